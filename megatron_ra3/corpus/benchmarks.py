"""Reads the tasks of evaluation benchmarks, in whatever format their authors publish them.

A corpus can only be kept clear of a benchmark whose every statement and solution is known. A field that a loader
overlooks is a leak, so a file without a known field is an error, not an empty benchmark.
"""

import gzip
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

# In these orders: the first identifier present names the task.
IDENTIFIERS = ("task_id", "question_id", "problem_id", "id", "query_id", "name", "title")
CODES = ("canonical_solution", "code", "solution", "solutions", "reference_solution", "reference_solutions")
STATEMENTS = (
    "prompt",
    "text",
    "question",
    "question_content",
    "problem",
    "problem_description",
    "problem_statement",
    "statement",
    "description",
    "instruction",
    "input_format",
    "output_format",
    "interaction_format",
    "note",
    "editorial",
    "starter_code",
)
TESTS = ("test", "test_list", "challenge_test_list", "assertion", "examples", "public_test_cases")

# The field that tells a benchmark whose identifiers do not name it.
_NAMED_BY = {"test_list": "Mbpp", "question_content": "LiveCodeBench", "input_format": "Codeforces"}
_NAMES_ITS_BENCHMARK = re.compile(r"[A-Za-z]\w*/")
_FENCED = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class BenchmarkTask:
    """One task: its identifier ("HumanEval/12"), its texts, and its solutions as (what comes before, code)."""

    id: str
    texts: tuple[str, ...]
    solutions: tuple[tuple[str, str], ...]


def read_tasks(path: Path) -> Iterator[BenchmarkTask]:
    """The tasks of a file: JSON lines or a JSON array, plain or gzipped, or Parquet; the content tells which.

    Known are HumanEval and HumanEval+, MBPP (full and sanitized) and MBPP+, LiveCodeBench, Codeforces, and any file
    whose records have fields among `IDENTIFIERS`, `STATEMENTS`, `CODES` and `TESTS`.

    Raises:
        ValueError: the file is none of these, or a record holds neither a statement nor a solution.
        OSError: the file cannot be read.
    """
    number = -1
    for number, record in enumerate(_records(path)):
        yield _task(record, path, number)
    if number < 0:
        raise ValueError(f"benchmark file {path} holds no task")


def _task(record: Any, path: Path, number: int) -> BenchmarkTask:
    if not isinstance(record, Mapping) or not any(record.get(name) for name in (*STATEMENTS, *CODES)):
        found = sorted(record) if isinstance(record, Mapping) else type(record).__name__
        raise ValueError(
            f"benchmark file {path}, record {number}: no statement and no solution in {found}; "
            f"known are statements {list(STATEMENTS)}, solutions {list(CODES)}; rename the fields"
        )
    codes = [code for name in CODES if record.get(name) for code in _codes(record[name])]
    texts = [text for name in (*STATEMENTS, *TESTS) if record.get(name) and (text := "\n".join(_strings(record[name])))]
    # Only a prompt that the code continues belongs before it; the normal form is taken of both or of the code alone.
    before = record.get("prompt")
    solutions = [(before if isinstance(before, str) else "", code) for code in codes]
    solutions += [("", code) for code in _FENCED.findall(str(record.get("editorial") or ""))]
    return BenchmarkTask(_identifier(record, path, number), (*texts, *codes), tuple(solutions))


def _identifier(record: Mapping[str, Any], path: Path, number: int) -> str:
    identifier = next((str(record[name]) for name in IDENTIFIERS if record.get(name) not in (None, "")), str(number))
    if _NAMES_ITS_BENCHMARK.match(identifier):
        return identifier
    benchmark = next((name for field, name in _NAMED_BY.items() if field in record), path.name.partition(".")[0])
    return f"{benchmark}/{identifier}"


def _codes(value: Any) -> list[str]:
    """The programs in a field: a program, a list of them, or that list as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    return list(_strings(value))


def _strings(value: Any) -> Iterator[str]:
    """Every string in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def _records(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"PAR1":
        yield from _parquet_records(path)
        return
    gzipped = magic[:2] == b"\x1f\x8b"
    try:
        with gzip.open(path, "rt", encoding="utf-8") if gzipped else path.open(encoding="utf-8") as file:
            yield from _json_records(file)
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are two
        raise ValueError(f"benchmark file {path} is neither JSON, JSON lines nor Parquet: {error}") from error


def _json_records(file: TextIO) -> Iterator[Any]:
    first = next((line for line in file if line.strip()), "")
    if first.lstrip().startswith("["):
        yield from json.loads(first + file.read())
    elif first:
        yield json.loads(first)
        yield from (json.loads(line) for line in file if line.strip())


def _parquet_records(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        known = {*IDENTIFIERS, *STATEMENTS, *CODES, *TESTS}
        columns = [name for name in file.schema_arrow.names if name in known]
        if not known.intersection((*STATEMENTS, *CODES), columns):
            columns = []
            yield dict.fromkeys(file.schema_arrow.names)  # for the error that names them
        for batch in file.iter_batches(columns=columns):
            yield from batch.to_pylist()
