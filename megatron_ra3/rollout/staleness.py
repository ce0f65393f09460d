"""How old the weights behind a rollout may be, and how old they are, in steps that changed the weights.

An update of version v may use what versions v - `max_staleness_steps` to v have sampled. The bound is kept by beginning
a step only when weights fresh enough for it are live, and checked on every latent when it is used: an engine that
serves other weights would teach from wrong log-probs without a word. Pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ra3.latents import Trajectory
from megatron_ra3.rollout.engine import EngineError


def steps_to_begin(begun: int, *, steps_left: int, max_staleness_steps: int) -> int:
    """How many more steps may be sampled from now on, with the weights of the current step live.

    Args:
        begun: steps whose sampling has begun, the current one perhaps among them, and that are not used yet.
        steps_left: steps of the phase that are not done; the phase after it must not find any begun.
        max_staleness_steps: the bound.
    """
    return max(0, min(1 + max_staleness_steps, steps_left) - begun)


@dataclass(frozen=True, slots=True)
class Staleness:
    """Of the sampled decisions of some rollouts: how many, the sum of their staleness, and the most, in steps."""

    decisions: int
    total_steps: int
    most_steps: int


def staleness(groups: Sequence[Sequence[Trajectory]], current: int, *, max_staleness_steps: int) -> Staleness:
    """Staleness of rollouts that version `current` shall learn from; EngineError where a decision breaks the bound."""
    versions = [
        version
        for group in groups
        for item in group
        for version, drawn in zip(item.weight_versions, item.sampled, strict=True)
        if drawn
    ]
    if any(not current - max_staleness_steps <= version <= current for version in versions):
        allowed = f" and estep.max_staleness_steps={max_staleness_steps}" if max_staleness_steps else ""
        raise EngineError(
            f"rollouts came with weight versions {sorted(set(versions))}, the trainer is at {current}{allowed}: give "
            "every run engines of its own (engine.urls)"
        )
    ages = [current - version for version in versions]
    return Staleness(len(ages), sum(ages), max(ages, default=0))
