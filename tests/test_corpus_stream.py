"""The stream: every sample once per epoch for any number of ranks, exact resume, clear errors for a damaged corpus."""

import dataclasses
import json

import numpy as np
import pytest

from megatron_ra3.config import StreamConfig
from megatron_ra3.corpus.manifest import Manifest
from megatron_ra3.corpus.order import EpochOrder
from megatron_ra3.corpus.reader import SplitReader
from megatron_ra3.corpus.stream import Cursor, ShardStream
from tests.corpora import make_corpus

SMALL = StreamConfig(shuffle_shards=2, chunk_samples=2, window_samples=6, prefetch_samples=4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder)
    return folder / "out"


@pytest.fixture
def own_corpus(tmp_path):
    """A corpus a test may damage."""
    make_corpus(tmp_path)
    return tmp_path / "out"


def names(records):
    return [record.source for record in records]


def take_on_all_ranks(streams, num_samples):
    """The step's samples in global order, from the shares of all ranks."""
    shares = [names(stream.take(num_samples, rank, len(streams))) for rank, stream in enumerate(streams)]
    order = [None] * num_samples
    for rank, share in enumerate(shares):
        order[rank :: len(streams)] = share
    assert len({stream.cursor for stream in streams}) == 1
    return order


def test_the_order_is_that_of_the_epoch(corpus):
    """Which test_corpus_order.py pins."""
    info = Manifest.load(corpus).splits["train"]
    reader = SplitReader(corpus, info)
    order = EpochOrder([shard.samples for shard in info.shards], 5, 0, SMALL)
    expected = [reader.read(sample).source for sample in order.samples(0, 23)]
    assert names(ShardStream(corpus, "train", seed=5, config=SMALL).take(23)) == expected


def test_each_epoch_is_another_permutation(corpus):
    stream = ShardStream(corpus, "train", seed=1)
    epochs = [names(stream.take(23)) for _ in range(3)]
    assert all(sorted(epoch) == [f"m{number:02d}.py" for number in range(23)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert names(ShardStream(corpus, "train", seed=2).take(23)) != epochs[0]
    assert stream.cursor == Cursor(epoch=3, position=0)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_global_order_exactly_once(corpus, world_size):
    expected = names(ShardStream(corpus, "train", seed=7).take(70))
    streams = [ShardStream(corpus, "train", seed=7) for _ in range(world_size)]
    assert [name for _ in range(10) for name in take_on_all_ranks(streams, 7)] == expected


def test_the_number_of_ranks_may_change_in_the_middle_of_an_epoch(corpus):
    expected = names(ShardStream(corpus, "train", seed=7).take(60))
    delivered, cursor = [], Cursor()
    for world_size, num_samples in [(1, 5), (3, 10), (2, 12), (5, 3), (1, 30)]:
        streams = [ShardStream(corpus, "train", seed=7, cursor=cursor) for _ in range(world_size)]
        delivered += take_on_all_ranks(streams, num_samples)
        cursor = streams[0].cursor
    assert delivered == expected
    assert cursor == Cursor(epoch=2, position=14)


def test_resume_continues_the_uninterrupted_order(corpus):
    stream = ShardStream(corpus, "train", seed=3)
    stream.take(31)
    state = json.loads(json.dumps(stream.state_dict()))
    assert (state["epoch"], state["position"]) == (1, 8)
    resumed = ShardStream(corpus, "train", seed=3)
    resumed.load_state_dict(state)
    assert resumed.take(40) == stream.take(40)


def test_one_step_may_be_longer_than_an_epoch(corpus):
    long, short = ShardStream(corpus, "train", seed=3), ShardStream(corpus, "train", seed=3)
    assert long.take(60, 1, 2) == [record for _ in range(6) for record in short.take(10, 1, 2)]
    assert long.cursor == short.cursor


@pytest.mark.parametrize(
    ("key", "other"), [("seed", 4), ("split", "heldout"), ("shards_sha256", "0"), ("chunk_samples", 63)]
)
def test_state_of_another_stream_is_refused(corpus, key, other):
    stream = ShardStream(corpus, "train", seed=3)
    with pytest.raises(ValueError, match=f"saved stream state has {key}="):
        stream.load_state_dict(stream.state_dict() | {key: other})


@pytest.mark.parametrize("cursor", [Cursor(0, 23), Cursor(-1, 0), Cursor(0, -1)])
def test_cursor_outside_the_epoch_is_refused(corpus, cursor):
    with pytest.raises(ValueError, match="not in an epoch of 23 samples"):
        ShardStream(corpus, "train", seed=3, cursor=cursor)


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0)])
def test_impossible_rank(corpus, rank, world_size):
    with pytest.raises(ValueError, match=f"rank={rank}, world_size={world_size}"):
        ShardStream(corpus, "train", seed=3).take(4, rank, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_run_killed_at_any_position_delivers_the_epoch_exactly_once(corpus, world_size):
    """Steps of 3 on one rank until the kill; then on `world_size` ranks, from the state that was saved."""
    whole = ShardStream(corpus, "train", seed=9, config=SMALL)
    expected = names(whole.take(46))
    for position in range(0, 46, 3):
        first = ShardStream(corpus, "train", seed=9, config=SMALL)
        delivered = [name for _ in range(0, position, 3) for name in names(first.take(3))]
        state = first.state_dict()
        first.take(3)  # delivered but not saved: the resumed run must deliver it again
        first.close()
        ranks = [ShardStream(corpus, "train", seed=9, config=SMALL) for _ in range(world_size)]
        for rank in ranks:
            rank.load_state_dict(state)
        while len(delivered) < 46:
            delivered += take_on_all_ranks(ranks, min(5, 46 - len(delivered)))
        for rank in ranks:
            rank.close()
        assert delivered == expected


@pytest.mark.parametrize(("threads", "ahead"), [(1, 0), (1, 50), (8, 0), (8, 7)])
def test_threads_and_prefetch_change_nothing(corpus, threads, ahead):
    config = dataclasses.replace(SMALL, read_threads=threads, prefetch_samples=ahead)
    stream = ShardStream(corpus, "train", seed=9, config=config)
    expected = names(ShardStream(corpus, "train", seed=9, config=SMALL).take(60))
    assert [name for _ in range(20) for name in names(stream.take(3))] == expected


def test_chunks_in_memory_are_bounded(tmp_path):
    make_corpus(tmp_path, samples_per_shard=1)
    stream = ShardStream(tmp_path / "out", "train", seed=0, config=SMALL)
    kept = []
    for _ in range(40):
        stream.take(3)
        kept.append(len(stream._prefetcher._kept))
    assert max(kept) <= 6 + 3 + 4  # two windows of three chunks; here a chunk is one sample: the step and what is ahead


def test_missing_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"manifest\.json is missing: .*ra3 prepare"):
        ShardStream(tmp_path, "train", seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"format_version": 2', '"format_version": 99'), "format version 99, this release"),
        (lambda text: text[: len(text) // 2], r"manifest\.json is damaged .*JSONDecodeError"),
        (lambda text: text.replace('"files_seen"', '"files_sen"'), r"manifest\.json is damaged .*files_sen"),
        (lambda _text: "[]", r"manifest\.json is damaged"),
    ],
)
def test_unreadable_manifest(own_corpus, change, message):
    path = own_corpus / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        ShardStream(own_corpus, "train", seed=0)


@pytest.mark.parametrize("name", ["train-00002.tar", "train-00001.npy"])
def test_missing_and_torn_files(own_corpus, name):
    path = own_corpus / name
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"{name} is torn: {len(data) - 1} bytes, the manifest says {len(data)}"):
        ShardStream(own_corpus, "train", seed=0)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing although .*ra3 prepare"):
        ShardStream(own_corpus, "train", seed=0)


@pytest.mark.parametrize("at_byte", [0, 512])  # in the header, in the data
def test_torn_sample(own_corpus, at_byte):
    shard = Manifest.load(own_corpus).splits["train"].shards[3]
    index = np.load(own_corpus / shard.index.name)
    data = bytearray((own_corpus / shard.tar.name).read_bytes())
    data[int(index[1, 0]) + at_byte] ^= 1  # sample 16 is the second one of the fourth shard
    (own_corpus / shard.tar.name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{shard.tar.name} has changed: its sha256"):
        ShardStream(own_corpus, "train", seed=0, verify=True)
    with pytest.raises(ValueError, match=rf"{shard.tar.name}: sample 16 at byte {index[1, 0]} is torn"):
        ShardStream(own_corpus, "train", seed=0).take(23)


def test_whole_corpus_passes_verification(corpus):
    assert len(ShardStream(corpus, "train", seed=0, verify=True)) == 23


def test_empty_and_unknown_split(corpus):
    with pytest.raises(ValueError, match=r"split 'heldout' of .* is empty"):
        ShardStream(corpus, "heldout", seed=0)
    with pytest.raises(ValueError, match="no split 'test'; it has heldout, train"):
        ShardStream(corpus, "test", seed=0)


def test_negative_seed(corpus):
    with pytest.raises(ValueError, match="seed must be at least 0, found -1"):
        ShardStream(corpus, "train", seed=-1)
