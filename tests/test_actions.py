"""Granularities: the same code tokens in larger or smaller actions, and where one statement ends."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from megatron_ra3.corpus.actions import regroup, statement_sizes
from megatron_ra3.corpus.lines import split_lines
from megatron_ra3.corpus.snippets import SnippetRecord
from megatron_ra3.corpus.tokenized import SnippetTokenizer
from megatron_ra3.latents import Kind, LatentFormat, Snippet
from megatron_ra3.mstep import NextToken
from megatron_ra3.presets import Granularity
from tests.test_latents import FORMATS, TOKENIZER, ids

SOURCE = """\
# reads a file
@cache
@wraps(open)
def read(path):
    # open it
    with open(path) as file:
        # all at once
        text = file.read()
        rows = text.split()
    if rows:
        first = rows[0]
    else:
        # nothing
        first = None
    note = '''
  # not a comment
'''
    return first, note


class Empty:
    size = 0
    name = "x"
"""
SIZES = [1, 3, 2, 2, 1, 1, 3]
"""def | with and its body | if | else | note = | return | class and its body."""
GRANULARITIES: tuple[Granularity, ...] = ("line", "statement", "snippet", "token")


def _code(source: str) -> list[str]:
    return [line.code for line in split_lines(source) if line.code]


def _snippet(fmt: LatentFormat, granularity: Granularity, max_tokens: int = 10_000) -> Snippet:
    lines = [line for line in split_lines(SOURCE) if line.code]
    settings = {"max_tokens": max_tokens, "max_rationale_tokens": 50, "granularity": granularity}
    tokenizer = SnippetTokenizer(TOKENIZER, fmt, "observe", **settings)
    return tokenizer.snippets([SnippetRecord("s", "", "", tuple(lines))])[0]


def _granularities(fmt: LatentFormat) -> tuple[Granularity, ...]:
    return GRANULARITIES if fmt.surface == "special" else GRANULARITIES[:-1]


def _code_tokens(fmt: LatentFormat, snippet: Snippet) -> list[int]:
    """Tokens of the program; in the newline form a gate's newline is the end of the line before it."""
    item = fmt.render(snippet, observe=False)
    kept = {int(Kind.LINE)} | ({int(Kind.GATE)} if fmt.surface == "newline" else set())
    return [token for token, kind in zip(item.token_ids, item.kinds, strict=True) if kind in kept]


# --- statements


def test_a_statement_is_a_block_without_blocks_in_it_or_a_line():
    assert statement_sizes(_code(SOURCE)) == SIZES
    code = _code(SOURCE)
    starts = [0, *itertools.accumulate(SIZES)]
    assert [code[start].split("\n")[0] for start in starts[:-1]] == [
        "@cache",
        "    with open(path) as file:",
        "    if rows:",
        "    else:",
        "    note = '''",
        "    return first, note",
        "class Empty:",
    ]


@pytest.mark.parametrize(
    ("source", "sizes"),
    [
        ("x = 1\n", [1]),
        ("x = 1\ny = 2\n", [1, 1]),
        ("if a: b()\nc()\n", [1, 1]),
        ("for i in x:\n    for j in i:\n        f(j)\n        g(j)\n    h(i)\n", [1, 3, 1]),
        ("try:\n    f()\nexcept E:\n    g()\nfinally:\n    h()\n", [2, 2, 2]),
        ("if a:\n    f()\nelif b:\n    if c:\n        g()\nelse:\n    h()\n", [2, 1, 2, 2]),
        ("x = [\n        1,\n    2,\n]\nif a:\n\tf()\n\n\tg()\n", [1, 3]),
        ("def f():\n    '''Text\nat the margin.'''\n    return 1\n", [3]),
        ("class A:\n    @property\n    def x(self):\n        return 1\n    y = 2\n", [1, 2, 1]),
    ],
)
def test_statement_sizes_of_nested_code(source, sizes):
    assert statement_sizes(_code(source)) == sizes


def test_statement_sizes_of_a_snippet_that_starts_inside_a_block():
    assert statement_sizes(["        a()", "        b()", "    c()", "    if d:", "        e()", "f()"]) == [
        1,
        1,
        1,
        2,
        1,
    ]


def test_comments_and_blank_rows_above_a_line_do_not_count_as_its_indent():
    kept_as_code = ["if a:", "# why\n\n    # and how\n    b()", "\n        \n    c()", "d()"]
    assert statement_sizes(kept_as_code) == [3, 1]


# --- regrouping


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_code_tokens_are_the_same_at_every_granularity(fmt):
    text = TOKENIZER.text(_code_tokens(fmt, _snippet(fmt, "line")))
    assert text.strip("\n") == "\n".join(_without_comments())
    for granularity in _granularities(fmt):
        assert _code_tokens(fmt, _snippet(fmt, granularity)) == _code_tokens(fmt, _snippet(fmt, "line"))
    actions = {name: len(_snippet(fmt, name).lines) for name in _granularities(fmt)}
    tokens = len(_code_tokens(fmt, _snippet(fmt, "line")))
    expected = {"line": sum(SIZES), "statement": len(SIZES), "snippet": 1, "token": tokens}
    assert actions == {name: expected[name] for name in actions}


def _without_comments() -> list[str]:
    """The source as `observe` leaves it: no full-line comments, blank rows kept."""
    rows = [row for row in SOURCE.rstrip("\n").split("\n") if not row.lstrip().startswith("#")]
    at = rows.index("    note = '''")
    return [*rows[: at + 1], "  # not a comment", *rows[at + 1 :]]


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_cutting_to_length_comes_before_regrouping(fmt):
    """A cut in the middle of a statement leaves a shorter statement, and every granularity the same code."""
    for max_tokens in (70, 100, 150):
        cut = [_code_tokens(fmt, _snippet(fmt, name, max_tokens)) for name in _granularities(fmt)]
        assert len(cut[0]) < len(_code_tokens(fmt, _snippet(fmt, "line")))
        assert all(item == cut[0] for item in cut)


def test_only_the_rationale_of_an_actions_first_line_survives():
    fmt = FORMATS["special"]
    line = _snippet(fmt, "line")
    found = {name: _snippet(fmt, name).native for name in GRANULARITIES}
    texts = [" reads a file", " open it", " all at once", " nothing"]
    assert [item for item in found["line"] if item] == [ids(text) for text in texts]
    assert found["statement"] == (ids(texts[0]), ids(texts[1]), *[None] * 5)
    assert found["snippet"] == (ids(texts[0]),)
    first_tokens = [0, *itertools.accumulate(map(len, line.lines))][:-1]
    assert [found["token"][at] for at in first_tokens] == list(line.native)
    assert sum(item is not None for item in found["token"]) == 4


def test_merged_lines_keep_the_newline_between_them():
    snippet = Snippet("s", (0,), (ids("a"), ids("b"), ids("c")), (None, ids(" x"), None))
    (newline,) = ids("\n")
    merged = FORMATS["newline"].merge(snippet, [2, 1])
    assert merged.lines == ((*ids("a"), newline, *ids("b")), ids("c"))
    assert merged.native == (None, None)
    assert FORMATS["special"].merge(snippet, [1, 2]).lines == (ids("a"), (*ids("b"), *ids("c")))
    assert FORMATS["special"].merge(snippet, [1, 2]).native == (None, ids(" x"))


def test_tokens_as_actions_are_refused_in_the_newline_form():
    snippet = Snippet("s", (0,), (ids("a"),), (None,))
    with pytest.raises(ValueError, match=r"granularity=token.*latents\.surface=special"):
        regroup(snippet, ["a"], "token", FORMATS["newline"])


# --- held-out measure


class _Unigram:
    """Scores a token by its own id, whatever precedes it."""

    def score(self, micro_batches):
        return [-(1.0 + batch.targets % 7).float() for batch in micro_batches]


def test_never_thinking_reads_and_costs_the_same_at_every_granularity_in_the_newline_form():
    fmt = FORMATS["newline"]
    items = [fmt.render(_snippet(fmt, name), observe=False) for name in _granularities(fmt)]
    assert items[0].token_ids == items[1].token_ids == items[2].token_ids
    layout = SimpleNamespace(device=torch.device("cpu"), sum_over_dp=lambda x: x, sum_number_over_dp=float)
    measure = NextToken(_Unigram(), layout, fmt, micro_batch_tokens=1000)
    found = [measure.evaluate([item]) for item in items]
    tokens = items[0].token_ids[1:]
    expected = sum(1 + token % 7 for token in tokens) / len(tokens)
    for metrics in found:
        for name in ("nats_per_code_token", "nats_code_only", "nats_per_token"):
            assert metrics[name] == pytest.approx(expected, rel=1e-6)


def test_in_the_special_form_granularities_differ_by_their_gates_alone():
    fmt = FORMATS["special"]
    layout = SimpleNamespace(device=torch.device("cpu"), sum_over_dp=lambda x: x, sum_number_over_dp=float)
    measure = NextToken(_Unigram(), layout, fmt, micro_batch_tokens=1000)
    code = _code_tokens(fmt, _snippet(fmt, "line"))
    of_code = sum(1 + token % 7 for token in code)
    of_gate = 1 + TOKENIZER.id_of("<act>") % 7
    for name in GRANULARITIES:
        snippet = _snippet(fmt, name)
        metrics = measure.evaluate([fmt.render(snippet, observe=False)])
        assert metrics["nats_code_only"] == pytest.approx(of_code / len(code), rel=1e-6)
        total = of_code + len(snippet.lines) * of_gate
        assert metrics["nats_per_code_token"] == pytest.approx(total / len(code), rel=1e-6)
