r"""From a task to the text a model continues, and from what it wrote to a program: pure functions, no tokens, no model.

A score says nothing without its prompt and its stop rule: one model has 38.6 and 60.2 % on "MBPP" under two of them.
Both are values here, which a result file can hold. No stop string is a comment: "\n#", which others use, would cut an
answer at its first rationale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_ra3.corpus.lines import split_lines
from megatron_ra3.evaluate.tasks import AssertTask, FunctionTask, PlusTask, ScriptTask, Task

Style = Literal["auto", "completion", "docstring", "few_shot", "question"]

_OUTSIDE = ("\nif __name__", "\ndef main(", "\nprint(")
HUMANEVAL_STOP = (*_OUTSIDE, "\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nassert ")
MBPP_STOP = (*_OUTSIDE, '\n"""', "\nassert")
_TAB = "    "


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is given, and how its answer is read. `max_new_tokens` is the published number."""

    text: str
    """The model continues this."""
    stop: tuple[str, ...]
    """The answer ends before the first of these."""
    max_new_tokens: int
    head: str = ""
    """The program begins with this, the answer follows."""
    fenced: bool = False
    """The program is the last whole block of the answer between lines of three backticks."""
    is_code: bool = False
    """`text` is Python all through."""


def build_prompt(task: Task, style: Style = "auto", shots: Sequence[AssertTask] = ()) -> Prompt:
    """The prompt of one task; `shots` are solved examples for `few_shot`.

    `completion` (HumanEval, HumanEval+, MBPP+; EvalPlus's base mode): the stripped prompt is the program's beginning.
    `docstring` (MBPP): the text and the first test as a docstring, as MBPP+ has it. `few_shot` (MBPP; Austin et al.
    2021): text and tests, examples first. `question` (contests): LiveCodeBench's generic prompt. `auto`: the first of
    these four that fits, but `few_shot` where there are shots.
    ValueError: the style does not fit the task.
    """
    mbpp = isinstance(task, AssertTask) and task.entry_point is None
    match style:
        case "completion" if isinstance(task, AssertTask | PlusTask) and not mbpp:
            return _completion(task)
        case "docstring" if isinstance(task, AssertTask) and mbpp:
            return _docstring(task)
        case "few_shot" if isinstance(task, AssertTask) and mbpp:
            return _few_shot(task, shots)
        case "question" if isinstance(task, ScriptTask | FunctionTask):
            return _question(task)
        case "auto":
            fitting: Style = "question" if isinstance(task, ScriptTask | FunctionTask) else "completion"
            if mbpp:
                fitting = "few_shot" if shots else "docstring"
            return build_prompt(task, fitting, shots)
    raise ValueError(f"{task.task_id}: a {type(task).__name__} has no prompt of style {style!r}; use 'auto'")


def cut(prompt: Prompt, answer: str) -> str:
    """The answer before its first stop string."""
    ends = [place for place in map(answer.find, prompt.stop) if place >= 0]
    return answer[: min(ends)] if ends else answer


def stopped(prompt: Prompt, answer: str) -> bool:
    """Whether the answer holds a stop string, so that nothing more of it counts."""
    return any(stop in answer for stop in prompt.stop)


def extract_program(prompt: Prompt, answer: str) -> str | None:
    """The whole program that an answer makes; None where it holds no code.

    `answer` is decoded without an end-of-text token. Spaces stand for tabs where the program begins with the prompt, as
    in EvalPlus.
    """
    kept = cut(prompt, answer)
    if prompt.fenced:
        return _last_block(kept)
    if not kept.strip():
        return None
    return prompt.head + kept.replace("\t", _TAB) if prompt.head else kept


def _completion(task: AssertTask | PlusTask) -> Prompt:
    text = task.prompt.strip() + "\n"
    stop = MBPP_STOP if task.task_id.startswith("Mbpp/") else HUMANEVAL_STOP
    return Prompt(text=text, head=text, stop=stop, max_new_tokens=768, is_code=True)


def _docstring(task: AssertTask) -> Prompt:
    text = f'"""\n{task.prompt.strip()}\n{task.tests[0]}\n"""\n'
    return Prompt(text=text, head=text, stop=MBPP_STOP, max_new_tokens=768, is_code=True)


def _few_shot(task: AssertTask, shots: Sequence[AssertTask]) -> Prompt:
    if any(shot.task_id == task.task_id for shot in shots):
        raise ValueError(f"{task.task_id}: is one of its own examples; leave the examples out of the scored tasks")
    examples = [f"{_described(shot)}{shot.reference.strip()}\n[DONE]\n\n" for shot in shots]
    return Prompt(text="".join(examples) + _described(task), stop=("[DONE]",), max_new_tokens=256)


def _described(task: AssertTask) -> str:
    tests = "\n".join(task.tests)
    return (
        f"You are an expert Python programmer, and here is your task: {task.prompt} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _question(task: ScriptTask | FunctionTask) -> Prompt:
    if isinstance(task, FunctionTask):
        form = (
            f"You will write the function `{task.function}` to solve the problem and enclose your code within "
            "delimiters."
        )
    else:
        form = (
            "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the "
            "sample inputs). Enclose your code within delimiters as follows."
        )
    text = (
        f"### Question:\n{task.prompt}\n\n### Format: {form}\n```python\n# YOUR CODE HERE\n```\n\n"
        "### Answer: (use the provided format with backticks)\n\n"
    )
    return Prompt(text=text, stop=("\n### Question",), max_new_tokens=2000, fenced=True)


def _last_block(text: str) -> str | None:
    last: str | None = None
    block: list[str] | None = None
    for line in text.split("\n"):
        if not line.lstrip().startswith("```"):
            if block is not None:
                block.append(line)
        elif block is None:
            block = []
        else:
            last, block = "\n".join(block), None
    return last if last is not None and last.strip() else None


def prompt_tokens(prompt: Prompt, encode: Callable[[str], list[int]], act: Sequence[int] | None) -> list[int]:
    """Token ids of a prompt; with the special form's `act` given, code has it before each line, as in mid-training."""
    if act is None or not prompt.is_code:
        return encode(prompt.text)
    ids: list[int] = []
    for line in split_lines(prompt.text):
        if line.code:
            ids += [*act, *encode(f"{line.trivia}{line.code}\n")]
    return ids
