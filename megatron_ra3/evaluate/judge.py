"""Verdicts on sampled answers as rewards: pass 1, fail 0, and nothing at all where the jail failed.

An infrastructure error that counted as a wrong answer would teach the policy to avoid what it was writing when a disk
was full. Such answers have no reward, and are counted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ra3.evaluate.graders import grade
from megatron_ra3.evaluate.plus import PlusReferences
from megatron_ra3.evaluate.problems import Problem
from megatron_ra3.evaluate.prompts import extract_program
from megatron_ra3.evaluate.sandbox import Sandbox, Verdict
from megatron_ra3.evaluate.tasks import Task
from megatron_ra3.evaluate.worker import JailError
from megatron_ra3.rlvr_config import JailConfig
from megatron_ra3.stall import ACTIVITY

NO_CODE = Verdict(outcome="fail", reason="no code")


@dataclass(frozen=True)
class Attempt:
    """An answer to a problem, as text without an end-of-text token."""

    problem: Problem
    text: str


class Judge:
    """Programs of answers in the jail; IsolationError where the machine cannot hold one."""

    def __init__(self, config: JailConfig) -> None:
        folder = Path(config.references_folder) if config.references_folder else None
        self._references = PlusReferences(folder)
        self._sandbox = Sandbox(config.workers or os.cpu_count() or 1, isolation=config.isolation)

    def close(self) -> None:
        """End the jail."""
        self._sandbox.close()

    def verdicts(self, attempts: Sequence[Attempt]) -> list[Verdict]:
        """One verdict per attempt, in order; equal programs for one task are run once."""
        programs = [extract_program(item.problem.prompt, item.text) for item in attempts]
        wanted = {
            (item.problem.task.task_id, program): item.problem.task
            for item, program in zip(attempts, programs, strict=True)
            if program is not None
        }
        judged = self._sandbox.map(lambda entry: self._grade(entry[1], entry[0][1]), wanted.items())
        found: dict[tuple[str, str], Verdict] = {}
        for key, verdict in zip(wanted, judged, strict=True):
            ACTIVITY.moved("judging answers")
            found[key] = verdict
        return [
            NO_CODE if program is None else found[item.problem.task.task_id, program]
            for item, program in zip(attempts, programs, strict=True)
        ]

    def _grade(self, task: Task, program: str) -> Verdict:
        try:
            return grade(self._sandbox, task, program, self._references)
        except JailError as error:  # while a reference ran
            return Verdict(outcome="infrastructure", reason="jail", detail=str(error))


def reward(verdict: Verdict) -> float | None:
    """1 for a pass, 0 for a failure, None for an infrastructure error."""
    return None if verdict.outcome == "infrastructure" else float(verdict.passed)
