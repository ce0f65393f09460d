"""`ra3 bench plan`: what `ra3 plan` forecasts of a training step, held against steps taken here.

Memory must agree to the byte: parameters, gradients and optimizer tensors are counted, and every tensor that autograd
keeps for the backward pass. Time must agree as well as a model of rates can: a plain product of matrices and a plain
addition are measured beside each step, in turn. Times are CPU seconds of one thread: on a busy machine wall time says
how long a thread waited for its turn, and with several threads all wait for the one that got none.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ra3.bench.result import publish
from megatron_ra3.launch import memory, timing
from megatron_ra3.launch.hardware import DTYPE_BYTES, Device, Dtype
from megatron_ra3.launch.layout import Layout
from megatron_ra3.launch.workload import Workload
from megatron_ra3.model.geometry import Geometry

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ra3.model.parallel import ParallelLayout
    from megatron_ra3.model.trainer import MicroBatch, Trainer

PRODUCT = (512, 1024, 1024)
"""Rows, inner and columns of the product whose rate is taken for the peak of the matrix units."""
ADDED_NUMBERS = 2**23
"""Numbers of the addition whose rate is taken for the memory's: too many for a cache."""


@dataclass(frozen=True)
class Case:
    """A model in the shape of Qwen2 and a step: `sequences` of `tokens` each in `micro_batches`."""

    hidden: int
    layers: int
    tokens: int
    sequences: int
    micro_batches: int
    vocabulary: int = 4096
    dtype: Dtype = "fp32"

    @property
    def name(self) -> str:
        """For tables."""
        return f"H{self.hidden} L{self.layers} {self.micro_batches}x{self.sequences}x{self.tokens} {self.dtype}"

    def hf_config(self) -> dict[str, Any]:
        """Its config.json."""
        return {
            "model_type": "qwen2",
            "hidden_size": self.hidden,
            "intermediate_size": 4 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.hidden // 128,
            "max_position_embeddings": self.tokens,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "vocab_size": self.vocabulary,
        }


CASES = (
    Case(hidden=256, layers=4, tokens=128, sequences=4, micro_batches=2),
    Case(hidden=256, layers=4, tokens=512, sequences=1, micro_batches=2),
    Case(hidden=512, layers=4, tokens=128, sequences=4, micro_batches=1),
    Case(hidden=512, layers=4, tokens=512, sequences=1, micro_batches=1),
    Case(hidden=256, layers=4, tokens=128, sequences=4, micro_batches=1, dtype="bf16"),
)
"""Those in fp32 are timed too: CPUs emulate bf16, and no run on one should use it."""


def add_plan_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """How often, and where to."""
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="default %(default)s")
    parser.add_argument("--out", type=Path, help="also write the JSON there")


def run_plan_bench(arguments: argparse.Namespace) -> int:
    """Measure, print a table and, on the last line, all as one JSON object."""
    if arguments.repeats < 1:
        raise ValueError(f"--repeats {arguments.repeats}: must be at least 1")
    result = measure(CASES, arguments.repeats)
    print(table(result))
    return publish(result, arguments.out)


def measure(cases: tuple[Case, ...], repeats: int) -> dict[str, Any]:
    """Forecast and measurement of each case; errors are forecast / measured - 1, of medians."""
    import torch

    from megatron_ra3.model import parallel

    if torch.cuda.is_available():
        raise ValueError("this bench measures a CPU: hide the GPUs, CUDA_VISIBLE_DEVICES= ra3 bench plan")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    layout = parallel.initialize(1, 1, seed=0, timeout_s=600.0)
    try:
        found = [_measure(case, layout, repeats) for case in cases]
    finally:
        parallel.destroy()
        torch.set_num_threads(threads)
    timed = [case for case in found if "step_s" in case]
    errors = {kind: [abs(case[kind]["error"]) for case in timed] for kind in ("step_s", "score_s")}
    return {
        "memory_error_max": max(abs(part["error"]) for case in found for part in case["bytes"].values()),
        "step_error_median": statistics.median(errors["step_s"]),
        "step_error_max": max(errors["step_s"]),
        "score_error_median": statistics.median(errors["score_s"]),
        "score_error_max": max(errors["score_s"]),
        "load_average": os.getloadavg()[0],
        "cpus": os.cpu_count(),
        "repeats": repeats,
        "cases": found,
    }


def table(result: dict[str, Any]) -> str:
    """The result for reading."""
    lines = [f"{'case':<24}{'what':<13}{'forecast':>14}{'measured':>14}{'error':>9}"]
    for case in result["cases"]:
        parts = [(name, case["bytes"][name], 1.0) for name in case["bytes"]]
        parts += [(f"{name[:-2]} ms", case[name], 1e3) for name in ("step_s", "score_s") if name in case]
        lines += [
            f"{case['case']:<24}{name:<13}{part['forecast'] * scale:>14,.0f}{part['measured'] * scale:>14,.0f}"
            f"{part['error']:>+9.1%}"
            for name, part, scale in parts
        ]
    rates = ", ".join(f"{case['gflops']:.0f}/{case['gb_per_s']:.1f}" for case in result["cases"] if "gflops" in case)
    return "\n".join([*lines, f"GFLOP/s / GB/s measured beside the cases: {rates}; load {result['load_average']:.1f}"])


def _measure(case: Case, layout: ParallelLayout, repeats: int) -> dict[str, Any]:
    trainer, batches = _assemble(case, layout)
    weights = [batch.targets.new_ones(len(batch.targets)).float() / len(batch.targets) for batch in batches]

    def step() -> object:
        return trainer.fit(batches, weights, lr=1e-4)

    step()  # the optimizer's state is made in the first step
    counted, g = _count(trainer, step, len(batches)), Geometry.of(case.hf_config())
    result: dict[str, Any] = {
        "case": case.name,
        "parameters": memory.model_parameters(g),
        "bytes": {name: _compared(size, counted[name]) for name, size in _forecast_bytes(case, g).items()},
    }
    if case.dtype == "fp32":
        result |= _timed(case, g, step, lambda: trainer.score(batches), repeats)
    return result


def _timed(
    case: Case, g: Geometry, step: Callable[[], object], score: Callable[[], object], repeats: int
) -> dict[str, Any]:
    product, addition = _rates()
    works: dict[str, Callable[[], object]] = {
        "product": product,
        "addition": addition,
        "step": step,
        "score": score,
    }
    runs: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            runs[name].append(_seconds(work))
    medians = {name: statistics.median(times) for name, times in runs.items()}
    rows, inner, columns = PRODUCT
    flops = 2 * rows * inner * columns / medians["product"]
    bytes_per_s = 3 * 4 * ADDED_NUMBERS / medians["addition"]
    machine = _machine(flops, bytes_per_s)
    load, sequences = _workload(case), case.sequences * case.micro_batches
    return {
        "step_s": _compared(timing.training_step(g, machine, load, sequences).total, medians["step"]),
        "score_s": _compared(timing.scoring_pass(g, machine, load, sequences).total, medians["score"]),
        "gflops": flops / 1e9,
        "gb_per_s": bytes_per_s / 1e9,
        "runs_s": runs,
    }


def _assemble(case: Case, layout: ParallelLayout) -> tuple[Trainer, list[MicroBatch]]:
    import torch

    from megatron_ra3.assembly import DTYPES
    from megatron_ra3.model.build import build_model
    from megatron_ra3.model.trainer import MicroBatch, Trainer, build_optimizer

    model = build_model(case.hf_config(), layout, dtype=DTYPES[case.dtype])
    for parameter in model.module.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    tokens = torch.randint(case.vocabulary, (case.micro_batches, case.sequences, case.tokens))
    batches = [MicroBatch(part, torch.arange(part.numel()), part.flatten()) for part in tokens]
    return Trainer(model, build_optimizer(model, lr=1e-4), layout, loss_precision=case.dtype), batches


def _count(trainer: Trainer, step: Callable[[], object], micro_batches: int) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer, and of what a micro-batch keeps for its backward pass."""
    import torch

    parameters = list(trainer.model.module.parameters())
    own = {_storage(parameter) for parameter in parameters}
    kept: dict[int, Tensor] = {}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        place = _storage(tensor)
        if place not in own and place not in kept:
            kept[place] = tensor  # keeps its storage from being used again, and counted twice or not at all
            total += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    gradients = {_storage(parameter.main_grad): parameter.main_grad for parameter in parameters}
    return {
        "weights": sum(parameter.nbytes for parameter in parameters),
        "gradients": sum(tensor.untyped_storage().nbytes() for tensor in gradients.values()),
        "optimizer": sum(tensor.nbytes for tensor in _state(trainer)),
        "activations": total // micro_batches,
    }


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _state(trainer: Trainer) -> Iterator[Tensor]:
    """Tensors of the optimizer that are not the model's: moments, and the fp32 copies of bf16 weights."""
    own = {_storage(parameter) for parameter in trainer.model.module.parameters()}
    for part in trainer.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            yield from (parameter for parameter in group["params"] if _storage(parameter) not in own)
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if hasattr(value, "nbytes"))


def _forecast_bytes(case: Case, g: Geometry) -> dict[str, float]:
    """The same as `ra3 plan` counts them."""
    sharding = memory.Sharding()
    parameters = memory.stage_parameters(g, sharding, 0, row_multiple=1)
    tokens = float(case.sequences * case.tokens)
    shape = memory.MicroBatchShape(tokens=tokens, sequence_tokens=float(case.tokens))
    kept = memory.activation_bytes(g, sharding, 0, case.dtype, shape, in_flight=1, fused=False)
    return {
        "weights": float(DTYPE_BYTES[case.dtype] * parameters),
        "gradients": 4.0 * parameters,
        "optimizer": memory.optimizer_bytes_per_parameter(case.dtype, sharding) * parameters,
        "activations": kept + memory.head_kept_bytes(g, 1, case.dtype, tokens, row_multiple=1),
    }


def _machine(flops: float, bytes_per_s: float) -> timing.Machine:
    alone = Device(
        flops=flops,
        fp8_flops=flops,
        memory_bytes_per_s=bytes_per_s,
        nvlink_bytes_per_s=bytes_per_s,
        network_bytes_per_s=bytes_per_s,
        fused=False,
        row_multiple=1,
    )
    return timing.Machine(device=alone, layout=Layout(gpus_per_node=1, trainer_gpus=1, engine_gpus=0), dtype="fp32")


def _workload(case: Case) -> Workload:
    return Workload(
        snippet_tokens=case.tokens,
        actions=1.0,
        think_rate=0.0,
        rationale_tokens=0.0,
        max_sequence_tokens=case.tokens,
        micro_batch_tokens=case.sequences * case.tokens,
        estep_steps=0,
        estep_snippets=1,
        rollouts=1,
        mstep_steps=1,
        mstep_snippets=case.sequences * case.micro_batches,
        evaluate_snippets=1,
        rounds=0,
        reference=False,
        counterfactual=False,
        teaches_lines=False,
        source="bench",
    )


def _rates() -> tuple[Callable[[], object], Callable[[], object]]:
    import torch

    rows, inner, columns = PRODUCT
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    product = torch.empty(rows, columns)
    one, two, total = torch.randn(3, ADDED_NUMBERS)
    return lambda: torch.mm(left, right, out=product), lambda: torch.add(one, two, out=total)


def _seconds(work: Callable[[], object]) -> float:
    started_s = time.process_time()
    work()
    return time.process_time() - started_s


def _compared(forecast: float, measured: float) -> dict[str, float]:
    return {"forecast": forecast, "measured": measured, "error": forecast / measured - 1.0}
