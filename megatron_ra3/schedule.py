"""Which phase a run is in, and the learning rate there. Pure Python, so that resuming is arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatron_ra3.config import NextTokenConfig, RunConfig
from megatron_ra3.rlvr_config import RlvrRunConfig

PhaseName = Literal["warmup", "estep", "bootstrap", "mstep", "rlvr", "evaluate"]


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of equal steps; `round` counts EM rounds from 1, 0 is before them."""

    name: PhaseName
    round: int
    steps: int


@dataclass(slots=True)
class Progress:
    """Where a run stands: enough, with weights, optimizer and stream cursor, to go on as if never stopped."""

    phase: int = 0
    """Index into `phases(config)`."""
    step: int = 0
    """Finished steps of that phase."""
    total_steps: int = 0
    phase_tokens: int = 0
    """Tokens trained on in this phase, over all ranks."""
    mstep_tokens: int = 0
    """Tokens trained on in M-steps so far."""
    weight_version: int = 0
    """Counts steps that may change the weights; tags every sampled latent."""

    def to_json(self) -> dict[str, Any]:
        """Plain dict."""
        return asdict(self)


def phases(config: RunConfig) -> list[Phase]:
    """All phases of a run in order; phases without steps are left out.

    Without EM rounds this is plain next-token training: the NTP baseline, or a base model from scratch. An objective
    without latents has no E-step.
    """

    def planned() -> Iterator[Phase]:
        yield Phase("warmup", 0, config.warmup.steps)
        if not config.em.rounds:
            yield Phase("evaluate", 0, 1)
        for number in range(1, config.em.rounds + 1):
            yield Phase("estep", number, 0 if config.objective.gate == "never" else config.estep.steps)
            yield Phase("bootstrap", number, config.mstep.steps)
            yield Phase("mstep", number, config.mstep.steps)
            yield Phase("evaluate", number, 1)

    return [phase for phase in planned() if phase.steps > 0]


def rlvr_phases(config: RlvrRunConfig) -> list[Phase]:
    """All phases of RLVR in order: an evaluation, then rounds of `evaluate.every_steps` steps with one after each."""
    every = config.evaluate.every_steps
    if not every:
        return [Phase("rlvr", 1, config.rlvr.steps)]
    found = [Phase("evaluate", 0, 1)]
    for number in range(1, config.rlvr.steps // every + 1):
        found += [Phase("rlvr", number, every), Phase("evaluate", number, 1)]
    return found


def phase_fraction(config: NextTokenConfig, *, step: int, tokens: int) -> float:
    """How much of a next-token phase is done, in [0, 1]: by tokens if `max_tokens` is set, else by steps."""
    by_steps = step / config.steps
    return max(by_steps, tokens / config.max_tokens) if config.max_tokens else by_steps


def learning_rate(config: NextTokenConfig, fraction: float) -> float:
    """Linear warm-up over `lr_warmup_fraction`, then a cosine down to `lr_final_fraction` of the peak."""
    if fraction < config.lr_warmup_fraction:
        return config.learning_rate * (fraction + 1 / config.steps) / (config.lr_warmup_fraction + 1 / config.steps)
    done = (fraction - config.lr_warmup_fraction) / max(1.0 - config.lr_warmup_fraction, 1e-9)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
    return config.learning_rate * (config.lr_final_fraction + (1.0 - config.lr_final_fraction) * cosine)
