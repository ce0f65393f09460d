"""Mutated solutions of HumanEval+ and MBPP+, judged by our graders and by EvalPlus; every disagreement is listed.

    python benchmarks/mutants.py --data FOLDER --evalplus-python PYTHON --state FILE --out FILE

PYTHON is an interpreter that has evalplus (see `evalplus_judge.py`). Verdicts go to the state file as they come, so
that a killed run goes on where it was. The order is drawn, so that any part of it is a fair sample. Hours on two cores.
"""

from __future__ import annotations

import argparse
import ast
import collections
import difflib
import json
import os
import platform
import random
import subprocess
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.mutations import Mutant, mutants
from megatron_ra3.evaluate.graders import grade
from megatron_ra3.evaluate.plus import PlusReferences, base_passed
from megatron_ra3.evaluate.sandbox import Sandbox
from megatron_ra3.evaluate.tasks import HUMANEVAL_PLUS_SHA256, MBPP_PLUS_SHA256, PlusTask
from megatron_ra3.evaluate.tasks import load_humaneval_plus as load_humaneval
from megatron_ra3.evaluate.tasks import load_mbpp_plus as load_mbpp

CHUNK = 20
USUAL_S, PATIENT_S = 1.0, 30.0
"""EvalPlus's least time limit per input, and one that no busy machine makes a program miss."""
FIND_ZERO = (
    "evalplus 0.3.1 leaves no mark for a right answer to find_zero (`continue` comes before `details[i] = True`), then "
    "finds fewer marks than inputs and fails it; the answer is within the task's tolerance and ours counts it as right"
)
TIME = (
    f"evalplus passes it too once an input may take {PATIENT_S:.0f} s: it goes by the clock, and a busy machine kept "
    "the program waiting; ours does not count seconds without a processor"
)


@dataclass(frozen=True)
class Case:
    """One mutant of one task."""

    task: PlusTask
    number: int
    mutant: Mutant

    @property
    def key(self) -> str:
        """What a verdict is kept under."""
        return f"{self.task.task_id}#{self.number}"


class EvalPlus:
    """The judge's process; a context manager."""

    def __init__(self, python: Path, data: Path) -> None:
        environment = {
            **os.environ,
            "HUMANEVAL_OVERRIDE_PATH": str(data / "HumanEvalPlus.jsonl.gz"),
            "MBPP_OVERRIDE_PATH": str(data / "MbppPlus.jsonl.gz"),
        }
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name("evalplus_judge.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def judge(self, case: Case, min_time_s: float = USUAL_S) -> dict[str, str | None]:
        """Status words for base and extra inputs."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"task_id": case.task.task_id, "code": case.mutant.code, "min_time_s": min_time_s}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise OSError(f"the evalplus judge ended with status {self._process.wait()}; its words are above")
        answer: dict[str, str | None] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Judge what is missing, then write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with HumanEvalPlus and MbppPlus .jsonl.gz")
    parser.add_argument("--evalplus-python", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True, help="JSON Lines file of verdicts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-task", type=int, default=5, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N")
    arguments = parser.parse_args()
    cases = draw(arguments.data, arguments.per_task, arguments.seed)
    rows: dict[str, dict[str, Any]] = {}
    if arguments.state.exists():
        rows = {row["key"]: row for row in map(json.loads, arguments.state.read_text().splitlines())}
    missing = [case for case in cases if case.key not in rows]
    references = PlusReferences(arguments.state.with_suffix(".references"))
    evalplus = EvalPlus(arguments.evalplus_python, arguments.data)
    try:
        with Sandbox(arguments.workers) as sandbox, arguments.state.open("a") as state:
            for start in range(0, len(missing), CHUNK):
                for row in judge(sandbox, references, evalplus, missing[start : start + CHUNK]):
                    rows[row["key"]] = row
                    state.write(json.dumps(row) + "\n")
                state.flush()
                print(f"{len(rows)}/{len(cases)} judged, {len(differing(rows.values()))} disagreements", flush=True)
                write(arguments, rows.values(), len(cases))
            for case in cases:
                if disagree(rows[case.key]) and "evalplus_patient" not in rows[case.key]:
                    rows[case.key] |= {"evalplus_patient": evalplus.judge(case, PATIENT_S), "diff": changed(case)}
                    state.write(json.dumps(rows[case.key]) + "\n")
    finally:
        evalplus.close()
    write(arguments, rows.values(), len(cases))


def draw(data: Path, per_task: int, seed: int) -> list[Case]:
    """All cases, in an order drawn by seed."""
    tasks = (*load_humaneval(data / "HumanEvalPlus.jsonl.gz").tasks, *load_mbpp(data / "MbppPlus.jsonl.gz").tasks)
    cases = [
        Case(task, number, mutant)
        for task in tasks
        for number, mutant in enumerate(mutants(task.reference, per_task, f"{seed}/{task.task_id}"))
    ]
    random.Random(seed).shuffle(cases)
    return cases


def judge(sandbox: Sandbox, references: PlusReferences, evalplus: EvalPlus, cases: list[Case]) -> list[dict[str, Any]]:
    """Both verdicts on each case; where they differ, a second time, one program at a time."""

    def ours(case: Case) -> dict[str, Any]:
        verdict = grade(sandbox, case.task, case.mutant.code, references)
        found = {"outcome": verdict.outcome, "reason": verdict.reason, "detail": verdict.detail}
        return {**found, "base_passed": base_passed(case.task, verdict)}

    rows = []
    for case, verdict in zip(cases, list(sandbox.map(ours, cases)), strict=True):
        row = {"key": case.key, "kind": case.mutant.kind, "ours": verdict}
        row["evalplus"] = evalplus.judge(case)
        if disagree(row):
            row["first"] = {"ours": row["ours"], "evalplus": row["evalplus"]}
            row["ours"] = ours(case)
            row["evalplus"] = evalplus.judge(case)
        rows.append(row)
    return rows


def changed(case: Case) -> list[str]:
    """What the mutant changed."""
    before = ast.unparse(ast.parse(case.task.reference)).split("\n")
    return list(difflib.unified_diff(before, case.mutant.code.split("\n"), n=1, lineterm=""))


def disagree(row: dict[str, Any]) -> bool:
    """Whether the verdicts on the base inputs, or on all inputs, differ."""
    ours, theirs = row["ours"], row["evalplus"]
    return (ours["base_passed"], ours["outcome"] == "pass") != (theirs["base"] == "pass", theirs["plus"] == "pass")


def argument(row: dict[str, Any]) -> str:
    """Why the verdicts differ, where that is known."""
    if row["key"].startswith("HumanEval/32#"):
        return FIND_ZERO
    patient = row.get("evalplus_patient")
    return TIME if patient and not disagree({**row, "evalplus": patient}) else ""


def differing(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose last verdicts differ."""
    return [row for row in rows if disagree(row)]


def write(arguments: argparse.Namespace, rows: Collection[dict[str, Any]], planned: int) -> None:
    """Counts, the table of verdicts, and every disagreement."""
    table = collections.Counter(
        f"ours {row['ours']['outcome']}, evalplus {'pass' if row['evalplus']['plus'] == 'pass' else 'fail'}"
        for row in rows
    )
    found = [{**row, "argument": argument(row)} for row in differing(rows)]
    result = {
        "mutants_planned": planned,
        "mutants_judged": len(rows),
        "per_task": arguments.per_task,
        "seed": arguments.seed,
        "tasks": len({row["key"].partition("#")[0] for row in rows}),
        "kinds": dict(collections.Counter(row["kind"] for row in rows).most_common()),
        "verdicts": dict(table),
        "reasons": dict(collections.Counter(row["ours"]["reason"] or "pass" for row in rows).most_common()),
        "settled_by_judging_again": sum("first" in row for row in rows) - len(found),
        "disagreements": found,
        "disagreements_without_an_argument": sum(not row["argument"] for row in found),
        "evalplus": "0.3.1",
        "data": {"HumanEval+": HUMANEVAL_PLUS_SHA256, "MBPP+": MBPP_PLUS_SHA256},
        "python": platform.python_version(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
