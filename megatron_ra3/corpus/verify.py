"""Reads a whole corpus and says what is wrong with it, all at once, so that a copy can be mended in one go."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_ra3.corpus.manifest import DataFile, Manifest, Shard
from megatron_ra3.corpus.shards import read_shard
from megatron_ra3.corpus.tokenizer import FOLDER, tokenizer_fingerprint


def problems(folder: Path) -> Iterator[str]:
    """One line per damaged or missing file of the corpus, in the order of the manifest.

    Raises:
        FileNotFoundError, ValueError: there is no manifest, or it cannot be read.
    """
    manifest = Manifest.load(folder)
    if manifest.tokenizer_sha256 and tokenizer_fingerprint(folder / FOLDER) != manifest.tokenizer_sha256:
        yield f"{folder / FOLDER} is missing or has changed: it is not the tokenizer in the manifest"
    for split in manifest.splits.values():
        for shard in split.shards:
            found = [*_changed(folder, shard.tar), *_changed(folder, shard.index)]
            yield from found
            if not found:
                yield from _inconsistent(folder, shard)


def _changed(folder: Path, file: DataFile) -> Iterator[str]:
    path = folder / file.name
    if not path.is_file():
        yield f"{path} is missing"
    elif path.stat().st_size != file.bytes:
        yield f"{path} is torn: {path.stat().st_size} bytes, the manifest says {file.bytes}"
    elif DataFile.of(path) != file:
        yield f"{path} has changed: its sha256 is not the one in the manifest"


def _inconsistent(folder: Path, shard: Shard) -> Iterator[str]:
    """What no checksum shows: a shard whose samples or index do not fit the manifest."""
    index = np.load(folder / shard.index.name)
    if index.shape != (shard.samples, 2):
        yield f"{folder / shard.index.name} has shape {index.shape}, the manifest says {shard.samples} samples"
    try:
        samples = sum(1 for _ in read_shard(folder / shard.tar.name))
    except ValueError as error:
        yield str(error)
        return
    if samples != shard.samples:
        yield f"{folder / shard.tar.name} holds {samples} samples, the manifest says {shard.samples}"
