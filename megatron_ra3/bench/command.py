"""`ra3 bench NAME`: the benchmarks by name."""

from __future__ import annotations

import argparse

from megatron_ra3.bench.logprob import add_logprob_arguments, run_logprob
from megatron_ra3.bench.plan import add_plan_bench_arguments, run_plan_bench
from megatron_ra3.bench.prepare import add_prepare_bench_arguments, run_prepare_bench
from megatron_ra3.bench.rollout import add_rollout_arguments, run_rollout
from megatron_ra3.bench.sandbox import add_sandbox_arguments, run_sandbox
from megatron_ra3.bench.stream import add_stream_arguments, run_stream
from megatron_ra3.bench.sync import add_sync_arguments, run_sync
from megatron_ra3.bench.timeline import add_timeline_bench_arguments, run_timeline_bench
from megatron_ra3.bench.tokens import add_tokens_arguments, run_tokens
from megatron_ra3.bench.tune import add_tune_arguments, run_tune

BENCHES = (
    ("rollout", add_rollout_arguments, run_rollout, "sampling latents: jump-ahead against line by line"),
    (
        "logprob",
        add_logprob_arguments,
        run_logprob,
        "likelihood kernels beside their peers",
    ),
    (
        "prepare",
        add_prepare_bench_arguments,
        run_prepare_bench,
        "making a corpus: beside reading its sources",
    ),
    ("plan", add_plan_bench_arguments, run_plan_bench, "what ra3 plan forecasts of a step, beside steps taken here"),
    ("stream", add_stream_arguments, run_stream, "reading a corpus: the exact stream beside plain webdataset"),
    ("tokens", add_tokens_arguments, run_tokens, "reading and tokenising a snippet: with stored token ids and without"),
    ("sandbox", add_sandbox_arguments, run_sandbox, "running programs: the warm jail beside a jail per program"),
    ("sync", add_sync_arguments, run_sync, "new weights into running engines: beside saving and loading them"),
    ("timeline", add_timeline_bench_arguments, run_timeline_bench, "what a span costs: switched off, and written down"),
    ("tune", add_tune_arguments, run_tune, "find the fastest tiles of the likelihood kernels for this GPU"),
)


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """A subcommand for each."""
    benches = parser.add_subparsers(dest="bench", required=True)
    for name, add_arguments, run, text in BENCHES:
        bench = benches.add_parser(name, help=text)
        add_arguments(bench)
        bench.set_defaults(run=run)
