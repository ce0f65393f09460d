"""Tasks of contest collections: LiveCodeBench, Codeforces (open-r1), and APPS-like `input_output` records.

These sets have no single well-known file, so the checksum is the caller's. Records that cannot be judged here are
skipped and counted by reason, never judged wrongly: interactive problems, tests cut short, no tests.
"""

from __future__ import annotations

import base64
import collections
import decimal
import io
import json
import pickle
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ra3.evaluate.tasks import FunctionTask, IoTest, ScriptTask, TaskFile, read_records

ContestTask = ScriptTask | FunctionTask
_LONGEST_PLAIN_INT = 4000
_MIB = 1 << 20


def load_livecodebench(
    path: Path, sha256: str | None, *, first_date: str = "", last_date: str = "9999"
) -> TaskFile[ContestTask]:
    """One file of LiveCodeBench's code generation set, public and private tests; dates are ISO, both included."""
    records, found = read_records(path, sha256)
    tasks: list[ContestTask] = []
    skipped: dict[str, str] = {}
    for record in records:
        task_id = f"LiveCodeBench/{record['question_id']}"
        if not first_date <= record["contest_date"][: len("2000-01-01")] <= last_date:
            skipped[task_id] = "outside the dates"
            continue
        tests = _json(record["public_test_cases"]) + decode_private_tests(record["private_test_cases"])
        kinds = {test["testtype"] for test in tests}
        prompt = record["question_content"] + (f"\n\n{record['starter_code']}" if record["starter_code"] else "")
        if kinds == {"functional"}:
            function = _json(record["metadata"])["func_name"]
            cases = tuple(IoTest(_arguments(test["input"]), _json(test["output"])) for test in tests)
            tasks.append(FunctionTask(task_id=task_id, prompt=prompt, function=function, tests=cases))
        elif kinds == {"stdin"}:
            cases = tuple(IoTest(test["input"], test["output"]) for test in tests)
            tasks.append(ScriptTask(task_id=task_id, prompt=prompt, tests=cases))
        else:
            skipped[task_id] = "no tests" if not kinds else f"tests of kinds {sorted(kinds)}"
    return TaskFile(name="LiveCodeBench", sha256=found, tasks=tuple(tasks), skipped=skipped)


class _NoClasses(pickle.Unpickler):
    """Builds strings and containers; anything that would name a class, and so could run code, is refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise ValueError(f"the packed tests name {module_name}.{global_name}: they should be only text")


def decode_private_tests(packed: str) -> list[dict[str, Any]]:
    """Private tests: JSON, or JSON text pickled, compressed and written in base64."""
    if packed.lstrip().startswith("["):
        tests = _json(packed)
    else:
        text = _NoClasses(io.BytesIO(zlib.decompress(base64.b64decode(packed)))).load()
        if not isinstance(text, str | bytes):
            raise ValueError(f"the packed tests hold a {type(text).__name__}, not text")
        tests = _json(text)
    if not isinstance(tests, list):
        raise ValueError("the private tests are no list")
    return tests


def load_codeforces(path: Path, sha256: str | None, *, python_time_factor: float = 3.0) -> TaskFile[ScriptTask]:
    """A JSON Lines export of open-r1/codeforces; its time limits, meant for compiled programs, are multiplied."""
    records, found = read_records(path, sha256)
    tasks = []
    skipped: dict[str, str] = {}
    for record in records:
        task_id = f"Codeforces/{record['id']}"
        tests = tuple(IoTest(test["input"], test["output"]) for test in record.get("official_tests") or ())
        reason = _why_not(record, tests)
        if reason:
            skipped[task_id] = reason
            continue
        parts = [record["description"], record.get("input_format"), record.get("output_format"), record.get("note")]
        tasks.append(
            ScriptTask(
                task_id=task_id,
                prompt="\n\n".join(part for part in parts if part),
                tests=tests,
                time_s=float(record["time_limit"] or 2.0) * python_time_factor,
                memory_bytes=int(float(record["memory_limit"] or 256) * _MIB),
                checker=record.get("generated_checker") or None,
            )
        )
    return TaskFile(name="Codeforces", sha256=found, tasks=tuple(tasks), skipped=skipped)


def _why_not(record: dict[str, Any], tests: Sequence[IoTest]) -> str:
    """Why a Codeforces record cannot be judged; empty if it can."""
    if record.get("interaction_format"):
        return "interactive"
    if record.get("input_mode", "stdio") != "stdio":
        return f"input mode {record['input_mode']}"
    if not tests:
        return "no tests"
    return "" if record.get("official_tests_complete") else "tests cut short"


def load_input_output(path: Path, sha256: str | None, *, name: str, time_s: float = 6.0) -> TaskFile[ContestTask]:
    """Records with `input_output` as in APPS, TACO and AReaL's set: inputs, outputs and perhaps `fn_name`."""
    records, found = read_records(path, sha256)
    tasks: list[ContestTask] = []
    skipped: dict[str, str] = {}
    for index, record in enumerate(records):
        identity = next((record[key] for key in ("problem_id", "query_id", "id", "task_id") if key in record), index)
        task_id = f"{name}/{identity}"
        packed = record.get("input_output") or {}
        content = _json(packed) if isinstance(packed, str) else packed
        inputs, outputs = content.get("inputs") or [], content.get("outputs") or []
        if not inputs or len(inputs) != len(outputs):
            skipped[task_id] = "no tests" if not inputs else f"{len(inputs)} inputs and {len(outputs)} outputs"
            continue
        prompt = record.get("question") or record.get("prompt") or ""
        common: dict[str, Any] = {"task_id": task_id, "prompt": prompt, "time_s": time_s}
        common["references"] = _references(record.get("solutions"))
        function = content.get("fn_name")
        if function:
            cases = tuple(IoTest(_arguments(given), right) for given, right in zip(inputs, outputs, strict=True))
            tasks.append(FunctionTask(function=function, tests=cases, wrapped=True, **common))
        else:
            cases = tuple(IoTest(_text(given), _text(right)) for given, right in zip(inputs, outputs, strict=True))
            tasks.append(ScriptTask(tests=cases, **common))
    _distinct(path, tasks)
    return TaskFile(name=name, sha256=found, tasks=tuple(tasks), skipped=skipped)


def _distinct(path: Path, tasks: Sequence[ContestTask]) -> None:
    counts = collections.Counter(task.task_id for task in tasks)
    repeated = [task_id for task_id, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(f"{path}: {len(repeated)} task ids occur more than once, for instance {repeated[0]}")


def _references(packed: Any) -> tuple[str, ...]:
    solutions = _json(packed) if isinstance(packed, str) and packed.strip() else packed
    return tuple(solutions or ())


def _text(value: Any) -> str:
    """Text as it is; some sets keep a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _arguments(value: Any) -> list[Any]:
    """A list of arguments; as text, one JSON value per line."""
    if isinstance(value, str):
        return [_json(line) for line in value.split("\n") if line.strip()]
    return list(value)


def _json(text: str | bytes) -> Any:
    """JSON whose integers may have any number of digits."""
    return json.loads(text, parse_int=_integer)


def _integer(digits: str) -> int:
    return int(digits) if len(digits) < _LONGEST_PLAIN_INT else int(decimal.Decimal(digits))
