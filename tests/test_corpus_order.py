"""The order of an epoch: a permutation for any sizes, local enough to read, found without walking, and pinned."""

import itertools

import numpy as np
import pytest

from megatron_ra3.config import StreamConfig
from megatron_ra3.corpus.order import EpochOrder

SMALL = StreamConfig(shuffle_shards=2, chunk_samples=3, window_samples=7)
SHARDS = [7, 1, 13, 5, 2]
PINNED = [7, 26, 27, 10, 5, 8, 3, 9, 4, 1, 2, 0, 6, 16, 14, 20, 15, 11, 17, 18, 12, 13, 19, 25, 24, 21, 22, 23]
PINNED_LARGE = [31843, 28261, 15023, 28402]
CASES = [
    (shards, StreamConfig(shuffle_shards=group, chunk_samples=chunk, window_samples=window))
    for shards, (group, chunk, window) in itertools.product(
        ([1], [3, 3], SHARDS, [64] * 4 + [17]), ((1, 1, 1), (2, 3, 7), (3, 4, 2), (16, 64, 8192))
    )
]


def sample_at(order, place):
    return int(order.samples(place, place + 1)[0])


@pytest.mark.parametrize(("shards", "config"), CASES)
def test_every_epoch_is_a_permutation_and_any_slice_of_it_is_the_same(shards, config):
    epochs = [EpochOrder(shards, 3, epoch, config).samples(0, sum(shards)).tolist() for epoch in range(3)]
    for epoch, whole in enumerate(epochs):
        assert sorted(whole) == list(range(sum(shards)))
        assert [sample_at(EpochOrder(shards, 3, epoch, config), place) for place in range(len(whole))] == whole
        assert (
            EpochOrder(shards, 3, epoch, config).samples(len(whole) // 3, len(whole)).tolist()
            == (whole[len(whole) // 3 :])
        )
    if sum(shards) > 20:
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_is_the_same_in_every_release():
    """Resuming an old run depends on it: it may change only together with the format version of checkpoints."""
    assert EpochOrder(SHARDS, 5, 1, SMALL).samples(0, 28).tolist() == PINNED
    assert EpochOrder([1000] * 40, 7, 2, StreamConfig()).samples(31_000, 31_004).tolist() == PINNED_LARGE


def test_windows_touch_the_shards_of_their_group_and_each_chunk_once():
    config = StreamConfig(shuffle_shards=4, chunk_samples=16, window_samples=256)
    shards = [500 + 16 * number for number in range(11)]
    shard_of = np.repeat(np.arange(len(shards)), shards)
    chunk_of = np.concatenate([1000 * number + np.arange(size) // 16 for number, size in enumerate(shards)])
    order = EpochOrder(shards, 0, 0, config)
    start, seen = 0, set()
    for first in range(0, len(shards), 4):
        group = order.shards[first : first + 4]
        stop = start + sum(shards[shard] for shard in group)
        assert set(shard_of[order.samples(start, stop)]) == set(group)
        while start < stop:
            end, chunks = start, set()
            while end < stop and len(chunks | {chunk_of[sample_at(order, end)]}) <= 16:  # a window's worth of chunks
                chunks.add(chunk_of[sample_at(order, end)])
                end += 1
            assert end - start > 200 or end == stop
            assert not chunks & seen
            assert len({shard_of[sample_at(order, place)] for place in range(start, end)}) > 1
            seen |= chunks
            start = end
    assert len(seen) == sum(-(-size // 16) for size in shards)


def test_neighbours_are_torn_apart():
    order = EpochOrder([1000] * 32, 0, 0, StreamConfig()).samples(0, 32_000)
    assert np.mean(np.abs(np.diff(order)) == 1) < 0.001
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.3  # a group is half of this corpus


@pytest.mark.parametrize("place", [0.01, 0.99])
def test_a_position_builds_one_window_only(place, monkeypatch):
    order = EpochOrder([10_000] * 2000, 1, 0, StreamConfig())
    drawn = []
    permutation = EpochOrder._permutation

    def counting(self, size, *where):
        drawn.append(size)
        return permutation(self, size, *where)

    monkeypatch.setattr(EpochOrder, "_permutation", counting)
    sample_at(order, int(len(order) * place))
    assert len(drawn) == 2
    assert sum(drawn) <= 16 * 157 + 8192  # the chunks of one group, the samples of one window


def test_shards_wanted_run_ahead_of_the_position():
    order = EpochOrder([10] * 5, 0, 0, StreamConfig(shuffle_shards=2, chunk_samples=2, window_samples=4))
    assert [order.shards_wanted(place) for place in (0, 9, 10, 19, 20, 30, 39)] == [
        (0, 2), (0, 2), (0, 3), (0, 3), (2, 4), (2, 5), (2, 5),
    ]  # fmt: skip
    assert [order.shards_wanted(place) for place in (40, 49)] == [(4, 5), (4, 5)]


@pytest.mark.parametrize("position", [-1, 28])
def test_positions_outside_the_epoch(position):
    with pytest.raises(ValueError, match=f"position {position} is not in an epoch of 28"):
        sample_at(EpochOrder(SHARDS, 0, 0, SMALL), position)
