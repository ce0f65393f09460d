"""Prompts, stop rules and the way from an answer to a program, against the published texts."""

import pytest

from megatron_ra3.evaluate.prompts import build_prompt, cut, extract_program, stopped
from megatron_ra3.evaluate.tasks import AssertTask, FunctionTask, IoTest, PlusTask, ScriptTask


def mbpp(number, text="Write a function to double.", reference="def f(x):\n    return 2 * x\n"):
    tests = (f"assert f({number}) == {2 * number}", "assert f(0) == 0", "assert f(-1) == -2")
    return AssertTask(task_id=f"Mbpp/{number}", prompt=text, reference=reference, tests=tests)


HUMANEVAL = AssertTask(
    task_id="HumanEval/0",
    prompt='\n\ndef f(x):\n    """ Double x. """\n',
    reference="",
    tests=("check(f)",),
    entry_point="f",
)
PLUS = PlusTask(
    task_id="Mbpp/2",
    prompt='"""\nDouble x.\nassert f(1) == 2\n"""\n',
    reference="",
    entry_point="f",
    atol=0.0,
    base_inputs=(),
    plus_inputs=(),
)


def test_a_completion_continues_the_stripped_prompt_and_ends_at_the_next_definition():
    prompt = build_prompt(HUMANEVAL)
    assert prompt.text == prompt.head == 'def f(x):\n    """ Double x. """\n'
    answer = "    # twice\n\treturn 2 * x\n\ndef g():\n    pass"
    assert cut(prompt, answer) == "    # twice\n\treturn 2 * x\n"
    assert extract_program(prompt, answer) == prompt.text + "    # twice\n    return 2 * x\n"
    assert extract_program(prompt, " \n") is None


@pytest.mark.parametrize(
    ("task", "stops"),
    [
        (HUMANEVAL, ["\ndef g", "\nclass A", "\nimport re", "\nfrom a", "\nassert f", "\nprint(", "\nif __name__"]),
        (PLUS, ['\n"""', "\nassert f(1) == 2", "\nprint(1)", "\nif __name__", "\ndef main("]),
    ],
)
def test_stop_rules_are_those_of_evalplus_and_a_comment_never_stops(task, stops):
    prompt = build_prompt(task)
    for stop in stops:
        assert stopped(prompt, "    return 1" + stop)
    assert not stopped(prompt, "    return 1\n# a rationale\n#another\n    x = 2")
    assert stopped(build_prompt(PLUS), "x\ndef f(x):") is False  # MBPP answers may hold several functions


def test_few_shot_is_the_prompt_of_austin_et_al():
    prompt = build_prompt(mbpp(11), shots=[mbpp(2), mbpp(3)])
    head = (
        "You are an expert Python programmer, and here is your task: Write a function to double. Your code should pass"
    )
    one = head + " these tests:\n\nassert f({0}) == {1}\nassert f(0) == 0\nassert f(-1) == -2\n[BEGIN]\n"
    solved = "def f(x):\n    return 2 * x\n[DONE]\n\n"
    assert prompt.text == one.format(2, 4) + solved + one.format(3, 6) + solved + one.format(11, 22)
    assert extract_program(prompt, "def f(x):\n\treturn x\n[DONE]\n\nYou are") == "def f(x):\n\treturn x\n"
    with pytest.raises(ValueError, match="Mbpp/2: is one of its own examples"):
        build_prompt(mbpp(2), shots=[mbpp(2)])


def test_docstring_is_mbpp_as_evalplus_shows_it():
    assert build_prompt(mbpp(11)).text == '"""\nWrite a function to double.\nassert f(11) == 22\n"""\n'


def test_questions_are_answered_in_the_last_whole_block():
    prompt = build_prompt(ScriptTask(task_id="a", prompt="Add.", tests=(IoTest("1", "1"),)))
    assert prompt.text.startswith("### Question:\nAdd.\n\n### Format: Read the inputs from stdin")
    assert extract_program(prompt, "First\n```\nx\n```\nthen\n```python\nprint(1)\n```\nbye") == "print(1)"
    assert extract_program(prompt, "```python\nprint(1)\n```\n```python\nprint(2)") == "print(1)"
    assert extract_program(prompt, "```python\nprint(1)\n```\n### Question: next\n```\n2\n```") == "print(1)"
    for nothing in ("print(1)", "```python\nprint(1)", "```\n```"):
        assert extract_program(prompt, nothing) is None
    task = FunctionTask(task_id="b", prompt="Add.", function="Solution.add", tests=())
    assert "the function `Solution.add`" in build_prompt(task).text


@pytest.mark.parametrize(("task", "style"), [(HUMANEVAL, "few_shot"), (mbpp(1), "completion"), (PLUS, "question")])
def test_a_style_that_does_not_fit_is_refused(task, style):
    with pytest.raises(ValueError, match=f"has no prompt of style '{style}'"):
        build_prompt(task, style)
