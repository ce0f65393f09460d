r"""Task files as problems to pose: each task with its prompt, and with no test in its verdict that its prompt shows.

A reward from tests that the prompt shows teaches to copy them. So tests that a prompt quotes are taken out, and a task
that has no other is refused.

The format `completions` is this project's own, for tasks that are made by a program: JSON Lines with

    {"task_id": "chains/1", "prompt": "A=3\nq=A\n", "stop": ["\n"], "head": "def accepts(q):\n ", "function": "accepts",
     "tests": [[[3], true], [[4], false]], "max_new_tokens": 16}

The model continues `prompt`; `head` and what it wrote before the first of `stop` are the program, whose `function` must
return what the tests say. So the prompt can hold what the program must not use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ra3.evaluate.formats import read_tasks
from megatron_ra3.evaluate.prompts import Prompt, Style, build_prompt
from megatron_ra3.evaluate.splits import mbpp_split
from megatron_ra3.evaluate.tasks import AssertTask, FunctionTask, IoTest, PlusTask, Task, TaskFile, read_records
from megatron_ra3.rlvr_config import TaskFileConfig

FUNCTION_TIME_S = 2.0
"""For each call of a function of the format `completions`."""


@dataclass(frozen=True)
class Problem:
    """A task as it is posed; `task` holds the hidden tests alone."""

    task: Task
    prompt: Prompt


@dataclass(frozen=True)
class Problems:
    """The problems of one file, its checksum, and why some of its tasks are none (by task id)."""

    problems: tuple[Problem, ...]
    sha256: str
    skipped: dict[str, str]


def load_problems(config: TaskFileConfig) -> Problems:
    """Read a file of tasks; ValueError: it is missing, is another one, or no task of it is left."""
    path = Path(config.file)
    if config.format == "completions":
        found = _load_completions(path, config)
    else:
        options = {"name": path.stem} if config.format == "input_output" else {}
        file = read_tasks(path, config.format, config.sha256, **options)
        found = _from_file(_in_split(file, config), config.style)
    if not found.problems:
        raise ValueError(f"{path}: no task can be posed; of the first: {next(iter(found.skipped.values()), 'no task')}")
    return found


def _in_split(file: TaskFile[Any], config: TaskFileConfig) -> TaskFile[Any]:
    """The tasks of one of MBPP's splits."""
    _check_split(config)
    if config.split == "all":
        return file
    kept = tuple(task for task in file.tasks if mbpp_split(task.task_id) == config.split)
    return dataclasses.replace(file, tasks=kept)


def _check_split(config: TaskFileConfig) -> None:
    if config.split != "all" and "mbpp" not in config.format:
        raise ValueError(f"split={config.split} with format={config.format}: only MBPP has splits; set split=all")


def hidden(task: Task, style: Style) -> Task | None:
    """The task without the tests that its prompt of this style shows; None: it has no others.

    The docstring of an MBPP task shows its first assert, and few-shot prompts show all. Examples inside the text of a
    HumanEval or contest task cannot be told from it; their tests hold more than those.
    """
    if isinstance(task, AssertTask) and task.entry_point is None:
        kept = () if style == "few_shot" else task.tests[1:]
        return dataclasses.replace(task, tests=kept) if kept else None
    if isinstance(task, PlusTask):
        return task if task.plus_inputs else None
    return task if task.tests else None


def _from_file(file: TaskFile[Any], style: Style) -> Problems:
    problems: list[Problem] = []
    skipped = dict(file.skipped)
    for task in file.tasks:
        posed = hidden(task, style)
        if posed is None:
            skipped[task.task_id] = "its prompt shows all its tests"
        else:
            problems.append(Problem(posed, build_prompt(task, style)))
    return Problems(tuple(problems), file.sha256, skipped)


def _load_completions(path: Path, config: TaskFileConfig) -> Problems:
    _check_split(config)
    records, found = read_records(path, config.sha256 or None)
    problems = []
    keys: Sequence[str] = ("task_id", "prompt", "stop", "head", "function", "tests", "max_new_tokens")
    for index, record in enumerate(records):
        missing = [key for key in keys if key not in record]
        if missing:
            raise ValueError(f"{path}: record {index} lacks {missing}; it has {sorted(record)}")
        task = FunctionTask(
            task_id=record["task_id"],
            prompt=record["prompt"],
            function=record["function"],
            tests=tuple(IoTest(given, right) for given, right in record["tests"]),
            time_s=FUNCTION_TIME_S,
        )
        prompt = Prompt(
            text=record["prompt"],
            stop=tuple(record["stop"]),
            max_new_tokens=record["max_new_tokens"],
            head=record["head"],
            is_code=True,
        )
        problems.append(Problem(task, prompt))
    if len({problem.task.task_id for problem in problems}) < len(problems):
        raise ValueError(f"{path}: some task ids occur more than once; give every task one of its own")
    return Problems(tuple(problems), found, {})
