"""Reads a whole corpus and says what is wrong with it, all at once, so that a copy can be mended in one go."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_ra3.corpus.manifest import DataFile, Manifest, Shard
from megatron_ra3.corpus.shards import read_shard
from megatron_ra3.corpus.storage import LocalStorage
from megatron_ra3.corpus.tokenizer import FOLDER, tokenizer_fingerprint


def problems(folder: Path) -> Iterator[str]:
    """One line per damaged or missing file of the corpus, in the order of the manifest.

    Raises:
        FileNotFoundError, ValueError: there is no manifest, or it cannot be read.
    """
    manifest = Manifest.load(folder)
    if manifest.tokenizer_sha256 and tokenizer_fingerprint(folder / FOLDER) != manifest.tokenizer_sha256:
        yield f"{folder / FOLDER} is missing or has changed: it is not the tokenizer in the manifest"
    storage = LocalStorage(folder)
    for split in manifest.splits.values():
        for shard in split.shards:
            found = [*_changed(storage, shard.tar), *_changed(storage, shard.index)]
            yield from found
            if not found:
                yield from _inconsistent(folder, shard, has_tokens=manifest.token_form is not None)


def _changed(storage: LocalStorage, file: DataFile) -> Iterator[str]:
    try:
        storage.check(file, verify=True)
    except (OSError, ValueError) as error:
        yield str(error)


def _inconsistent(folder: Path, shard: Shard, *, has_tokens: bool) -> Iterator[str]:
    """What no checksum shows: a shard whose samples or index do not fit the manifest."""
    index = np.load(folder / shard.index.name)
    if index.shape != (shard.samples, 2):
        yield f"{folder / shard.index.name} has shape {index.shape}, the manifest says {shard.samples} samples"
    samples = unlike = 0
    try:
        for record in read_shard(folder / shard.tar.name):
            samples += 1
            unlike += (record.tokens is not None) != has_tokens
    except ValueError as error:
        yield str(error)
        return
    if samples != shard.samples:
        yield f"{folder / shard.tar.name} holds {samples} samples, the manifest says {shard.samples}"
    if unlike:
        held = "hold no token ids" if has_tokens else "hold token ids"
        yield f"{folder / shard.tar.name}: {unlike} samples {held}, against the manifest"
