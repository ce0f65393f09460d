"""Damage is skipped, counted and limited, in the same way on any number of ranks; never silent, and no rank hangs."""

import dataclasses
from contextlib import closing

import numpy as np
import pytest

from megatron_ra3.config import StreamConfig
from megatron_ra3.corpus.stream import ShardStream
from tests.corpora import make_corpus
from tests.distributed import run_ranks

SMALL = StreamConfig(shuffle_shards=2, chunk_samples=2, window_samples=6, prefetch_samples=4)


@pytest.fixture
def corpus(tmp_path):
    """A corpus to damage."""
    make_corpus(tmp_path)
    return tmp_path / "out"


def open_stream(folder, max_bad_samples, **settings):
    config = dataclasses.replace(SMALL, max_bad_samples=max_bad_samples)
    return ShardStream(folder, "train", seed=9, config=config, **settings)


def files_of(corpus, shard):
    """Source files whose samples lie in a shard, in their order."""
    with closing(open_stream(corpus, 0)) as stream:
        first = 5 * shard
        return [stream._reader.read(sample).source for sample in range(first, min(first + 5, 23))]


def epoch(corpus):
    with closing(open_stream(corpus, 0)) as stream:
        return [record.source for record in stream.take(23)]


def flip_byte(corpus, shard, place, at_byte=512):
    """Damages one sample; returns its offset in the shard."""
    index = np.load(corpus / f"train-{shard:05d}.npy")
    path = corpus / f"train-{shard:05d}.tar"
    data = bytearray(path.read_bytes())
    data[int(index[place, 0]) + at_byte] ^= 1
    path.write_bytes(data)
    return int(index[place, 0])


@pytest.mark.parametrize("at_byte", [0, 124, 150, 512])  # name, size and checksum of the header, and the data
def test_a_torn_sample_is_skipped_in_place_and_counted(corpus, caplog, at_byte):
    whole, torn = epoch(corpus), files_of(corpus, 3)[1]
    offset = flip_byte(corpus, 3, 1, at_byte)
    with closing(open_stream(corpus, 1)) as stream:
        assert [record.source for record in stream.take(23)] == [name for name in whole if name != torn]
        assert stream.bad_samples == stream.state_dict()["bad_samples"] == 1
    assert f"skipped: {corpus}/train-00003.tar: sample 16 at byte {offset} is torn" in caplog.text
    assert "1 bad samples so far (corpus.max_bad_samples=1)" in caplog.text


def test_a_missing_shard_costs_all_its_samples_when_they_come_up(corpus, caplog):
    whole, gone = epoch(corpus), files_of(corpus, 1)
    (corpus / "train-00001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00001\.tar is missing"):
        open_stream(corpus, 0)
    with closing(open_stream(corpus, 5)) as stream:
        assert stream.bad_samples == 0
        assert [record.source for record in stream.take(23)] == [name for name in whole if name not in gone]
        assert stream.bad_samples == 5
    assert caplog.text.count("train-00001.tar is missing although the manifest lists it") == 1
    assert caplog.text.count("skipped: ") == 1  # once per shard
    with closing(open_stream(corpus, 4)) as stream, pytest.raises(ValueError, match=r"5 could not .*max_bad_samples=4"):
        stream.take(23)


def test_samples_before_the_cut_of_a_truncated_shard_are_delivered(corpus):
    whole, files = epoch(corpus), files_of(corpus, 2)
    path = corpus / "train-00002.tar"
    path.write_bytes(path.read_bytes()[: int(np.load(path.with_suffix(".npy"))[3, 0]) + 300])
    with pytest.raises(ValueError, match=r"train-00002\.tar is torn"):
        open_stream(corpus, 0)
    with closing(open_stream(corpus, 2)) as stream:
        assert [record.source for record in stream.take(23)] == [name for name in whole if name not in files[3:]]
        assert stream.bad_samples == 2


def test_a_changed_index_makes_its_shard_unreadable(corpus, caplog):
    path = corpus / "train-00000.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with closing(open_stream(corpus, 5, verify=True)) as stream:
        assert "train-00000.npy has changed" in caplog.text
        assert len(stream.take(23)) == 18
    with closing(open_stream(corpus, 0)) as stream, pytest.raises(ValueError, match=r"train-00000\.npy has changed"):
        stream.take(23)


def test_the_budget_survives_a_resume(corpus):
    flip_byte(corpus, 3, 1)
    with closing(open_stream(corpus, 1)) as stream:
        stream.take(23)
        state = stream.state_dict()
    with closing(open_stream(corpus, 1)) as resumed:
        resumed.load_state_dict(state)
        with pytest.raises(ValueError, match=r"sample 16 .*2 could not be read so far, corpus\.max_bad_samples=1"):
            resumed.take(23)
    with closing(open_stream(corpus, 0)) as stricter:
        stricter.load_state_dict(state)
        with pytest.raises(ValueError, match=r"sample 16 "):
            stricter.take(23)


def read_on_ranks(folder, max_bad_samples):
    """What a rank sees in steps of 4: its shares, the counts after each step, and how it ended."""
    from megatron_ra3.model import parallel

    layout = parallel.initialize(1, 1, seed=0, timeout_s=60)
    seen, counts, end = [], [], "end of the epoch"
    with closing(open_stream(folder, max_bad_samples)) as stream:
        try:
            for _ in range(5):
                share = stream.take(4, layout.dp_rank, layout.dp_size, gather=layout.gather_from_ranks)
                seen.append([record.source for record in share])
                counts.append(stream.bad_samples)
        except ValueError as error:
            end = str(error)
    parallel.destroy()
    return seen, counts, end


@pytest.mark.parametrize("max_bad_samples", [0, 5])
def test_ranks_agree_on_what_only_one_of_them_meets(corpus, max_bad_samples):
    flip_byte(corpus, 3, 1)
    (alone,) = run_ranks(read_on_ranks, 1, corpus, max_bad_samples)
    pair = run_ranks(read_on_ranks, 2, corpus, max_bad_samples)
    assert [rank[1:] for rank in pair] == [alone[1:]] * 2
    assert [sorted(a + b) for a, b in zip(pair[0][0], pair[1][0], strict=True)] == [sorted(step) for step in alone[0]]
    if max_bad_samples:
        assert alone[1][-1] == 1
        assert alone[2] == "end of the epoch"
    else:
        assert "sample 16 at byte" in alone[2]
        assert alone[1] == [0] * len(alone[1])


def test_a_process_that_does_not_read_goes_along(corpus):
    flip_byte(corpus, 3, 1)
    reports = []

    def keep(report):
        reports.append(report)
        return [report]

    with closing(open_stream(corpus, 1)) as leader, closing(open_stream(corpus, 1)) as follower:
        leader.take(23, gather=keep)
        assert follower.take(23, reads=False, gather=lambda own: [*reports, own]) == []
        assert follower.state_dict() == leader.state_dict()
        assert not follower._prefetcher._kept


def test_the_manifest_itself_must_be_whole(corpus):
    path = corpus / "manifest.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="is damaged"):
        open_stream(corpus, 99)
