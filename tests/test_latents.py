"""Latent formats: what is rendered, what counts as well formed, and the arithmetic of the gate."""

import ast
import decimal
import json
import math
from pathlib import Path

import pytest

from megatron_ra3.corpus.tokenizer import train_tokenizer
from megatron_ra3.latents import Kind, LatentFormat, Snippet, Surface, Trajectory, log1mexp

P, G, R, L = (int(kind) for kind in (Kind.PROMPT, Kind.GATE, Kind.RATIONALE, Kind.LINE))
SPECIALS = ("<eos>", "<act>", "<think>", "</think>")
MERGED = ("\n\n", ".\n", "\n    ", "    ", "def", "return")


class ByteTokenizer:
    """Bytes, a few merged tokens (longest match first) and special tokens."""

    def __init__(self, specials: tuple[str, ...] = SPECIALS, absent: str = "") -> None:
        self.tokens = [bytes([i]) for i in range(256) if chr(i) != absent] + [text.encode() for text in MERGED]
        self.specials = specials
        self.vocab_size = len(self.tokens) + len(specials)
        self.eos_id = self.id_of("<eos>")

    def encode(self, text: str) -> list[int]:
        raw, ids = text.encode(), []
        while raw:
            longest = max((token for token in self.tokens if raw.startswith(token)), key=len, default=b"")
            ids += [self.tokens.index(longest)] if longest else [0, 0]
            raw = raw[len(longest) or 1 :]
        return ids

    def id_of(self, token: str) -> int:
        if token not in self.specials:
            raise ValueError(f"tokenizer: lacks the token {token}")
        return len(self.tokens) + self.specials.index(token)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < len(self.tokens):
            return self.tokens[token_id]
        return self.specials[token_id - len(self.tokens)].encode()

    def text(self, token_ids: list[int]) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode()


TOKENIZER = ByteTokenizer()
LINES = [(None, "def f(x):"), (" add one", "    y = x + 1"), (None, "    return y")]
FORMATS = {surface: LatentFormat.build(surface, TOKENIZER) for surface in ("newline", "special")}


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text))


def test_newline_format_resolves_to_these_tokens() -> None:
    fmt = FORMATS["newline"]
    (newline,), (hash_id,) = ids("\n"), ids("#")
    assert (fmt.start, fmt.gate_prefix, fmt.act_suffix) == ((TOKENIZER.eos_id,), (newline,), ())
    assert (fmt.think_suffix, fmt.gate_ids, fmt.close) == ((hash_id,), (hash_id,), (newline,))
    assert fmt.close_ids == {newline, *ids(".\n")}
    assert fmt.stop_ids == {newline, *ids(".\n"), *ids("\n\n"), *ids("\n    "), TOKENIZER.eos_id}
    assert fmt.conditions_line


def test_special_format_resolves_to_these_tokens() -> None:
    fmt = FORMATS["special"]
    act, think, end = (TOKENIZER.id_of(name) for name in SPECIALS[1:])
    assert (fmt.gate_prefix, fmt.act_suffix, fmt.think_suffix) == ((), (act,), (think,))
    assert (fmt.gate_ids, fmt.close, fmt.close_ids) == ((act, think), (end,), {end})
    assert {act, think, end, TOKENIZER.eos_id, *ids("\n\n")} <= fmt.stop_ids
    assert not fmt.conditions_line


def test_newline_rendering_observed_is_the_commented_program() -> None:
    fmt = FORMATS["newline"]
    snippet = fmt.tokenize(TOKENIZER, "s", "", LINES)
    trajectory = fmt.render(snippet, observe=True)
    text = TOKENIZER.text(trajectory.token_ids)
    assert text == "<eos>\ndef f(x):\n# add one\n    y = x + 1\n    return y"
    assert ast.dump(ast.parse(text.removeprefix("<eos>"))) == ast.dump(
        ast.parse("def f(x):\n    y = x + 1\n    return y")
    )
    first, second, third = (len(ids(line)) for _, line in LINES)
    rationale = len(ids(" add one")) + 1  # and its newline
    assert trajectory.kinds == [P, G] + [L] * first + [G, G] + [R] * rationale + [L] * second + [G] + [L] * third
    assert trajectory.line_index == [-1] + [0] * (1 + first) + [1] * (2 + rationale + second) + [2] * (1 + third)
    assert trajectory.thought == [False, True, False]
    assert trajectory.well_formed == [True, True, True]
    assert not any(trajectory.sampled)
    assert sum(trajectory.rationale_lengths()) == rationale


def test_special_rendering_observed() -> None:
    fmt = FORMATS["special"]
    trajectory = fmt.render(fmt.tokenize(TOKENIZER, "s", '"""doc"""\n', LINES), observe=True)
    assert TOKENIZER.text(trajectory.token_ids) == (
        '<eos>"""doc"""\n<act>def f(x):\n<think> add one</think>    y = x + 1\n<act>    return y\n'
    )
    assert trajectory.kinds.count(P) == 1 + len(ids('"""doc"""\n'))
    assert trajectory.kinds.count(G) == 3


def test_rendering_with_a_trained_tokenizer(tmp_path: Path) -> None:
    code = "\n".join(line for _, line in LINES)
    tokenizer = train_tokenizer([code, " add one"] * 20, 300, tmp_path / "tokenizer")
    expected = {
        "newline": "\ndef f(x):\n# add one\n    y = x + 1\n    return y",
        "special": "<act>def f(x):\n<think> add one</think>    y = x + 1\n<act>    return y\n",
    }
    for surface in FORMATS:
        fmt = LatentFormat.build(surface, tokenizer)  # type: ignore[arg-type]
        trajectory = fmt.render(fmt.tokenize(tokenizer, "s", "", LINES), observe=True)
        assert trajectory.token_ids[0] == tokenizer.eos_id
        assert tokenizer.decode(trajectory.token_ids[1:]) == expected[surface]
        assert trajectory.thought == [False, True, False]


def test_rendering_unobserved_has_only_acts() -> None:
    expected = {
        "newline": "<eos>\ndef f(x):\n    y = x + 1\n    return y",
        "special": "<eos><act>def f(x):\n<act>    y = x + 1\n<act>    return y\n",
    }
    for surface, fmt in FORMATS.items():
        trajectory = fmt.render(fmt.tokenize(TOKENIZER, "s", "", LINES), observe=False)
        assert TOKENIZER.text(trajectory.token_ids) == expected[surface]
        assert trajectory.thought == [False] * 3
        assert R not in trajectory.kinds


@pytest.mark.parametrize(
    ("surface", "rationale", "well_formed", "written"),
    [
        ("newline", ids(" go\n"), True, " go\n"),
        ("newline", ids(" go.\n"), True, " go.\n"),
        ("newline", ids(".\n"), False, ".\n"),
        ("newline", ids(" go"), False, " go\n"),
        ("newline", ids(" go\n\n"), False, " go\n\n\n"),
        ("newline", ids(" go\n    "), False, " go\n    \n"),
        ("newline", ids("\n"), False, "\n"),
        ("newline", ids("  \n"), False, "  \n"),
        ("newline", (*ids(" go"), TOKENIZER.eos_id), False, " go<eos>\n"),
        ("newline", (), False, "\n"),
        ("special", (*ids("go"), TOKENIZER.id_of("</think>")), True, "go</think>"),
        ("special", ids("go"), False, "go</think>"),
        ("special", (TOKENIZER.id_of("</think>"),), False, "</think>"),
        ("special", (*ids(" "), TOKENIZER.id_of("</think>")), False, " </think>"),
        ("special", ids("go\n"), False, "go\n</think>"),
        ("special", (*ids("go"), TOKENIZER.id_of("<act>")), False, "go<act></think>"),
        ("special", (*ids("go"), TOKENIZER.eos_id), False, "go<eos></think>"),
    ],
)
def test_sampled_rationale(surface: Surface, rationale: tuple[int, ...], well_formed: bool, written: str) -> None:
    fmt = FORMATS[surface]
    trajectory = fmt.begin(fmt.tokenize(TOKENIZER, "s", "", LINES[:1]))
    fmt.append_think(trajectory, logprob=-0.5, weight_version=3)
    start = len(trajectory.token_ids)
    fmt.append_rationale(trajectory, rationale, ids("x"), logprobs=[-1.0] * len(rationale), weight_version=4)
    assert TOKENIZER.text(trajectory.token_ids[start:]) == written + "x"
    assert trajectory.well_formed == [well_formed]
    assert trajectory.sampled[start - 1 :] == [True] * (1 + len(rationale)) + [False] * (
        len(trajectory.token_ids) - start - len(rationale)
    )
    assert trajectory.engine_logprobs[start - 1 : start + len(rationale)] == [-0.5] + [-1.0] * len(rationale)
    assert trajectory.weight_versions[start - 1 : start + len(rationale)] == [3] + [4] * len(rationale)


@pytest.mark.parametrize("surface", ["newline", "special"])
def test_gate_logprob_sits_on_the_last_gate_token_only(surface: Surface) -> None:
    fmt = FORMATS[surface]
    trajectory = fmt.begin(fmt.tokenize(TOKENIZER, "s", "", LINES[:2]))
    fmt.append_act(trajectory, ids("x"), logprob=-0.25, weight_version=7)
    fmt.append_act(trajectory, ids("y"))
    decided = [i for i, kind in enumerate(trajectory.kinds) if kind == G]
    assert [trajectory.sampled[i] for i in decided] == [True, False]
    assert trajectory.engine_logprobs[decided[0]] == -0.25
    assert trajectory.weight_versions[decided[0]] == 7
    fmt.append_think(trajectory, logprob=-2.0)
    assert trajectory.sampled[-2:] == [False, True]
    assert trajectory.engine_logprobs[-1] == -2.0


def test_think_logprob() -> None:
    assert FORMATS["newline"].think_logprob([math.log(0.03)]) == math.log(0.03)
    act, think = math.log(0.003), math.log(0.001)
    assert FORMATS["special"].think_logprob([act, think]) == pytest.approx(math.log(0.25), rel=1e-14)
    assert FORMATS["special"].think_logprob([-2000.0, -2001.0]) == pytest.approx(-math.log1p(math.e), rel=1e-14)


@pytest.mark.parametrize("logprob", [-1e-300, -1e-17, -1e-9, -1e-3, -0.5, -0.693147, -0.6931472, -1.0, -40.0, -700.0])
def test_log1mexp_against_high_precision(logprob: float) -> None:
    with decimal.localcontext(prec=400):
        exact = float((1 - decimal.Decimal(logprob).exp()).ln())
    assert log1mexp(logprob) == pytest.approx(exact, rel=1e-15, abs=0.0)


def test_log1mexp_of_certainty_is_minus_infinity() -> None:
    assert log1mexp(0.0) == -math.inf


def test_newline_form_refuses_a_line_that_reads_as_a_rationale() -> None:
    with pytest.raises(ValueError, match=r"snippet s7: a line starts with '#'.*latents\.surface=special"):
        FORMATS["newline"].tokenize(TOKENIZER, "s7", "", [(None, "#!/bin/sh")])
    special = FORMATS["special"].tokenize(TOKENIZER, "s7", "", [(None, "#!/bin/sh")])
    assert special.lines == (ids("#!/bin/sh\n"),)


def test_tokenizer_without_the_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks the token <think>"):
        LatentFormat.build("special", ByteTokenizer(("<eos>", "<act>")))
    with pytest.raises(ValueError, match=r"'#' must be one token .* but is 2; use latents.surface=special"):
        LatentFormat.build("newline", ByteTokenizer(absent="#"))


def test_snippet_needs_lines_with_tokens() -> None:
    with pytest.raises(ValueError, match="snippet s: needs at least one line"):
        Snippet("s", (0,), (), ())
    with pytest.raises(ValueError, match="snippet s: needs at least one line"):
        Snippet("s", (0,), ((1,), ()), (None, None))


def test_trajectory_survives_json() -> None:
    fmt = FORMATS["newline"]
    trajectory = fmt.begin(fmt.tokenize(TOKENIZER, "s", "", LINES[:2]))
    fmt.append_act(trajectory, ids("x"), logprob=-0.1, weight_version=2)
    fmt.append_think(trajectory, logprob=-0.2)
    fmt.append_rationale(trajectory, ids("a\n"), ids("y"), logprobs=[-0.3, -0.4], weight_version=5)
    record = json.loads(json.dumps(trajectory.to_json()))
    assert Trajectory.from_json(record) == trajectory
    record["kinds"].pop()
    with pytest.raises(ValueError, match="trajectory s: lists of different lengths"):
        Trajectory.from_json(record)


def test_append_refuses_logprobs_of_another_length() -> None:
    trajectory = Trajectory("s")
    with pytest.raises(ValueError, match="trajectory s, line 2: 3 tokens but 1 log-probs"):
        trajectory.append(Kind.RATIONALE, 2, [1, 2, 3], logprobs=[-1.0])
