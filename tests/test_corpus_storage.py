"""Every storage gives the same stream; what is slow is overlapped or named, what fails is tried again, then named."""

import dataclasses
import socket
import sys
import time
from collections import Counter
from contextlib import closing
from importlib.util import find_spec

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from megatron_ra3.config import StreamConfig, load_config
from megatron_ra3.corpus.manifest import Manifest
from megatron_ra3.corpus.stream import Cursor, ShardStream
from tests.corpora import make_corpus, serve
from tests.support import require

SMALL = StreamConfig(shuffle_shards=2, chunk_samples=2, window_samples=6, prefetch_samples=4, read_attempts=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder)
    return folder / "out"


@pytest.fixture(scope="module")
def expected(corpus):
    """Two epochs as read from the folder."""
    return take(corpus, 46)


def take(address, num_samples, *, seed=9, cursor=None, config=SMALL, **settings):
    with closing(ShardStream(address, "train", seed, cursor=cursor, config=config, **settings)) as stream:
        return [record.source for _ in range(num_samples // 2) for record in stream.take(2)]


def tars(folder):
    return {shard.tar.name: shard for shard in Manifest.load(folder).splits["train"].shards}


class SlowFileSystem(MemoryFileSystem):
    """Memory whose tars take `seconds` to answer."""

    protocol = "slowmemory"
    seconds = 0.0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("slowmemory://", "memory://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        if path.endswith(".tar"):
            time.sleep(self.seconds)
        return super().cat_file(path, start, end, **kwargs)


@pytest.fixture
def slow(corpus, monkeypatch):
    """A function that opens the corpus in a storage of so many seconds per read."""
    fsspec.register_implementation("slowmemory", SlowFileSystem, clobber=True)
    filesystem = fsspec.filesystem("slowmemory")
    for path in corpus.iterdir():
        if path.is_file():
            filesystem.pipe_file(f"/corpus/{path.name}", path.read_bytes())

    def open_slow(seconds, **settings):
        monkeypatch.setattr(SlowFileSystem, "seconds", seconds)
        config = dataclasses.replace(SMALL, **settings)
        return closing(ShardStream("slowmemory://corpus", "train", seed=9, config=config))

    return open_slow


def test_every_storage_gives_the_same_stream(corpus, expected):
    with serve(corpus) as (url, asked):
        addresses = [url, f"file://{corpus}", f"pipe:cat {corpus}/{{name}}", f"{url}/"]
        for address in addresses:
            assert take(address, 46) == expected
            assert take(address, 10, cursor=Cursor(1, 5), verify=True) == expected[28:38]
        assert ("HEAD", "/train-00002.tar", None) in asked


def test_s3(corpus, expected, monkeypatch):
    """As s3fs speaks it, to a server that knows no more of S3 than ranges."""
    require(find_spec("s3fs"), "s3fs is not installed")
    with serve(corpus.parent) as (url, asked):
        settings = {"endpoint_url": url, "anon": True, "skip_instance_cache": True}
        monkeypatch.setitem(fsspec.config.conf, "s3", settings)
        assert take("s3://out", 46, verify=True) == expected
        assert ("HEAD", "/out/train-00002.tar", None) in asked
        with pytest.raises(FileNotFoundError, match=r"s3://elsewhere/manifest\.json is missing"):
            take("s3://elsewhere", 2)


def test_a_filesystem_without_asyncio(slow, expected):
    with slow(0.0) as stream:
        assert [record.source for record in stream.take(46)] == expected


def test_an_epoch_reads_every_chunk_of_a_url_once(corpus):
    with serve(corpus) as (url, asked):
        take(url, 22, config=dataclasses.replace(SMALL, prefetch_samples=0))
    ranges = Counter((path, part) for method, path, part in asked if path.endswith(".tar"))
    assert set(ranges.values()) == {1}
    assert max(Counter(path for _, path, _ in asked if path.endswith(".npy")).values()) == 1
    assert len(ranges) == 14  # chunks of 2 of 4 shards of 5 and one of 3 samples
    sizes = [int(end) - int(start) + 1 for _, part in ranges for start, end in [part[6:].split("-")]]
    index = [row for name in tars(corpus) for row in np.load((corpus / name).with_suffix(".npy"))[:, 1].tolist()]
    assert sum(sizes) <= sum(512 + -(-num_bytes // 512) * 512 for num_bytes in index)


def test_a_server_without_ranges_is_refused_with_the_way_out(corpus, expected):
    with serve(corpus, knows_ranges=False) as (url, _):
        with pytest.raises(
            ValueError, match=rf"{url}/train-\d+\.tar: .*corpus\.folder='pipe:curl -fsS {url}/{{name}}'"
        ):
            take(url, 2)
        assert take(f"pipe:curl -fsS {url}/{{name}}", 46) == expected


def test_a_read_that_fails_is_tried_again(corpus, expected):
    with serve(corpus, fail_first=1) as (url, _):
        assert take(url, 46, config=dataclasses.replace(SMALL, read_attempts=9)) == expected
    with (
        serve(corpus, fail_first=99) as (url, _),
        pytest.raises(ValueError, match=rf"{url}/train-\d+.tar: attempt 1 of 1 failed"),
    ):
        take(url, 2)


def test_silence_ends_with_the_name_of_the_url():
    config = dataclasses.replace(SMALL, read_timeout_s=0.2, read_attempts=2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(OSError, match=rf"{url}/manifest\.json: attempt 2 of 2 failed.*FSTimeoutError"):
            take(url, 2, config=config)


def test_missing_corpus_and_torn_shard_behind_a_url(corpus, tmp_path):
    with serve(tmp_path) as (url, _), pytest.raises(FileNotFoundError, match=f"{url}/manifest.json is missing: no fin"):
        take(url, 2)
    make_corpus(tmp_path)
    path = tmp_path / "out" / "train-00001.tar"
    path.write_bytes(path.read_bytes()[:-1])
    with serve(tmp_path / "out") as (url, _), pytest.raises(ValueError, match=f"{url}/train-00001.tar is torn"):
        take(url, 2, verify=True)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"s3a://bucket/corpus: .*pip install 'megatron-ra3\[s3\]'"):
        take("s3a://bucket/corpus", 2)  # another test has imported s3fs for s3://
    with pytest.raises(ValueError, match=r"corpus\.folder=nosuch://x: .*nosuch"):
        take("nosuch://x", 2)


def test_slow_reads_overlap_with_the_steps(slow):
    waited_s = {}
    for ahead in (0, 23):
        with slow(0.05, prefetch_samples=ahead) as stream:
            for _ in range(11):
                stream.take(2)
                time.sleep(0.05)
            waited_s[ahead] = stream.take_waited_s()
            assert stream.take_waited_s() == 0.0
    assert waited_s[0] > 9 * 0.05
    assert waited_s[23] < 0.5 * waited_s[0]


def test_a_stall_is_named(slow, caplog):
    with slow(0.35, stall_s=0.1) as stream:
        stream.take(1)
        assert stream.take_waited_s() >= 0.3
    assert "waits for slowmemory://corpus/train-0000" in caplog.text
    assert "(stall 1 of this process)" in caplog.text
    assert "stall 2" not in caplog.text


def test_a_pipe_runs_once_per_shard_and_epoch_and_its_cache_is_bounded(corpus, tmp_path, expected):
    log, cache = tmp_path / "log", tmp_path / "cache"
    config = dataclasses.replace(SMALL, shuffle_shards=1, read_threads=2, cache_folder=str(cache))
    address = f"pipe:echo {{name}} >> {log}; cat {corpus}/{{name}}"
    delivered = take(address, 92, config=config)
    counts = Counter(log.read_text().split())
    assert Counter(delivered) == dict.fromkeys(expected, 4)
    assert max(counts[name] for name in tars(corpus)) <= 4  # one for each epoch, or none if still in the cache
    assert sum(counts[name] for name in tars(corpus)) > 5
    assert len(list(cache.glob("*.tar"))) <= 4
    assert not list(cache.glob("*.partial"))


def test_processes_share_a_cache_folder(corpus, tmp_path):
    log = tmp_path / "log"
    config = dataclasses.replace(SMALL, cache_folder=str(tmp_path / "cache"))
    address = f"pipe:echo {{name}} >> {log}; cat {corpus}/{{name}}"
    streams = [ShardStream(address, "train", seed=9, config=config) for _ in range(2)]
    for _ in range(11):
        for rank, stream in enumerate(streams):
            stream.take(2, rank, 2)
    for stream in streams:
        stream.close()
    take(address, 22, config=config)
    counts = Counter(log.read_text().split())
    assert {counts[name] for name in tars(corpus)} == {1}


def test_a_temporary_cache_is_removed(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stream = ShardStream(f"pipe:cat {corpus}/{{name}}", "train", seed=9, config=SMALL)
    stream.take(2)
    assert list(tmp_path.glob("ra3-shards-*/*.tar"))
    stream.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("case {name} in *.tar) echo denied >&2; exit 3;; esac; cat FOLDER/{name}", r"exit status 3: denied"),
        ("case {name} in *.tar) head -c 700 FOLDER/{name};; *) cat FOLDER/{name};; esac", r"is torn: 700 bytes"),
        ("case {name} in *.tar) tr a b < FOLDER/{name};; *) cat FOLDER/{name};; esac", r"its sha256 is not"),
        ("case {name} in *.tar) sleep 60;; *) cat FOLDER/{name};; esac", r"nothing came for 0\.3 s after 0 bytes"),
    ],
)
def test_a_command_that_fails_is_named(corpus, command, message):
    started_s = time.monotonic()
    with pytest.raises(ValueError, match=message):
        take("pipe:" + command.replace("FOLDER", str(corpus)), 2, config=dataclasses.replace(SMALL, read_timeout_s=0.3))
    assert time.monotonic() - started_s < 20


def test_a_command_needs_a_place_for_the_name(corpus):
    with pytest.raises(ValueError, match=r"write \{name\} where the command takes the name"):
        take(f"pipe:cat {corpus}/manifest.json", 2)


def test_a_remote_corpus_has_no_tokenizer_folder_to_find():
    remote = ["run_folder=r", "model.folder=m", "model.init=random", "corpus.folder=s3://bucket/corpus"]
    with pytest.raises(ValueError, match=r"corpus\.tokenizer is empty, and corpus\.folder=s3://bucket/corpus"):
        load_config(None, remote)
    assert load_config(None, [*remote, "corpus.tokenizer=t"]).corpus.max_bad_samples == 0
