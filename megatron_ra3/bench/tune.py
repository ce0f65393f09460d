"""`ra3 bench tune`: which way to cut the kernels' work is fastest on this GPU; runs use it from then on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from megatron_ra3.bench.logprob import LogprobBench, random_inputs


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """The shape to tune for."""
    for name, value in (("rows", 8192), ("hidden", 4096), ("vocab", 151_936)):
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help="default %(default)s")


def run_tune(arguments: argparse.Namespace) -> int:
    """Try all candidates, keep the fastest of each kernel, and write them into the table of this machine."""
    import torch

    from megatron_ra3.kernels.tuning import save, table_path

    if not torch.cuda.is_available():
        raise ValueError("tuning needs a GPU that torch can use: see `ra3 doctor`")
    bench = LogprobBench(rows=arguments.rows, hidden=arguments.hidden, vocab=arguments.vocab)
    result = search(_milliseconds(bench))
    save(table_path(), torch.cuda.get_device_name(), result["best"])
    print(f"wrote {table_path()}")
    print(json.dumps(result | {"best": asdict(result["best"]), "gpu": torch.cuda.get_device_name()}))
    return 0


def search(milliseconds: Callable[[str, Any], float]) -> dict[str, Any]:
    """The fastest candidate of every kernel, `best`, and `milliseconds` of all; one that cannot run is left out.

    Args:
        milliseconds: of a kernel, by its name in `Tuning`, with all tiles as a `Tuning` has them.
    """
    from triton.errors import TritonError

    from megatron_ra3.kernels.tuning import CANDIDATES, Tuning

    best, times = Tuning(), {}
    for kernel, candidates in CANDIDATES.items():
        found: dict[Any, float] = {}
        for tiles in candidates:
            choice: dict[str, Any] = {kernel: tiles}
            try:
                found[tiles] = milliseconds(kernel, replace(best, **choice))
            except (RuntimeError, TritonError) as error:  # out of memory, or the compiler gave up
                print(f"{kernel} {tiles}: {error}")
        if found:
            choice = {kernel: min(found, key=found.__getitem__)}
            best = replace(best, **choice)
        times[kernel] = [asdict(tiles) | {"ms": value} for tiles, value in found.items()]
    return {"best": best, "milliseconds": times}


def _milliseconds(bench: LogprobBench) -> Callable[[str, Any], float]:
    """Median time of a call that uses the kernel on random operands; those of gradients run forward too."""
    import torch
    from triton.testing import do_bench

    from megatron_ra3.kernels import HeadCache, linear_logprob
    from megatron_ra3.kernels.tuning import use

    inputs, cache = random_inputs(bench, 0), HeadCache()
    leaves = inputs.leaves()

    def forward(precision: Any) -> None:
        with torch.no_grad():
            linear_logprob(inputs.hidden, inputs.weight, inputs.targets, precision=precision, cache=cache)

    def backward(*, with_entropy: bool) -> None:
        found = linear_logprob(
            leaves.hidden, leaves.weight, leaves.targets, precision="bf16", with_entropy=with_entropy
        )
        sum(part.sum() for part in found).backward() if isinstance(found, tuple) else found.sum().backward()

    calls: dict[str, Callable[[], None]] = {
        "bf16": lambda: forward("bf16"),
        "fp8": lambda: forward("fp8_rescored"),
        "gradient": lambda: backward(with_entropy=False),
        "gradient_with_entropy": lambda: backward(with_entropy=True),
    }

    def measured(kernel: str, choice: Any) -> float:
        with use(choice):
            gradients = [leaves.hidden, leaves.weight]
            return float(do_bench(calls[kernel], return_mode="median", grad_to_none=gradients))

    return measured
