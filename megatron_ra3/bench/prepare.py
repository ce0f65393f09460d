"""`ra3 bench prepare`: how fast sources become a corpus, beside a single pass that only reads and decodes them."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_ra3.bench.result import publish
from megatron_ra3.corpus.documents import Document
from megatron_ra3.corpus.inputs import find_inputs, read_documents
from megatron_ra3.corpus.prepare import PrepareConfig, prepare


def add_prepare_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments that `run_prepare_bench` reads."""
    add = parser.add_argument
    add("sources", nargs="*", metavar="SOURCE", help="as of `ra3 prepare` (default: the standard library)")
    add("--repeats", type=int, default=3, help="default %(default)s")
    add("--workers", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}), help="default %(default)s")
    add("--benchmarks", nargs="+", default=[], metavar="FILE", help="decontaminate against these")
    add("--out", type=Path, help="also write the result as JSON")


def run_prepare_bench(arguments: argparse.Namespace) -> int:
    """Measures, one after the other in every repeat, and prints one JSON object on the last line."""
    sources = arguments.sources or [sysconfig.get_paths()["stdlib"]]
    result = measure(sources, arguments.workers, arguments.repeats, arguments.benchmarks)
    return publish(result, arguments.out)


def measure(sources: Sequence[str], workers: Sequence[int], repeats: int, benchmarks: Sequence[str]) -> dict[str, Any]:
    """MB/s of a plain read and, for each number of workers, of `prepare` in all and per worker.

    `ratio` is MB/s per core over that of the plain read, at the most workers; medians over `repeats` after one
    unmeasured read that fills the page cache.
    """
    megabytes = _read_all(sources) / 1e6
    plain: list[float] = []
    prepared: dict[int, list[float]] = {count: [] for count in workers}
    with TemporaryDirectory() as folder:
        for _ in range(repeats):
            started_s = time.perf_counter()
            _read_all(sources)
            plain.append(time.perf_counter() - started_s)
            for count in workers:
                out = str(Path(folder) / "corpus")
                started_s = time.perf_counter()
                config = PrepareConfig(
                    sources=tuple(sources), out=out, workers=count, benchmarks=tuple(benchmarks), overwrite=True
                )
                manifest = prepare(config)
                prepared[count].append(time.perf_counter() - started_s)
    plain_rate = megabytes / statistics.median(plain)
    rates = {count: megabytes / statistics.median(seconds) for count, seconds in prepared.items()}
    per_core = {count: rate / count for count, rate in rates.items()}
    return {
        "megabytes": round(megabytes, 1),
        "files": manifest.files_seen,
        "plain_mb_per_s": plain_rate,
        "mb_per_s": rates,
        "mb_per_s_per_core": per_core,
        "ratio": per_core[max(per_core)] / plain_rate,
        "plain_s": plain,
        "prepare_s": prepared,
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
    }


def _read_all(sources: Sequence[str]) -> int:
    """Reads and decodes every document once; returns the bytes."""
    suffixes, exclude = PrepareConfig(sources=tuple(sources), out="").suffixes, PrepareConfig.exclude
    num_bytes = 0
    for source in find_inputs(sources, suffixes=suffixes, exclude=exclude):
        for document in read_documents(source, suffixes=suffixes, exclude=exclude, max_file_bytes=1_000_000):
            if isinstance(document, Document):
                num_bytes += len(document.data)
                document.data.decode(errors="replace")
    return num_bytes
