"""Benchmark tasks read from files by path and checksum, never downloaded.

Many copies of these files are cut, extended or edited, and a score on one of them looks like any other; so each known
file is named by its sha256, and a different file is refused unless its own checksum is given.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

HUMANEVAL_SHA256 = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"
MBPP_SHA256 = "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f"
SANITIZED_MBPP_SHA256 = "ca95deaa9a01ef0a6f439f88bcf0dd3db3563d22f22aad6cae04ebb9a8d8c8e9"
HUMANEVAL_PLUS_SHA256 = "272720b90ac375502c8ed23cd791c2a93dfb22a911641a494da74a426c09f101"
HUMANEVAL_PLUS_MINI_SHA256 = "91486741f1627101021fbe50523df08eebb5b0bf5e804b633dcd5ca3c14dbd2f"
MBPP_PLUS_SHA256 = "af43697e8791c4c149bdfd6b489d8b5412507551ac20e28a439f650b8225db63"

TaskT = TypeVar("TaskT")


@dataclass(frozen=True, kw_only=True)
class AssertTask:
    """A task judged by assert statements, run outside the jail with stubs in place of the program's names."""

    task_id: str
    prompt: str
    reference: str
    """A program known to pass."""
    tests: tuple[str, ...]
    setup: str = ""
    """Trusted code run before the tests, in their namespace."""
    entry_point: str | None = None
    """The name that is a stub even where `setup` defines it; None: every name that `reference` defines."""
    time_s: float = 10.0


@dataclass(frozen=True, kw_only=True)
class PlusTask:
    """An EvalPlus task: inputs, and a reference that says what is right for them and how long it may take."""

    task_id: str
    prompt: str
    reference: str
    entry_point: str
    atol: float
    base_inputs: tuple[list[Any], ...]
    plus_inputs: tuple[list[Any], ...]


@dataclass(frozen=True)
class IoTest:
    """One input and the output it should give: texts for a script, JSON values for a function."""

    input: Any
    output: Any


@dataclass(frozen=True, kw_only=True)
class ScriptTask:
    """A task judged by what a script prints for a text on stdin. Without `checker`, outputs are compared as text."""

    task_id: str
    prompt: str
    tests: tuple[IoTest, ...]
    time_s: float = 6.0
    """Per test."""
    memory_bytes: int | None = None
    checker: str | None = None
    """Trusted program called with the paths of input, right output and given output; prints 1 if that is right."""
    references: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FunctionTask:
    """A task judged by what one function, or one method of `Solution`, returns."""

    task_id: str
    prompt: str
    function: str
    tests: tuple[IoTest, ...]
    """Inputs are lists of arguments."""
    time_s: float = 6.0
    wrapped: bool = False
    """Whether an expected value may be a list that holds the right one first, as in APPS."""
    references: tuple[str, ...] = ()


Task = AssertTask | PlusTask | ScriptTask | FunctionTask


@dataclass(frozen=True, kw_only=True)
class TaskFile(Generic[TaskT]):
    """The tasks of one file, with what a result file must say about them."""

    name: str
    sha256: str
    tasks: tuple[TaskT, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    """Task id -> why it cannot be judged here."""


def read_file(path: Path, sha256: str | None) -> tuple[bytes, str]:
    """The unpacked content and the checksum of the file as it lies there; `sha256=None` accepts any content."""
    if not path.is_file():
        raise ValueError(
            f"no benchmark file {path}: download it yourself and give its path; nothing is downloaded here"
        )
    raw = path.read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if sha256 is not None and found != sha256:
        raise ValueError(f"{path} has sha256 {found}, not {sha256}: another version or an altered copy of the file")
    return gzip.decompress(raw) if path.suffix == ".gz" else raw, found


def read_records(path: Path, sha256: str | None) -> tuple[list[dict[str, Any]], str]:
    """The records of a JSON Lines file, or of a file that is one JSON array; plain or .gz."""
    content, found = read_file(path, sha256)
    text = content.decode()
    if text.lstrip().startswith("["):
        records = json.loads(text)
    else:
        records = [json.loads(line) for line in text.split("\n") if line.strip()]
    if not records or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: holds no records")
    return records, found


def load_humaneval(path: Path, sha256: str | None = HUMANEVAL_SHA256) -> TaskFile[AssertTask]:
    """HumanEval. The tests of a few tasks use helpers of the prompt; a trusted copy of it is run beside them."""
    records, found = read_records(path, sha256)
    tasks = []
    for record in _complete(path, records, "task_id prompt entry_point canonical_solution test"):
        reference = record["prompt"] + record["canonical_solution"]
        tasks.append(
            AssertTask(
                task_id=record["task_id"],
                prompt=record["prompt"],
                reference=reference,
                setup=reference + "\n" + record["test"],
                tests=(f"check({record['entry_point']})",),
                entry_point=record["entry_point"],
                time_s=3.0,
            )
        )
    return TaskFile(name="HumanEval", sha256=found, tasks=tuple(tasks))


def load_mbpp(path: Path, sha256: str | None = MBPP_SHA256) -> TaskFile[AssertTask]:
    """MBPP as published; the asserts are the tests, the challenge tests are left out as everywhere."""
    records, found = read_records(path, sha256)
    tasks = tuple(
        AssertTask(
            task_id=f"Mbpp/{record['task_id']}",
            prompt=record["text"],
            reference=record["code"].replace("\r\n", "\n"),
            setup=record["test_setup_code"].replace("\r\n", "\n"),
            tests=tuple(record["test_list"]),
        )
        for record in _complete(path, records, "task_id text code test_list test_setup_code")
    )
    return TaskFile(name="MBPP", sha256=found, tasks=tasks)


def load_sanitized_mbpp(path: Path, sha256: str | None = SANITIZED_MBPP_SHA256) -> TaskFile[AssertTask]:
    """The hand-checked subset of MBPP."""
    records, found = read_records(path, sha256)
    tasks = tuple(
        AssertTask(
            task_id=f"Mbpp/{record['task_id']}",
            prompt=record["prompt"],
            reference=record["code"].replace("\r\n", "\n"),
            setup="\n".join(record["test_imports"]),
            tests=tuple(record["test_list"]),
        )
        for record in _complete(path, records, "task_id prompt code test_list test_imports")
    )
    return TaskFile(name="MBPP sanitized", sha256=found, tasks=tasks)


def load_humaneval_plus(path: Path, sha256: str | None = HUMANEVAL_PLUS_SHA256) -> TaskFile[PlusTask]:
    """HumanEval+ of EvalPlus, v0.1.10 by default."""
    return _load_plus("HumanEval+", path, sha256, lambda _, inputs: inputs)


def load_mbpp_plus(path: Path, sha256: str | None = MBPP_PLUS_SHA256) -> TaskFile[PlusTask]:
    """MBPP+ of EvalPlus, v0.2.0 by default; inputs get back the types that JSON lost."""
    from megatron_ra3.evaluate.plus import restore_mbpp_inputs

    return _load_plus("MBPP+", path, sha256, restore_mbpp_inputs)


def _load_plus(
    name: str, path: Path, sha256: str | None, restore: Callable[[int, list[Any]], list[Any]]
) -> TaskFile[PlusTask]:
    records, found = read_records(path, sha256)
    tasks = []
    for record in _complete(path, records, "task_id prompt entry_point canonical_solution base_input plus_input atol"):
        number = int(record["task_id"].rpartition("/")[2])
        base, plus = (
            tuple(list(arguments) for arguments in restore(number, list(record[key])))  # Mbpp/793 has {} for none
            for key in ("base_input", "plus_input")
        )
        tasks.append(
            PlusTask(
                task_id=record["task_id"],
                prompt=record["prompt"],
                reference=record["prompt"] + record["canonical_solution"],
                entry_point=record["entry_point"],
                atol=float(record["atol"]),
                base_inputs=base,
                plus_inputs=plus,
            )
        )
    return TaskFile(name=name, sha256=found, tasks=tuple(tasks))


def _complete(path: Path, records: list[dict[str, Any]], keys: str) -> Iterator[dict[str, Any]]:
    """The records, each checked for `keys`."""
    for index, record in enumerate(records):
        missing = [key for key in keys.split() if key not in record]
        if missing:
            raise ValueError(f"{path}: record {index} lacks {missing}; it has {sorted(record)}")
        yield record
