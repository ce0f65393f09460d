"""EvalPlus's own verdicts, program by program, for `mutants.py`; runs in an environment of its own.

Reads JSON lines {"task_id", "code", "min_time_s"} and answers each with {"base", "plus"}: evalplus's status words, null
for `plus` where `base` did not pass. Needs evalplus 0.3.1, numpy, psutil, tqdm, appdirs, tempdir and wget, none of its
other requirements. EvalPlus isolates nothing: give it mutants of trusted programs, never a model's programs.
"""

from __future__ import annotations

import json
import sys
import types
from typing import Any

sys.modules["datasets"] = types.ModuleType("datasets")  # evalplus.data imports it for another benchmark
sys.modules["datasets"].load_dataset = None  # type: ignore[attr-defined]

from evalplus.data import get_human_eval_plus, get_mbpp_plus  # noqa: E402
from evalplus.eval import PASS, untrusted_check  # noqa: E402
from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS  # noqa: E402
from evalplus.gen.util import trusted_exec  # noqa: E402


def main() -> None:
    """Serve until stdin ends. The files are those of HUMANEVAL_OVERRIDE_PATH and MBPP_OVERRIDE_PATH."""
    problems = {**get_human_eval_plus(), **get_mbpp_plus()}
    expected: dict[tuple[str, str], Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        problem = problems[request["task_id"]]
        answer: dict[str, str | None] = {"base": None, "plus": None}
        for part in ("base", "plus"):
            key = (problem["task_id"], part)
            if key not in expected:
                expected[key] = trusted_exec(
                    problem["prompt"] + problem["canonical_solution"],
                    problem[f"{part}_input"],
                    problem["entry_point"],
                    record_time=True,
                    output_not_none=problem["entry_point"] in MBPP_OUTPUT_NOT_NONE_TASKS,
                )
            answer[part] = check(problem, part, request, *expected[key])
            if answer[part] != PASS:
                break
        print(json.dumps(answer), flush=True)


def check(problem: dict[str, Any], part: str, request: dict[str, Any], outputs: list[Any], seconds: list[float]) -> str:
    """The status of one program on the base or on the extra inputs, as `evalplus.evaluate` asks for it.

    Its least time for an input is 1 s of the clock, unless the request gives more.
    """
    dataset = "humaneval" if problem["task_id"].startswith("HumanEval/") else "mbpp"
    status, _ = untrusted_check(
        dataset,
        request["code"],
        problem[f"{part}_input"],
        problem["entry_point"],
        expected=outputs,
        atol=problem["atol"],
        ref_time=seconds,
        min_time_limit=request["min_time_s"],
        fast_check=True,
    )
    return str(status)


if __name__ == "__main__":
    main()
