"""Writes the corpus to disk: webdataset tar shards, each with its index, published at once when all are complete."""

import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_ra3.corpus.lines import annotate
from megatron_ra3.corpus.manifest import MANIFEST, SPLITS, DataFile, Manifest, Shard, SplitInfo
from megatron_ra3.corpus.snippets import SnippetRecord, num_chars


def refuse_existing(folder: Path) -> None:
    """FileExistsError if `folder` holds a finished corpus."""
    if (folder / MANIFEST).exists():
        raise FileExistsError(f"{folder} already holds a corpus; choose another --out or pass --overwrite")


def publish(staging: Path, folder: Path, manifest: Manifest) -> None:
    """Moves the finished files in `staging` to `folder`, in place of the corpus there; foreign files stay."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for split in SPLITS:
        for old in [*folder.glob(f"{split}-*.tar"), *folder.glob(f"{split}-*.npy")]:
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
        self._index = array("Q")  # of the shard being written, see Shard
        self._shards: list[Shard] = []
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
        """Finishes the last shard."""
        self._close_shard()
        return SplitInfo(
            files=self._files,
            snippets=self._snippets,
            lines=self._lines,
            native_comments=self._native_comments,
            chars=self._chars,
            shards=tuple(self._shards),
        )

    def _write(self, record: SnippetRecord) -> None:
        if self._tar is None:
            self._open_shard()
        data = json.dumps(record.to_json(), ensure_ascii=False, separators=(",", ":")).encode()
        self._index.extend((self._tar.tarstream.offset, len(data)))
        self._tar.write({"__key__": record.id, "json": data})
        if len(self._index) == 2 * self._samples_per_shard:
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
        path = Path(self._file.name)
        index = np.array(self._index, dtype="<u8").reshape(-1, 2)
        np.save(path.with_suffix(".npy"), index)
        self._shards.append(Shard(len(index), DataFile.of(path), DataFile.of(path.with_suffix(".npy"))))
        self._file = self._tar = None
        self._index = array("Q")
