"""Which configurations make sense: ranges, and settings that clash. Every refusal names the keys and the fix.

Checked before a process group or an engine is started: a mistake shows within a second, not after an hour in a queue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ra3.presets import ObjectiveConfig

if TYPE_CHECKING:
    from megatron_ra3.config import ProfileConfig, RunConfig, TrainerConfig


def is_local(corpus_folder: str) -> bool:
    """Whether `corpus.folder` is a path of this machine rather than a URL or a pipe."""
    return "://" not in corpus_folder and not corpus_folder.startswith("pipe:")


def validate_trainer(config: TrainerConfig) -> None:
    """Check what every kind of run has; ValueError names the keys and the fix."""
    check_ranges(config, positive=_POSITIVE, not_negative=_NOT_NEGATIVE, fractions=("engine.memory_fraction",))
    for key in ("optimizer.beta1", "optimizer.beta2"):
        if not 0.0 <= _get(config, key) < 1.0:
            raise ValueError(f"{key}={_get(config, key)}: must be at least 0 and below 1")
    for key in ("run_folder", "model.folder"):
        require_path(config, key)
    engine = config.engine
    for key, neutral in (("top_p", 1.0), ("top_k", 0), ("repetition_penalty", 1.0), ("temperature", 1.0)):
        if getattr(engine, key) != neutral:
            raise ValueError(
                f"engine.{key}={getattr(engine, key)}: the trainer scores the full law at temperature 1, so engine "
                f"and trainer log-probs would disagree; set engine.{key}={neutral}"
            )
    if engine.resolved_kind == "inprocess" and engine.urls:
        raise ValueError(
            f"engine.urls is set but engine.kind={engine.kind} uses no server here; set engine.kind=vllm (vllm must be "
            "installed)"
        )
    if engine.urls and engine.per_replica > 1:
        raise ValueError(
            f"engine.per_replica={engine.per_replica} with engine.urls set: replicas start no servers then, they share "
            "out those named; set engine.per_replica=1"
        )
    if engine.block_size % 32:
        raise ValueError(f"engine.block_size={engine.block_size}: must be a multiple of 32")
    _check_profile(config.profile)


def _check_profile(profile: ProfileConfig) -> None:
    steps, ranks = profile.steps, profile.ranks
    if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
        raise ValueError(f"profile.steps={list(steps)}: write it as [FIRST, LAST], steps from 1 on, or leave it empty")
    if steps and (not ranks or min(ranks) < 0):
        raise ValueError(f"profile.ranks={list(ranks)}: name ranks from 0 on, or leave profile.steps empty")


def validate(config: RunConfig) -> None:
    """Check ranges and clashes of a mid-training run; ValueError names the keys and the fix."""
    validate_trainer(config)
    check_ranges(config, positive=_RUN_POSITIVE, not_negative=_RUN_NOT_NEGATIVE, fractions=_RUN_FRACTIONS)
    require_path(config, "corpus.folder")
    latents = config.latents
    if latents.surface == "newline" and latents.comments == "keep_as_code":
        raise ValueError(
            "latents.surface=newline with latents.comments=keep_as_code: a comment kept as code looks like a "
            "rationale; set latents.surface=special, or latents.comments=observe or strip"
        )
    _check_objective(config)
    if config.tokenizer_folder == Path(config.corpus.folder) / "tokenizer" and not is_local(config.corpus.folder):
        raise ValueError(
            f"corpus.tokenizer is empty, and corpus.folder={config.corpus.folder} is no local folder to find one in: "
            "copy the corpus's tokenizer folder here and set corpus.tokenizer to it"
        )
    longest = config.corpus.max_snippet_tokens - 2
    if latents.max_rationale_tokens > longest:
        raise ValueError(
            f"latents.max_rationale_tokens={latents.max_rationale_tokens}: a trajectory has room for {longest} at "
            f"corpus.max_snippet_tokens={config.corpus.max_snippet_tokens}; lower the former or raise the latter"
        )
    _check_staleness(config)
    if config.em.rounds and not config.mstep.steps and not config.estep.steps:
        raise ValueError("em.rounds > 0 but estep.steps=0 and mstep.steps=0; set steps or em.rounds=0")


_POSITIVE = (
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.micro_batch_tokens",
    "parallel.timeout_s",
    "engine.per_replica",
    "engine.max_in_flight",
    "engine.request_timeout_s",
    "engine.health_interval_s",
    "engine.health_timeout_s",
    "engine.start_timeout_s",
    "engine.sync_timeout_s",
    "engine.restart_pause_s",
    "engine.tensor_parallel",
    "engine.cpu_kv_cache_bytes",
    "checkpoint.every_steps",
    "checkpoint.keep_last",
    "optimizer.eps",
    "optimizer.clip_grad_norm",
)
_NOT_NEGATIVE = (
    "seed",
    "stall_timeout_s",
    "logging.timeline_megabytes",
    "optimizer.weight_decay",
    "checkpoint.stop_after_steps",
    "checkpoint.keep_every_steps",
    "checkpoint.wall_clock_limit_s",
    "checkpoint.stop_before_s",
    "engine.port",
    "engine.wait_timeout_s",
    "engine.max_restarts",
)
_RUN_POSITIVE = (
    "corpus.max_snippet_tokens",
    "corpus.shuffle_shards",
    "corpus.chunk_samples",
    "corpus.window_samples",
    "corpus.read_threads",
    "corpus.read_timeout_s",
    "corpus.read_attempts",
    "corpus.stall_s",
    "latents.max_rationale_tokens",
    "warmup.snippets_per_step",
    "mstep.snippets_per_step",
    "estep.snippets_per_step",
    "objective.horizon",
    "estep.rollouts_per_snippet",
    "evaluate.snippets",
    "signatures.window",
)
_RUN_NOT_NEGATIVE = (
    "corpus.max_bad_samples",
    "corpus.prefetch_samples",
    "warmup.steps",
    "mstep.steps",
    "estep.steps",
    "warmup.learning_rate",
    "mstep.learning_rate",
    "estep.learning_rate",
    "warmup.latent_weight",
    "mstep.latent_weight",
    "warmup.max_tokens",
    "mstep.max_tokens",
    "objective.penalty",
    "objective.reference_kl",
    "objective.gate_entropy_weight",
    "objective.line_gradient",
    "objective.format_penalty",
    "estep.window",
    "estep.max_staleness_steps",
    "em.rounds",
    "evaluate.samples_shown",
    "signatures.max_thinking_loss_nats",
    "signatures.max_mismatch_nats",
    "signatures.min_mstep_fall",
    "signatures.max_heldout_rise",
)
_RUN_FRACTIONS = (
    "objective.gate_exploration",
    "objective.discount",
    "warmup.lr_warmup_fraction",
    "mstep.lr_warmup_fraction",
    "warmup.lr_final_fraction",
    "mstep.lr_final_fraction",
    "signatures.max_think_rate",
    "signatures.min_think_rate",
    "signatures.max_malformed_rate",
    "signatures.max_cap_fraction",
    "signatures.max_forced_act_rate",
    "signatures.min_effective_samples",
)


def _check_staleness(config: RunConfig) -> None:
    """Refuse an overlap that there cannot be, and the emulation of one that is not asked for."""
    steps, engine = config.estep.max_staleness_steps, config.engine
    if config.estep.lockstep and not steps:
        raise ValueError(
            "estep.lockstep=true with estep.max_staleness_steps=0: there is no staleness to emulate; raise the latter, "
            "or set estep.lockstep=false"
        )
    if steps and not config.estep.lockstep and engine.resolved_kind == "inprocess":
        raise ValueError(
            f"estep.max_staleness_steps={steps} with engine.kind={engine.kind}, which here is inprocess: sampling and "
            "training share the trainer's own forward passes and cannot overlap; set engine.kind=vllm (vllm must be "
            "installed) or estep.max_staleness_steps=0, or estep.lockstep=true to study staleness without any gain"
        )


def _check_objective(config: RunConfig) -> None:
    aim, rollouts = config.objective, config.estep.rollouts_per_snippet
    if aim.granularity == "token" and config.latents.surface == "newline":
        raise ValueError(
            "objective.granularity=token with latents.surface=newline: a newline cannot open a latent inside a line; "
            "set latents.surface=special"
        )
    if aim.baseline != "counterfactual" and rollouts < 2:
        raise ValueError(
            f"estep.rollouts_per_snippet={rollouts}: the leave-one-out baseline needs at least 2; raise it, or set "
            "objective.baseline=counterfactual"
        )
    if not 0.0 < aim.stickiness < 1.0:
        raise ValueError(f"objective.stickiness={aim.stickiness}: must lie above 0 and below 1")
    if aim.max_importance_weight < 1.0:
        raise ValueError(f"objective.max_importance_weight={aim.max_importance_weight}: must be at least 1")
    if not 0.0 <= aim.ppo_clip < 1.0:
        raise ValueError(f"objective.ppo_clip={aim.ppo_clip}: must be at least 0 and below 1")
    if not 0.0 <= aim.gate_entropy_floor < math.log(2):
        raise ValueError(
            f"objective.gate_entropy_floor={aim.gate_entropy_floor}: must be at least 0 and below log 2 = 0.693 nats, "
            "the most a gate can have"
        )
    if aim.ppo_clip and aim.importance_weight != "truncate":
        raise ValueError(
            f"objective.importance_weight={aim.importance_weight}: objective.ppo_clip={aim.ppo_clip} takes its place; "
            "set one of the two"
        )
    if aim.line_gradient and aim.gate == "never":
        raise ValueError(
            f"objective.line_gradient={aim.line_gradient} with objective.gate=never: an E-step samples nothing; set "
            "objective.line_gradient=0 and leave the lines to the M-step"
        )
    if aim.gate_exploration:
        _check_exploration(aim, rollouts)
    if aim.gate != "sampled" and (aim.gate_exploration or aim.gate_entropy_floor):
        raise ValueError(
            f"objective.gate={aim.gate}: there is no gate to explore; set objective.gate_exploration=0 and "
            "objective.gate_entropy_floor=0"
        )


def _check_exploration(aim: ObjectiveConfig, rollouts: int) -> None:
    """Refuse what would undo exploration: its choices are unlikely under the policy, as stale ones are."""
    explores = f"objective.gate_exploration={aim.gate_exploration}"
    if aim.gate_exploration >= 1.0:
        raise ValueError(f"{explores}: must be below 1, or the policy's own gates are never drawn")
    if aim.ppo_clip or aim.importance_weight == "mask":
        raise ValueError(
            f"{explores}: clip and mask would drop what was explored; set objective.ppo_clip=0 and "
            "objective.importance_weight=truncate"
        )
    if rollouts < 2:
        raise ValueError(f"{explores}: E-steps of one rollout do not explore; raise estep.rollouts_per_snippet")


def check_ranges(
    config: object, *, positive: Sequence[str], not_negative: Sequence[str], fractions: Sequence[str]
) -> None:
    """Check single settings, given by their dotted keys; ValueError names the first that is out of range."""
    for key in positive:
        if not _get(config, key) > 0:
            raise ValueError(f"{key}={_get(config, key)}: must be positive")
    for key in not_negative:
        if not _get(config, key) >= 0:
            raise ValueError(f"{key}={_get(config, key)}: must not be negative")
    for key in fractions:
        if not 0.0 <= _get(config, key) <= 1.0:
            raise ValueError(f"{key}={_get(config, key)}: must lie between 0 and 1")


def require_path(config: object, key: str) -> None:
    """ValueError where a path that a run cannot do without is empty."""
    if not _get(config, key):
        raise ValueError(f"{key} is empty: set it in the config file or as {key}=PATH")


def _get(config: object, dotted: str) -> Any:
    for name in dotted.split("."):
        config = getattr(config, name)
    return config
