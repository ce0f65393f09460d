"""Seconds of every step of an EM round on a given layout, and which part of them to attack first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megatron_ra3.launch.hardware import DTYPE_BYTES
from megatron_ra3.launch.memory import model_parameters
from megatron_ra3.launch.timing import (
    Machine,
    Sampling,
    StepTime,
    layer_flops,
    sampling,
    scoring_pass,
    sync_seconds,
    training_step,
)
from megatron_ra3.launch.workload import Workload
from megatron_ra3.model.geometry import Geometry

HOST_BYTES_PER_S = 20e9
"""Between GPU and host memory: what copies of the reference's weights run at (PCIe 5, pageable); an assumption."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """What a configuration lets the engines do."""

    max_in_flight: int
    cached_sequences: int
    fp8_rewards: bool
    asynchronous: bool
    """Sampling for the next step overlaps with scoring and updating."""


@dataclass(frozen=True, kw_only=True)
class EStepTime:
    """Seconds of one E-step step."""

    sync: float
    sampling: Sampling
    scoring: StepTime
    update: StepTime
    reference: float
    """Copies of weights to and from the host for the reference policy."""
    asynchronous: bool

    @property
    def trainer(self) -> float:
        """Scoring and updating."""
        return self.scoring.total + self.update.total + self.reference

    @property
    def seconds(self) -> float:
        """The whole step."""
        parts = (self.sampling.seconds, self.trainer)
        return self.sync + (max(parts) if self.asynchronous else sum(parts))

    @property
    def engines_busy(self) -> float:
        """Share of the step in which engines sample."""
        return self.sampling.seconds / self.seconds

    @property
    def trainers_busy(self) -> float:
        """Share of the step in which trainers compute."""
        return self.trainer / self.seconds


@dataclass(frozen=True, kw_only=True)
class RoundTime:
    """Seconds of one EM round; `estep` and `bootstrap` are None where nothing is sampled."""

    estep: EStepTime | None
    bootstrap: Sampling | None
    mstep: StepTime
    evaluation: float
    estep_steps: int
    mstep_steps: int

    @property
    def estep_seconds(self) -> float:
        """All E-step steps."""
        return self.estep_steps * self.estep.seconds if self.estep else 0.0

    @property
    def bootstrap_seconds(self) -> float:
        """Annotating the snippets of all M-step steps, and one sync."""
        if self.bootstrap is None or self.estep is None:
            return 0.0
        return self.mstep_steps * self.bootstrap.seconds + self.estep.sync

    @property
    def mstep_seconds(self) -> float:
        """All M-step steps."""
        return self.mstep_steps * self.mstep.total

    @property
    def seconds(self) -> float:
        """The whole round."""
        return self.estep_seconds + self.bootstrap_seconds + self.mstep_seconds + self.evaluation


class Share(NamedTuple):
    """A part of a round, and what makes it smaller."""

    name: str
    seconds: float
    fix: str


def forecast(g: Geometry, machine: Machine, work: Workload, sampler: Sampler) -> RoundTime:
    """What a round takes."""
    mstep = training_step(g, machine, work, work.mstep_snippets)
    evaluation = 2 * scoring_pass(g, machine, work, work.evaluate_snippets).total
    if not work.samples_latents:
        return RoundTime(
            estep=None, bootstrap=None, mstep=mstep, evaluation=evaluation, estep_steps=0, mstep_steps=work.mstep_steps
        )

    def samples(snippets: int, rollouts: int) -> Sampling:
        return sampling(
            g,
            machine,
            work,
            snippets=snippets,
            rollouts=rollouts,
            max_in_flight=sampler.max_in_flight,
            cached_sequences=sampler.cached_sequences,
        )

    rollouts = work.estep_snippets * work.rollouts
    scoring = scoring_pass(g, machine, work, rollouts, fp8=sampler.fp8_rewards)
    if work.counterfactual:  # a variant per rationale, half a trajectory long on average
        scoring += scoring_pass(g, machine, work, rollouts * work.thinks / 2)
    copying = 0.0
    if work.reference:
        scoring += scoring_pass(g, machine, work, rollouts)
        copying = 3 * _weight_bytes(g, machine) / HOST_BYTES_PER_S
    decisions = 1.0 if work.teaches_lines else (work.actions + work.latent_tokens) / work.trajectory_tokens
    estep = EStepTime(
        sync=sync_seconds(g, machine),
        sampling=samples(work.estep_snippets, work.rollouts),
        scoring=scoring,
        update=training_step(g, machine, work, rollouts, head_rows=decisions, head_products=4),
        reference=copying,
        asynchronous=sampler.asynchronous,
    )
    return RoundTime(
        estep=estep,
        bootstrap=samples(work.mstep_snippets, 1),
        mstep=mstep,
        evaluation=evaluation + samples(work.evaluate_snippets, 1).seconds,
        estep_steps=work.estep_steps,
        mstep_steps=work.mstep_steps,
    )


def _weight_bytes(g: Geometry, machine: Machine) -> float:
    return model_parameters(g) / machine.layout.replica_gpus * DTYPE_BYTES[machine.dtype]


def model_flops(g: Geometry, sequence_tokens: float) -> float:
    """Useful products of a training step per token, forward and backward: what utilisation is measured by."""
    return 3 * (g.layers * layer_flops(g, 1.0, sequence_tokens, fused=True) + 2 * g.hidden * g.vocab)


def bottlenecks(times: RoundTime, work: Workload, sampler: Sampler) -> list[Share]:
    """Parts of the round, longest first; what an asynchronous E-step hides behind something longer is no part."""
    steps = times.mstep_steps
    shares = _training_shares(times.mstep, steps, "M-step")
    estep = times.estep
    if estep is not None and times.bootstrap is not None:
        count = times.estep_steps
        hides_sampling = estep.asynchronous and estep.trainer >= estep.sampling.seconds
        hides_training = estep.asynchronous and not hides_sampling
        if not hides_sampling:
            shares += _sampling_shares(estep.sampling, count, "E-step", sampler, work.estep_snippets * work.rollouts)
        if not hides_training:
            shares += _training_shares(estep.update, count, "E-step update")
            shares.append(
                Share(
                    "E-step scoring",
                    count * (estep.scoring.total + estep.reference),
                    "set model.reward_precision=fp8_rescored, or baseline=group where it is counterfactual",
                )
            )
        shares += _sampling_shares(times.bootstrap, steps, "bootstrap", sampler, work.mstep_snippets)
        shares.append(
            Share("weight sync", (count + 1) * estep.sync, "raise estep.snippets_per_step: a sync serves a whole step")
        )
    return sorted(shares, key=lambda share: -share.seconds)


def _training_shares(step: StepTime, count: int, phase: str) -> list[Share]:
    fixes = {
        "layers": "more trainer nodes; nothing else makes matrix products cheaper",
        "head": "keep model.loss_precision=bf16; more trainer nodes",
        "tensor_parallel": "lower parallel.tensor and raise parallel.pipeline, or set parallel.distributed_optimizer "
        "to make room for a lower one",
        "bubble": "raise snippets_per_step or lower parallel.micro_batch_tokens, so that more micro-batches fill the "
        "pipeline",
        "data_parallel": "raise snippets_per_step: gradients are summed once per step however large it is",
        "optimizer": "set parallel.distributed_optimizer=true, or raise snippets_per_step",
    }
    return [
        Share(f"{phase}: {name.replace('_', ' ')}", count * getattr(step, name), fix) for name, fix in fixes.items()
    ]


def _sampling_shares(found: Sampling, count: int, phase: str, sampler: Sampler, trajectories: int) -> list[Share]:
    decode_fixes = {
        "engine.max_in_flight": f"raise engine.max_in_flight from {sampler.max_in_flight} to "
        f"{min(sampler.cached_sequences, trajectories)}: the cache of an engine has room for "
        f"{sampler.cached_sequences} trajectories",
        "KV cache": "raise engine.tensor_parallel or engine.memory_fraction: the cache is full",
        "trajectories": "larger steps: engines read all weights for few trajectories each; or fewer engines",
    }
    return [
        Share(f"{phase} sampling: decoding", count * found.decode, decode_fixes[found.limit]),
        Share(f"{phase} sampling: prompts", count * found.prefill, "more engine nodes, or a lower think rate"),
        Share(f"{phase} sampling: requests", count * found.requests, "more engines per replica"),
    ]
