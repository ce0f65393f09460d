"""Counts what the runs of the positive control cost, so that baselines get as much.

Two measures: tokens that a gradient came from, and floating-point operations by the cost model of README.md beside it.
Sampling is counted as on an engine with a key-value cache, one forward pass over each rollout; the in-process engine
has no cache and computes more, which is no property of the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PASSES = {"warmup": 3, "estep": 5, "bootstrap": 1, "mstep": 3}
"""Forward passes per token that a phase amounts to; a backward pass is worth two."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Tokens a gradient came from, and floating-point operations of everything."""

    training_tokens: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.training_tokens + other.training_tokens, self.flops + other.flops)


def forward_flops(model: Mapping[str, Any], tokens_per_program: float) -> float:
    """Operations per token of one forward pass through a model of the Qwen2 family: F = 2 P + 4 L H N.

    P counts the weights of all matrices, the output layer included and the embedding look-up not: per layer
    H (H + 2 H_kv) + H^2 for attention and 3 H I for the feed-forward part, and H V. L layers of width H attend to all N
    tokens of a program, future ones computed and masked.
    """
    width, layers = model["hidden_size"], model["num_hidden_layers"]
    kv_width = width * model["num_key_value_heads"] // model["num_attention_heads"]
    per_layer = width * (width + 2 * kv_width) + width * width + 3 * width * model["intermediate_size"]
    weights = layers * per_layer + width * model["vocab_size"]
    return 2.0 * weights + 4.0 * layers * width * tokens_per_program


def run_cost(
    steps: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    model: Mapping[str, Any],
    *,
    lines: int,
    act_tokens: float,
) -> Cost:
    """Cost of a run, evaluations left out; F as in `forward_flops`.

    Warm-up and M-step: 3 F n for n tokens. E-step: S G rollouts of n = N + f T l tokens each take F n to sample, F n
    for the reward and 3 F n for the update; each counts, though equal ones are scored once. Bootstrapping: F n.

    Args:
        steps: the records of its metrics.jsonl.
        settings: its config as nested plain values.
        model: its Hugging Face config.
        lines: T, lines per program.
        act_tokens: N, tokens of a program with `<act>` before every line.
    """
    total = Cost()
    for step in steps:
        phase = step["phase"]
        if phase == "evaluate":
            continue
        programs = settings["mstep" if phase == "bootstrap" else phase]["snippets_per_step"]
        if phase == "estep":
            programs *= settings["estep"]["rollouts_per_snippet"]
        length = act_tokens + step["think_rate"] * lines * step["rationale_tokens"]
        tokens = step.get("tokens", programs * length)
        total += Cost(
            training_tokens=0.0 if phase == "bootstrap" else tokens,
            flops=PASSES[phase] * tokens * forward_flops(model, length),
        )
    return total
