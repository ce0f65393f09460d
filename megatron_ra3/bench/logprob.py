"""`ra3 bench logprob`: the likelihood kernels beside every other way to compute the same, in time, memory and error.

All providers get the same inputs within one run, three random sets in turn, one provider after the other in every
repeat, so that a machine that slows down slows all of them. What is made once per update of the weights, a quantised
head, is made before. Errors are against float64 on a sample of rows. Operands are random, with outlier channels as real
hidden states have, or those of a model (`--model`), scored on text (`--text`).
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_ra3.bench.result import publish

ERROR_ROWS = 256
INPUTS = 3
"""Sets of inputs that repeats rotate through, so that no cache holds them."""
CHUNK = 1024
"""Rows at a time of the chunked peers."""


@dataclass(frozen=True, kw_only=True)
class LogprobBench:
    """What is measured; the fields are the options of the command."""

    rows: int = 512
    hidden: int = 256
    vocab: int = 32_768
    logit_std: float = 2.4
    outlier_channels: int = 8
    repeats: int = 5
    seed: int = 0
    backward: bool = True
    model: str = ""
    """Hugging Face folder: its output layer, and its own hidden states of `text`, in place of random ones."""
    text: str = ""
    """A UTF-8 file."""
    providers: tuple[str, ...] = field(default=())
    """Default: all that can run here."""

    def __post_init__(self) -> None:
        for name in ("rows", "hidden", "vocab", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if bool(self.model) != bool(self.text):
            raise ValueError("model and text go together: give both or neither")
        unknown = sorted(set(self.providers) - set(PROVIDERS))
        if unknown:
            raise ValueError(f"providers {', '.join(unknown)}: known are {', '.join(PROVIDERS)}")


def add_logprob_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of `LogprobBench` as options, and where to write the result."""
    for name, value in asdict(LogprobBench()).items():
        if isinstance(value, str):
            parser.add_argument(f"--{name}", default=value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, metavar="N")
    parser.add_argument("--no-backward", dest="backward", action="store_false")
    parser.add_argument("--providers", nargs="+", default=(), metavar="NAME", help=f"of {', '.join(PROVIDERS)}")
    parser.add_argument("--out", type=Path, help="also write the result as a JSON file")


def run_logprob(arguments: argparse.Namespace) -> int:
    """Measure as asked; a table, then the result as one JSON object on the last line."""
    given = {name: getattr(arguments, name) for name in asdict(LogprobBench())}
    result = measure(LogprobBench(**given | {"providers": tuple(arguments.providers)}))
    print(table(result))
    return publish(result, arguments.out)


def measure(bench: LogprobBench) -> dict[str, Any]:
    """Per provider: forward and forward+backward milliseconds, TFLOP/s, extra memory, and error in nats.

    `gemm_ms` is the bare product of the same operands, measured in the same run, in bf16 and on a GPU in e4m3;
    `of_gemm` is its time in the provider's precision over the provider's. FLOPs are 2 N H V forward and 6 N H V with
    gradients, whatever a provider really computes.
    """
    import torch

    inputs = [_of_model(bench)] if bench.model else [random_inputs(bench, seed) for seed in range(INPUTS)]
    rows, width = inputs[0].hidden.shape
    flops = 2.0 * rows * width * len(inputs[0].weight)
    names = bench.providers or tuple(PROVIDERS)
    found: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    runners = _runnable({name: PROVIDERS[name] for name in names}, inputs[0], skipped)
    gemms = {"gemm bf16": _gemm} | ({"gemm fp8": _gemm_fp8} if inputs[0].hidden.is_cuda else {})
    walls = _interleaved(bench, inputs, gemms | runners)
    learning = [name for name in runners if bench.backward and name not in NO_GRADIENT]
    trained = {name: functools.partial(_with_gradient, runners[name]) for name in learning}
    trained_too = _runnable(trained, inputs[0], skipped, " with gradients")
    walls_backward = _interleaved(bench, inputs, trained_too)
    gemm_ms = {name: 1e3 * statistics.median(walls[name]) for name in gemms}
    for name, run in runners.items():
        forward = 1e3 * statistics.median(walls[name])
        ceiling = gemm_ms.get("gemm fp8" if name in FP8 else "gemm bf16", gemm_ms["gemm bf16"])
        found[name] = {
            "forward_ms": forward,
            "forward_ms_range": [1e3 * min(walls[name]), 1e3 * max(walls[name])],
            "forward_tflops": flops / forward / 1e9,
            "of_gemm": ceiling / forward,
            **_errors(run, inputs[0]),
            **_memory(run, inputs[0]),
        }
        if name in walls_backward:
            both = 1e3 * statistics.median(walls_backward[name])
            found[name] |= {"forward_backward_ms": both, "forward_backward_tflops": 3 * flops / both / 1e9}
    return {
        "fp8_rescored_vs_best_bf16_peer": _against_peers(found),
        "providers": found,
        "skipped": skipped,
        "gemm_ms": gemm_ms,
        "entropy": _mean_entropy(inputs[0]),
        "shape": {"rows": rows, "hidden": width, "vocab": len(inputs[0].weight)},
        "settings": asdict(bench),
        "machine": {
            "device": torch.cuda.get_device_name() if inputs[0].hidden.is_cuda else platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[0],
            "torch": torch.__version__,
        },
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown, fastest first."""
    lines = [
        "| provider | forward, ms | of the GEMM, % | forward+backward, ms | extra memory, MB | rms error, nats | max |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(result["providers"].items(), key=lambda item: item[1]["forward_ms"]):
        both = f"{row['forward_backward_ms']:.2f}" if "forward_backward_ms" in row else "-"
        memory = f"{row['extra_mb']:.0f}" if "extra_mb" in row else "-"
        lines.append(
            f"| {name} | {row['forward_ms']:.2f} | {100 * row['of_gemm']:.0f} | {both} | {memory} "
            f"| {row['rms_error']:.2g} | {row['max_error']:.2g} |"
        )
    lines += [f"\nNot run: {name} ({reason})" for name, reason in result["skipped"].items()]
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Inputs:
    """hidden [N, H], weight [V, H], targets [N]."""

    hidden: Any
    weight: Any
    targets: Any
    cache: dict[str, Any] = field(default_factory=dict)
    """What a provider makes once per update of the weights, such as a quantised head."""

    def leaves(self) -> Inputs:
        """The same, to take gradients."""
        hidden, weight = (item.detach().requires_grad_() for item in (self.hidden, self.weight))
        return Inputs(hidden, weight, self.targets, self.cache)


def random_inputs(bench: LogprobBench, seed: int) -> Inputs:
    """Random operands with outlier channels, and targets drawn from their law."""
    import torch

    device = _device()
    draw = torch.Generator(device).manual_seed(bench.seed * INPUTS + seed)
    hidden = torch.randn(bench.rows, bench.hidden, generator=draw, device=device)
    hidden[:, : bench.outlier_channels] *= 10.0
    weight = torch.randn(bench.vocab, bench.hidden, generator=draw, device=device)
    weight[:, : bench.outlier_channels] *= 0.3
    scale = hidden.square().sum(1).mean().sqrt() * weight.square().mean().sqrt()
    weight *= bench.logit_std / scale
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    return Inputs(hidden, weight, _on_policy(hidden, weight, seed))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _of_model(bench: LogprobBench) -> Inputs:
    """Final hidden states of a Hugging Face model at every token of a text, and the tokens that follow."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_ra3.corpus.tokenizer import load_tokenizer

    model = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32).eval()
    tokens = load_tokenizer(Path(bench.model)).encode(Path(bench.text).read_text(encoding="utf-8"))
    length = min(256, model.config.max_position_embeddings)
    pieces = torch.tensor(tokens[: (bench.rows // length + 2) * length])
    hidden, targets = [], []
    with torch.no_grad():
        for piece in pieces.split(length):
            hidden.append(model.model(piece[None])[0][0, :-1])
            targets.append(piece[1:])
    rows, device = slice(0, bench.rows), _device()
    weight = model.get_output_embeddings().weight.detach()
    return Inputs(
        torch.cat(hidden)[rows].bfloat16().to(device), weight.bfloat16().to(device), torch.cat(targets)[rows].to(device)
    )


def _on_policy(hidden: Any, weight: Any, seed: int) -> Any:
    """Targets drawn from the law, chunk by chunk."""
    import torch

    generator = torch.Generator(hidden.device).manual_seed(seed)
    chunks = [(rows.float() @ weight.float().T).softmax(dim=1) for rows in hidden.split(CHUNK)]
    return torch.cat([torch.multinomial(chunk, 1, generator=generator).squeeze(1) for chunk in chunks])


# --- providers


def _ours(precision: str) -> Callable[[Inputs], Any]:
    def run(given: Inputs) -> Any:
        from megatron_ra3.kernels import HeadCache, linear_logprob

        cache = given.cache.setdefault("head", HeadCache()) if precision.startswith("fp8") else None
        return linear_logprob(given.hidden, given.weight, given.targets, precision=precision, cache=cache)  # type: ignore[arg-type]

    return run


def _ours_as_loss(precision: str) -> Callable[[Inputs], Any]:
    """What the M-step calls: the same without gradients, one product less with."""

    def run(given: Inputs) -> Any:
        import torch

        from megatron_ra3.kernels import linear_cross_entropy

        if not torch.is_grad_enabled():
            return _ours(precision)(given)
        ones = torch.ones(len(given.targets), device=given.hidden.device)
        return linear_cross_entropy(given.hidden, given.weight, given.targets, ones, precision=precision)  # type: ignore[arg-type]

    return run


def _eager(given: Inputs) -> Any:
    """The whole [N, V] in bf16, then log-softmax in fp32."""
    logits = given.hidden @ given.weight.T
    return logits.float().log_softmax(dim=1).gather(1, given.targets[:, None]).squeeze(1)


def _chunked(given: Inputs) -> Any:
    """`_eager` on `CHUNK` rows at a time, without its logits kept for the backward pass."""
    import torch
    from torch.utils.checkpoint import checkpoint

    parts = []
    for hidden, targets in zip(given.hidden.split(CHUNK), given.targets.split(CHUNK), strict=True):
        part = Inputs(hidden, given.weight, targets)
        parts.append(checkpoint(_eager, part, use_reentrant=False) if torch.is_grad_enabled() else _eager(part))
    return torch.cat(parts)


def _compiled(given: Inputs) -> Any:
    """`_chunked` with its chunk compiled by torch."""
    import torch

    if not given.hidden.is_cuda:
        raise NotImplementedError("torch.compile needs a C++ compiler at run time on a CPU")
    compiled = _compile()
    pairs = zip(given.hidden.split(CHUNK), given.targets.split(CHUNK), strict=True)
    return torch.cat([compiled(hidden, given.weight, targets) for hidden, targets in pairs])


@functools.cache
def _compile() -> Callable[..., Any]:
    import torch

    return torch.compile(lambda hidden, weight, targets: _eager(Inputs(hidden, weight, targets)))


def _scaled_mm(given: Inputs) -> Any:
    """FP8 by torch's own GEMM, row-wise scales, chunked: what is there without a fused kernel."""
    import torch

    from megatron_ra3.kernels import fp8

    if not given.hidden.is_cuda:
        raise NotImplementedError("torch._scaled_mm with row-wise scales needs a GPU")
    head = _by_rows(given, "weight")
    parts = []
    for hidden, targets in zip(given.hidden.split(CHUNK), given.targets.split(CHUNK), strict=True):
        logits = _product(fp8.quantize(hidden, 1), head)
        parts.append(logits.float().log_softmax(dim=1).gather(1, targets[:, None]).squeeze(1))
    return torch.cat(parts)


def _by_rows(given: Inputs, name: str) -> Any:
    """One of the operands in e4m3 with a scale per row, quantised once."""
    from megatron_ra3.kernels import fp8

    key = f"{name} by rows"
    if key not in given.cache:
        given.cache[key] = fp8.quantize(getattr(given, name), 1)
    return given.cache[key]


def _product(left: Any, right: Any) -> Any:
    import torch

    return torch._scaled_mm(  # noqa: SLF001
        left.values, right.values.T, scale_a=left.scales[:, None], scale_b=right.scales[None],
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip


def _liger(given: Inputs) -> Any:
    """Liger-Kernel's fused linear cross-entropy, gradients added up in fp32, about `CHUNK` rows at a time."""
    import torch
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    vocab, hidden = given.weight.shape
    chunks_of = max(1, CHUNK * vocab // (hidden * len(given.hidden)))
    options = (None, None, -100, 0.0, 0.0, "none", None, False, torch.float32, False, False, False, None, None)
    loss = LigerFusedLinearCrossEntropyFunction.apply(given.hidden, given.weight, given.targets, *options, chunks_of)
    return -(loss[0] if isinstance(loss, tuple) else loss)


def _liger_scaled(given: Inputs) -> Any:
    """Liger-Kernel's per-token likelihood: its CuTe kernels on Hopper if installed, else torch in chunks."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(given.hidden, given.weight, given.targets)


def _verl(given: Inputs) -> Any:
    """The Triton kernels of verl, which compute the entropy too."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(given.hidden, given.weight, given.targets, 1.0, "none")[0]


def _cut_cross_entropy(given: Inputs) -> Any:
    """Apple's cut cross-entropy."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(given.hidden, given.weight, given.targets, reduction="none")


def _quack(given: Inputs) -> Any:
    """QuACK: its GEMM with a log-sum-exp epilogue, no logits kept; with gradients its chunked loss, summed."""
    import torch
    from quack.epilogue.library import lse_target_epi
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    if not given.hidden.is_cuda:
        raise NotImplementedError("QuACK's kernels need a GPU")
    if torch.is_grad_enabled():
        return -chunked_linear_cross_entropy(given.hidden, given.weight, given.targets, reduction="sum")
    found = lse_target_epi(given.hidden, given.weight.mT, store_d=False, target=given.targets, tuned=False)
    return found["target_logit"] - found["lse"]


PROVIDERS: dict[str, Callable[[Inputs], Any]] = {
    "ours fp32": _ours("fp32"),
    "ours bf16": _ours("bf16"),
    "ours fp32 loss": _ours_as_loss("fp32"),
    "ours bf16 loss": _ours_as_loss("bf16"),
    "ours fp8": _ours("fp8"),
    "ours fp8_rescored": _ours("fp8_rescored"),
    "torch eager": _eager,
    "torch chunked": _chunked,
    "torch.compile": _compiled,
    "torch._scaled_mm": _scaled_mm,
    "liger": _liger,
    "liger scaled": _liger_scaled,
    "verl": _verl,
    "cut-cross-entropy": _cut_cross_entropy,
    "quack": _quack,
}
NO_GRADIENT = ("ours fp8", "torch._scaled_mm")
FP8 = ("ours fp8", "ours fp8_rescored", "torch._scaled_mm")
BF16_PEERS = (
    "torch eager", "torch chunked", "torch.compile", "liger", "liger scaled", "verl", "cut-cross-entropy", "quack",
)  # fmt: skip


# --- measuring


def _gemm(given: Inputs) -> Any:
    return given.hidden @ given.weight.T


def _gemm_fp8(given: Inputs) -> Any:
    return _product(_by_rows(given, "hidden"), _by_rows(given, "weight"))


def _with_gradient(run: Callable[[Inputs], Any], given: Inputs) -> None:
    import torch

    found = run(given.leaves())
    found.backward(torch.ones_like(found))


def _runnable(
    runs: Mapping[str, Callable[[Inputs], Any]], given: Inputs, skipped: dict[str, str], what: str = ""
) -> dict[str, Callable[[Inputs], Any]]:
    """Those that run once; `skipped` gets the others' reasons."""
    import torch

    found = {}
    for name, run in runs.items():
        try:
            with torch.set_grad_enabled(isinstance(run, functools.partial)):
                run(given)
            found[name] = run
        except (
            AssertionError,
            ImportError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:  # out of memory too
            skipped[name + what] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return found


def _interleaved(
    bench: LogprobBench, inputs: list[Inputs], runs: Mapping[str, Callable[[Inputs], Any]]
) -> dict[str, list[float]]:
    """Seconds of every repeat, all runs taking turns; the first round is not measured."""
    import torch

    walls: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-1, bench.repeats):
        for name, run in runs.items():
            with torch.set_grad_enabled(isinstance(run, functools.partial)):
                _wait()
                started = time.perf_counter()
                run(inputs[repeat % len(inputs)])
                _wait()
            if repeat >= 0:
                walls[name].append(time.perf_counter() - started)
    return walls


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _exact(given: Inputs) -> Iterator[Any]:
    """Log-softmax in float64 of the first ERROR_ROWS rows, a few at a time."""
    weight = given.weight.double()
    for rows in given.hidden[:ERROR_ROWS].double().split(32):
        yield (rows @ weight.T).log_softmax(dim=1)


def _errors(run: Callable[[Inputs], Any], given: Inputs) -> dict[str, float]:
    import torch

    with torch.no_grad():
        found = run(given)[:ERROR_ROWS].double()
        laws = zip(_exact(given), given.targets[:ERROR_ROWS].split(32), strict=True)
        true = torch.cat([law.gather(1, targets[:, None]).squeeze(1) for law, targets in laws])
    gap = found - true
    return {
        "rms_error": float(gap.square().mean().sqrt()),
        "mean_error": float(gap.mean()),
        "max_error": float(gap.abs().max()),
        "positive": int((found > 0).sum()),
    }


def _mean_entropy(given: Inputs) -> float:
    values = [float(-(law.exp() * law).sum(dim=1).mean()) for law in _exact(given)]
    return statistics.fmean(values)


def _memory(run: Callable[[Inputs], Any], given: Inputs) -> dict[str, float]:
    import torch

    if not given.hidden.is_cuda:
        return {}
    _wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        run(given)
    return {"extra_mb": (torch.cuda.max_memory_allocated() - before) / 2**20}


def _against_peers(found: dict[str, Any]) -> float | None:
    """How many times faster fp8_rescored is than the fastest bf16 peer that ran, forward."""
    peers = [found[name]["forward_ms"] for name in BF16_PEERS if name in found]
    own = found.get("ours fp8_rescored", {}).get("forward_ms", math.nan)
    return min(peers) / own if peers and own == own else None
