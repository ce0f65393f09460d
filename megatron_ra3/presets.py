"""What the E-step optimises: one parameterised objective, and published methods as corners of it (algorithm.md 2, 3).

Settings only, imported by `config`; the formulas that read them stand in `objective`. Pure Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

PresetName = Literal["ra3", "ntp", "rlp", "brite", "latro"]
Granularity = Literal["line", "statement", "token", "snippet"]
Gate = Literal["sampled", "always", "never"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The objective of the E-step (algorithm.md 2, 3); the defaults are `ra3`."""

    preset: PresetName = "ra3"
    """Where the other settings of this section start from; what is given beside it wins."""
    granularity: Granularity = "line"
    """What one action is: a logical line, an innermost compound statement with its body, a token, or the whole snippet.
    `token` needs `latents.surface=special`."""
    gate: Gate = "sampled"
    """`sampled`: the model decides before each action; `always`, `never`: it is told."""
    latent_cost: Literal["penalty", "sticky_kl"] = "penalty"
    """`penalty`: c per rationale; `sticky_kl`: KL to the sticky prior instead, its content against the reference. The
    bound itself takes `line_reward=sum`: with `mean`, the KL weighs as much as a line's tokens more."""
    penalty: float = 0.05
    """c: nats taken from the line reward for each rationale, for `latent_cost=penalty`."""
    stickiness: float = 0.9
    """alpha': prior probability of keeping the rationale, for `latent_cost=sticky_kl`."""
    line_reward: Literal["mean", "sum"] = "mean"
    """Token mean or sum of a line's log-prob (nats)."""
    format_penalty: float = 1.0
    """Nats taken for a rationale that is empty, unclosed or over the cap."""
    horizon: int = 8
    """H: actions over which a return adds rewards."""
    discount: float = 1.0
    """gamma of the return."""
    baseline: Literal["group", "counterfactual", "both"] = "group"
    """`group`: leave-one-out mean of the other rollouts; `counterfactual`: the line's reward without the rationale,
    at one more forward pass per rationale; `both`: the first of what the second leaves."""
    reference_kl: float = 0.0
    """beta: weight of KL(q to q_ref) on rationale tokens; q_ref has the weights that the run started from."""
    importance_weight: Literal["truncate", "mask"] = "truncate"
    """Trainer/engine weights above the maximum: cut down to it, or out; `mask` also drops those below its inverse."""
    max_importance_weight: float = 2.0
    ppo_clip: float = 0.0
    """If positive, PPO's clipped surrogate with this half-width takes the place of the weighted log-prob."""
    gate_exploration: float = 0.0
    """epsilon: the gate is drawn from (1-epsilon) q + epsilon/2. With per-decision weights the gradient is that of the
    exploring policy's return; switch it off to optimise the policy's own. The E-step alone explores."""
    gate_entropy_floor: float = 0.0
    """If positive, a gate whose entropy (nats, below log 2) is lower pays `gate_entropy_weight` times the gap."""
    gate_entropy_weight: float = 1.0
    line_gradient: float = 0.0
    """mu: weight of the reward's own gradient, which teaches lines beside latents. With 0 only latents learn, but
    through weights that lines share: a small model unlearns its lines if the step is not small. With 1 the step ascends
    J in all weights."""

    @property
    def needs_reference(self) -> bool:
        """Whether rationale tokens are scored under the reference weights too."""
        return self.reference_weight > 0.0

    @property
    def reference_weight(self) -> float:
        """Weight of log q - log q_ref of a rationale's tokens in the reward."""
        return self.reference_kl + (1.0 if self.latent_cost == "sticky_kl" else 0.0)

    @classmethod
    def of(cls, preset: PresetName, **settings: Any) -> ObjectiveConfig:
        """A preset with some settings changed."""
        return cls(**cls.with_preset({"preset": preset, **settings}))

    @staticmethod
    def with_preset(settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of the named preset (default `ra3`) with `settings` over them; unknown names pass unchanged."""
        return {**PRESETS.get(settings.get("preset", "ra3"), {}), **settings}


_WHOLE_SNIPPET: dict[str, Any] = {
    "granularity": "snippet",
    "gate": "always",
    "penalty": 0.0,
    "line_reward": "sum",
    "horizon": 1,
}
PRESETS: dict[PresetName, dict[str, Any]] = {
    "ra3": {},
    "ntp": {"gate": "never"},
    "rlp": {"granularity": "token", "gate": "always", "penalty": 0.0, "horizon": 1, "baseline": "counterfactual"},
    "brite": {**_WHOLE_SNIPPET, "reference_kl": 1.0},
    "latro": {**_WHOLE_SNIPPET, "reference_kl": 0.05, "line_gradient": 1.0},
}
"""Settings of each preset that differ from the defaults of `ObjectiveConfig`."""
