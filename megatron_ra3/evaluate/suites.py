"""A suite is a benchmark as it is scored: which tasks of which file, and the prompt of each.

Three different things are called "MBPP"; a result names the file, the tasks and the prompts, so that nobody guesses.
"""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from megatron_ra3.evaluate.formats import FORMATS, read_tasks
from megatron_ra3.evaluate.prompts import Prompt, build_prompt
from megatron_ra3.evaluate.settings import DataConfig, EvalConfig, FileConfig, SuiteName
from megatron_ra3.evaluate.splits import Split, mbpp_split, refuse_leaks
from megatron_ra3.evaluate.tasks import AssertTask, Task, TaskFile

SHOTS = ("Mbpp/2", "Mbpp/3", "Mbpp/4")
"""The examples of Austin et al. 2021 and of everybody since; they belong to MBPP's prompt split."""
UNTRAINED = "not trained on"
_SECTIONS: dict[SuiteName, str] = {
    "sanitized-mbpp": "sanitized_mbpp",
    "humaneval+": "humaneval_plus",
    "mbpp+": "mbpp_plus",
}
"""Sections of `data` that are not named as their suite is; the format has the section's name."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks with their prompts, in the order of the file."""

    name: SuiteName
    title: str
    sha256: str
    tasks: tuple[Task, ...]
    prompts: tuple[Prompt, ...]
    skipped: dict[str, str]
    """Task id -> why it is not scored."""
    groups: dict[str, frozenset[str]] = field(default_factory=dict)
    """Parts of the suite that are also scored by themselves."""
    leaked: int = 0
    """Scored tasks that the models were trained on."""

    def identity(self) -> dict[str, Any]:
        """What samples of this suite depend on, for the result file and for resuming."""
        prompts = [
            [task.task_id, prompt.text, prompt.stop] for task, prompt in zip(self.tasks, self.prompts, strict=True)
        ]
        return {
            "file": self.title,
            "sha256": self.sha256,
            "tasks": len(self.tasks),
            "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
            "stop": sorted({stop for prompt in self.prompts for stop in prompt.stop}),
            "prompt_example": self.prompts[0].text,
            "skipped": dict(collections.Counter(self.skipped.values())),
        }


def load_suites(config: EvalConfig) -> dict[str, Suite]:
    """All suites of `config.suites`, by name.

    ValueError: a file is missing or another version, no task is left, or tasks were trained on (see `splits`).
    """
    files = {name: load_file(name, config.data) for name in config.suites}
    scored = {name: _choose(name, file, config) for name, file in files.items()}
    trained = _trained(config.trained_on, [task.task_id for file in files.values() for task in file.tasks])
    everything = [task.task_id for chosen, _ in scored.values() for task in chosen]
    refuse_leaks(trained, everything, allow=config.allow_leaks)
    return {
        name: _suite(name, files[name], chosen, skipped, config, trained) for name, (chosen, skipped) in scored.items()
    }


def load_file(name: SuiteName, data: DataConfig) -> TaskFile[Any]:
    """The file of one suite; ValueError where no path is set."""
    section = _SECTIONS.get(name, name)
    file: FileConfig = getattr(data, section)
    file_format = "input_output" if name == "apps" else section
    path = file.path or FORMATS[file_format].usual_name
    if not path:
        raise ValueError(f"data.{section}.path: must be set; this set has no usual file name")
    options: dict[SuiteName, dict[str, Any]] = {
        "livecodebench": {"first_date": data.first_date, "last_date": data.last_date},
        "codeforces": {"python_time_factor": data.python_time_factor},
        "apps": {"name": "APPS"},
    }
    return read_tasks(Path(data.folder) / path, file_format, file.sha256, **options.get(name, {}))


def _choose(name: SuiteName, file: TaskFile[Any], config: EvalConfig) -> tuple[list[Task], dict[str, str]]:
    """The tasks that are scored, and why the others are not."""
    skipped = dict(file.skipped)
    chosen: list[Task] = []
    plain_mbpp = name in ("mbpp", "sanitized-mbpp")
    shots = SHOTS[: config.prompt.mbpp_shots]
    for task in file.tasks:
        if plain_mbpp and config.mbpp_split == "test" and mbpp_split(task.task_id) != "test":
            skipped[task.task_id] = "not in the test split"
        elif plain_mbpp and task.task_id in shots:
            skipped[task.task_id] = "an example of the prompt"
        elif config.max_tasks and len(chosen) == config.max_tasks:
            skipped[task.task_id] = "beyond max_tasks"
        else:
            chosen.append(task)
    if not chosen:
        raise ValueError(f"suites={name!r}: no task of {file.name} can be scored; left out: {_counted(skipped)}")
    return chosen, skipped


def _counted(skipped: Mapping[str, str]) -> dict[str, int]:
    return dict(collections.Counter(skipped.values()))


def _suite(
    name: SuiteName,
    file: TaskFile[Any],
    chosen: Sequence[Task],
    skipped: dict[str, str],
    config: EvalConfig,
    trained: frozenset[str],
) -> Suite:
    examples: list[AssertTask] = []
    if name in ("mbpp", "sanitized-mbpp"):
        known = {task.task_id: task for task in file.tasks}
        missing = [shot for shot in SHOTS[: config.prompt.mbpp_shots] if shot not in known]
        if missing:
            raise ValueError(f"prompt.mbpp_shots={config.prompt.mbpp_shots}: {file.name} has no task {missing[0]}")
        examples = [known[shot] for shot in SHOTS[: config.prompt.mbpp_shots]]
    ids = frozenset(task.task_id for task in chosen)
    groups: dict[str, frozenset[str]] = {}
    if next(iter(ids)).startswith("Mbpp/"):
        groups["test split of MBPP"] = frozenset(task_id for task_id in ids if mbpp_split(task_id) == "test")
    if ids & trained:
        groups[UNTRAINED] = ids - trained
    return Suite(
        name=name,
        title=file.name,
        sha256=file.sha256,
        tasks=tuple(chosen),
        prompts=tuple(build_prompt(task, shots=examples) for task in chosen),
        skipped=skipped,
        groups={title: part for title, part in groups.items() if 0 < len(part) < len(ids)},
        leaked=len(ids & trained),
    )


def _trained(items: Sequence[str], known: Sequence[str]) -> frozenset[str]:
    """The task ids that `trained_on` means. ValueError: an item is no id of any suite, no split and no file."""
    found: set[str] = set()
    for item in items:
        if item.startswith("@"):
            path = Path(item[1:])
            if not path.is_file():
                raise ValueError(f"trained_on={item!r}: {path} does not exist")
            found.update(path.read_text(encoding="utf-8").split())
        elif item.startswith("mbpp:"):
            split = item.removeprefix("mbpp:")
            if split not in get_args(Split):
                raise ValueError(f"trained_on={item!r}: MBPP's splits are {list(get_args(Split))}")
            found.update(task_id for task_id in known if task_id.startswith("Mbpp/") and mbpp_split(task_id) == split)
        elif "/" in item:
            found.add(item)
        else:
            raise ValueError(f"trained_on={item!r}: write a task id as Mbpp/601, a split as mbpp:train, or @FILE")
    return frozenset(found)
