"""One shard of a corpus on disk: a webdataset tar and its index. Equal samples in equal order give equal bytes."""

import json
import tarfile
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np

from megatron_ra3.corpus.manifest import DataFile, Shard
from megatron_ra3.corpus.snippets import SnippetRecord


def shard_name(split: str, number: int) -> str:
    """File name of a shard, without suffix."""
    return f"{split}-{number:05d}"


def write_shard(path: Path, samples: Iterable[tuple[str, bytes]]) -> Shard:
    """Writes (id, encoded snippet) pairs into the tar `path` and the index beside it."""
    from webdataset import TarWriter

    index = array("Q")
    with path.open("wb") as file:
        tar = TarWriter(file, user="ra3", group="ra3", mode=0o444, mtime=0)
        for snippet_id, data in samples:
            index.extend((tar.tarstream.offset, len(data)))
            tar.write({"__key__": snippet_id, "json": data})
        tar.close()
    np.save(path.with_suffix(".npy"), np.array(index, dtype="<u8").reshape(-1, 2))
    return Shard(len(index) // 2, DataFile.of(path), DataFile.of(path.with_suffix(".npy")))


def write_split(
    folder: Path, split: str, samples: Iterator[tuple[str, bytes]], samples_per_shard: int
) -> tuple[Shard, ...]:
    """Writes (id, encoded snippet) pairs into as many shards as they need."""
    shards: list[Shard] = []
    for first in samples:
        path = folder / f"{shard_name(split, len(shards))}.tar"
        shards.append(write_shard(path, chain([first], islice(samples, samples_per_shard - 1))))
    return tuple(shards)


def read_shard(path: Path) -> Iterator[SnippetRecord]:
    """The samples of a shard, from its beginning.

    Raises:
        ValueError: a sample or the tar is damaged; names the file and what is wrong with it.
    """
    try:
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                file = tar.extractfile(member)
                record = SnippetRecord.from_json(json.loads(file.read() if file else b""))
                if member.name != f"{record.id}.json":
                    raise ValueError(f"member {member.name!r} holds snippet {record.id!r}")
                yield record
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it or run `ra3 prepare --overwrite` again") from error
