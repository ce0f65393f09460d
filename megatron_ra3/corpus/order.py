"""The order of an epoch as arithmetic: which sample stands at a position, without walking there.

A permutation of all samples would be the best shuffle and the worst to read, one distant sample after another. Here
the shards are permuted; groups of consecutive ones are cut into chunks of neighbouring samples and the chunks permuted;
windows of consecutive chunks are then permuted sample by sample. So a window touches the shards of one group, each of
its chunks is read at once, and only the window around a position has to be built.

All depends on (seed, epoch) and the three sizes alone: a resumed run meets the same order on any number of ranks.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from megatron_ra3.config import StreamConfig

_SHARDS, _CHUNKS, _SAMPLES = range(3)
_KEPT_WINDOWS = 4


class EpochOrder:
    """One epoch's permutation of the samples of a split, which are numbered in the order they were written."""

    def __init__(self, shard_samples: Sequence[int], seed: int, epoch: int, config: StreamConfig) -> None:
        """Draws the order of the shards; everything finer is drawn when it is asked for.

        Args:
            shard_samples: samples of every shard.
            seed: of the run, at least 0.
            epoch: from 0.
            config: its `shuffle_shards`, `chunk_samples` and `window_samples` shape the order.
        """
        self._key = np.array([seed, epoch], dtype=np.uint64)
        self._config = config
        self._first_sample = np.cumsum([0, *shard_samples])
        self.shards = self._permutation(len(shard_samples), _SHARDS)
        """Shard numbers in the order of their groups."""
        ends = np.cumsum(np.diff(self._first_sample)[self.shards])
        self._group_start = np.concatenate([[0], ends[:-1]])[:: config.shuffle_shards]
        self._group: tuple[int, np.ndarray, np.ndarray] | None = None
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return int(self._first_sample[-1])

    def samples(self, start: int, stop: int) -> np.ndarray:
        """The samples at positions `start` to `stop`, int64 [stop - start]."""
        parts = [np.zeros(0, dtype=np.int64)]
        while start < stop:
            window_start, window = self._window_at(start)
            parts.append(window[start - window_start : stop - window_start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def shards_wanted(self, position: int) -> tuple[int, int]:
        """Which of `shards`, from a first one to before a last one, to have at hand at a position.

        Those of the position's group, and as large a part of the next group as this one is done. The numbers go on
        into the next epoch.
        """
        group, per_group = self._group_at(position), self._config.shuffle_shards
        start = self._group_start[group]
        end = self._group_start[group + 1] if group + 1 < len(self._group_start) else len(self)
        first = group * per_group
        last = min(first + per_group, len(self.shards))
        return first, last + int((position - start) * (last - first) // (end - start))

    def _group_at(self, position: int) -> int:
        if not 0 <= position < len(self):
            raise ValueError(f"position {position} is not in an epoch of {len(self)} samples")
        return int(np.searchsorted(self._group_start, position, side="right")) - 1

    def _window_at(self, position: int) -> tuple[int, np.ndarray]:
        """The position where the window around `position` begins, and its samples."""
        group = self._group_at(position)
        first, size = self._chunks(group)
        per_window = max(1, self._config.window_samples // self._config.chunk_samples)
        starts = self._group_start[group] + (np.cumsum(size) - size)[::per_window]
        number = int(np.searchsorted(starts, position, side="right")) - 1
        if (group, number) not in self._windows:
            part = slice(number * per_window, (number + 1) * per_window)
            window = _ranges(first[part], size[part])
            self._windows[group, number] = window[self._permutation(len(window), _SAMPLES, group, number)]
            if len(self._windows) > _KEPT_WINDOWS:
                self._windows.popitem(last=False)
        return int(starts[number]), self._windows[group, number]

    def _chunks(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """First sample and number of samples of the chunks of a group, in their order."""
        if self._group is None or self._group[0] != group:
            per_group, per_chunk = self._config.shuffle_shards, self._config.chunk_samples
            shards = self.shards[group * per_group : (group + 1) * per_group]
            begin, end = self._first_sample[shards], self._first_sample[shards + 1]
            counts = -(-(end - begin) // per_chunk)
            first = np.repeat(begin, counts) + per_chunk * _ranges(np.zeros_like(counts), counts)
            size = np.minimum(first + per_chunk, np.repeat(end, counts)) - first
            shuffled = self._permutation(len(first), _CHUNKS, group)
            self._group = group, first[shuffled], size[shuffled]
        return self._group[1], self._group[2]

    def _permutation(self, size: int, level: int, group: int = 0, window: int = 0) -> np.ndarray:
        """The ranks of random words at a counter of their own, a stream numpy keeps the same in every release."""
        counter = np.array([0, level, group, window], dtype=np.uint64)
        words = np.random.Philox(key=self._key, counter=counter).random_raw(size)
        return np.argsort(words, kind="stable")


def _ranges(first: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The numbers first[0], first[0] + 1, ... of every range, one range after the other."""
    return np.repeat(first - (np.cumsum(size) - size), size) + np.arange(size.sum())
