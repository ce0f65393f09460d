"""What vLLM says of itself: a few figures of each server's Prometheus endpoint, asked for once a step beside the step.

Prevents the slow run whose engines thrash: preempted for want of KV cache, or never finding a prefix again. A thread
asks, so a server that is slow to answer delays nothing, and one that does not answer is counted, and no more. Between
the steps a cluster's own Prometheus sees more: `prometheus/` in the run folder tells it where (`write_targets`).
"""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from megatron_ra3 import durable
from megatron_ra3.observe.spans import TIMELINE

TIMEOUT_S = 5.0
DELAY_S = 0.5
"""Between the first query of a step and the look at the engines: by then they are at work."""


@dataclass(slots=True)
class Reading:
    """One engine's own figures: how much it has to do now, and what it has done since it started."""

    running: float = 0.0
    waiting: float = 0.0
    kv_cache_usage: float = 0.0
    prefix_queries: float = 0.0
    prefix_hits: float = 0.0
    generated_tokens: float = 0.0
    preemptions: float = 0.0


SOURCES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_cache_usage",
    "vllm:prefix_cache_queries_total": "prefix_queries",
    "vllm:prefix_cache_hits_total": "prefix_hits",
    "vllm:generation_tokens_total": "generated_tokens",
    "vllm:num_preemptions_total": "preemptions",
}
COUNTERS = ("prefix_queries", "prefix_hits", "generated_tokens", "preemptions")


@dataclass(slots=True)
class Figures:
    """One engine over `seconds` between two readings: its state at the second, its counters' growth."""

    reading: Reading
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens."""
        return self.reading.generated_tokens / self.seconds if self.seconds else 0.0


def parse_reading(text: str) -> Reading:
    """From an answer of `/metrics`; engines of one server (data parallelism) are summed, of their caches the fullest.

    ValueError: it has none of the figures, or is no such answer at all.
    """
    from prometheus_client.parser import text_string_to_metric_families

    wanted = "\n".join(line for line in text.splitlines() if line.partition("{")[0].partition(" ")[0] in SOURCES)
    reading, found = Reading(), False
    for family in text_string_to_metric_families(wanted + "\n"):
        for sample in family.samples:
            name = SOURCES[sample.name]
            before = getattr(reading, name)
            value = max(before, sample.value) if name == "kv_cache_usage" else before + sample.value
            setattr(reading, name, value)
            found = True
    if not found:
        raise ValueError(f"no figure of vLLM in {len(text)} characters")
    return reading


def growth(before: Reading | None, now: Reading, seconds: float) -> Figures:
    """What an engine did between two readings, 0 where there is no earlier one.

    Counters that fell are those of a server that was started anew.
    """
    grown = replace(now)
    for name in COUNTERS:
        value, earlier = getattr(now, name), getattr(before or now, name)
        setattr(grown, name, value - earlier if value >= earlier else value)
    return Figures(grown, seconds)


def merged(found: Sequence[Figures], failed: int) -> dict[str, float]:
    """Metrics of all engines together; nothing where none was asked."""
    metrics: dict[str, float] = {"engine_scrapes_failed": failed} if failed else {}
    if not found:
        return metrics
    readings = [each.reading for each in found]
    queries = sum(reading.prefix_queries for reading in readings)
    metrics |= {
        "engine_running": sum(reading.running for reading in readings),
        "engine_waiting": sum(reading.waiting for reading in readings),
        "engine_kv_cache_usage": max(reading.kv_cache_usage for reading in readings),
        "engine_tokens_per_second": sum(each.tokens_per_second for each in found),
        "engine_preemptions": sum(reading.preemptions for reading in readings),
    }
    if queries:
        metrics["engine_prefix_hit_rate"] = sum(reading.prefix_hits for reading in readings) / queries
    return metrics


class Scraper:
    """A thread that asks the engines for their figures, once after each `ask`, at most once between two `take`s.

    Args:
        urls: the engines there are now.
        fetch: the answer of an engine's `/metrics`; OSError, HTTPException: there is none.
        delay_s: between `ask` and the look.
    """

    def __init__(
        self,
        urls: Callable[[], Iterable[str]],
        fetch: Callable[[str], str] | None = None,
        delay_s: float = DELAY_S,
    ) -> None:
        self._urls = urls
        self._fetch = fetch or _fetch
        self._delay_s = delay_s
        self._lock = threading.Lock()
        self._asked = threading.Event()
        self._closed = threading.Event()
        self._may_ask = True
        self._before: dict[str, tuple[Reading, float]] = {}
        self._found: list[Figures] = []
        self._failed = 0
        self._thread = threading.Thread(target=self._run, name="engine-figures", daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """The engines begin to work; returns at once."""
        if self._may_ask:
            self._may_ask = False
            self._asked.set()

    def take(self) -> tuple[list[Figures], int]:
        """What was found since the last call, one per engine, and how many engines gave no answer."""
        self._may_ask = True
        with self._lock:
            taken, self._found, self._failed = (self._found, self._failed), [], 0
        return taken

    def close(self) -> None:
        """Ask no more."""
        self._closed.set()
        self._asked.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._asked.wait()
            self._asked.clear()
            if self._closed.wait(self._delay_s):
                return
            for url in list(self._urls()):
                if not self._closed.is_set():
                    self._look(url)

    def _look(self, url: str) -> None:
        now_s = time.monotonic()
        try:
            reading = parse_reading(self._fetch(url))
        except (OSError, ValueError, http.client.HTTPException):
            with self._lock:
                self._failed += 1
            return
        before, before_s = self._before.get(url, (None, now_s))
        self._before[url] = (reading, now_s)
        figures = growth(before, reading, now_s - before_s)
        with self._lock:
            self._found.append(figures)
        TIMELINE.engine(
            url,
            running=reading.running,
            waiting=reading.waiting,
            kv_cache_usage=round(reading.kv_cache_usage, 4),
            tokens_per_second=round(figures.tokens_per_second, 1),
            preemptions=reading.preemptions,
        )


def write_targets(path: Path, urls: Sequence[str], labels: Mapping[str, str]) -> None:
    """Say where engines are, in the format of Prometheus's `file_sd_configs`; OSError: the disk refuses.

    A reader sees the file before or after, never half of it.
    """
    groups = [{"targets": [urlsplit(url).netloc for url in urls], "labels": dict(labels)}]
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write(path, f"{json.dumps(groups, indent=1)}\n".encode())


class Targets:
    """Keeps a targets file true to the engines there are; a disk that refuses is said once."""

    def __init__(self, run_folder: Path, replica: int) -> None:
        self._path = run_folder / "prometheus" / f"replica-{replica:05d}.json"
        self._labels = {"ra3_run": run_folder.resolve().name, "ra3_replica": str(replica)}
        self._told: list[str] | None = None
        self._has_warned = False

    def tell(self, urls: Sequence[str]) -> None:
        """Write the file where the engines are others than at the last call."""
        if self._told == urls:
            return
        try:
            write_targets(self._path, urls, self._labels)
            self._told = list(urls)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                print(f"targets of Prometheus cannot be written: {error}", flush=True)


def _fetch(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics", timeout=TIMEOUT_S) as answer:  # noqa: S310
        text: bytes = answer.read()
    return text.decode()
