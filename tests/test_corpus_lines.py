"""Logical lines: exact on the whole standard library, and by value where a plain split would go wrong."""

import ast
import sysconfig
import tokenize
import warnings
from pathlib import Path

import pytest

from megatron_ra3.corpus.lines import CodeLine, annotate, join_lines, split_lines

STDLIB = Path(sysconfig.get_paths()["stdlib"])
CLAUSES = ("elif", "else", "except", "finally", "case")


def stdlib_files():
    """Every file of the library, and every twelfth of its much larger test suites."""
    files = [path for path in sorted(STDLIB.rglob("*.py")) if "site-packages" not in path.parts]
    tests = [path for path in files if not {"test", "tests"}.isdisjoint(path.parts)]
    return sorted(set(files) - set(tests)) + tests[::12]


def parse(path):
    """Text and tree of a file; None if the interpreter cannot read it."""
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = file.read()
            return text, ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, LookupError):
        return None


def check_against_parser(lines, tree):
    """A code line begins where a statement or clause begins, and no simple statement or decorated head is cut."""
    number_of_row, starts = {}, {}
    row = 1
    for number, line in enumerate(lines):
        first = row + line.trivia.count("\n")
        row = first + line.code.count("\n") + 1
        if line.code:
            starts[first] = line
        number_of_row |= dict.fromkeys(range(first, row), number)
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    first_rows = {
        min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]): node for node in statements
    }
    for first, line in starts.items():
        assert first in first_rows or line.code.lstrip().startswith(CLAUSES), line
    for first, node in first_rows.items():
        last = node.lineno if hasattr(node, "body") or hasattr(node, "cases") else node.end_lineno
        assert number_of_row[first] == number_of_row[last], node


def test_every_stdlib_file_survives_and_agrees_with_the_parser():
    checked = 0
    for path in stdlib_files():
        parsed = parse(path)
        if parsed is None:
            continue
        text, tree = parsed
        lines = split_lines(text)
        assert join_lines(lines) == text, path
        checked += 1
        if checked % 6 == 0:
            check_against_parser(lines, tree)
    assert checked > 500


def test_windows_newlines_give_the_same_lines():
    text = Path(tokenize.__file__).read_text(encoding="utf-8")
    windows = text.replace("\n", "\r\n")
    lines = split_lines(windows)
    assert join_lines(lines) == windows
    plain = [CodeLine(line.trivia.replace("\r", ""), line.code.replace("\r", "")) for line in lines]
    assert plain == split_lines(text)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("", [("", "")]),
        ("x = 1", [("", "x = 1")]),
        ("x = 1\n", [("", "x = 1"), ("", "")]),
        ("\n# a\n\nx = 1  # b\n# end", [("\n# a\n\n", "x = 1  # b"), ("# end", "")]),
        ("x = 1; y = 2\nif x: y\n", [("", "x = 1; y = 2"), ("", "if x: y"), ("", "")]),
        ('s = """a\n# no comment\n"""\nt', [("", 's = """a\n# no comment\n"""'), ("", "t")]),
        ("f(1,\n  # inside\n\n  2)\nt", [("", "f(1,\n  # inside\n\n  2)"), ("", "t")]),
        ("x = 1 + \\\n  2\nt", [("", "x = 1 + \\\n  2"), ("", "t")]),
        (
            "if x:\n    a\n  # odd\nelse:\n\tb\n",
            [("", "if x:"), ("", "    a"), ("  # odd\n", "else:"), ("", "\tb"), ("", "")],
        ),
        ("# c\n@a\n# d\n\n@b(\n1)\ndef f():\n    pass", [("# c\n", "@a\n# d\n\n@b(\n1)\ndef f():"), ("", "    pass")]),
        (
            "@a\nclass C: x = 1\n@b\nasync def f(): pass\n",
            [("", "@a\nclass C: x = 1"), ("", "@b\nasync def f(): pass"), ("", "")],
        ),
        ("x = 1\r\n# c\r\ny\r\n", [("", "x = 1\r"), ("# c\r\n", "y\r"), ("", "")]),
        ("x\n\x0c\n\x0cdef f(): pass", [("", "x"), ("\x0c\n", "\x0cdef f(): pass")]),
        ("# a\u2028b\x0cc\ny = a @ b", [("# a\u2028b\x0cc\n", "y = a @ b")]),
    ],
)
def test_lines_by_value(source, expected):
    lines = split_lines(source)
    assert [(line.trivia, line.code) for line in lines] == expected
    assert join_lines(lines) == source


@pytest.mark.parametrize("source", ["x = (1\n", 's = """a\n', "if x:\n        a\n    b\n"])
def test_untokenizable_source_is_an_error(source):
    with pytest.raises((SyntaxError, tokenize.TokenError)):
        split_lines(source)


def test_lone_carriage_return_is_an_error():
    with pytest.raises(ValueError, match="line 2 holds a lone carriage return"):
        split_lines("x = 1\ny\rz\n")


LINE = CodeLine("# first\n\n    # not this\n    # sum of squares  \n", "    return x * x  # tail")


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("observe", (" sum of squares", "\n    return x * x  # tail")),
        ("strip", (None, "\n    return x * x  # tail")),
        ("keep_as_code", (None, LINE.trivia + LINE.code)),
    ],
)
def test_comment_modes(mode, expected):
    assert annotate(LINE, mode) == expected


@pytest.mark.parametrize(
    ("trivia", "rationale"),
    [
        ("", None),
        ("# far\n\n", None),
        ("#near\n", "near"),
        ("\t#  two  spaces\n", "  two  spaces"),
        ("## head\n", "# head"),
        ("# a\u2028b\n", " a\u2028b"),
        ("# crlf\r\n", " crlf"),
        ("#\n", None),
        ("# -------- #\n", None),
        ("#!/usr/bin/env python\n", None),
        ("# -*- coding: utf-8 -*-\n", None),
        ("# vim: set fileencoding=utf-8 :\n", None),
        ("# encoding: latin-1\n", None),
        ("# percent-encoding: see RFC 3986\n", " percent-encoding: see RFC 3986"),
    ],
)
def test_observed_rationale(trivia, rationale):
    assert annotate(CodeLine(trivia, "x"), "observe")[0] == rationale


def test_comment_after_the_last_line_is_no_rationale():
    assert annotate(CodeLine("# end\n", ""), "observe") == (None, "")
