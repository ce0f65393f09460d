"""Verdicts on small made tasks of each kind, and, with RA3_DATA set, on all canonical solutions of the benchmarks."""

import os
from pathlib import Path

import pytest

from megatron_ra3.evaluate.graders import grade
from megatron_ra3.evaluate.plus import Expected, PlusReferences, base_passed, restore_mbpp_inputs
from megatron_ra3.evaluate.stdio import same_output, same_value
from megatron_ra3.evaluate.tasks import (
    AssertTask,
    FunctionTask,
    IoTest,
    PlusTask,
    ScriptTask,
    load_humaneval,
    load_humaneval_plus,
    load_mbpp,
    load_mbpp_plus,
    load_sanitized_mbpp,
)
from tests.support import open_jail


@pytest.fixture(scope="module")
def jail():
    with open_jail(2) as sandbox:
        yield sandbox


def outcome(jail, task, code, references=None):
    verdict = grade(jail, task, code, references)
    assert verdict.outcome != "infrastructure", verdict
    return verdict.reason or verdict.outcome


def mbpp(reference, *tests, setup=""):
    return AssertTask(task_id="made", prompt="", reference=reference, tests=tests, setup=setup, time_s=5.0)


def test_asserts_with_helpers_classes_types_and_modules(jail):
    helper = AssertTask(
        task_id="made",
        prompt="",
        reference="",
        setup="def poly(x):\n    return x * x\ndef root(y):\n    return None\ndef check(candidate):\n"
        "    assert abs(poly(candidate(4)) - 4) < 1e-9",
        tests=("check(root)",),
        entry_point="root",
    )
    assert outcome(jail, helper, "def poly(x):\n    return 4\ndef root(y):\n    return y ** 0.5") == "pass"
    assert outcome(jail, helper, "def poly(x):\n    return 4\ndef root(y):\n    return y") == "wrong"

    tree = "class Node:\n    def __init__(self, v):\n        self.v, self.left = v, None\ndef depth(n):\n"
    tree += "    return 0 if n is None else 1 + depth(n.left)\n"
    task = mbpp(tree, "assert depth(root) == 2", setup="root = Node(1)\nroot.left = Node(2)")
    assert outcome(jail, task, tree) == "pass"
    assert outcome(jail, task, tree.replace("1 +", "2 +")) == "wrong"
    assert outcome(jail, task, "def depth(n):\n    return 2") == "error"  # no Node

    task = mbpp("def f(x, t):\n    pass", "assert f(('a', 1), int) == ['a']")
    assert outcome(jail, task, "def f(x, t):\n    return [i for i in x if type(i) is not t]") == "pass"
    task = mbpp("import sys\ndef f(x):\n    pass", "assert f((1, 2)) == sys.getsizeof((1, 2))")
    assert outcome(jail, task, "import sys\nf = sys.getsizeof") == "pass"
    task = mbpp("def sum(a, b):\n    pass", "assert sum(10, 15) == 25")
    assert outcome(jail, task, "def sum(a, b):\n    return a + b") == "pass"


def test_mutations_are_seen_by_the_tests(jail):
    test = "x = [3, 1]\nf(x)\nassert x == [1, 3]"
    task = mbpp("def f(x):\n    pass", test)
    assert outcome(jail, task, "def f(x):\n    x.sort()") == "pass"
    assert outcome(jail, task, "def f(x):\n    return sorted(x)") == "wrong"


def test_every_test_must_pass(jail):
    task = mbpp("def f(x):\n    pass", "assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 3")
    verdict = grade(jail, task, "def f(x):\n    return min(x, 2)")
    assert (verdict.reason, verdict.tests_passed) == ("wrong", 2)
    assert grade(jail, task, "f = abs").tests_passed == 3
    assert outcome(jail, task, "def f(x) return x") == "error"
    assert outcome(jail, task, "g = abs") == "error"


def plus(name, reference, base, extra=(), atol=0.0, task_id="Mbpp/1"):
    return PlusTask(
        task_id=task_id,
        prompt="",
        reference=reference,
        entry_point=name,
        atol=atol,
        base_inputs=tuple(base),
        plus_inputs=tuple(extra),
    )


def judge_plus(jail, task, code):
    return outcome(jail, task, code, PlusReferences())


def test_plus_passes_only_with_base_and_extra_inputs(jail):
    task = plus("f", "def f(x):\n    return x * x", [[2]], [[3], [-1]])
    assert judge_plus(jail, task, "f = lambda x: x ** 2") == "pass"
    verdict = grade(jail, task, "def f(x):\n    return x * abs(x)", PlusReferences())
    assert (verdict.reason, verdict.tests_passed, base_passed(task, verdict)) == ("wrong", 2, True)
    verdict = grade(jail, task, "def f(x):\n    return x", PlusReferences())
    assert (verdict.tests_passed, base_passed(task, verdict)) == (0, False)


def test_plus_tolerates_floats_as_evalplus_does(jail):
    task = plus("f", "def f(x):\n    return x / 3", [[1.0]])
    assert judge_plus(jail, task, "def f(x):\n    return x / 3 + 5e-7") == "pass"
    assert judge_plus(jail, task, "def f(x):\n    return x / 3 + 2e-6") == "wrong"
    task = plus("f", "def f(x):\n    return [x]", [[1]])
    assert judge_plus(jail, task, "def f(x):\n    return [x + 1e-9]") == "wrong"  # integers are exact
    task = plus("f", "def f(x):\n    return x", [[1.5], [1]])
    assert judge_plus(jail, task, "def f(x):\n    return x + (1e-7 if x == 1 else 0)") == "wrong"  # float for an int
    assert judge_plus(jail, plus("f", "def f(x):\n    return [x]", [[1.5]]), "def f(x):\n    return (x,)") == "wrong"
    task = plus("f", "def f(x):\n    return {1: x}", [[1.5]], atol=1e-4)
    assert judge_plus(jail, task, "def f(x):\n    return {1: x + 1e-5}") == "wrong"  # no numbers to compare


def test_plus_special_oracles(jail):
    same = plus("Diff", "def Diff(a, b):\n    return [1, 2]", [[[1], [2]]])
    assert judge_plus(jail, same, "def Diff(a, b):\n    return (2, 1, 1)") == "pass"
    assert judge_plus(jail, same, "def Diff(a, b):\n    return [1]") == "wrong"
    match = plus("check_str", "import re\ndef check_str(s):\n    return re.match('a', s)", [["a"], ["b"]])
    assert judge_plus(jail, match, "def check_str(s):\n    return s == 'a'") == "pass"
    assert judge_plus(jail, match, "def check_str(s):\n    return 5 if s == 'a' else None") == "pass"
    assert judge_plus(jail, match, "def check_str(s):\n    return 5") == "wrong"
    zero = plus("find_zero", "def find_zero(xs):\n    return -xs[0] / xs[1]", [[[1, 2]]], [], 1e-4, "HumanEval/32")
    assert judge_plus(jail, zero, "def find_zero(xs):\n    return -0.500001") == "pass"
    assert judge_plus(jail, zero, "def find_zero(xs):\n    return -0.6") == "wrong"
    divisors = plus("sum_div", "def sum_div(n):\n    return 1", [[7]])
    assert judge_plus(jail, divisors, "def sum_div(n):\n    return 0") == "pass"
    assert judge_plus(jail, plus("f", "def f(n):\n    return 1", [[7]]), "def f(n):\n    return 0") == "wrong"


def test_plus_limits_come_from_the_reference():
    assert Expected((1, 2), (0.01, 0.5)).limits_s == [1.0, 2.0]
    assert Expected((1, 2), (0.01, 0.5)).total_s == 4.0
    assert Expected((1,) * 99, (1.0,) * 20 + (0.0,) * 79).total_s == 61.0
    assert Expected((1, 2), (40.0, 20.0)).total_s == 121.0


def test_plus_references_are_kept_by_content(jail, tmp_path):
    task = plus("f", "def f(x):\n    return {x: (x, 1.5)}", [[1]])
    first = PlusReferences(tmp_path).of(jail, task)
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    again = PlusReferences(tmp_path).of(jail, task)
    assert again == first
    assert again.outputs == ({1: (1, 1.5)},)
    assert file.stat().st_mtime_ns == before
    PlusReferences(tmp_path).of(jail, plus("f", "def f(x):\n    return 3", [[1]]))
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match="the reference failed on input 0"):
        PlusReferences().of(jail, plus("f", "def f(x):\n    return 1 / 0", [[1]]))


@pytest.mark.parametrize(
    ("number", "given", "restored"),
    [
        (1, [[1], 2], [[1], 2]),
        (2, [[1], [2]], [(1,), (2,)]),
        (63, [[[1], [2]]], [[(1,), (2,)]]),
        (75, [[[1]], 2], [[(1,)], 2]),
        (106, [[1], [2]], [[1], (2,)]),
        (115, [[[1], []]], [[{1}, {}]]),
        (124, ["1", "2j"], [1.0, 2j]),
        (252, ["1+2j"], [1 + 2j]),
        (259, [[[1]], [[2]]], [((1,),), ((2,),)]),
        (278, [[1, [2]]], [(1, (2,))]),
        (307, [[1], 2, 3], [(1,), 2, 3]),
        (722, [{"a": [1]}, 2], [{"a": (1,)}, 2]),
    ],
)
def test_inputs_get_their_types_back(number, given, restored):
    assert restore_mbpp_inputs(number, [given]) == [restored]


def test_nested_lists_of_a_whole_task_become_tuples():
    assert restore_mbpp_inputs(580, [[[1, [2]]]]) == [((1, (2,)),)]


@pytest.mark.parametrize(
    ("given", "right", "same"),
    [
        ("3\n", "3", True),
        ("  1 2 \n3", "1 2\n3\n", True),
        ("1.0", "1", True),
        ("1  2", "1 2", True),
        ("1.0000001", "1", False),
        ("1\n\n2", "1\n2", False),
        ("yes", "YES", False),
        ("nan", "NaN", False),
        ("", "", True),
        ("1 2", "1", False),
    ],
)
def test_outputs_agree_by_line_or_as_numbers(given, right, same):
    assert same_output(given, right) is same


def test_returned_values_agree_with_json():
    assert same_value((1, (2,)), [1, [2]])
    assert same_value({1: (2,)}, {"1": [2]})
    assert not same_value([1], [1, 2])
    assert not same_value("1", 1)


def test_scripts_are_judged_by_output_status_and_checker(jail):
    task = ScriptTask(task_id="made", prompt="", tests=(IoTest("1 2", "3"), IoTest("2 3", "5")), time_s=5.0)
    assert outcome(jail, task, "print(sum(map(int, input().split())))") == "pass"
    assert outcome(jail, task, "print(3)") == "wrong"
    assert outcome(jail, task, "print(sum(map(int, input().split())))\nraise SystemExit(1)") == "exit"
    checker = (
        "import sys\ngiven, right, output = (open(name).read().split() for name in sys.argv[1:])\n"
        "print(int(sorted(output) == sorted(given)))"
    )
    any_order = ScriptTask(task_id="made", prompt="", tests=(IoTest("2 1", "1 2"),), checker=checker)
    assert outcome(jail, any_order, "print(input())") == "pass"
    assert outcome(jail, any_order, "print(1)") == "wrong"
    assert outcome(jail, ScriptTask(task_id="made", prompt="", tests=()), "print(1)") == "untested"


def test_functions_are_judged_by_what_they_return(jail):
    task = FunctionTask(task_id="made", prompt="", function="pair", tests=(IoTest([1, [2]], [1, [2]]),))
    assert outcome(jail, task, "class Solution:\n    def pair(self, a, b):\n        return a, b") == "pass"
    assert outcome(jail, task, "def pair(a, b):\n    return [a, tuple(b)]") == "pass"
    assert outcome(jail, task, "def pair(a, b):\n    return [b, a]") == "wrong"
    wrapped = FunctionTask(task_id="made", prompt="", function="f", tests=(IoTest([1], [2]),), wrapped=True)
    assert outcome(jail, wrapped, "def f(a):\n    return 2") == "pass"


BENCHMARKS = {
    "HumanEval.jsonl.gz": (load_humaneval, 164),
    "mbpp.jsonl": (load_mbpp, 974),
    "sanitized-mbpp.json": (load_sanitized_mbpp, 427),
    "HumanEvalPlus.jsonl.gz": (load_humaneval_plus, 164),
    "MbppPlus.jsonl.gz": (load_mbpp_plus, 378),
}


@pytest.mark.skipif("RA3_DATA" not in os.environ, reason="RA3_DATA names no folder with benchmark files")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_canonical_solutions_pass(jail, name):
    load, count = BENCHMARKS[name]
    tasks = load(Path(os.environ["RA3_DATA"], name)).tasks
    references = PlusReferences()
    verdicts = list(jail.map(lambda task: grade(jail, task, task.reference, references), tasks))
    assert len(verdicts) == count
    assert [task.task_id for task, verdict in zip(tasks, verdicts, strict=True) if not verdict.passed] == []
