"""RLVR: policy gradient on the verdicts that programs get from hidden tests (docs/rlvr.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ra3.observe.journal import recorded
from megatron_ra3.policy_step import Group
from megatron_ra3.rlvr_config import RlvrRunConfig
from megatron_ra3.rlvr_run import RlvrRun, Tally
from megatron_ra3.stall import watched

Metrics = dict[str, float]


def rlvr(config: RlvrRunConfig) -> dict[str, Any]:
    """Run, or resume, a whole RLVR; returns the summary that is also written to the run folder."""
    with (
        watched(Path(config.run_folder) / "stalls", config.stall_timeout_s),
        recorded(config.run_folder, config.logging.timeline_megabytes),
        RlvrRun(config) as run,
    ):
        for phase in run.remaining_phases():
            step = PHASES[phase.name]
            for _ in run.remaining_steps(phase):
                run.finish_step(phase, step(run))
        return run.finish()


def train(run: RlvrRun) -> Metrics:
    """One step: sample G answers per task, judge them, and move towards those that did better than their group.

    With dynamic sampling, groups whose answers fared alike make room for further tasks.
    """
    run.sync_engine()
    settings, tally = run.config.rlvr, Tally()
    groups: list[Group] = []
    missing = settings.tasks_per_step
    for _ in range(settings.max_sampling_rounds if settings.dynamic_sampling else 1):
        judged = run.judge(run.sample(run.next_tasks(missing), settings.samples_per_task))
        found = [Group.of(item.answers, item.rewards, settings) for item in judged]
        tally.add(judged, found)
        groups += [group for group in found if group is not None and (group.teaches or not settings.dynamic_sampling)]
        missing = settings.tasks_per_step - run.over_replicas(len(groups))
        if missing <= 0:
            break
    return run.policy.update(groups, run.learning_rate()) | run.training_means(tally)


def evaluate(run: RlvrRun) -> Metrics:
    """Held-out pass rate of answers sampled as in training, with the same random draws at every evaluation."""
    run.sync_engine()
    judged = run.judge(run.sample(run.heldout_tasks(), run.config.evaluate.samples_per_task))
    run.write_answers(judged)
    tally = Tally()
    tally.add(judged)
    return run.means(tally)


PHASES: dict[str, Callable[[RlvrRun], Metrics]] = {"rlvr": train, "evaluate": evaluate}
