"""`ra3 bench rollout`: what jump-ahead saves over sampling latents line by line.

Both modes are the package's own sampler on one engine, with the same model, snippets and seeds: `window="auto"` and
`window=1`, which asks for one gate at a time but likewise never twice for the same past. They alternate within one
run, each from an empty prefix cache, so that a machine that slows down slows both; they draw the same rollouts, which
is counted too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_ra3.bench.gated_model import SPELLED, GatedModel, SyntheticTokenizer, write_gated_model
from megatron_ra3.bench.result import publish
from megatron_ra3.latents import LatentFormat, Snippet, Surface
from megatron_ra3.rollout.engine import Engine, EngineError
from megatron_ra3.rollout.sampler import Sampler, SamplerConfig

MODES: dict[str, Literal["auto"] | int] = {"jump_ahead": "auto", "line_by_line": 1}
TOTALS = {"vllm:prompt_tokens_total": 1, "vllm:prefix_cache_hits_total": -1}
"""vLLM's counters whose signed sum is the number of prompt tokens it computed."""
DECODED = "vllm:generation_tokens_total"
KV_CACHE_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class RolloutBench:
    """What is measured; the fields are the options of the command. Token and line counts are per rollout."""

    engine: Literal["vllm", "inprocess"] = "vllm"
    surface: Surface = "special"
    think_rates: tuple[float, ...] = (0.05, 0.2, 0.5)
    snippets: int = 8
    lines: int = 30
    line_tokens: int = 12
    rollouts: int = 8
    rationale_tokens: float = 8.0
    max_rationale_tokens: int = 64
    repeats: int = 7
    layers: int = 2
    hidden_size: int = 64
    vocab_size: int = 2048
    block_size: int = 32
    max_in_flight: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % 32:
            raise ValueError(f"hidden_size={self.hidden_size}: must be a multiple of 32, the head size")
        if self.vocab_size <= len(SPELLED) + 1:
            raise ValueError(
                f"vocab_size={self.vocab_size}: must leave tokens beside the {len(SPELLED)} of the latents"
            )
        if not self.think_rates or not all(0.0 < rate < 1.0 for rate in self.think_rates):
            raise ValueError(f"think_rates={self.think_rates}: needs rates above 0 and below 1")
        for name in ("snippets", "lines", "line_tokens", "rollouts", "repeats", "layers", "rationale_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")

    @property
    def max_sequence_tokens(self) -> int:
        """Room for a full-length rationale before every line, so that none is refused."""
        return 1 + self.lines * (self.line_tokens + 2 + self.max_rationale_tokens + 1)


@dataclass(frozen=True, slots=True)
class Sample:
    """One `sample` call.

    `prefilled_tokens` are those computed, not those found in the prefix cache; of an engine that does not count
    (`inprocess`), those of its requests.
    """

    wall_s: float
    requests: int
    gate_queries: int
    generate_requests: int
    discarded_rationales: int
    prefilled_tokens: int
    decoded_tokens: int
    lines: int
    thinks: int


@dataclass(frozen=True, slots=True)
class Bed:
    """An engine to measure on; `computed` reads its prefilled and decoded tokens so far, None if it does not count."""

    engine: Engine
    forget: Callable[[], None]
    computed: Callable[[], tuple[int, int] | None]


def add_rollout_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of `RolloutBench` as options, and where to write the result."""
    default = RolloutBench()
    parser.add_argument("--engine", choices=("vllm", "inprocess"), default=default.engine)
    parser.add_argument("--surface", choices=("special", "newline"), default=default.surface)
    parser.add_argument("--think-rates", type=float, nargs="+", default=default.think_rates, metavar="RATE")
    parser.add_argument("--rationale-tokens", type=float, default=default.rationale_tokens, help="mean length")
    for name, value in asdict(default).items():
        if isinstance(value, int):
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, metavar="N")
    parser.add_argument("--out", type=Path, help="also write the result as a JSON file")


def run_rollout(arguments: argparse.Namespace) -> int:
    """Measure as asked; a table, then the result as one JSON object on the last line."""
    given = {name: getattr(arguments, name) for name in asdict(RolloutBench())}
    bench = RolloutBench(**given | {"think_rates": tuple(arguments.think_rates)})
    result = measure(bench)
    return publish(result, arguments.out)


def measure(bench: RolloutBench) -> dict[str, Any]:
    """Ratios line by line / jump-ahead (above 1: jump-ahead is cheaper) and all they come from, by think rate.

    `wall_ratio` is one of medians, `wall_ratio_range` the lowest and highest ratio of a single repeat.
    `requests_ratio_unshared` compares with one request per line of every rollout, nothing shared within a group.
    """
    form = LatentFormat.build(bench.surface, SyntheticTokenizer(bench.vocab_size))
    snippets = random_snippets(bench)
    result: dict[str, Any] = {
        "requests_ratio": {},
        "wall_ratio": {},
        "wall_ratio_range": {},
        "requests_ratio_unshared": {},
        "identical_rollouts": {},
        "measured": {},
    }
    for rate in bench.think_rates:
        with tempfile.TemporaryDirectory() as folder:
            model = GatedModel(
                latent_format=form,
                vocab_size=bench.vocab_size,
                layers=bench.layers,
                hidden_size=bench.hidden_size,
                think_rate=rate,
                rationale_tokens=bench.rationale_tokens,
                max_positions=bench.max_sequence_tokens,
            )
            write_gated_model(Path(folder), model, snippets, seed=bench.seed)
            opened = _served if bench.engine == "vllm" else _inprocess
            with opened(bench, form, Path(folder)) as bed:
                samples, identical = _alternate(bench, form, bed, snippets)
        for name, value in _summary(samples).items():
            result[name][f"{rate:g}"] = value
        result["identical_rollouts"][f"{rate:g}"] = identical
        print(_table(f"{rate:g}", result), flush=True)
    return result | {"settings": asdict(bench), "machine": _machine()}


def random_snippets(bench: RolloutBench) -> list[Snippet]:
    """Snippets of random tokens; lines have two thirds of `line_tokens` to all of them."""
    draw = random.Random(bench.seed)
    fewest, most = max(1, bench.line_tokens * 2 // 3), bench.line_tokens
    ids = range(len(SPELLED), bench.vocab_size)
    return [
        Snippet(
            f"snippet-{number}",
            (0,),
            tuple(tuple(draw.choices(ids, k=draw.randint(fewest, most))) for _ in range(bench.lines)),
            (None,) * bench.lines,
        )
        for number in range(bench.snippets)
    ]


def _alternate(
    bench: RolloutBench, form: LatentFormat, bed: Bed, snippets: Sequence[Snippet]
) -> tuple[dict[str, list[Sample]], float]:
    """Samples per mode, after one unmeasured round, and the share of rollouts that both modes drew alike."""
    samplers = {
        mode: Sampler(
            bed.engine,
            form,
            SamplerConfig(
                rollouts_per_snippet=bench.rollouts,
                max_rationale_tokens=bench.max_rationale_tokens,
                max_sequence_tokens=bench.max_sequence_tokens,
                window=window,
            ),
        )
        for mode, window in MODES.items()
    }
    samples: dict[str, list[Sample]] = {mode: [] for mode in MODES}
    alike = total = 0
    for repeat in range(-1, bench.repeats):
        drawn = {}
        for mode in sorted(MODES, reverse=repeat % 2 == 0):
            sample, drawn[mode] = _sample(bed, samplers[mode], snippets, seed=bench.seed + 1 + repeat)
            if repeat >= 0:
                samples[mode].append(sample)
        jumped, stepped = drawn.values()
        total += len(jumped)
        alike += sum(a == b for a, b in zip(jumped, stepped, strict=True))
    return samples, alike / total


def _sample(bed: Bed, sampler: Sampler, snippets: Sequence[Snippet], *, seed: int) -> tuple[Sample, list[list[int]]]:
    bed.forget()
    before = bed.computed()
    started = time.perf_counter()
    groups = sampler.sample(snippets, seed=seed)
    wall_s = time.perf_counter() - started
    after, stats = bed.computed(), sampler.stats
    if before is None or after is None:
        prefilled, decoded = stats.prompt_tokens, stats.rationale_tokens + stats.discarded_tokens
    else:
        prefilled, decoded = after[0] - before[0], after[1] - before[1]
    sample = Sample(
        wall_s,
        stats.requests,
        stats.gate_queries,
        stats.generate_requests,
        stats.discarded_rationales,
        prefilled,
        decoded,
        stats.lines,
        stats.thinks,
    )
    return sample, [rollout.token_ids for group in groups for rollout in group]


def _summary(samples: dict[str, list[Sample]]) -> dict[str, Any]:
    jumped, stepped = samples["jump_ahead"], samples["line_by_line"]
    walls = {mode: statistics.median(item.wall_s for item in items) for mode, items in samples.items()}
    per_repeat = [slow.wall_s / fast.wall_s for fast, slow in zip(jumped, stepped, strict=True)]
    asked = sum(item.requests for item in jumped)
    return {
        "requests_ratio": sum(item.requests for item in stepped) / asked,
        "requests_ratio_unshared": sum(item.lines for item in jumped) / asked,
        "wall_ratio": walls["line_by_line"] / walls["jump_ahead"],
        "wall_ratio_range": [min(per_repeat), max(per_repeat)],
        "measured": {mode: _mode_summary(items) for mode, items in samples.items()},
    }


def _mode_summary(items: Sequence[Sample]) -> dict[str, Any]:
    """Mean counts per `sample` call; of the wall time median, range and all values (seconds)."""
    walls = [item.wall_s for item in items]
    counts = {
        name: statistics.fmean(getattr(item, name) for item in items)
        for name in Sample.__slots__
        if name not in ("wall_s", "lines", "thinks")
    }
    rate = sum(item.thinks for item in items) / sum(item.lines for item in items)
    return counts | {
        "think_rate": rate,
        "wall_s": statistics.median(walls),
        "wall_s_range": [min(walls), max(walls)],
        "wall_s_all": walls,
    }


def _table(rate: str, result: dict[str, Any]) -> str:
    rows = [f"think rate {rate}, {100 * result['identical_rollouts'][rate]:.1f} % of the rollouts identical"]
    for mode, row in result["measured"][rate].items():
        rows.append(
            f"  {mode:<13}{row['think_rate']:7.3f} thinks/line {row['requests']:8.0f} requests "
            f"{row['prefilled_tokens']:9.0f} prefilled {row['decoded_tokens']:7.0f} decoded "
            f"{row['discarded_rationales']:5.0f} discarded {row['wall_s']:8.3f} s "
            f"({row['wall_s_range'][0]:.3f} to {row['wall_s_range'][1]:.3f})"
        )
    requests, unshared, wall = (
        result[name][rate] for name in ("requests_ratio", "requests_ratio_unshared", "wall_ratio")
    )
    low, high = result["wall_ratio_range"][rate]
    rows.append(
        f"  line by line / jump-ahead: requests {requests:.2f} (nothing shared: {unshared:.2f}), "
        f"wall {wall:.2f} ({low:.2f} to {high:.2f})"
    )
    return "\n".join(rows)


def _machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
    }


@contextmanager
def _served(bench: RolloutBench, form: LatentFormat, folder: Path) -> Iterator[Bed]:
    from megatron_ra3.rollout.server import ServerConfig, VllmServer
    from megatron_ra3.rollout.vllm_engine import VllmEngine

    config = ServerConfig(
        folder,
        folder / "vllm.log",
        dtype="float32",
        max_model_len=bench.max_sequence_tokens,
        kv_cache_bytes=KV_CACHE_BYTES,
        block_size=bench.block_size,
        max_num_seqs=bench.max_in_flight,
        seed=bench.seed + 1,
    )
    with VllmServer(config) as server:
        engine = VllmEngine(
            [server.url],
            form.gate_ids,
            min_model_len=bench.max_sequence_tokens,
            max_in_flight=bench.max_in_flight,
            timeout_s=600.0,
        )
        try:
            yield Bed(engine, lambda: _reset_prefix_cache(server.url), lambda: _computed_tokens(server.url))
        except (EngineError, OSError) as error:
            raise EngineError(f"{error}{server.log_tail()}") from error
        finally:
            engine.close()


def _reset_prefix_cache(url: str) -> None:
    request = urllib.request.Request(f"{url}/reset_prefix_cache", b"", method="POST")  # noqa: S310
    with urllib.request.urlopen(request, timeout=60):  # noqa: S310
        pass


def _computed_tokens(url: str) -> tuple[int, int]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:  # noqa: S310
        text = answer.read().decode()
    prefilled = decoded = 0.0
    for line in text.splitlines():
        name = line.partition("{")[0]
        if name in TOTALS:
            prefilled += TOTALS[name] * float(line.rpartition(" ")[2])
        elif name == DECODED:
            decoded += float(line.rpartition(" ")[2])
    return int(prefilled), int(decoded)


@contextmanager
def _inprocess(bench: RolloutBench, form: LatentFormat, folder: Path) -> Iterator[Bed]:
    import torch

    from megatron_ra3.model import names, parallel
    from megatron_ra3.model.build import build_model
    from megatron_ra3.model.trainer import Trainer
    from megatron_ra3.rollout.inprocess import InProcessEngine

    layout = parallel.initialize(1, 1, seed=bench.seed, timeout_s=600.0)
    try:
        hf_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = build_model(hf_config, layout, dtype=torch.float32)
        names.import_hf(model, folder)
        engine = InProcessEngine(Trainer(model, None, layout), form, max_batch_tokens=8192)
        yield Bed(engine, lambda: None, lambda: None)
    finally:
        parallel.destroy()
