"""Verdicts: tests run here, outside the jail, on what programs return from inside it.

A program that could reach the comparison would pass whatever it answers; so what runs in the jail has neither the
expected values nor a say. A pass needs that every test ran, called the program, and found the right answer.
"""

from __future__ import annotations

import ast
import importlib
import sys
from typing import Any

from megatron_ra3.evaluate.plus import PlusReferences, attempt_plus
from megatron_ra3.evaluate.sandbox import Sandbox, Verdict
from megatron_ra3.evaluate.session import Session
from megatron_ra3.evaluate.stdio import attempt_function, attempt_script
from megatron_ra3.evaluate.tasks import AssertTask, FunctionTask, PlusTask, ScriptTask, Task
from megatron_ra3.evaluate.worker import JailError, Limits, ProgramError, Worker


def grade(sandbox: Sandbox, task: Task, code: str, references: PlusReferences | None = None) -> Verdict:
    """Judge the whole program `code`. An EvalPlus task needs its `references`."""
    if isinstance(task, PlusTask):
        if references is None:
            raise ValueError(f"{task.task_id}: an EvalPlus task is judged against references; see plus.PlusReferences")
        expected = references.of(sandbox, task)
        return sandbox.judge(lambda worker: attempt_plus(worker, task, code, expected))
    if isinstance(task, ScriptTask):
        return sandbox.judge(lambda worker: attempt_script(worker, task, code))
    if isinstance(task, FunctionTask):
        return sandbox.judge(lambda worker: attempt_function(worker, task, code))
    return sandbox.judge(lambda worker: attempt_asserts(worker, task, code))


def attempt_asserts(worker: Worker, task: AssertTask, code: str) -> Verdict:
    """Run the task's own test code verbatim against stubs that call into the jail."""
    with Session(worker, code, Limits(time_s=task.time_s)) as session:
        for index, test in enumerate(task.tests):
            if index == 0:
                namespace = _namespace(session, task)
            before = session.calls
            try:
                exec(compile(test, f"{task.task_id} test {index}", "exec"), namespace)  # noqa: S102 - from a file named by its checksum
            except (JailError, ProgramError):
                raise
            except Exception as error:  # noqa: BLE001 - a test meets values of unforeseen types
                detail = f"test {index}: {type(error).__name__} {str(error)[:200]}"
                return Verdict(outcome="fail", reason="wrong", detail=detail, tests_passed=index)
            if session.failure is not None:
                raise session.failure
            if session.calls == before:
                return Verdict(outcome="fail", reason="untested", detail=f"test {index} calls nothing")
    if not task.tests:
        return Verdict(outcome="fail", reason="untested", detail="the task has no tests")
    return Verdict(outcome="pass", tests_passed=len(task.tests))


class Stub:
    """A name of the program: calling it calls into the jail; anything else looks at the object there."""

    def __init__(self, session: Session, name: str) -> None:
        self._session = session
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result, with mutable arguments changed as the program changed them."""
        return self._session.call_mutable(self._name, *args, **kwargs)


def _namespace(session: Session, task: AssertTask) -> dict[str, Any]:
    """What the tests see: the trusted setup, stubs for names of the program, and standard modules.

    Which names are stubs is read from the reference, never from the program: one that defines `set` itself must not
    have the tests call it.
    """
    namespace: dict[str, Any] = {"__name__": "tests"}
    if task.entry_point is None:
        used = _used_names("\n".join((task.setup, *task.tests)))
        for name in used - _defined_names(task.reference):
            if name in sys.stdlib_module_names:
                namespace[name] = importlib.import_module(name)
        for name in used & _defined_names(task.reference):
            namespace[name] = Stub(session, name)
    exec(compile(task.setup, f"{task.task_id} setup", "exec"), namespace)  # noqa: S102 - from a file named by its checksum
    if task.entry_point is not None:
        namespace[task.entry_point] = Stub(session, task.entry_point)
    return namespace


def _used_names(code: str) -> set[str]:
    """Names that `code` reads and nowhere sets."""
    names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    stored = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    return {node.id for node in names} - stored


def _defined_names(program: str) -> set[str]:
    """Functions, classes and variables that `program` defines; modules it imports are not among them."""
    defined: set[str] = set()
    for node in ast.parse(program).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            defined.update(name.id for name in ast.walk(node) if isinstance(name, ast.Name))
    return defined
