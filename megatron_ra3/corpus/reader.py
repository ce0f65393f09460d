"""Random access to the samples of a corpus: an index makes any sample one seek away.

A resumed run never reads a shard from its beginning to find its place.
"""

import json
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_ra3.corpus.manifest import DataFile, SplitInfo
from megatron_ra3.corpus.snippets import SnippetRecord

_OPEN_SHARDS = 16


class SplitReader:
    """Random access to the samples of a split, in the order they were written."""

    def __init__(self, folder: Path, info: SplitInfo, *, verify_checksums: bool = False) -> None:
        """Checks that every file is there and has its size.

        Raises:
            FileNotFoundError, ValueError: a file is missing or changed; the message names it and the fix.
        """
        for shard in info.shards:
            for file in (shard.index, shard.tar):
                _check_file(folder / file.name, file, verify_checksums=verify_checksums)
        self._folder = folder
        self._shards = info.shards
        self._first_sample = np.cumsum([0, *(shard.samples for shard in info.shards)])
        self._index = np.concatenate(
            [np.zeros((0, 2), "<u8"), *(np.load(folder / shard.index.name) for shard in info.shards)]
        )
        self._open: OrderedDict[str, BinaryIO] = OrderedDict()

    def __len__(self) -> int:
        return len(self._index)

    def read(self, sample: int) -> SnippetRecord:
        """The sample of that number.

        Raises:
            ValueError: the bytes in the shard are not those that were written.
        """
        offset, num_bytes = map(int, self._index[sample])
        shard = self._shards[int(np.searchsorted(self._first_sample, sample, side="right")) - 1].tar.name
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


def _check_file(path: Path, expected: DataFile, *, verify_checksums: bool) -> None:
    fix = "restore it or run `ra3 prepare --overwrite` again"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing although the manifest lists it; {fix}")
    found_bytes = path.stat().st_size
    if found_bytes != expected.bytes:
        raise ValueError(f"{path} is torn: {found_bytes} bytes, the manifest says {expected.bytes}; {fix}")
    if verify_checksums and DataFile.of(path) != expected:
        raise ValueError(f"{path} has changed: its sha256 is not the one in the manifest; {fix}")
