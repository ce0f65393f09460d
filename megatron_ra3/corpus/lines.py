"""One line of code is one action, so what a "line" is must be decided once, exactly and without loss.

Splitting at newlines would cut strings, bracketed expressions and continuations in the middle and take a `#` inside a
string for a comment; a model trained on such lines learns to think inside string literals. This module asks `tokenize`.
"""

import re
import tokenize
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

CommentMode = Literal["observe", "strip", "keep_as_code"]

_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
# PEP 263 cookies and the mode lines of Emacs and Vim: instructions to programs, not thoughts about code.
_MODE_LINE = re.compile(r"\s*(-\*-.*-\*-|vim?:.*|(file)?(en)?coding[:=]\s*[-\w.]+)\s*")


class CodeLine(NamedTuple):
    r"""One logical line of source, with what stands above it.

    `trivia` holds the full-line comments and blank lines since the previous code line, each with its newline.
    `code` is the logical line without its final newline; a decorated `def` or `class` includes its decorators and what
    stands between them. After "\r\n" the "\r" stays at the end of `code`.
    """

    trivia: str
    code: str


def split_lines(source: str) -> list[CodeLine]:
    r"""Splits Python source into logical lines; `join_lines` gives back exactly `source`.

    As with `str.split`, text that ends in a newline has a last element with empty `code`; its `trivia` is what
    follows the last line of code.

    Raises:
        SyntaxError, tokenize.TokenError: the source cannot be tokenized.
        ValueError: a carriage return that is not part of "\r\n".
    """
    rows = source.split("\n")
    lines: list[CodeLine] = []
    first_row = code_row = 0  # where the trivia and the code of the current line begin
    before_code = at_statement_start = True
    decorator = False
    for token in tokenize.generate_tokens(_feed(rows).__next__):
        if token.type in _LAYOUT:
            if token.type == tokenize.NL and before_code:
                code_row = token.start[0]
        elif token.type != tokenize.NEWLINE:
            if at_statement_start:
                decorator = token.string == "@"
            before_code = at_statement_start = False
        else:
            at_statement_start = True
            if not decorator:
                end_row = token.start[0]
                trivia = "".join(f"{row}\n" for row in rows[first_row:code_row])
                lines.append(CodeLine(trivia, "\n".join(rows[code_row:end_row])))
                first_row = code_row = end_row
                before_code = True
    if first_row < len(rows):
        lines.append(CodeLine("\n".join(rows[first_row:]), ""))
    return lines


def join_lines(lines: Iterable[CodeLine]) -> str:
    """The source text of `lines`; the inverse of `split_lines`."""
    return "\n".join(line.trivia + line.code for line in lines)


def annotate(line: CodeLine, mode: CommentMode, comment: str = "#") -> tuple[str | None, str]:
    """Reads a line as (native rationale or None, text of the line) under a comment mode.

    `observe` takes the comment directly above the code as its rationale: the text after the sign `comment`,
    right-stripped; `///` and `//!` count as `//`, and a block comment is no rationale. Other comments are dropped,
    blank lines stay. `strip` drops every full-line comment. `keep_as_code` keeps all as text.
    """
    if mode == "keep_as_code":
        return None, line.trivia + line.code
    above = line.trivia.split("\n")[:-1]
    text = "".join(f"{row}\n" for row in above if not row.strip()) + line.code
    if mode == "strip" or not above or not line.code:
        return None, text
    return _rationale(above[-1].strip(), comment), text


def _rationale(row: str, sign: str) -> str | None:
    if not row.startswith(sign):
        return None
    body = row.removeprefix(sign)
    if sign == "//" and body.startswith(("/", "!")):
        body = body[1:]
    said_to_people = any(map(str.isalnum, body)) and not body.startswith("!") and not _MODE_LINE.fullmatch(body)
    return body if said_to_people else None


def _feed(rows: list[str]) -> Iterator[str]:
    """The rows as `tokenize` wants them: ending in a newline, the last one too, and no carriage returns."""
    for number, row in enumerate(rows, start=1):
        text = row.removesuffix("\r")
        if "\r" in text:
            raise ValueError(f"line {number} holds a lone carriage return; read the file with universal newlines first")
        if text or number < len(rows):
            yield f"{text}\n"
