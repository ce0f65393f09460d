"""Which backend computes what: Triton on a Hopper GPU, torch elsewhere, and every fallback counted with its reason."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from megatron_ra3.kernels import fp8, reference
from megatron_ra3.kernels.partials import Merged, Normaliser
from megatron_ra3.kernels.problem import Gradients, LossGradients, Options, Problem

if TYPE_CHECKING:
    from megatron_ra3.kernels.fp8 import HeadCache
    from megatron_ra3.kernels.problem import Precision

_FALLBACKS: Counter[str] = Counter()
ALIGNMENT_BYTES = 16
"""What the tensor memory accelerator asks of a tensor's first byte and of a row's length."""
TRITON = (3, 6)
"""The oldest version that the kernels are written for."""


class Backend(Protocol):
    """One way to compute partials and gradients."""

    def forward(self, problem: Problem, precision: Precision, cache: HeadCache | None) -> Tensor:
        """Partials [4, N] of this shard."""

    def backward(self, problem: Problem, norm: Normaliser, entropy: Tensor, grads: Gradients) -> tuple[Tensor, Tensor]:
        """Gradients of hidden [N, H], this shard's part, and of weight [V, H]."""

    def cross_entropy(
        self, problem: Problem, token_weights: Tensor, block_rows: int, merge: Callable[[Tensor], Merged]
    ) -> LossGradients:
        """Log-probs and the gradients of -sum(token_weights · log-prob).

        `merge` is called on the partials of `block_rows` rows at a time, as often on all ranks.
        """


class TorchBackend:
    """`reference`, and `fp8` in torch."""

    def forward(self, problem: Problem, precision: Precision, cache: HeadCache | None) -> Tensor:
        """Partials [4, N] of this shard."""
        if precision in ("fp32", "bf16"):
            return reference.forward(problem)
        return fp8.forward(problem, quantized_head(problem, cache), rescored=precision == "fp8_rescored")

    def backward(self, problem: Problem, norm: Normaliser, entropy: Tensor, grads: Gradients) -> tuple[Tensor, Tensor]:
        """Gradients of hidden [N, H], this shard's part, and of weight [V, H]."""
        return reference.backward(problem, norm, entropy, grads)

    def cross_entropy(
        self, problem: Problem, token_weights: Tensor, block_rows: int, merge: Callable[[Tensor], Merged]
    ) -> LossGradients:
        """Log-probs and the gradients of -sum(token_weights · log-prob), `block_rows` rows at a time."""
        return reference.cross_entropy(problem, token_weights, block_rows, merge)


def quantized_head(problem: Problem, cache: HeadCache | None) -> fp8.Head:
    """The problem's weight in e4m3, from the cache where there is one."""
    if cache is None:
        return fp8.Head.of(problem.weight)
    return cache.get(problem.weight)


def choose(problem: Problem, precision: Precision) -> Backend:
    """The kernels, or torch where they cannot be used (counted) or fp32 was asked for."""
    if precision == "fp32" or not len(problem.hidden) or not len(problem.weight):
        return TorchBackend()
    reason = refusal(problem, precision)
    if reason is None:
        return _triton_backend()
    _FALLBACKS[reason] += 1
    return TorchBackend()


def in_use(hidden_size: int, precision: Precision, device: str) -> str:
    """Which backend takes a precision of an output layer of this hidden size: `Triton`, or `torch` and why."""
    if precision == "fp32":
        return "torch, exact"
    hidden, target = torch.zeros(1, hidden_size, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    reason = refusal(Options(None, 1, 1.0, precision).problem(hidden, hidden, target), precision)
    return f"torch: {reason}" if reason else "Triton"


def take_fallbacks() -> Counter[str]:
    """How often the torch backend took a call meant for the kernels, by reason, since this was last asked."""
    taken = Counter(_FALLBACKS)
    _FALLBACKS.clear()
    return taken


def refusal(problem: Problem, precision: Precision) -> str | None:
    """Why the kernels cannot take this problem; None where they can."""
    width = problem.hidden.shape[1]
    bytes_per_row = width * (1 if precision.startswith("fp8") else problem.hidden.element_size())
    if (width * problem.hidden.element_size()) % ALIGNMENT_BYTES or bytes_per_row % ALIGNMENT_BYTES:
        return f"hidden size {width} at {precision}: a row must be a multiple of {ALIGNMENT_BYTES} bytes"
    if any(item.data_ptr() % ALIGNMENT_BYTES for item in (problem.hidden, problem.weight)):
        return f"a tensor does not begin at a multiple of {ALIGNMENT_BYTES} bytes"
    found = _triton_version()
    if found < TRITON:
        return f"triton {'.'.join(map(str, found))} is older than 3.6" if found else "triton is not installed"
    if _interpreted():
        return None
    if not problem.hidden.is_cuda:
        return "no CUDA device"
    capability = torch.cuda.get_device_capability(problem.hidden.device)
    if capability != (9, 0):
        return f"compute capability {capability[0]}.{capability[1]} is not 9.0"
    return None


@functools.cache
def _triton_version() -> tuple[int, ...]:
    """Major and minor; empty where Triton is missing."""
    try:
        return tuple(map(int, version("triton").split(".")[:2]))
    except PackageNotFoundError:
        return ()


def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def _triton_backend() -> Backend:
    from megatron_ra3.kernels.triton_backend import TritonBackend

    return TritonBackend()
