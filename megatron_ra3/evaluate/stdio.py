"""Judging programs by text on stdin and stdout, or by one function's return values: LiveCodeBench, Codeforces, APPS.

Outputs are compared outside the jail. Where several outputs are right, a checker runs in a jail of its own, after the
program's has ended, so that a program cannot reach the checker either.
"""

from __future__ import annotations

import decimal
import math
from typing import Any

from megatron_ra3.evaluate.sandbox import Verdict, brief
from megatron_ra3.evaluate.scripts import run_script
from megatron_ra3.evaluate.session import Session
from megatron_ra3.evaluate.tasks import FunctionTask, IoTest, ScriptTask
from megatron_ra3.evaluate.worker import JailError, Limits, Worker

_CHECKER_TIME_S = 30.0
_LOADING_S = 5.0
_MIN_MEMORY_BYTES = 512 << 20
"""What an interpreter needs beside the data of a small problem, address space being counted."""


def same_output(given: str, right: str) -> bool:
    """Whether two outputs agree as LiveCodeBench compares them.

    Both are stripped and split into lines; a line agrees if it is equal when stripped, or if its tokens are equal as
    decimal numbers, without tolerance.
    """
    given_lines, right_lines = given.strip().split("\n"), right.strip().split("\n")
    if len(given_lines) != len(right_lines):
        return False
    return all(_same_line(a.strip(), b.strip()) for a, b in zip(given_lines, right_lines, strict=True))


def _same_line(given: str, right: str) -> bool:
    if given == right:
        return True
    left, other = given.split(), right.split()
    if len(left) != len(other):
        return False
    try:
        return all(_number(a) == _number(b) for a, b in zip(left, other, strict=True))
    except decimal.InvalidOperation:
        return False


def _number(token: str) -> decimal.Decimal:
    """Of a finite number; NaN and infinities agree only as text."""
    value = decimal.Decimal(token)
    if not value.is_finite():
        raise decimal.InvalidOperation(token)
    return value


def attempt_script(worker: Worker, task: ScriptTask, code: str) -> Verdict:
    """Run every test up to the first failure. A non-zero exit status fails whatever was printed before."""
    memory_bytes = max(task.memory_bytes or 0, _MIN_MEMORY_BYTES)
    limits = Limits(time_s=task.time_s, memory_bytes=memory_bytes)
    for index, test in enumerate(task.tests):
        finished = run_script(worker, code, test.input.encode(), limits)
        reason, detail = finished.exceeded, ""
        if not reason and finished.code != 0:
            reason = "exit"
            detail = f"status {finished.code} {finished.stderr[-300:].decode(errors='replace').strip()}"
        elif not reason:
            output = finished.stdout.decode(errors="replace")
            if not (_checked(worker, task, test, output) if task.checker else same_output(output, test.output)):
                reason, detail = "wrong", f"{brief(output)} instead of {brief(test.output)}"
        if reason:
            return Verdict(outcome="fail", reason=reason, detail=f"test {index}: {detail}", tests_passed=index)
    if not task.tests:
        return Verdict(outcome="fail", reason="untested", detail="the task has no tests")
    return Verdict(outcome="pass", tests_passed=len(task.tests))


def _checked(worker: Worker, task: ScriptTask, test: IoTest, output: str) -> bool:
    """What the task's checker says. A checker that breaks is our failure unless it says so of a strange output."""
    assert task.checker is not None
    files = {"input.txt": test.input, "correct_output.txt": test.output, "output.txt": output}
    finished = run_script(worker, task.checker, b"", Limits(time_s=_CHECKER_TIME_S), argv=tuple(files), files=files)
    if finished.exceeded == "time":
        raise JailError(f"{task.task_id}: the checker took more than {_CHECKER_TIME_S:.0f} s")
    return finished.code == 0 and finished.stdout.strip() in {b"1", b"1.0"}


def attempt_function(worker: Worker, task: FunctionTask, code: str) -> Verdict:
    """Call the function, or the method of a new `Solution` if the program defines none, for every test."""
    limits = Limits(time_s=_LOADING_S + task.time_s * len(task.tests))
    method = task.function.rpartition(".")[2]
    with Session(worker, code, limits) as session:
        owner = session.call("Solution") if "class Solution" in code else None
        for index, test in enumerate(task.tests):
            output = session.call(method, *test.input, on=owner, limit_s=task.time_s)
            if not (same_value(output, test.output) or (task.wrapped and _first(output, test.output))):
                detail = f"test {index}: {brief(output)} instead of {brief(test.output)}"
                return Verdict(outcome="fail", reason="wrong", detail=detail, tests_passed=index)
    if not task.tests:
        return Verdict(outcome="fail", reason="untested", detail="the task has no tests")
    return Verdict(outcome="pass", tests_passed=len(task.tests))


def _first(given: Any, right: Any) -> bool:
    """APPS keeps some return values in a list of one."""
    return isinstance(right, list) and len(right) > 0 and same_value(given, right[0])


def same_value(given: Any, right: Any) -> bool:
    """Whether a returned value is the JSON value `right`: tuples count as lists, at every depth."""
    if isinstance(given, list | tuple) and isinstance(right, list):
        return len(given) == len(right) and all(map(same_value, given, right))
    if isinstance(given, dict) and isinstance(right, dict):
        return {str(key) for key in given} == set(right) and all(
            same_value(value, right[str(key)]) for key, value in given.items()
        )
    if isinstance(given, float) and isinstance(right, float):
        return given == right or (math.isnan(given) and math.isnan(right))
    return bool(given == right)
