"""EvalPlus tasks as EvalPlus judges them: outputs and times of a reference, tolerances, special oracles.

Written from the behaviour of evalplus 0.3.1, with the comparison outside the jail. One difference on purpose: there,
a right answer to HumanEval/32 (`find_zero`) leaves no mark and counts as missing; here it counts as right.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import platform
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ra3 import durable
from megatron_ra3.evaluate.jail import values
from megatron_ra3.evaluate.sandbox import Sandbox, Verdict, brief
from megatron_ra3.evaluate.session import Handle, Session
from megatron_ra3.evaluate.tasks import PlusTask
from megatron_ra3.evaluate.worker import JailError, Limits, ProgramError, Worker

MIN_TIME_S = 1.0
REFERENCE_TIME_FACTOR = 4.0
MAX_TASK_TIME_S = 60.0
_REFERENCE_TIME_S = 600.0
_MEMORY_BYTES = 4 << 30
_VALUE_BYTES = 64 << 20

NOT_NONE = {"check_str", "text_match_three", "text_starta_endb"}
SAME_SET = {
    "similar_elements",
    "find_char_long",
    "common_in_nested_lists",
    "extract_singly",
    "larg_nnum",
    "intersection_array",
    "find_dissimilar",
    "Diff",
}


@dataclass(frozen=True)
class Expected:
    """Of one task: what the reference returned for each input, base inputs first, and the seconds it took."""

    outputs: tuple[Any, ...]
    seconds: tuple[float, ...]

    @property
    def limits_s(self) -> list[float]:
        """The time a program has for each input."""
        return [max(MIN_TIME_S, REFERENCE_TIME_FACTOR * second) for second in self.seconds]

    @property
    def total_s(self) -> float:
        """The time for all inputs: EvalPlus's, unless this machine is so slow that the reference would miss it."""
        return max(min(MAX_TASK_TIME_S, sum(self.limits_s)), 2.0 * sum(self.seconds)) + 1.0


class PlusReferences:
    """What references return, run once in the jail and kept in `folder` (as packed JSON), if one is given.

    A file is named by the task, its content and the Python version, so that an old one is never taken for a new one.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._known: dict[str, Expected] = {}
        self._lock = threading.Lock()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def of(self, sandbox: Sandbox, task: PlusTask) -> Expected:
        """The expected outputs of `task`. Raises ValueError if its reference fails, JailError if the jail does."""
        with self._lock:
            known = self._known.get(task.task_id)
        if known is None:
            path = self._path(task)
            known = _read(path) if path is not None and path.exists() else None
            if known is None:
                known = _run_reference(sandbox, task)
                if path is not None:
                    _write(path, known)
            with self._lock:
                self._known[task.task_id] = known
        return known

    def _path(self, task: PlusTask) -> Path | None:
        if self._folder is None:
            return None
        content = repr((task.reference, task.entry_point, task.base_inputs, task.plus_inputs))
        digest = hashlib.sha256(f"{platform.python_version()}{content}".encode()).hexdigest()[:16]
        return self._folder / f"{task.task_id.replace('/', '-')}-{digest}.json.gz"


def _run_reference(sandbox: Sandbox, task: PlusTask) -> Expected:
    limits = Limits(time_s=_REFERENCE_TIME_S, memory_bytes=_MEMORY_BYTES, output_bytes=_VALUE_BYTES)
    outputs, seconds = [], []
    try:
        with sandbox.worker() as worker, Session(worker, task.reference, limits) as session:
            for arguments in (*task.base_inputs, *task.plus_inputs):
                output = session.call(task.entry_point, *arguments)
                outputs.append(output is not None if task.entry_point in NOT_NONE else output)
                seconds.append(session.seconds)
    except ProgramError as error:
        raise ValueError(f"{task.task_id}: the reference failed on input {len(outputs)}: {error}") from None
    return Expected(tuple(outputs), tuple(seconds))


def _refuse(value: object) -> Any:
    raise ValueError(f"{value!r} is no data")


def _write(path: Path, expected: Expected) -> None:
    """Written whole or not at all; outputs that are no data (none are known) are not kept."""
    if any(isinstance(output, Handle) for output in expected.outputs):
        return
    data = {"seconds": expected.seconds, "outputs": [values.encode(output, _refuse) for output in expected.outputs]}
    durable.write(path, gzip.compress(json.dumps(data).encode(), compresslevel=1))


def _read(path: Path) -> Expected:
    data = json.loads(gzip.decompress(path.read_bytes()))
    return Expected(tuple(values.decode(output, _refuse) for output in data["outputs"]), tuple(data["seconds"]))


def attempt_plus(worker: Worker, task: PlusTask, code: str, expected: Expected) -> Verdict:
    """The base inputs, then in a fresh process the plus inputs, up to the first wrong answer; a pass needs them all."""
    total = len(task.base_inputs) + len(task.plus_inputs)
    if not total or len(expected.outputs) != total:
        raise ValueError(f"{task.task_id}: {total} inputs and {len(expected.outputs)} expected outputs")
    passed = 0
    for inputs in (task.base_inputs, task.plus_inputs):
        if not inputs:
            continue
        part = slice(passed, passed + len(inputs))
        stage = Expected(expected.outputs[part], expected.seconds[part])
        try:
            wrong, right = _attempt_inputs(worker, task, code, inputs, stage)
        except ProgramError as error:
            return Verdict(outcome="fail", reason=error.reason, detail=error.detail, tests_passed=passed)
        passed += right
        if wrong:
            return Verdict(outcome="fail", reason="wrong", detail=wrong, tests_passed=passed)
    return Verdict(outcome="pass", tests_passed=passed)


def base_passed(task: PlusTask, verdict: Verdict) -> bool:
    """Whether all base inputs were answered right: the original benchmark's verdict, as EvalPlus reports it."""
    return verdict.passed or (bool(task.base_inputs) and verdict.tests_passed >= len(task.base_inputs))


def _attempt_inputs(
    worker: Worker, task: PlusTask, code: str, inputs: tuple[list[Any], ...], expected: Expected
) -> tuple[str, int]:
    """What was wrong first, empty if nothing, and how many answers before it were right."""
    limits_s = expected.limits_s
    limits = Limits(time_s=expected.total_s, memory_bytes=_MEMORY_BYTES, output_bytes=_VALUE_BYTES)
    atol = task.atol
    with Session(worker, code, limits) as session:
        for index, (arguments, target) in enumerate(zip(inputs, expected.outputs, strict=True)):
            output = session.call(task.entry_point, *arguments, limit_s=limits_s[index])
            try:
                right = _matches(task, arguments, output, target, atol)
            except (JailError, ProgramError):
                raise
            except Exception as error:  # noqa: BLE001 - an oracle meets values of unforeseen types
                right, output = False, f"{type(error).__name__} {error}"
            if not right:
                return f"input {index} of {len(inputs)}: {brief(output)} instead of {brief(target)}", index
            atol = _tolerance(atol, target)  # stays raised for the later inputs, as in EvalPlus
    return "", len(inputs)


def _matches(task: PlusTask, arguments: list[Any], output: Any, target: Any, atol: float) -> bool:
    name = task.entry_point
    if name == "find_zero" and task.task_id.startswith("HumanEval/"):
        return abs(_polynomial(arguments[0], output)) <= atol
    right = bool(output == target)
    if task.task_id.startswith("Mbpp/"):
        special = _special(name, arguments, output, target, atol)
        if special is not None:
            right = special if name in SAME_SET | NOT_NONE else right or special
    atol = _tolerance(atol, target)
    if right or atol == 0:
        return right
    if type(output) is not type(target) or (isinstance(target, list | tuple) and len(output) != len(target)):
        return False
    import numpy as np

    return bool(np.allclose(output, target, rtol=1e-07, atol=atol))


def _tolerance(atol: float, target: Any) -> float:
    """`atol`, or EvalPlus's tolerance for floats where the task has none."""
    floats = isinstance(target, float)
    if isinstance(target, list | tuple) and target:
        floats = all(isinstance(item, float) for item in target)
    return 1e-6 if atol == 0 and floats else atol


def _special(name: str, arguments: list[Any], output: Any, target: Any, atol: float) -> bool | None:
    """What a special oracle says; None where there is none."""
    if name in SAME_SET:
        return set(output) == set(target)
    if name in NOT_NONE:
        return bool(output == target if isinstance(output, bool) else target == (output is not None))
    oracles: dict[str, Callable[[], bool]] = {
        "are_equivalent": lambda: True,
        "sum_div": lambda: bool(output == 0),
        "surface_Area": lambda: bool(abs(output - _surface_area(*arguments)) <= atol),
        "digit_distance_nums": lambda: bool(output == _digit_distance(*arguments)),
    }
    return oracles[name]() if name in oracles else None


def _polynomial(coefficients: list[float], x: float) -> float:
    return sum(coefficient * math.pow(x, power) for power, coefficient in enumerate(coefficients))


def _surface_area(base_edge: float, height: float) -> int:
    """Of a square pyramid, `height` being measured from the base to the apex."""
    slant_height = math.sqrt((base_edge / 2) ** 2 + height**2)
    return round(base_edge**2 + 4 * (base_edge * slant_height) / 2)


def _digit_distance(first: int, second: int) -> int:
    digits = [str(first), str(second)]
    width = max(map(len, digits))
    return sum(abs(int(a) - int(b)) for a, b in zip(*(text.zfill(width) for text in digits), strict=True))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


_ITEMS_OF_ARGUMENTS = {
    *(63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780),
}
_ARGUMENTS = {
    *(2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630, 726, 740, 744, 809),
}
_FIRST_ARGUMENT = {250, 307, 405, 446, 617, 720, 763, 808}
_ITEMS_OF_FIRST = {75, 413, 444, 753}
_SECOND_ARGUMENT = {106, 750}
_ARGUMENTS_AND_ITEMS = {259, 401, 445}
_WHOLE = {580, 615, 791}


def restore_mbpp_inputs(number: int, inputs: list[Any]) -> list[Any]:
    """MBPP+ inputs with the tuples, sets and complex numbers that JSON cannot hold, by task number."""
    if number in _WHOLE:
        return [_tuples(arguments) for arguments in inputs]
    return [_restore(number, arguments) for arguments in inputs]


def _restore(number: int, arguments: list[Any]) -> list[Any]:
    first, rest = (arguments[0], arguments[1:]) if arguments else ([], [])
    restored: list[Any] = arguments
    if number in _ARGUMENTS:
        restored = [tuple(argument) for argument in arguments]
    elif number in _ITEMS_OF_ARGUMENTS:
        restored = [[tuple(item) for item in argument] for argument in arguments]
    elif number in _ARGUMENTS_AND_ITEMS:
        restored = [tuple(tuple(item) for item in argument) for argument in arguments]
    elif number in _FIRST_ARGUMENT:
        restored = [tuple(first), *rest]
    elif number in _ITEMS_OF_FIRST:
        restored = [[tuple(item) for item in first], *rest]
    elif number in _SECOND_ARGUMENT:
        restored = [first, tuple(arguments[1])]
    else:
        restored = _restore_single(number, arguments)
    return restored


def _restore_single(number: int, arguments: list[Any]) -> list[Any]:
    """Tasks that are alone in how they lost their types."""
    if number == 115:  # EvalPlus gives an empty dict where the set was empty
        return [[set(item) if isinstance(item, list) and item else {} for item in arguments[0]]]
    if number == 124:
        return [float(arguments[0]), complex(arguments[1])]
    if number == 252:
        return [complex(arguments[0])]
    if number == 278:
        return [tuple(tuple(item) if isinstance(item, list) else item for item in arguments[0])]
    if number == 722:
        return [{key: tuple(value) for key, value in arguments[0].items()}, *arguments[1:]]
    return arguments
