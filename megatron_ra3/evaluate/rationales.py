r"""Rationales inside answers: what they look like as text, how many there are, and programs without them.

In the newline form a rationale is a comment on a line of its own, which Python ignores. In the special form it stands
between tokens that no program may hold, so it is rewritten as such a comment before anything else looks at the answer.
Only token ids tell such a token from text that spells it.
"""

from __future__ import annotations

import tokenize
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from megatron_ra3.corpus.lines import CodeLine, annotate, split_lines


@dataclass(frozen=True)
class SpecialIds:
    """The tokens of the special surface form."""

    act: int
    think: int
    end: int


@dataclass(frozen=True)
class RationaleCount:
    """Lines of code, and how many of them have a rationale directly above."""

    lines: int
    rationales: int


def as_comments(ids: Sequence[int], special: SpecialIds, decode: Callable[[Sequence[int]], str]) -> str:
    r"""The text of an answer in the special form, each rationale as comment lines ("#" and its text).

    One that does not start a line of the text is left out: there a comment would take the code behind it along.
    """
    text = ""
    for thinks, part in _parts(ids, special):
        piece = decode(part)
        if not thinks:
            text += piece
        elif text.endswith("\n") or not text:
            text += "".join(f"#{row}\n" for row in piece.split("\n") if row.strip())
    return text


def _parts(ids: Sequence[int], special: SpecialIds) -> Iterable[tuple[bool, list[int]]]:
    """Runs of ids and whether they are a rationale's; `<act>`, or an end without a beginning, just separates."""
    thinks = False
    part: list[int] = []
    for token in ids:
        if token in (special.act, special.think, special.end):
            yield thinks, part
            thinks, part = token == special.think, []
        else:
            part.append(token)
    yield thinks, part


def count_rationales(program: str, head: str = "") -> RationaleCount:
    """Rationales in the part of `program` after `head`, which is whole lines.

    Lines are logical ones; rows, where the program cannot be read as Python.
    """
    read = split_lines if _is_python(program) else _rows
    before = len(_code(read(head))) if head else 0
    own = _code(read(program))[before:]
    return RationaleCount(len(own), sum(annotate(line, "observe")[0] is not None for line in own))


def strip_rationales(program: str, head: str = "") -> str:
    """The program without comments on lines of their own after `head`; as it is where it cannot be read as Python."""
    if not _is_python(program):
        return program
    lines = split_lines(program)
    before = len(_code(split_lines(head))) if head else 0
    kept = [line.trivia + line.code for line in lines[:before]]
    return "\n".join([*kept, *(annotate(line, "strip")[1] for line in lines[before:])])


def _is_python(text: str) -> bool:
    """Whether it can be cut into logical lines."""
    try:
        split_lines(text)
    except (SyntaxError, tokenize.TokenError, ValueError):
        return False
    return True


def _code(lines: Sequence[CodeLine]) -> list[CodeLine]:
    return [line for line in lines if line.code]


def _rows(text: str) -> list[CodeLine]:
    lines, trivia = [], ""
    for row in text.split("\n"):
        if not row.strip() or row.lstrip().startswith("#"):
            trivia += row + "\n"
        else:
            lines.append(CodeLine(trivia, row))
            trivia = ""
    return lines
