"""One RLVR run, assembled: ranks, model, tasks, engine, jail and logs, with nothing left to decide.

`rlvr.py` says what happens; this module owns what it happens to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ra3.assembly import assemble
from megatron_ra3.evaluate.judge import Attempt, Judge, reward
from megatron_ra3.evaluate.problems import Problem, Problems, load_problems
from megatron_ra3.evaluate.sandbox import Verdict
from megatron_ra3.evaluate.splits import note_training, refuse_leaks
from megatron_ra3.lifecycle import DurableRun
from megatron_ra3.model.parallel import ParallelLayout
from megatron_ra3.model.reference import Reference
from megatron_ra3.observe.spans import TIMELINE
from megatron_ra3.policy_step import Group, PolicyStep
from megatron_ra3.report.metrics import global_means
from megatron_ra3.rlvr_config import RlvrRunConfig, TaskFileConfig
from megatron_ra3.rollout.answers import Answer, AnswerSampler, Posed, prompt_ids
from megatron_ra3.rollout.engine import Engine, refuse_other_weights
from megatron_ra3.schedule import rlvr_phases
from megatron_ra3.task_order import TaskOrder


@dataclass(frozen=True, slots=True)
class Sampled:
    """A posed problem and its sampled answers."""

    posed: Posed
    answers: list[Answer]


@dataclass(frozen=True, slots=True)
class Judged:
    """The answers to one problem, with a verdict each."""

    posed: Posed
    answers: list[Answer]
    verdicts: list[Verdict]

    @property
    def rewards(self) -> list[float | None]:
        """1, 0, or None where the jail failed."""
        return [reward(verdict) for verdict in self.verdicts]


@dataclass(slots=True)
class Tally:
    """Sums over judged answers of this replica: of the metrics that are means, and of those that are counts."""

    answers: int = 0
    judged: int = 0
    passed: float = 0.0
    truncated: int = 0
    tokens: int = 0
    reasons: dict[str, int] = field(default_factory=lambda: {"no code": 0, "time": 0})
    groups: int = 0
    equal_groups: int = 0
    too_few_groups: int = 0
    reward: float = 0.0
    rewarded: int = 0

    def add(self, judged: Sequence[Judged], groups: Sequence[Group | None] = ()) -> None:
        """Take in answers, and where they are trained on what became of them."""
        for item in judged:
            known = [value for value in item.rewards if value is not None]
            self.answers += len(item.answers)
            self.judged += len(known)
            self.passed += sum(known)
            self.truncated += sum(not answer.ended for answer in item.answers)
            self.tokens += sum(len(answer.answer_ids) for answer in item.answers)
            for reason in self.reasons:
                self.reasons[reason] += sum(verdict.reason == reason for verdict in item.verdicts)
        for group in groups:
            self.groups += 1
            if group is None:
                self.too_few_groups += 1
                continue
            self.equal_groups += not group.teaches
            self.reward += sum(count * value for count, value in zip(group.counts, group.rewards, strict=True))
            self.rewarded += sum(group.counts)


class RlvrRun(DurableRun[RlvrRunConfig]):
    """Context manager around everything an RLVR run uses."""

    kind = "rlvr"

    def __init__(self, config: RlvrRunConfig) -> None:
        assembly = assemble(config)
        self._train = load_problems(config.tasks)
        self._heldout = load_problems(config.heldout) if config.evaluate.every_steps else Problems((), "", {})
        trained = [problem.task.task_id for problem in self._train.problems]
        refuse_leaks(
            trained,
            [problem.task.task_id for problem in self._heldout.problems],
            allow=config.evaluate.allow_leaks,
        )
        super().__init__(config, assembly, rlvr_phases(config), data=_fingerprint(config, self._train, self._heldout))
        layout = self.layout
        if layout.rank == 0:
            note_training(self.folder, trained, start=Path(config.model.folder))
        self._posed = self._pose(self._train, config.tasks, "")
        self._posed_heldout = self._pose(self._heldout, config.heldout, "heldout ")[: config.evaluate.tasks]
        self._order = TaskOrder(len(self._posed), config.seed)
        self.policy = PolicyStep(
            config.rlvr,
            assembly.trainer,
            layout,
            config.parallel.micro_batch_tokens,
            Reference(assembly.trainer, assembly.initial_folder) if config.rlvr.reference_kl else None,
        )
        self._sampler: AnswerSampler | None = None
        self._judge = _open_judge(config, layout)

    # Tasks

    def next_tasks(self, count: int) -> list[Posed]:
        """The replica's share of the next `count` training tasks."""
        turns = self._order.take(count)[self.layout.dp_rank :: self.layout.dp_size]
        posed = [self._posed[turn.index] for turn in turns]
        self._consume(item.problem.task.task_id for item in posed)
        return [
            Posed(item.problem, item.prompt_ids, f"{self.config.seed} {turn.serial}")
            for item, turn in zip(posed, turns, strict=True)
        ]

    def heldout_tasks(self) -> list[Posed]:
        """The replica's share of the held-out tasks, the same at every evaluation."""
        return self._posed_heldout[self.layout.dp_rank :: self.layout.dp_size]

    # Answers

    def sample(self, posed: Sequence[Posed], count: int) -> list[Sampled]:
        """`count` answers to each problem, the same on every rank of the replica.

        EngineError when something was sampled with other weights than the current ones.
        """
        assert self._engine is not None, "sync_engine comes first"
        served = self._engine
        groups = self._lead(lambda: self._open_sampler(served.engine).sample(posed, count))
        refuse_other_weights(
            (version for group in groups for answer in group for version in answer.weight_versions),
            self.progress.weight_version,
        )
        return [Sampled(item, group) for item, group in zip(posed, groups, strict=True)]

    def judge(self, sampled: Sequence[Sampled]) -> list[Judged]:
        """Verdicts of the replica's jail, the same on every rank of the replica; an error of any, on all ranks."""
        verdicts: list[Verdict] = []
        problem: Exception | None = None
        if self._judge is not None:
            attempts = [Attempt(item.posed.problem, answer.text) for item in sampled for answer in item.answers]
            try:
                with TIMELINE.span("judging", awaits="jail"):
                    verdicts = self._judge.verdicts(attempts)
            except (ValueError, OSError, RuntimeError) as error:
                problem = error
        self.layout.raise_on_all(problem)
        found = iter(self.layout.broadcast_in_replica(verdicts))
        return [Judged(item.posed, item.answers, [next(found) for _ in item.answers]) for item in sampled]

    def write_answers(self, judged: Sequence[Judged]) -> None:
        """Show answers of the first replica in samples.jsonl."""
        flat = [
            {
                "step": self.progress.total_steps,
                "task_id": answer.task_id,
                "prompt": item.posed.problem.prompt.text,
                "answer": self.assembly.tokenizer.decode(answer.answer_ids),
                "outcome": verdict.outcome,
                "reason": verdict.reason,
                "detail": verdict.detail,
            }
            for item in judged
            for answer, verdict in zip(item.answers, item.verdicts, strict=True)
        ]
        self.samples.append(flat[: self.config.evaluate.samples_shown])

    # Figures

    def over_replicas(self, count: int) -> int:
        """The sum of a count over all replicas."""
        return int(self.layout.sum_number_over_dp(count))

    def learning_rate(self) -> float:
        """Of the step that comes: a linear rise over `lr_warmup_steps`, then constant."""
        settings = self.config.rlvr
        risen = (self.progress.weight_version + 1) / max(settings.lr_warmup_steps, 1)
        return settings.learning_rate * min(risen, 1.0)

    def means(self, tally: Tally) -> dict[str, float]:
        """Figures of judged answers over all replicas; rates are per answer.

        `pass_rate` is of the answers that were judged; `infrastructure_errors` counts those that were not.
        """
        count = float(tally.answers)
        sums = {
            "pass_rate": (tally.passed, float(tally.judged)),
            "truncated": (float(tally.truncated), count),
            "no_code": (float(tally.reasons["no code"]), count),
            "timeouts": (float(tally.reasons["time"]), count),
            "answer_tokens": (float(tally.tokens), count),
        }
        return global_means(self.layout, sums) | {
            "answers": self.over_replicas(tally.answers),
            "infrastructure_errors": self.over_replicas(tally.answers - tally.judged),
        }

    def training_means(self, tally: Tally) -> dict[str, float]:
        """`means`, the mean reward of answers that count (overlong ones charged), and what became of the groups.

        `zero_advantage_groups` taught nothing as all their rewards were equal; of `too_few_groups` fewer than two
        answers counted.
        """
        reward_mean = global_means(self.layout, {"reward": (tally.reward, float(tally.rewarded))})
        return (
            reward_mean
            | self.means(tally)
            | {
                "groups": self.over_replicas(tally.groups),
                "zero_advantage_groups": self.over_replicas(tally.equal_groups),
                "too_few_groups": self.over_replicas(tally.too_few_groups),
            }
        )

    # State

    def _state(self) -> dict[str, Any]:
        return {"order": self._data_position()}

    def _restore_state(self, manifest: Mapping[str, Any]) -> None:
        self._order.load_state_dict(manifest["order"])

    def _data_position(self) -> dict[str, Any]:
        return self._order.state_dict()

    def _rewind_data(self, position: Mapping[str, Any]) -> None:
        self._order.load_state_dict(dict(position))

    def _step_figures(self) -> dict[str, float]:
        return {"epoch": self._order.epoch, "position": self._order.position}

    def _close(self) -> None:
        if self._judge is not None:
            self._judge.close()

    def _open_sampler(self, engine: Engine) -> AnswerSampler:
        if self._sampler is None:
            settings = self.config.rlvr
            self._sampler = AnswerSampler(
                engine,
                self.assembly.tokenizer,
                self.format,
                max_tokens=settings.max_answer_tokens,
                check_tokens=settings.check_tokens,
            )
        return self._sampler

    def _pose(self, found: Problems, config: TaskFileConfig, draw: str) -> list[Posed]:
        """Problems with prompts that fit; ValueError where none does."""

        def posed(problem: Problem) -> Posed:
            ids = prompt_ids(problem, self.format, self.assembly.tokenizer)
            return Posed(problem, ids, f"{draw}{self.config.seed} {problem.task.task_id}")

        longest = self.config.rlvr.max_prompt_tokens
        fitting = [item for item in map(posed, found.problems) if len(item.prompt_ids) <= longest]
        if found.problems and not fitting:
            raise ValueError(f"{config.file}: no prompt fits in rlvr.max_prompt_tokens={longest}; raise it")
        if self.layout.rank == 0 and found.problems:
            skipped, long = len(found.skipped), len(found.problems) - len(fitting)
            print(f"{config.file}: {len(fitting)} tasks, {skipped} cannot be posed, {long} are too long", flush=True)
        return fitting


def _fingerprint(config: RlvrRunConfig, train: Problems, heldout: Problems) -> str:
    """What a resumed run must share: both files, by content."""
    return f"{config.tasks.format} {train.sha256}, {config.heldout.format} {heldout.sha256}"


def _open_judge(config: RlvrRunConfig, layout: ParallelLayout) -> Judge | None:
    """The jail of a replica, with its leader; what only one of them finds wrong is raised on all ranks."""
    judge: Judge | None = None
    problem: Exception | None = None
    if layout.is_replica_leader:
        try:
            judge = Judge(config.jail)
        except (ValueError, OSError, RuntimeError) as error:
            problem = error
    try:
        layout.raise_on_all(problem)
    except BaseException:
        if judge is not None:
            judge.close()
        raise
    return judge
