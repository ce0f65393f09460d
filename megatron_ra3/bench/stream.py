"""`ra3 bench stream`: what the exact cursor costs beside plain webdataset, and what a resume costs.

Three readers of the same tars alternate within one run, so that a machine that slows down slows all: their bytes alone,
webdataset's usual recipe (shuffled shards, a shuffle buffer, decoded JSON) and the package's stream, whose records are
checked besides. The page cache is warm: what is compared is the work per sample.
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from megatron_ra3.bench.result import publish
from megatron_ra3.corpus.lines import CodeLine
from megatron_ra3.corpus.manifest import FORMAT_VERSION, Manifest, SplitInfo
from megatron_ra3.corpus.shards import write_split
from megatron_ra3.corpus.snippets import SnippetRecord
from megatron_ra3.corpus.stream import Cursor, ShardStream

_LINES = 28
_STEP_SAMPLES = 64
_SHUFFLE_BUFFER = 1000


def add_stream_arguments(parser: argparse.ArgumentParser) -> None:
    """What to read and how often."""
    parser.add_argument("--corpus", type=Path, metavar="FOLDER", help="a prepared corpus; default: one made for this")
    parser.add_argument("--samples", type=int, default=20_000, metavar="N", help="of that one (default %(default)s)")
    parser.add_argument("--shards", type=int, default=8, metavar="N", help="of that one (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default %(default)s")
    parser.add_argument("--out", type=Path, help="also write the JSON there")


def run_stream(arguments: argparse.Namespace) -> int:
    """Measure, print a table and, on the last line, all as one JSON object."""
    for name in ("samples", "shards", "repeats"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)}: must be at least 1")
    with tempfile.TemporaryDirectory(prefix="ra3-bench-") as temporary:
        folder = arguments.corpus or Path(temporary)
        if not arguments.corpus:
            write_corpus(folder, arguments.samples, arguments.shards)
        result = measure(folder, arguments.repeats)
    print(table(result))
    return publish(result, arguments.out)


def write_corpus(folder: Path, samples: int, shards: int) -> None:
    """Write a corpus of `samples` snippets: lines of the standard library, over again if they do not suffice."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace").splitlines() for path in paths]
    lines = cycle([CodeLine("", line) for text in texts for line in text if line.strip()])
    records = (
        SnippetRecord(f"{number:016x}-0000", "stdlib", "", tuple(islice(lines, _LINES))) for number in range(samples)
    )
    written = write_split(folder, "train", ((record.id, record.encode()) for record in records), -(-samples // shards))
    train = SplitInfo(
        files=samples, repos=1, snippets=samples, lines=samples * _LINES, native_comments=0, chars=0, tokens=None,
        shards=written,
    )  # fmt: skip
    Manifest(
        format_version=FORMAT_VERSION,
        settings={},
        files_seen=samples,
        bytes_seen=0,
        files_dropped={},
        cut_dropped={},
        scrubbed={},
        licences={},
        languages={},
        tokenizer_sha256=None,
        splits={"train": train},
    ).save(folder)


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """Rates of the three readers and times of a resume, medians over the repeats; ratios are of the same repeat."""
    shards = Manifest.load(folder).splits["train"].shards
    tars = [str(folder / shard.tar.name) for shard in shards]
    samples, num_bytes = sum(shard.samples for shard in shards), sum(shard.tar.bytes for shard in shards)
    readers = {"tar_bytes": _read_bytes, "webdataset": _read_webdataset}
    runs: list[dict[str, float]] = []
    _read_bytes(tars)  # warms the page cache
    for number in range(repeats):
        seconds = {name: _seconds(partial(reader, tars)) for name, reader in readers.items()}
        seconds["ours"] = _seconds(partial(_read_ours, folder, number, samples))
        seconds["resume_1"] = _resume_seconds(folder, number, samples // 100)
        seconds["resume_99"] = _resume_seconds(folder, number, samples * 99 // 100)
        runs.append(seconds)
    replay_s = _seconds(lambda: next(islice(_webdataset(tars), samples * 99 // 100, None)))

    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {
        "ratio": statistics.median(run["webdataset"] / run["ours"] for run in runs),
        "resume_ratio": medians["resume_99"] / medians["resume_1"],
        "samples": samples,
        "shards": len(shards),
        "bytes": num_bytes,
        "repeats": repeats,
        "samples_per_s": {name: samples / medians[name] for name in (*readers, "ours")},
        "mb_per_s": {name: num_bytes / 1e6 / medians[name] for name in (*readers, "ours")},
        "resume_s": {
            "ours_at_1_percent": medians["resume_1"],
            "ours_at_99_percent": medians["resume_99"],
            "webdataset_replay_to_99_percent": replay_s,
        },
        "runs_s": runs,
    }


def table(result: dict[str, Any]) -> str:
    """The result for reading."""
    lines = [f"{result['samples']} samples in {result['shards']} shards, {result['bytes'] / 1e6:.1f} MB"]
    lines += [
        f"{name:<12}{rate:>12,.0f} samples/s {result['mb_per_s'][name]:>10,.1f} MB/s"
        for name, rate in result["samples_per_s"].items()
    ]
    lines += [f"first sample, {name:<34}{seconds * 1e3:>10,.1f} ms" for name, seconds in result["resume_s"].items()]
    return "\n".join([*lines, f"ours / webdataset: {result['ratio']:.2f}; resume: {result['resume_ratio']:.2f}"])


def _read_bytes(tars: list[str]) -> None:
    for tar in tars:
        with Path(tar).open("rb") as file:
            while file.read(1 << 20):
                pass


def _webdataset(tars: list[str]) -> Iterator[Any]:
    import webdataset

    return iter(webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(_SHUFFLE_BUFFER).decode())


def _read_webdataset(tars: list[str]) -> None:
    for _ in _webdataset(tars):
        pass


def _read_ours(folder: Path, seed: int, samples: int) -> None:
    with closing(ShardStream(folder, "train", seed)) as stream:
        for start in range(0, samples, _STEP_SAMPLES):
            stream.take(min(_STEP_SAMPLES, samples - start))


def _resume_seconds(folder: Path, seed: int, position: int) -> float:
    """Seconds from opening a stream at a position to its first sample."""
    started_s = time.perf_counter()
    stream = ShardStream(folder, "train", seed, cursor=Cursor(0, position))
    stream.take(1)
    seconds = time.perf_counter() - started_s
    stream.close()
    return seconds


def _seconds(work: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s
