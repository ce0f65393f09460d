"""What a corpus folder holds: the manifest, written last, which vouches for every other file.

A folder with a manifest holds a whole corpus. Counts of what was left out stand beside the counts of what was kept: a
corpus that silently lost half its files trains just as smoothly as a whole one.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ra3 import durable
from megatron_ra3.corpus.lines import CommentMode
from megatron_ra3.latents import Surface

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class DataFile:
    """A file of the corpus, as it was when it was written."""

    name: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "DataFile":
        """Describe a file on disk; reads it whole."""
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(path.name, path.stat().st_size, sha256)


@dataclass(frozen=True)
class Shard:
    """A webdataset tar of `samples` snippets and its index, an array [samples, 2] of uint64 in npy format.

    A row holds the offset in bytes of a sample's tar header and the size in bytes of its data.
    """

    samples: int
    tar: DataFile
    index: DataFile


@dataclass(frozen=True)
class TokenForm:
    """All that decides the token ids of a line: the tokenizer, and `latents.surface` and `latents.comments`."""

    tokenizer_sha256: str
    surface: Surface
    comments: CommentMode


@dataclass(frozen=True)
class SplitInfo:
    """Counts and shards of one split.

    `native_comments` are lines whose comment can serve as an observed rationale; `tokens` is None where the corpus was
    prepared without a tokenizer.
    """

    files: int
    repos: int
    snippets: int
    lines: int
    native_comments: int
    chars: int
    tokens: int | None
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """What a corpus holds, from what it was made, and what was left out and why.

    `files_dropped` counts files, `cut_dropped` lines and snippets of files that were kept, `scrubbed` replaced texts;
    `licences` and `languages` count the files of all splits. `token_form` says how the token ids that every sample
    holds beside its text were made; None: samples hold text alone.
    """

    format_version: int
    settings: dict[str, Any]
    files_seen: int
    bytes_seen: int
    files_dropped: dict[str, int]
    cut_dropped: dict[str, int]
    scrubbed: dict[str, int]
    licences: dict[str, int]
    languages: dict[str, int]
    tokenizer_sha256: str | None
    splits: dict[str, SplitInfo]
    token_form: TokenForm | None = None

    def save(self, folder: Path) -> None:
        """Writes `manifest.json` atomically."""
        durable.write(folder / MANIFEST, (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Reads the manifest of a corpus folder.

        Raises:
            FileNotFoundError: there is none. ValueError: it is damaged or of another format version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: no finished corpus there; run `ra3 prepare --out {folder}`")
        return cls.parse(path.read_bytes(), str(path))

    @classmethod
    def parse(cls, content: bytes, name: str) -> "Manifest":
        """Reads the content of a manifest that lies at `name`.

        Raises:
            ValueError: it is damaged or of another format version.
        """
        try:
            data = json.loads(content)
            version = data["format_version"]
            if version == FORMAT_VERSION:
                splits = {split: _split_from_json(info) for split, info in data.pop("splits").items()}
                form = data.pop("token_form", None)
                return cls(**data, splits=splits, token_form=TokenForm(**form) if form else None)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{name} is damaged ({error!r}); run `ra3 prepare --overwrite` again") from error
        raise ValueError(
            f"{name} has format version {version!r}, this release reads {FORMAT_VERSION}; "
            "run `ra3 prepare --overwrite` again"
        )


def _split_from_json(data: dict[str, Any]) -> SplitInfo:
    shards = tuple(
        Shard(shard["samples"], DataFile(**shard["tar"]), DataFile(**shard["index"])) for shard in data.pop("shards")
    )
    return SplitInfo(**data, shards=shards)
