"""Reading each benchmark format from small made files, and refusing what is not what it should be."""

import base64
import gzip
import hashlib
import json
import os
import pickle
import zlib

import pytest

from megatron_ra3.evaluate.contests import (
    decode_private_tests,
    load_codeforces,
    load_input_output,
    load_livecodebench,
)
from megatron_ra3.evaluate.splits import mbpp_split, refuse_leaks
from megatron_ra3.evaluate.tasks import (
    IoTest,
    load_humaneval,
    load_humaneval_plus,
    load_mbpp,
    load_mbpp_plus,
    load_sanitized_mbpp,
)


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "canonical_solution": "    return x\n",
    "test": "def check(candidate):\n    assert candidate(1) == 1\n",
}


def test_files_are_known_by_checksum(tmp_path):
    path = lines(tmp_path / "h.jsonl", HUMANEVAL)
    with pytest.raises(ValueError, match=r"sha256 .* not b796127e"):
        load_humaneval(path)
    loaded = load_humaneval(path, hashlib.sha256(path.read_bytes()).hexdigest())
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    (task,) = loaded.tasks
    assert task.reference == "def f(x):\n    return x\n"
    assert (task.tests, task.entry_point, task.time_s) == (("check(f)",), "f", 3.0)
    with pytest.raises(ValueError, match="nothing is downloaded"):
        load_humaneval(tmp_path / "missing.jsonl")
    packed = tmp_path / "h.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert load_humaneval(packed, None).tasks == loaded.tasks


def test_records_that_lack_something_are_named(tmp_path):
    path = lines(tmp_path / "h.jsonl", HUMANEVAL, {"task_id": "HumanEval/1"})
    with pytest.raises(ValueError, match=r"record 1 lacks \['prompt', 'entry_point'"):
        load_humaneval(path, None)
    with pytest.raises(ValueError, match="holds no records"):
        load_humaneval(lines(tmp_path / "empty.jsonl"), None)


def test_mbpp_in_both_forms(tmp_path):
    record = {
        "task_id": 3,
        "text": "T",
        "code": "def f(x):\r\n  return x",
        "test_setup_code": "",
        "test_list": ["assert f(1)"],
    }
    (task,) = load_mbpp(lines(tmp_path / "m.jsonl", record), None).tasks
    assert (task.task_id, task.prompt, task.reference) == ("Mbpp/3", "T", "def f(x):\n  return x")
    record = {"task_id": 3, "prompt": "P", "code": "c", "test_imports": ["import math"], "test_list": ["assert f(1)"]}
    path = tmp_path / "s.json"
    path.write_text(json.dumps([record]), encoding="utf-8")
    (task,) = load_sanitized_mbpp(path, None).tasks
    assert (task.prompt, task.setup, task.tests) == ("P", "import math", ("assert f(1)",))


def test_plus_files_with_their_quirks(tmp_path):
    record = {
        "task_id": "Mbpp/2",
        "prompt": '"""p"""\n',
        "entry_point": "f",
        "canonical_solution": "f = 1",
        "base_input": [[[1], [2]]],
        "plus_input": {},
        "atol": 0,
    }
    (task,) = load_mbpp_plus(lines(tmp_path / "p.jsonl", record), None).tasks
    assert task.base_inputs == ([(1,), (2,)],)
    assert task.plus_inputs == ()
    (task,) = load_humaneval_plus(lines(tmp_path / "q.jsonl", record | {"task_id": "HumanEval/2"}), None).tasks
    assert task.base_inputs == ([[1], [2]],)


def packed_tests(payload):
    return base64.b64encode(zlib.compress(pickle.dumps(payload))).decode()


def lcb(**changes):
    public = [{"input": "1\n", "output": "2\n", "testtype": "stdin"}]
    return {
        "question_id": "q1",
        "question_content": "Q",
        "contest_date": "2024-05-01T00:00:00",
        "starter_code": "",
        "public_test_cases": json.dumps(public),
        "private_test_cases": packed_tests(json.dumps(public)),
        "metadata": "{}",
    } | changes


def test_livecodebench_reads_both_kinds(tmp_path):
    call = json.dumps([{"input": '[1, 2]\n"x"', "output": "3", "testtype": "functional"}])
    path = lines(
        tmp_path / "l.jsonl",
        lcb(),
        lcb(
            question_id="q2",
            public_test_cases=call,
            private_test_cases="[]",
            metadata='{"func_name": "f"}',
            starter_code="S",
        ),
        lcb(question_id="q3", contest_date="2023-01-01"),
        lcb(question_id="q4", public_test_cases="[]", private_test_cases="[]"),
    )
    loaded = load_livecodebench(path, None, first_date="2024-01-01")
    script, function = loaded.tasks
    assert script.tests == (IoTest("1\n", "2\n"),) * 2
    assert (function.function, function.tests, function.prompt) == ("f", (IoTest([[1, 2], "x"], 3),), "Q\n\nS")
    assert loaded.skipped == {"LiveCodeBench/q3": "outside the dates", "LiveCodeBench/q4": "no tests"}


class Evil:
    def __reduce__(self):
        return os.getcwd, ()


def test_private_tests_run_no_code():
    assert decode_private_tests('[{"a": 1}]') == [{"a": 1}]
    with pytest.raises(ValueError, match=r"posix\.getcwd"):
        decode_private_tests(packed_tests(Evil()))
    with pytest.raises(ValueError, match="hold a list"):
        decode_private_tests(packed_tests([1]))


def test_codeforces_skips_what_it_cannot_judge(tmp_path):
    record = {
        "id": "1/A",
        "description": "D",
        "input_format": "I",
        "output_format": None,
        "note": "",
        "time_limit": 2.0,
        "memory_limit": 64.0,
        "official_tests": [{"input": "1", "output": "2"}],
        "official_tests_complete": True,
        "interaction_format": None,
        "input_mode": "stdio",
        "generated_checker": None,
    }
    path = lines(
        tmp_path / "c.jsonl",
        record,
        record | {"id": "1/B", "interaction_format": "x"},
        record | {"id": "1/C", "input_mode": "file"},
        record | {"id": "1/D", "official_tests_complete": False},
        record | {"id": "1/E", "official_tests": None},
    )
    loaded = load_codeforces(path, None, python_time_factor=2.0)
    (task,) = loaded.tasks
    assert (task.prompt, task.time_s, task.memory_bytes, task.checker) == ("D\n\nI", 4.0, 64 << 20, None)
    assert list(loaded.skipped.values()) == ["interactive", "input mode file", "tests cut short", "no tests"]


def test_input_output_records_of_every_make(tmp_path):
    huge = "9" * 5000
    path = lines(
        tmp_path / "a.jsonl",
        {
            "problem_id": 1,
            "question": "Q",
            "input_output": json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]}),
            "solutions": '["s"]',
        },
        {"problem_id": 2, "input_output": {"inputs": [["a", "b"]], "outputs": [["c"]]}},
        {"problem_id": 3, "input_output": f'{{"fn_name": "f", "inputs": [[{huge}]], "outputs": [[1]]}}'},
        {"problem_id": 4, "input_output": ""},
        {"problem_id": 5, "input_output": {"inputs": ["1"], "outputs": []}},
    )
    loaded = load_input_output(path, None, name="APPS")
    first, second, third = loaded.tasks
    assert (first.task_id, first.tests, first.references) == ("APPS/1", (IoTest("1\n", "2\n"),), ("s",))
    assert second.tests == (IoTest("a\nb", "c"),)
    assert (third.function, third.wrapped, third.tests[0].input) == ("f", True, [10**5000 - 1])
    assert loaded.skipped == {"APPS/4": "no tests", "APPS/5": "1 inputs and 0 outputs"}
    with pytest.raises(ValueError, match="1 task ids occur more than once"):
        load_input_output(
            lines(tmp_path / "b.jsonl", *[{"id": 1, "input_output": {"inputs": ["1"], "outputs": ["1"]}}] * 2),
            None,
            name="X",
        )


def test_scoring_on_training_tasks_is_refused():
    assert [mbpp_split(f"Mbpp/{number}") for number in (10, 11, 510, 511, 600, 601, 974)] == [
        *("prompt", "test", "test", "validation", "validation", "train", "train")
    ]
    for name in ("Mbpp/0", "Mbpp/975", "HumanEval/3"):
        with pytest.raises(ValueError, match=name):
            mbpp_split(name)
    with pytest.raises(ValueError, match="1 of 2 tasks were trained on, for instance Mbpp/601"):
        refuse_leaks({"Mbpp/601", "Mbpp/700"}, {"Mbpp/601", "Mbpp/20"})
    assert refuse_leaks({"Mbpp/601"}, {"Mbpp/601"}, allow=True) == 1
    assert refuse_leaks({"Mbpp/700"}, {"Mbpp/20"}) == 0
