"""The corpus on disk: webdataset tar shards, one index per split, and a manifest that vouches for them.

The manifest is written last, so a folder with a manifest holds a whole corpus. The index (one array that can be memory
mapped) makes any sample one seek away, so a resumed run never reads a shard from its beginning to find its place.
"""

import hashlib
import json
import os
import tarfile
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_ra3.corpus.lines import annotate
from megatron_ra3.corpus.snippets import SnippetRecord, num_chars

FORMAT_VERSION = 1
SPLITS = ("train", "heldout")
_MANIFEST = "manifest.json"
_OPEN_SHARDS = 16


@dataclass(frozen=True)
class DataFile:
    """A file of the corpus, as it was when it was written."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class SplitInfo:
    """Counts and files of one split. `native_comments` are lines whose comment can serve as an observed rationale."""

    files: int
    snippets: int
    lines: int
    native_comments: int
    chars: int
    index: DataFile
    shards: tuple[DataFile, ...]


@dataclass(frozen=True)
class Manifest:
    """What a corpus holds, from what it was made, and what was left out and why."""

    format_version: int
    settings: dict[str, Any]
    files_seen: int
    files_dropped: dict[str, int]
    cut_dropped: dict[str, int]
    tokenizer_sha256: str | None
    splits: dict[str, SplitInfo]

    def save(self, folder: Path) -> None:
        """Writes `manifest.json` atomically."""
        partial = folder / f"{_MANIFEST}.partial"
        with partial.open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / _MANIFEST)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Reads the manifest of a corpus folder.

        Raises:
            FileNotFoundError: there is none. ValueError: it is damaged or of another format version.
        """
        path = folder / _MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: no finished corpus there; run `ra3 prepare --out {folder}`")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            version = data["format_version"]
            if version == FORMAT_VERSION:
                splits = {name: _split_from_json(split) for name, split in data.pop("splits").items()}
                return cls(**data, splits=splits)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); run `ra3 prepare --overwrite` again") from error
        raise ValueError(
            f"{path} has format version {version!r}, this release reads {FORMAT_VERSION}; "
            "run `ra3 prepare --overwrite` again"
        )


def refuse_existing(folder: Path) -> None:
    """FileExistsError if `folder` holds a finished corpus."""
    if (folder / _MANIFEST).exists():
        raise FileExistsError(f"{folder} already holds a corpus; choose another --out or pass --overwrite")


def publish(staging: Path, folder: Path, manifest: Manifest) -> None:
    """Moves the finished files in `staging` to `folder`, in place of the corpus there; foreign files stay."""
    (folder / _MANIFEST).unlink(missing_ok=True)
    for split in SPLITS:
        for old in [*folder.glob(f"{split}-*.tar"), *folder.glob(f"{split}.index.npy")]:
            old.unlink()
    for new in sorted(path for path in staging.rglob("*") if path.is_file()):
        target = folder / new.relative_to(staging)
        target.parent.mkdir(exist_ok=True)
        new.replace(target)
    manifest.save(folder)


class SplitWriter:
    """Writes one split as numbered webdataset shards. Equal samples in equal order give equal bytes."""

    def __init__(self, folder: Path, split: str, samples_per_shard: int) -> None:
        self._folder = folder
        self._split = split
        self._samples_per_shard = samples_per_shard
        self._index = array("Q")  # offset of the member's header and size of its data, in bytes, per sample
        self._shards: list[DataFile] = []
        self._samples_in_shard = 0
        self._file: BinaryIO | None = None
        self._tar: Any = None
        self._files = self._snippets = self._lines = self._native_comments = self._chars = 0

    def add_file(self, records: Sequence[SnippetRecord]) -> None:
        """Appends the snippets of one source file."""
        self._files += 1
        for record in records:
            self._write(record)
            self._snippets += 1
            self._lines += len(record.lines)
            self._native_comments += sum(annotate(line, "observe")[0] is not None for line in record.lines)
            self._chars += sum(map(num_chars, record.lines))

    def close(self) -> SplitInfo:
        """Finishes the last shard and writes the index."""
        self._close_shard()
        path = self._folder / f"{self._split}.index.npy"
        np.save(path, np.array(self._index, dtype="<u8").reshape(-1, 2))
        return SplitInfo(
            files=self._files,
            snippets=self._snippets,
            lines=self._lines,
            native_comments=self._native_comments,
            chars=self._chars,
            index=_describe(path, self._snippets),
            shards=tuple(self._shards),
        )

    def _write(self, record: SnippetRecord) -> None:
        if self._tar is None:
            self._open_shard()
        data = json.dumps(record.to_json(), ensure_ascii=False, separators=(",", ":")).encode()
        self._index.extend((self._tar.tarstream.offset, len(data)))
        self._tar.write({"__key__": record.id, "json": data})
        self._samples_in_shard += 1
        if self._samples_in_shard == self._samples_per_shard:
            self._close_shard()

    def _open_shard(self) -> None:
        from webdataset import TarWriter

        self._file = (self._folder / f"{self._split}-{len(self._shards):05d}.tar").open("wb")
        self._tar = TarWriter(self._file, user="ra3", group="ra3", mode=0o444, mtime=0)

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._tar.close()
        self._file.close()
        self._shards.append(_describe(Path(self._file.name), self._samples_in_shard))
        self._file = self._tar = None
        self._samples_in_shard = 0


class SplitReader:
    """Random access to the samples of a split, in the order they were written."""

    def __init__(self, folder: Path, info: SplitInfo, *, verify_checksums: bool = False) -> None:
        """Checks that every file is there and has its size.

        Raises:
            FileNotFoundError, ValueError: a file is missing or changed; the message names it and the fix.
        """
        for file in (info.index, *info.shards):
            _check_file(folder / file.name, file, verify_checksums=verify_checksums)
        self._folder = folder
        self._shards = info.shards
        self._first_sample = np.cumsum([0, *(shard.samples for shard in info.shards)])
        self._index = np.load(folder / info.index.name, mmap_mode="r")
        self._open: OrderedDict[str, BinaryIO] = OrderedDict()

    def __len__(self) -> int:
        return len(self._index)

    def read(self, sample: int) -> SnippetRecord:
        """The sample of that number.

        Raises:
            ValueError: the bytes in the shard are not those that were written.
        """
        offset, num_bytes = map(int, self._index[sample])
        shard = self._shards[int(np.searchsorted(self._first_sample, sample, side="right")) - 1].name
        file = self._open_shard(shard)
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE + num_bytes)
        try:
            header = tarfile.TarInfo.frombuf(block[: tarfile.BLOCKSIZE], "utf-8", "strict")
            record = SnippetRecord.from_json(json.loads(block[tarfile.BLOCKSIZE :]))
            if (header.name, header.size) != (f"{record.id}.json", num_bytes):
                raise ValueError(f"header of {header.name!r} with {header.size} bytes")
        except (ValueError, tarfile.TarError) as error:
            raise ValueError(
                f"{self._folder / shard}: sample {sample} at byte {offset} is torn ({error}); "
                "restore the shard or run `ra3 prepare --overwrite` again"
            ) from error
        return record

    def close(self) -> None:
        """Closes the open shards."""
        while self._open:
            self._open.popitem()[1].close()

    def _open_shard(self, name: str) -> BinaryIO:
        if name not in self._open:
            self._open[name] = (self._folder / name).open("rb")
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(name)
        return self._open[name]


def _describe(path: Path, samples: int) -> DataFile:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return DataFile(path.name, path.stat().st_size, sha256, samples)


def _check_file(path: Path, expected: DataFile, *, verify_checksums: bool) -> None:
    fix = "restore it or run `ra3 prepare --overwrite` again"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing although the manifest lists it; {fix}")
    found_bytes = path.stat().st_size
    if found_bytes != expected.bytes:
        raise ValueError(f"{path} is torn: {found_bytes} bytes, the manifest says {expected.bytes}; {fix}")
    if verify_checksums and _describe(path, expected.samples).sha256 != expected.sha256:
        raise ValueError(f"{path} has changed: its sha256 is not the one in the manifest; {fix}")


def _split_from_json(data: dict[str, Any]) -> SplitInfo:
    index = DataFile(**data.pop("index"))
    shards = tuple(DataFile(**shard) for shard in data.pop("shards"))
    return SplitInfo(**data, index=index, shards=shards)
