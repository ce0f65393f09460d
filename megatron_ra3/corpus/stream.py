"""The one order in which training sees the corpus, and an exact place in it.

A cursor kept per rank goes wrong as soon as a job restarts on another number of ranks: samples are skipped or seen
twice. Here the order belongs to the corpus and the seed alone, the cursor counts the samples of all ranks together, and
a rank only chooses its share of the next step. Resuming is a seek.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ra3.corpus.manifest import Manifest
from megatron_ra3.corpus.reader import SplitReader
from megatron_ra3.corpus.snippets import SnippetRecord


@dataclass(frozen=True, slots=True)
class Cursor:
    """How many samples of the current epoch were delivered, over all ranks."""

    epoch: int = 0
    position: int = 0


class ShardStream:
    """An endless stream over one split of a corpus; every epoch delivers each sample once, in a new order."""

    def __init__(
        self, folder: str | Path, split: str, seed: int, *, cursor: Cursor | None = None, verify: bool = False
    ) -> None:
        """Opens a corpus folder and checks that all its files are there in full size.

        Args:
            folder: where `ra3 prepare` wrote the corpus.
            split: "train" or "heldout".
            seed: with the epoch, decides the order. At least 0.
            cursor: where to start; the beginning if not given.
            verify: also compare each file's sha256, which reads the whole split.

        Raises:
            FileNotFoundError, ValueError: the corpus is missing, empty or damaged; names the file and the fix.
        """
        if seed < 0:
            raise ValueError(f"seed must be at least 0, found {seed}")
        folder = Path(folder)
        splits = Manifest.load(folder).splits
        if split not in splits:
            raise ValueError(f"corpus {folder} has no split {split!r}; it has {', '.join(splits)}")
        info = splits[split]
        if not info.snippets:
            raise ValueError(f"split {split!r} of {folder} is empty; prepare more files or change --heldout-fraction")
        self._reader = SplitReader(folder, info, verify_checksums=verify)
        self._identity = {
            "split": split,
            "seed": seed,
            "shards_sha256": hashlib.sha256("".join(shard.tar.sha256 for shard in info.shards).encode()).hexdigest(),
        }
        self._order_of_epoch: dict[int, np.ndarray] = {}
        self._seed = seed
        self._cursor = Cursor()
        self._seek(cursor or Cursor())

    def __len__(self) -> int:
        """Samples in one epoch."""
        return len(self._reader)

    @property
    def cursor(self) -> Cursor:
        """The place of the next sample."""
        return self._cursor

    def take(self, num_samples: int, rank: int = 0, world_size: int = 1) -> list[SnippetRecord]:
        """Delivers a rank's share of the next `num_samples` samples of all ranks: every `world_size`-th of them.

        All ranks must ask for the same `num_samples`; each then advances by it, also where its own share is smaller.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), found rank={rank}, world_size={world_size}")
        if num_samples < 0:
            raise ValueError(f"num_samples must be at least 0, found {num_samples}")
        start = self._cursor.position
        share = [self._reader.read(self._sample_at(start + ahead)) for ahead in range(rank, num_samples, world_size)]
        epochs, position = divmod(start + num_samples, len(self))
        self._seek(Cursor(self._cursor.epoch + epochs, position))
        return share

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, and what identifies the stream it is a place in."""
        return self._identity | asdict(self._cursor)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved place.

        Raises:
            ValueError: the place belongs to another split, seed or corpus.
        """
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise ValueError(
                    f"saved stream state has {key}={state.get(key)!r}, this stream {value!r}: the order would differ; "
                    "resume with the corpus and the seed the run started with"
                )
        self._seek(Cursor(state["epoch"], state["position"]))

    def close(self) -> None:
        """Closes the open shards."""
        self._reader.close()

    def _seek(self, cursor: Cursor) -> None:
        if cursor.epoch < 0 or not 0 <= cursor.position < len(self):
            raise ValueError(f"{cursor} is not in an epoch of {len(self)} samples")
        self._cursor = cursor

    def _sample_at(self, position: int) -> int:
        """The sample at a position counted from the start of the current epoch, which later epochs continue."""
        epochs, position = divmod(position, len(self))
        return int(self._order(self._cursor.epoch + epochs)[position])

    def _order(self, epoch: int) -> np.ndarray:
        """A permutation of all samples: the ranks of random words, a stream numpy keeps the same in every release."""
        if epoch not in self._order_of_epoch:
            words = np.random.Philox(key=np.array([self._seed, epoch], dtype=np.uint64)).random_raw(len(self))
            self._order_of_epoch = {kept: order for kept, order in self._order_of_epoch.items() if kept == epoch - 1}
            self._order_of_epoch[epoch] = np.argsort(words, kind="stable")
        return self._order_of_epoch[epoch]
