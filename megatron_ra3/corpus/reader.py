"""Random access to the samples of a corpus: an index makes any sample one seek away.

A resumed run never reads a shard from its beginning to find its place. Neighbouring samples are read together, in
chunks, since a storage answers few large requests sooner than many small ones.
"""

import hashlib
import io
import json
import tarfile
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ra3.config import StreamConfig
from megatron_ra3.corpus.manifest import MANIFEST, DataFile, Manifest, SplitInfo
from megatron_ra3.corpus.snippets import SnippetRecord
from megatron_ra3.corpus.storage import Storage, open_storage
from megatron_ra3.stall import ACTIVITY

_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 136), slice(148, 156)  # fields of a ustar header
_FIX = "restore the shard or run `ra3 prepare --overwrite` again"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Neighbouring samples of one shard, as bytes.

    Attributes:
        place: path or URL of the shard.
        first_sample: number of the first sample.
        index: per sample the offset of its header in the shard and the size of its data, in bytes.
        data: the shard's bytes from the first header on; too few if the shard is torn.
    """

    place: str
    first_sample: int
    index: list[list[int]]
    data: bytes

    def record(self, sample: int) -> SnippetRecord:
        """Decodes a sample of this chunk.

        Raises:
            ValueError: the bytes in the shard are not those that were written.
        """
        offset, num_bytes = self.index[sample - self.first_sample]
        start = offset - self.index[0][0] + tarfile.BLOCKSIZE
        header, data = self.data[start - tarfile.BLOCKSIZE : start], self.data[start : start + num_bytes]
        try:
            name = _check_header(header, num_bytes)
            record = SnippetRecord.from_json(json.loads(data))
            if name != f"{record.id}.json":
                raise ValueError(f"header of {name!r}, data of {record.id!r}")
        except ValueError as error:
            raise ValueError(f"{self.place}: sample {sample} at byte {offset} is torn ({error}); {_FIX}") from error
        return record


class SplitReader:
    """Random access to the samples of a split, in the order they were written; from any thread."""

    def __init__(
        self,
        folder: str | Path,
        info: SplitInfo,
        *,
        verify_checksums: bool = False,
        config: StreamConfig | None = None,
    ) -> None:
        """Checks that every file is there and has its size, as far as the storage can tell cheaply.

        Args:
            folder: as `corpus.folder`.
            info: the split in the manifest.
            verify_checksums: compare each file's sha256 if the folder is local, else its size.
            config: how to read; with a `max_bad_samples` above 0, damage is not raised but kept in `damage`.

        Raises:
            OSError, ValueError: a file is missing or changed; the message names it and the fix.
        """
        self._config = config or StreamConfig()
        self._storage = open_storage(folder, self._config)
        self._shards = info.shards
        self._first_sample = np.cumsum([0, *(shard.samples for shard in info.shards)])
        chunks = [-(-shard.samples // self._config.chunk_samples) for shard in info.shards]
        self._first_chunk = np.cumsum([0, *chunks])
        self._indexes: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self._loading = [threading.Lock() for _ in info.shards]
        self.damage = _damage(self._storage, info, verify_checksums, self._config.read_threads)
        """What is wrong with the files, as far as it showed at the start."""
        if self.damage and not self._config.max_bad_samples:
            self._storage.close()
            raise self.damage[0]

    def __len__(self) -> int:
        return int(self._first_sample[-1])

    def read(self, sample: int) -> SnippetRecord:
        """The sample of that number.

        Raises:
            ValueError: the bytes in the shard are not those that were written. OSError: they are out of reach.
        """
        shard = int(np.searchsorted(self._first_sample, sample, side="right")) - 1
        return self._read(shard, sample, sample + 1).record(sample)

    def chunks_of(self, samples: np.ndarray) -> np.ndarray:
        """The numbers of the chunks that hold `samples`."""
        shard = np.searchsorted(self._first_sample, samples, side="right") - 1
        return self._first_chunk[shard] + (samples - self._first_sample[shard]) // self._config.chunk_samples

    def read_chunk(self, chunk: int) -> Chunk:
        """Reads a chunk with one request.

        Raises:
            ValueError: the shard's index has changed. OSError: the shard or its index is out of reach.
        """
        shard = self._shard_of(chunk)
        first = int(self._first_sample[shard]) + (chunk - int(self._first_chunk[shard])) * self._config.chunk_samples
        return self._read(shard, first, min(first + self._config.chunk_samples, int(self._first_sample[shard + 1])))

    def place_of(self, chunk: int) -> str:
        """Path or URL of the shard that a chunk lies in."""
        return self._storage.place(self._shards[self._shard_of(chunk)].tar.name)

    def warm(self, shard: int) -> None:
        """Says that reads of a shard will come."""
        self._storage.warm(self._shards[shard].tar)

    def close(self) -> None:
        """Closes the storage."""
        self._storage.close()

    def _shard_of(self, chunk: int) -> int:
        return int(np.searchsorted(self._first_chunk, chunk, side="right")) - 1

    def _read(self, shard: int, start: int, stop: int) -> Chunk:
        """Reads samples `start` to `stop` of a shard."""
        tar, first = self._shards[shard].tar, int(self._first_sample[shard])
        index = self._index(shard)[start - first : stop - first].tolist()
        num_bytes = index[-1][0] + tarfile.BLOCKSIZE + index[-1][1] - index[0][0]
        return Chunk(self._storage.place(tar.name), start, index, self._storage.read(tar, index[0][0], num_bytes))

    def _index(self, shard: int) -> np.ndarray:
        """The index of a shard, uint64 [samples, 2]; those last used stay in memory, each is fetched by one thread."""
        with self._loading[shard]:
            with self._lock:
                if shard in self._indexes:
                    self._indexes.move_to_end(shard)
                    return self._indexes[shard]
            index = self._load_index(self._shards[shard].index)
            with self._lock:
                self._indexes[shard] = index
                if len(self._indexes) > 2 * self._config.shuffle_shards:
                    self._indexes.popitem(last=False)
            return index

    def _load_index(self, file: DataFile) -> np.ndarray:
        content = self._storage.fetch(file.name)
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise ValueError(f"{self._storage.place(file.name)} has changed: its sha256 is not the manifest's; {_FIX}")
        return np.load(io.BytesIO(content))


def load_manifest(folder: str | Path, config: StreamConfig) -> tuple[Manifest, str]:
    """The manifest of a corpus in any storage, and the sha256 of its file.

    Raises:
        OSError: there is none, or it is out of reach. ValueError: it is damaged or of another format version.
    """
    storage = open_storage(folder, config)
    try:
        content = storage.fetch(MANIFEST)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{storage.place(MANIFEST)} is missing: no finished corpus there; run `ra3 prepare --out FOLDER`"
        ) from error
    finally:
        storage.close()
    return Manifest.parse(content, storage.place(MANIFEST)), hashlib.sha256(content).hexdigest()


def _damage(storage: Storage, info: SplitInfo, verify: bool, threads: int) -> list[OSError | ValueError]:
    """What is wrong with the files of a split, in their order."""

    def check(file: DataFile) -> OSError | ValueError | None:
        try:
            storage.check(file, verify=verify)
        except (OSError, ValueError) as error:
            return error
        finally:
            ACTIVITY.moved()
        return None

    files = [file for shard in info.shards for file in (shard.index, shard.tar)]
    with ThreadPoolExecutor(threads) as pool:
        return [error for error in pool.map(check, files) if error is not None]


def _check_header(header: bytes, num_bytes: int) -> str:
    """The name in a tar header; ValueError: the header is damaged or of other data.

    What `tarfile.TarInfo.frombuf` checks, without the object it builds.
    """
    try:
        size, checksum = int(header[_SIZE].strip(b" \0"), 8), int(header[_CHECKSUM].strip(b" \0"), 8)
    except ValueError:
        raise ValueError("no tar header") from None
    if checksum != sum(header) - sum(header[_CHECKSUM]) + 8 * ord(" "):
        raise ValueError("wrong checksum of the tar header")
    if size != num_bytes:
        raise ValueError(f"header of {size} bytes of data")
    return header[_NAME].rstrip(b"\0").decode()
