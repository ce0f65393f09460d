"""Which languages a corpus may hold, and how each is cut into logical lines.

Cutting other languages at newlines would split calls, strings and comments in the middle, as it would Python. Here a
lexer says where a line may end, so one splitter serves every language whose lexer can be relied on.
"""

import ast
import posixpath
import re
import tokenize
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

from megatron_ra3.corpus.lines import CodeLine
from megatron_ra3.corpus.lines import split_lines as split_python

_MAX_ERROR_FRACTION = 0.01
_OPENING = {")": "(", "]": "[", "}": "{"}


@dataclass(frozen=True, slots=True)
class Language:
    """How to read files of one language; can be pickled.

    Attributes:
        name: its key in `LANGUAGES`.
        suffixes: ends of its file names.
        comment: the sign that begins a full-line comment, see `annotate`.
        split_lines: text -> logical lines; `join_lines` gives back the text. That of Python raises what
            `lines.split_lines` does, the others take any text.
        parse: raises SyntaxError for text that is not valid.

    """

    name: str
    suffixes: tuple[str, ...]
    comment: str
    split_lines: Callable[[str], list[CodeLine]]
    parse: Callable[[str], None]


def language_of(path: str) -> Language | None:
    """The language of a file by the end of its name, in upper or lower case."""
    return _language_of_suffix().get(posixpath.splitext(path)[1].lower())


def split_lexed(text: str, *, lexer: str, words: str = "") -> list[CodeLine]:
    """Splits source into logical lines where its Pygments lexer allows; `join_lines` gives back exactly `text`.

    A row ends a line unless it ends inside a string or a block comment, where the innermost open bracket is ( or [, or
    after a backslash. Blank rows and rows of comments are trivia of the next line. A row of nothing but brackets,
    commas, semicolons and `words` (a regex of what stands for a brace) decides nothing: it belongs to the line before
    it, unless a comment stands between them.
    """
    rows = text.split("\n")
    bare = re.compile(rf"(?:[\s{{}}()\[\],;]|\b(?:{words})\b)*" if words else r"[\s{}()\[\],;]*")
    lines: list[CodeLine] = []
    first = line_start = start = 0  # rows where the trivia begin, where the last line's code and this one's begin
    commented = False
    ends, code = _row_ends(text.replace("\r\n", "\n"), lexer)
    for end in ends:
        here = "".join(code[start:end])
        if not here.strip():
            commented = commented or any(row.strip() for row in rows[start:end])
        elif lines and not commented and bare.fullmatch(here):
            lines[-1] = CodeLine(lines[-1].trivia, "\n".join(rows[line_start:end]))
            first = end
        else:
            trivia = "".join(f"{row}\n" for row in rows[first:start])
            lines.append(CodeLine(trivia, "\n".join(rows[start:end])))
            line_start, first, commented = start, end, False
        start = end
    if first < len(rows):
        lines.append(CodeLine("\n".join(rows[first:]), ""))
    return lines


def parse_lexed(text: str, *, lexer: str) -> None:
    """SyntaxError if the lexer knows no token for more than 1 % of the characters; it cannot see more than that."""
    from pygments.token import Error

    unknown = sum(len(value) for _, kind, value in _lex(text.replace("\r\n", "\n"), lexer) if kind is Error)
    if unknown > _MAX_ERROR_FRACTION * len(text):
        raise SyntaxError(f"{unknown} of {len(text)} characters belong to no token of {lexer}")


def parse_python(text: str) -> None:
    """SyntaxError for what the interpreter cannot compile to a tree, for whatever reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like are the author's business
            ast.parse(text)
    except (ValueError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise SyntaxError(repr(error)) from error


def _row_ends(text: str, lexer: str) -> tuple[list[int], list[str]]:
    """Numbers of the rows after which a line may end, counted from 1, and what of each row is not comment."""
    from pygments.token import Comment, Error, String

    rows = text.split("\n")
    ends: list[int] = []
    code = [""] * len(rows)
    row = 0
    brackets: list[str] = []
    waits = in_text = False  # the last token ended its row: the next one may continue it; it was a string or comment
    for _, kind, value in _lex(text, lexer):
        comment = _is_comment(kind, value)
        string = kind in String and not comment
        goes_on = in_text and (string or kind in Comment.Multiline or kind in String.Doc)
        if waits and not goes_on and kind not in String.Heredoc:  # a heredoc begins after the row that announces it
            ends.append(row)
        waits, in_text = False, string or (comment and kind not in Comment.Single)
        parts = value.split("\n")
        for number, part in enumerate(parts):
            if number:
                row += 1
                held = brackets[-1:] in (["("], ["["]) or (not comment and rows[row - 1].endswith("\\"))
                waits = not held and number == len(parts) - 1 and not part
                if not (held or waits or string or comment):
                    ends.append(row)
            if not comment:
                code[row] += part
            if kind in String.Interpol:  # what is put into a string stays with it, also in braces
                _follow(part.replace("{", "(").replace("}", ")"), brackets)
            elif not (string or kind in Comment or kind in Error):
                _follow(part, brackets)
    last_rows = {len(rows), len(rows) - 1} if len(rows) > 1 and not rows[-1] else {len(rows)}
    return sorted({*ends, *last_rows}), code


def _is_comment(kind: Any, value: str) -> bool:
    """Pygments calls preprocessor lines comments, which are code, and the doc comments of some languages strings."""
    from pygments.token import Comment, String

    if kind in Comment:
        return kind not in Comment.Preproc and kind not in Comment.PreprocFile
    return kind in String.Doc and value.lstrip().startswith(("/", "*"))


def _follow(value: str, brackets: list[str]) -> None:
    """Opens and closes brackets; one that closes also closes those inside it that its author forgot."""
    for character in value:
        if character in "([{":
            brackets.append(character)
        elif (opening := _OPENING.get(character)) in brackets:
            while brackets.pop() != opening:
                pass


@lru_cache(maxsize=1)  # parsing and splitting the same text need the same tokens
def _lex(text: str, lexer: str) -> list[tuple[int, Any, str]]:
    """Tokens in the order of the text, which they make up without a gap."""
    tokens = sorted(_lexer(lexer).get_tokens_unprocessed(text), key=lambda token: token[0])
    return list(_without_gaps(text, tokens))


def _without_gaps(text: str, tokens: list[tuple[int, Any, str]]) -> Iterator[tuple[int, Any, str]]:
    """No lexer promises to give back all of the text, once each."""
    from pygments.token import Text

    done = 0
    for start, kind, value in tokens:
        if start > done:
            yield done, Text, text[done:start]
        end = start + len(value)
        if end > max(done, start):
            yield max(done, start), kind, text[max(done, start) : end]
            done = end
    if done < len(text):
        yield done, Text, text[done:]


@cache
def _lexer(name: str) -> Any:
    from pygments.lexers import get_lexer_by_name

    return get_lexer_by_name(name)


def _lexed(name: str, comment: str, suffixes: str, *, lexer: str | None = None, words: str = "") -> Language:
    lexer = lexer or name
    split = partial(split_lexed, lexer=lexer, words=words)
    return Language(name, tuple(suffixes.split()), comment, split, partial(parse_lexed, lexer=lexer))


LANGUAGES = {
    language.name: language
    for language in (
        Language("python", (".py",), "#", split_python, parse_python),
        _lexed("c", "//", ".c .h"),
        _lexed("cpp", "//", ".cc .cpp .cxx .hh .hpp .hxx"),
        _lexed("csharp", "//", ".cs"),
        _lexed("go", "//", ".go"),
        _lexed("java", "//", ".java"),
        _lexed("javascript", "//", ".js .mjs .cjs"),
        _lexed("julia", "#", ".jl", words="end"),
        _lexed("kotlin", "//", ".kt .kts"),
        _lexed("lua", "--", ".lua", words="end"),
        _lexed("php", "//", ".php"),
        _lexed("r", "#", ".r"),
        _lexed("ruby", "#", ".rb", words="end"),
        _lexed("rust", "//", ".rs"),
        _lexed("scala", "//", ".scala"),
        _lexed("shell", "#", ".sh .bash", lexer="bash", words="then|do|fi|done|esac"),
        _lexed("sql", "--", ".sql"),
        _lexed("swift", "//", ".swift"),
        _lexed("typescript", "//", ".ts"),
    )
}


@cache
def _language_of_suffix() -> dict[str, Language]:
    return {suffix: language for language in LANGUAGES.values() for suffix in language.suffixes}
