"""Tells files that a person wrote as code from files that a program wrote, packed, or filled with data.

Their share of public code is large and they teach the wrong things: parser tables and protocol descriptors are long,
repetitive and easy to predict, so that they take part of every batch and improve the loss without any skill.
"""

import re
from collections.abc import Collection
from typing import Literal

# generated: a header comment or the module docstring says that a program wrote the file.
# minified: lines or characters that no person writes; also a few rows of packed data inside of ordinary code.
# data: nearly all of the file is numbers and strings.
Suspicion = Literal["generated", "minified", "data"]

# The limits of The Stack and of StarCoder (Kocetkov et al. 2022, appendix; Li et al. 2023, section 3).
MAX_LINE_CHARS = 1000
MAX_MEAN_LINE_CHARS = 100
MIN_ALPHANUMERIC = 0.25
# Measured on the Python standard library and on installed packages: argument parsers full of help texts and test
# modules stay below 0.8, tables of characters, time zones and expected results begin at 0.9.
MIN_LITERALS_OF_DATA = 0.9
MIN_LITERAL_CHARS_OF_DATA = 2000

_HEADER_CHARS = 4000
# Comments and blank rows, then perhaps a docstring, then more comments: what stands before the first code.
_COMMENTS = r"(?:[ \t]*(?:(?:\#|//|--|/?\*)[^\n]*)?\n)*"
_DOCSTRING = r"[rRuU]?(?:\"\"\".*?(?:\"\"\"|\Z)|'''.*?(?:'''|\Z))"
_HEADER = re.compile(f"\ufeff?(?P<above>{_COMMENTS})(?P<docstring>{_DOCSTRING})?(?P<below>{_COMMENTS})", re.DOTALL)
_AUTO = r"(?:auto(?:matically|matic)?[-\s]?)"
_SAID_IN_COMMENTS = re.compile(
    rf"""^\W*(?:{_AUTO}?generated\s(?:by|from|with|using|via|on)\b
                | {_AUTO}generated\b (?!\s(?:if|when|unless|and|or)\b))
    | \b(?:file|code|module|class|script|parser|wrapper|bindings?|stubs?|implementation)
      \s(?:is\s|was\s|has\sbeen\s|were\s|are\s)?{_AUTO}?generated\b
    | @generated\b
    | \bdo\snot\s(?:edit|modify)(?:\s(?:this\sfile|manually|by\shand|directly|it\b)|\W*$)""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_SAID_IN_DOCSTRINGS = re.compile(
    r"""^\s*generated\sby:\s+(?:https?://|openapi|swagger)
    | \b(?:file|module|code)\s(?:is|was|has\sbeen)\s(?:auto(?:matically)?[-\s]?generated|generated\sby)\b
    | \bdo\snot\s(?:edit|modify)\s(?:this\sfile|manually|by\shand)
    | \A\W*auto(?:matically)?[-\s]?generated\sby\b""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_GENERATED_NAMES = ("_pb2.py", "_pb2_grpc.py")  # what protoc writes; people do not end names so

_LEXEME = re.compile(
    r"""\#[^\n]*
    | ^[ \t]*[rRuU]?(?:\"{3}.*?\"{3}|'{3}.*?'{3})                                                 # a docstring
    | ([rRbBuUfF]{0,2}(?:\"{3}.*?\"{3}|'{3}.*?'{3}|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|\b\d[\w.]*)
    | ([^\W\d]\w*)""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)


def suspicion(text: str, path: str, without: Collection[str] = ()) -> Suspicion | None:
    """Why a source file should be left out, the first reason that holds; None for what a person wrote as code.

    Reasons in `without` are not looked for.
    """
    if "generated" not in without and _is_generated(text, path):
        return "generated"
    if "minified" not in without and _is_minified(text):
        return "minified"
    return "data" if "data" not in without and _is_data(text) else None


def _is_generated(text: str, path: str) -> bool:
    if path.endswith(_GENERATED_NAMES):
        return True
    header = _HEADER.match(text[:_HEADER_CHARS])
    if header is None:
        return False
    comments = f"{header['above']}\n{header['below']}"
    docstring = header["docstring"] or ""
    return bool(_SAID_IN_COMMENTS.search(comments) or _SAID_IN_DOCSTRINGS.search(docstring.strip("rRuU\"'")))


def _is_minified(text: str) -> bool:
    if not text:
        return False
    rows = text.split("\n")
    if len(text) / len(rows) > MAX_MEAN_LINE_CHARS or max(map(len, rows)) > MAX_LINE_CHARS:
        return True
    return sum(map(str.isalnum, text)) < MIN_ALPHANUMERIC * len(text)


def _is_data(text: str) -> bool:
    if len(text) < MIN_LITERAL_CHARS_OF_DATA:
        return False
    lexemes = _LEXEME.findall(text)
    literals = sum(len(literal) for literal, _ in lexemes)
    names = sum(len(name) for _, name in lexemes)
    return literals >= max(MIN_LITERAL_CHARS_OF_DATA, MIN_LITERALS_OF_DATA * (literals + names))
