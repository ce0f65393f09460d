"""The settings of RLVR: programming tasks, the policy gradient on them, and the jail that judges the answers.

A kind of configuration of its own: RLVR has tasks where mid-training has a corpus, and neither reads the other's
settings. Imports neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_ra3.config import RunConfig, TrainerConfig, load_config
from megatron_ra3.settings import build, read_settings
from megatron_ra3.validation import check_ranges, validate_trainer

TaskFormat = Literal[
    "completions",
    "humaneval",
    "mbpp",
    "sanitized_mbpp",
    "humaneval_plus",
    "mbpp_plus",
    "livecodebench",
    "codeforces",
    "input_output",
]
Algorithm = Literal["grpo", "rloo", "dapo"]


@dataclass(frozen=True, kw_only=True)
class TaskFileConfig:
    """A file of programming tasks. Nothing is downloaded."""

    file: str = ""
    format: TaskFormat = "completions"
    """`completions`: functions to complete, see `evaluate.problems`; `input_output`: as APPS and TACO have it; the rest
    are the benchmarks of that name."""
    sha256: str = ""
    """Of the file; empty: the known one of a benchmark, and any content in formats that have no well-known file."""
    split: Literal["all", "prompt", "test", "validation", "train"] = "all"
    """Of MBPP's tasks."""
    style: Literal["auto", "completion", "docstring", "question"] = "auto"
    """Of the prompt (`evaluate.prompts`)."""


@dataclass(frozen=True, kw_only=True)
class RlvrConfig:
    """Policy gradient on verdicts (docs/rlvr.md); the defaults are `grpo`."""

    preset: Algorithm = "grpo"
    """Where the other settings of this section start from; what is given beside it wins."""
    steps: int = 200
    tasks_per_step: int = 32
    samples_per_task: int = 8
    """G: answers sampled for each task."""
    max_prompt_tokens: int = 1024
    """Tasks with a longer prompt are left out, and counted."""
    max_answer_tokens: int = 512
    """An answer that has not ended by then is cut, and counted as truncated."""
    check_tokens: int = 32
    """So many tokens are sampled before an answer is looked at for its end; divides `max_answer_tokens`. What comes
    after the end is thrown away."""
    learning_rate: float = 1e-6
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises linearly; then it stays."""
    advantage: Literal["group_normalised", "group_mean", "leave_one_out"] = "group_normalised"
    """(r - mean) / std over the group's answers; r - mean; r - mean of the others."""
    loss_average: Literal["answer", "token", "constant"] = "answer"
    """What a token's loss is divided by: its answer's length, then the number of answers; the number of all tokens; the
    number of answers times `max_answer_tokens`."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    """The ratio of the updated policy to the one at the start of the step is clipped to [1 - low, 1 + high]; both 0: it
    is not. Matters from the second update of a step on."""
    updates_per_step: int = 1
    """Optimizer steps that share out the groups of one step."""
    max_importance_weight: float = 2.0
    """Trainer/engine weights of single tokens are cut down to this."""
    dynamic_sampling: bool = False
    """Leave out groups whose answers all have one reward, and sample further tasks in their place."""
    max_sampling_rounds: int = 8
    """How often a step samples at most for that; then it goes on with the groups it has."""
    truncated: Literal["mask", "judge"] = "judge"
    """`mask`: a cut answer is no sample at all; `judge`: it is judged as it stands."""
    overlong_tokens: int = 0
    """If positive, rewards fall linearly by up to `overlong_penalty` over the last so many of `max_answer_tokens`."""
    overlong_penalty: float = 1.0
    reference_kl: float = 0.0
    """beta: weight of KL(policy to reference) per token; the reference has the weights that the run started from."""
    entropy_bonus: float = 0.0
    """Weight of the tokens' mean entropy (nats)."""
    entropy_floor: float = 0.0
    """If positive, the bonus is paid only in steps whose mean entropy (nats) is below."""

    @staticmethod
    def with_preset(settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of the named preset (default `grpo`) with `settings` over them; unknown names pass unchanged."""
        return {**ALGORITHMS.get(settings.get("preset", "grpo"), {}), **settings}


ALGORITHMS: dict[Algorithm, dict[str, Any]] = {
    "grpo": {},
    "rloo": {"advantage": "leave_one_out", "clip_low": 0.0, "clip_high": 0.0},
    "dapo": {
        "clip_high": 0.28,
        "loss_average": "token",
        "dynamic_sampling": True,
        "truncated": "mask",
    },
}
"""Settings of each preset that differ from the defaults of `RlvrConfig`."""


@dataclass(frozen=True, kw_only=True)
class JailConfig:
    """The jail that judges answers (docs/evaluation.md)."""

    workers: int = 0
    """Per replica; 0: as many as the replica's machine has processors."""
    isolation: Literal["bubblewrap", "unsafe"] = "bubblewrap"
    """`unsafe` runs programs as ordinary processes: for machines whose content does not matter."""
    references_folder: str = ""
    """Where outputs of EvalPlus references are kept; empty: they are computed anew by every process."""


@dataclass(frozen=True, kw_only=True)
class RlvrEvaluateConfig:
    """Held-out evaluation: the pass rate of answers sampled as in training."""

    every_steps: int = 20
    """Before the first step and after every so many; divides `rlvr.steps`. 0: never."""
    tasks: int = 256
    """The first so many held-out tasks."""
    samples_per_task: int = 1
    allow_leaks: bool = False
    """Go on where held-out tasks are trained on too."""
    samples_shown: int = 4
    """Answers written to samples.jsonl per evaluation."""


@dataclass(frozen=True, kw_only=True)
class RlvrRunConfig(TrainerConfig):
    """Everything of an RLVR run. Of `latents` only `surface` matters: it says how code prompts are written."""

    tasks: TaskFileConfig = field(default_factory=TaskFileConfig)
    heldout: TaskFileConfig = field(default_factory=TaskFileConfig)
    rlvr: RlvrConfig = field(default_factory=RlvrConfig)
    jail: JailConfig = field(default_factory=JailConfig)
    evaluate: RlvrEvaluateConfig = field(default_factory=RlvrEvaluateConfig)

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence that the trainer scores or an engine continues."""
        return self.rlvr.max_prompt_tokens + self.rlvr.max_answer_tokens

    @property
    def shared_counts(self) -> dict[str, int]:
        """Settings that count what the data-parallel replicas share: none may get nothing."""
        shared = {"rlvr.tasks_per_step": self.rlvr.tasks_per_step}
        return shared | ({"evaluate.tasks": self.evaluate.tasks} if self.evaluate.every_steps else {})

    def fitting(self, positions: int) -> str:
        """What to change, and why, where the model has only so many positions."""
        return (
            f"rlvr.max_prompt_tokens={self.rlvr.max_prompt_tokens} and rlvr.max_answer_tokens="
            f"{self.rlvr.max_answer_tokens}: together more than the model's {positions} positions; lower them"
        )


def load_rlvr_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RlvrRunConfig:
    """The settings of an RLVR run, see `settings.read_settings` and `settings.build`; ValueError: they clash."""
    return _checked(read_settings(path, overrides))


def load_any_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig | RlvrRunConfig:
    """The settings of either kind of run: one with a section `rlvr` or `tasks` is RLVR."""
    tree = read_settings(path, overrides)
    return _checked(tree) if {"rlvr", "tasks"} & tree.keys() else load_config(path, overrides)


def _checked(tree: Mapping[str, Any]) -> RlvrRunConfig:
    config: RlvrRunConfig = build(RlvrRunConfig, tree)
    validate_trainer(config)
    check_ranges(config, positive=_POSITIVE, not_negative=_NOT_NEGATIVE, fractions=("rlvr.clip_low",))
    _check_clashes(config)
    return config


_POSITIVE = (
    "rlvr.steps",
    "rlvr.tasks_per_step",
    "rlvr.max_prompt_tokens",
    "rlvr.max_answer_tokens",
    "rlvr.check_tokens",
    "rlvr.updates_per_step",
    "rlvr.max_sampling_rounds",
    "evaluate.tasks",
    "evaluate.samples_per_task",
)
_NOT_NEGATIVE = (
    "rlvr.learning_rate",
    "rlvr.lr_warmup_steps",
    "rlvr.clip_high",
    "rlvr.overlong_tokens",
    "rlvr.overlong_penalty",
    "rlvr.reference_kl",
    "rlvr.entropy_bonus",
    "rlvr.entropy_floor",
    "jail.workers",
    "evaluate.every_steps",
    "evaluate.samples_shown",
)


def _check_clashes(config: RlvrRunConfig) -> None:
    aim, every = config.rlvr, config.evaluate.every_steps
    if config.model.init != "pretrained":
        raise ValueError(f"model.init={config.model.init}: RLVR starts from trained weights; set model.init=pretrained")
    if not config.tasks.file:
        raise ValueError("tasks.file is empty: set it in the config file or as tasks.file=PATH")
    if every and not config.heldout.file:
        raise ValueError(
            f"heldout.file is empty, but evaluate.every_steps={every}: name a file, or set evaluate.every_steps=0"
        )
    if every and aim.steps % every:
        raise ValueError(
            f"rlvr.steps={aim.steps}: must be a multiple of evaluate.every_steps={every}, so that the run ends with an "
            "evaluation and can be made longer"
        )
    if aim.samples_per_task < 2:
        raise ValueError(f"rlvr.samples_per_task={aim.samples_per_task}: a group needs at least 2 answers")
    if aim.max_answer_tokens % aim.check_tokens:
        raise ValueError(
            f"rlvr.check_tokens={aim.check_tokens}: must divide rlvr.max_answer_tokens={aim.max_answer_tokens}"
        )
    if aim.overlong_tokens > aim.max_answer_tokens:
        raise ValueError(
            f"rlvr.overlong_tokens={aim.overlong_tokens}: must be at most rlvr.max_answer_tokens="
            f"{aim.max_answer_tokens}"
        )
    if aim.updates_per_step > aim.tasks_per_step:
        raise ValueError(
            f"rlvr.updates_per_step={aim.updates_per_step}: must be at most rlvr.tasks_per_step={aim.tasks_per_step}"
        )
    if aim.max_importance_weight < 1.0:
        raise ValueError(f"rlvr.max_importance_weight={aim.max_importance_weight}: must be at least 1")
    if aim.entropy_floor and not aim.entropy_bonus:
        raise ValueError(
            f"rlvr.entropy_floor={aim.entropy_floor} with rlvr.entropy_bonus=0: there is no bonus to pay below it; set "
            "rlvr.entropy_bonus, or rlvr.entropy_floor=0"
        )
