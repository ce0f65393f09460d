"""Where files are cut, what is dropped, and what a damaged snippet record says."""

import re

import pytest

from megatron_ra3.corpus.lines import CodeLine, split_lines
from megatron_ra3.corpus.snippets import SnippetLimits, SnippetRecord, cut_snippets


def cut(source, **limits):
    snippets, dropped = cut_snippets(
        split_lines(source), source="a.py", file_sha256="0123456789abcdef" * 4, limits=SnippetLimits(**limits)
    )
    return [[line.code for line in snippet.lines] for snippet in snippets], dict(dropped), snippets


def test_short_file_is_one_snippet_without_the_tail():
    codes, dropped, snippets = cut("# c\na\nb\nc\n# end\n")
    assert codes == [["a", "b", "c"]]
    assert dropped == {}
    assert snippets[0] == SnippetRecord(
        "0123456789abcdef-0000", "a.py", "", (CodeLine("# c\n", "a"), CodeLine("", "b"), CodeLine("", "c"))
    )


def test_cut_is_at_the_last_top_level_line_of_the_second_half():
    source = "a\nb\ndef f():\n    c\ndef g():\n    d\n    e\nelse_ = 1\nh"
    codes, _, snippets = cut(source, max_lines=6, min_lines=1)
    assert codes == [["a", "b", "def f():", "    c"], ["def g():", "    d", "    e", "else_ = 1", "h"]]
    assert [snippet.id[-4:] for snippet in snippets] == ["0000", "0001"]


def test_no_cut_before_a_clause_of_a_compound_statement():
    source = "if a:\n    b\n    c\nelse:\n    d\n    e\nf"
    assert cut(source, max_lines=5, min_lines=1)[0] == [["if a:", "    b", "    c", "else:", "    d"], ["    e", "f"]]


def test_cut_by_characters_counts_trivia_and_newlines():
    source = "# 34\naa\nbb\ncc\ndd"  # 5 + 3, 3, 3, 3 characters
    assert cut(source, max_chars=13, min_lines=1)[0] == [["aa", "bb"], ["cc", "dd"]]
    assert cut("aa\nbb", max_chars=6, min_lines=1)[0] == [["aa", "bb"]]
    assert cut("aa\nbb", max_chars=5, min_lines=1)[0] == [["aa"], ["bb"]]


def test_dropped_lines_and_snippets_are_counted():
    codes, dropped, _ = cut("a\nb\nlong = 123456789\nc\nd\ne\n", max_chars=10, min_lines=3)
    assert codes == [["c", "d", "e"]]
    assert dropped == {"line_too_long": 1, "snippet_too_short": 1}


@pytest.mark.parametrize("limits", [{"min_lines": 0}, {"min_lines": 3, "max_lines": 2}, {"max_chars": 0}])
def test_impossible_limits(limits):
    with pytest.raises(ValueError, match=re.escape(next(iter(limits)))):
        SnippetLimits(**limits)


def test_record_survives_json():
    record = SnippetRecord("i", "s", "p", (CodeLine("# é\n", "x"), CodeLine("", "y")), "r", "mit", "go")
    origin = {"id": "i", "source": "s", "prompt": "p", "repo": "r", "licence": "mit", "language": "go"}
    assert record.to_json() == origin | {"lines": [["# é\n", "x"], ["", "y"]]}
    assert SnippetRecord.from_json(record.to_json()) == record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 3}, "'id' must be a string, found 3"),
        ({"lines": []}, "'lines' must be a non-empty list"),
        ({"lines": [["x"]]}, "'lines' must be a non-empty list"),
        ({"extra": 1}, "must have the fields"),
    ],
)
def test_bad_record(change, message):
    good = SnippetRecord("i", "s", "", (CodeLine("", "x"),)).to_json()
    with pytest.raises(ValueError, match=message):
        SnippetRecord.from_json(good | change)


def test_record_of_another_type():
    with pytest.raises(ValueError, match="found list"):
        SnippetRecord.from_json([])
