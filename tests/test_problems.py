"""Tasks as they are posed, with hidden tests alone in their verdict, and verdicts as rewards."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import get_args

import pytest

from megatron_ra3.evaluate.formats import FORMATS
from megatron_ra3.evaluate.judge import Attempt, Judge, reward
from megatron_ra3.evaluate.problems import hidden, load_problems
from megatron_ra3.evaluate.sandbox import Verdict
from megatron_ra3.evaluate.settings import DataConfig, FileConfig, SuiteName
from megatron_ra3.evaluate.suites import load_file
from megatron_ra3.evaluate.tasks import AssertTask, PlusTask
from megatron_ra3.rlvr_config import JailConfig, TaskFileConfig, TaskFormat
from tests.support import open_jail

RECORD = {
    "task_id": "double/0",
    "prompt": "x=4\n",
    "stop": ["\n"],
    "head": "def f(n):\n ",
    "function": "f",
    "tests": [[[1], 2], [[5], 10]],
    "max_new_tokens": 8,
}


def _file(path: Path, *records: object) -> TaskFileConfig:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return TaskFileConfig(file=str(path))


def _mbpp(*tests: str) -> AssertTask:
    return AssertTask(task_id="Mbpp/1", prompt="Double.", reference="def f(n): return 2 * n", tests=tests)


def test_a_test_that_the_prompt_shows_earns_nothing():
    task = hidden(_mbpp("assert f(1) == 2", "assert f(2) == 4"), "docstring")
    assert isinstance(task, AssertTask)
    assert task.tests == ("assert f(2) == 4",)
    assert hidden(_mbpp("assert f(1) == 2"), "auto") is None
    assert hidden(_mbpp("assert f(1) == 2", "assert f(2) == 4"), "few_shot") is None
    plus = PlusTask(task_id="p", prompt="", reference="", entry_point="f", atol=0.0, base_inputs=([1],), plus_inputs=())
    assert hidden(plus, "auto") is None


def test_mbpp_is_posed_without_the_assert_it_shows(tmp_path):
    record = {"text": "Double.", "code": "def f(n): return 2*n", "task_id": 601, "test_setup_code": ""}
    tests = [[f"assert f({n}) == {2 * n}" for n in range(count)] for count in (3, 1)]
    config = _file(tmp_path / "m.jsonl", *({**record, "task_id": 601 + i, "test_list": t} for i, t in enumerate(tests)))
    with pytest.raises(ValueError, match="another version or an altered copy"):
        load_problems(TaskFileConfig(file=config.file, format="mbpp"))
    sha256 = hashlib.sha256(Path(config.file).read_bytes()).hexdigest()
    found = load_problems(TaskFileConfig(file=config.file, format="mbpp", sha256=sha256))
    (problem,) = found.problems
    assert isinstance(problem.task, AssertTask)
    assert problem.task.tests == tuple(tests[0][1:])
    assert tests[0][0] in problem.prompt.text
    assert not any(test in problem.prompt.text for test in problem.task.tests)
    assert found.skipped == {"Mbpp/602": "its prompt shows all its tests"}


def test_only_mbpp_has_splits(tmp_path):
    record = {"text": "Double.", "code": "def f(n): return 2*n", "test_setup_code": ""}
    tests = ["assert f(1) == 2", "assert f(2) == 4"]
    config = _file(tmp_path / "m.jsonl", *({**record, "task_id": number, "test_list": tests} for number in (11, 601)))
    sha256 = hashlib.sha256(Path(config.file).read_bytes()).hexdigest()
    found = load_problems(TaskFileConfig(file=config.file, format="mbpp", sha256=sha256, split="train"))
    assert [problem.task.task_id for problem in found.problems] == ["Mbpp/601"]
    with pytest.raises(ValueError, match=r"split=train with format=completions: only MBPP has splits"):
        load_problems(dataclasses.replace(_file(tmp_path / "t.jsonl", RECORD), split="train"))


def test_training_and_scoring_read_the_same_files(tmp_path):
    assert {*FORMATS, "completions"} == set(get_args(TaskFormat))
    for name in get_args(SuiteName):
        with pytest.raises(ValueError, match=r"no benchmark file|path: must be set"):
            load_file(name, DataConfig(folder=str(tmp_path)))
        given = FileConfig(path=f"{name}.jsonl")
        section = name.replace("+", "_plus").replace("-", "_")
        with pytest.raises(ValueError, match=rf"no benchmark file {tmp_path}/{re.escape(name)}\.jsonl"):
            load_file(name, DataConfig(folder=str(tmp_path), **{section: given}))


def test_broken_files_of_completions_are_named(tmp_path):
    broken = {key: value for key, value in RECORD.items() if key != "head"}
    with pytest.raises(ValueError, match=r"record 0 lacks \['head'\]"):
        load_problems(_file(tmp_path / "a.jsonl", broken))
    with pytest.raises(ValueError, match="task ids occur more than once"):
        load_problems(_file(tmp_path / "b.jsonl", RECORD, RECORD))
    with pytest.raises(ValueError, match="no benchmark file"):
        load_problems(TaskFileConfig(file=str(tmp_path / "none.jsonl")))


def test_answers_become_programs_with_verdicts(tmp_path):
    open_jail(1).close()  # skips where there is none
    (problem,) = load_problems(_file(tmp_path / "tasks.jsonl", RECORD)).problems
    judge = Judge(JailConfig(workers=1))
    try:
        texts = ["return n+n\nrest", "return x+x", "return n*3", "\n", "return n+n\nother rest"]
        verdicts = judge.verdicts([Attempt(problem, text) for text in texts])
    finally:
        judge.close()
    assert [verdict.outcome for verdict in verdicts] == ["pass", "fail", "fail", "fail", "pass"]
    assert [verdict.reason for verdict in verdicts[1:4]] == ["error", "wrong", "no code"]
    assert [reward(verdict) for verdict in verdicts] == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert reward(Verdict(outcome="infrastructure", reason="jail")) is None
