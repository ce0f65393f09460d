import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ra3.corpus.lines import split_lines
from megatron_ra3.corpus.tokenizer import CodeTokenizer, train_tokenizer
from megatron_ra3.latents import LatentFormat, Trajectory

EXAMPLE = Path(__file__).parents[1] / "examples" / "positive_control"
sys.path[:0] = [str(EXAMPLE), str(EXAMPLE.parent)]

import costs  # noqa: E402
import evaluate  # noqa: E402
import programs  # noqa: E402
import results  # noqa: E402
import run  # noqa: E402
from programs import ProgramConfig  # noqa: E402

VARIANTS = [
    ProgramConfig(),
    ProgramConfig(blocks=True),
    ProgramConfig(distractors=4, easy_comments=0.5),
    ProgramConfig(blocks=True, distractors=4, wrong_comments=1.0, hard_comments=1.0),
    ProgramConfig(assignments=16, min_hops=1, max_hops=6, pairs=5),
]


@pytest.mark.parametrize("config", VARIANTS)
def test_programs_run_and_ask_what_they_should(config: ProgramConfig) -> None:
    draw = random.Random(1)
    rationales = 0
    for _ in range(200):
        text = programs.program(config, draw)
        exec(text, {})
        lines = split_lines(text)[:-1]
        assert len(lines) == config.lines
        asked = dict(programs.questions([line.code for line in lines]))
        assert len(asked) == config.pairs
        for number, question in asked.items():
            chain = question.chain
            assert config.min_hops <= programs.hops(chain) <= config.max_hops
            assert lines[number].code.lstrip() == f"assert q=={chain[-1]}"
            values = dict(line.code.split("=") for line in lines if line.code.count("=") == 1)
            assert all(values[name] == value for name, value in itertools.pairwise(chain))
            comment = lines[number].trivia.strip().removeprefix("#")
            rationales += bool(comment)
            if comment:
                assert (comment == chain) == (config.wrong_comments == 0)
    assert rationales == pytest.approx(200 * config.pairs * config.hard_comments, rel=0.2)


def test_sources_depend_on_the_seed_alone(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        programs.write_sources(tmp_path / name, ProgramConfig(), programs=150, seed=seed)
    first, second, other = (
        [path.read_text() for path in sorted((tmp_path / name).iterdir())] for name in ("a", "b", "c")
    )
    assert first == second
    assert first != other
    assert [text.count("assert") for text in first] == [100 * 3, 50 * 3]


def test_earlier_questions_tell_little_about_the_next() -> None:
    """A chain with one variable to ask for cannot be asked again, so it is a little less than a third."""
    draw = random.Random(0)
    same = total = 0
    for _ in range(2000):
        text = programs.program(ProgramConfig(), draw)
        digits = [row[-1] for row in text.splitlines() if row.startswith("assert")]
        same += (digits[0] == digits[1]) + (digits[1] == digits[2])
        total += 2
    assert same / total == pytest.approx(0.26, abs=0.02)


@pytest.mark.parametrize("settings", [{"assignments": 5}, {"pairs": 8}, {"roots": 11}])
def test_impossible_programs_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="=") as caught:
        ProgramConfig(**settings)
    assert next(iter(settings)) in str(caught.value)


@pytest.fixture(scope="module", params=[False, True], ids=["lines", "blocks"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CodeTokenizer:
    draw = random.Random(0)
    config = ProgramConfig(blocks=request.param, easy_comments=0.3)
    lines = [line for _ in range(1000) for line in split_lines(programs.program(config, draw))]
    texts = [text for line in lines for text in (line.trivia.strip().removeprefix("#"), line.code) if text]
    return train_tokenizer(texts, run.TOKENIZER_VOCAB[request.param], tmp_path_factory.mktemp("tokenizer"))


def test_names_and_digits_are_tokens_of_their_own(tokenizer: CodeTokenizer) -> None:
    def pieces(text: str) -> list[str]:
        return [tokenizer.decode([token]) for token in tokenizer.encode(text)]

    assert pieces("B=A\n") == ["B", "=", "A", "\n"]
    assert pieces("CBA3") == ["C", "B", "A", "3"]
    if tokenizer.vocab_size == run.TOKENIZER_VOCAB[True]:
        assert pieces("for q in[B]:\n") == ["for", " q", " in", "[", "B", "]:", "\n"]
        assert pieces(" assert q==3\n") == [" assert", " q", "==", "3", "\n"]
    else:
        assert pieces("assert q==3\n") == ["assert", " q", "==", "3", "\n"]
    every_pair = "".join(first + second for first in programs.NAMES for second in programs.NAMES)
    assert len(pieces(every_pair)) == len(every_pair)


def trajectory(tokenizer: CodeTokenizer, latent_format: LatentFormat) -> Trajectory:
    """A program with a useless thought, a right one, a wrong one, and a hard line without any."""
    rows = [(None, "A=3"), ("ok", "B=A"), (None, "C=B"), (None, "D=7")]
    for name, digit, thought in (("C", 3, "CBA3"), ("B", 3, "BD7"), ("A", 3, None)):
        rows += [(None, f"q={name}"), (thought, f"assert q=={digit}")]
    snippet = latent_format.tokenize(tokenizer, "hand-made", "", rows)
    return latent_format.render(snippet, observe=True)


@pytest.mark.parametrize("surface", ["special", "newline"])
def test_figures_of_a_hand_made_trajectory(tokenizer: CodeTokenizer, surface: str) -> None:
    latent_format = LatentFormat.build(surface, tokenizer)
    item = trajectory(tokenizer, latent_format)
    hard = evaluate.hard_lines(item, latent_format, tokenizer)
    assert [line.chain for line in hard] == ["CBA3", "BA3", "A3"]
    assert [line.rationales for line in hard] == [("CBA3",), ("BD7",), ()]
    assert [tokenizer.decode([item.token_ids[line.position]]) for line in hard] == ["3", "3", "3"]
    three, seven = (tokenizer.encode(digit)[0] for digit in "37")
    figures = evaluate.measure([item], [[three, seven, three]], latent_format, tokenizer)
    assert figures["accuracy_hard"] == pytest.approx(2 / 3)
    assert figures["accuracy_hard_by_hops"] == {"0": 1.0, "1": 0.0, "2": 1.0}
    assert figures["think_rate_hard"] == pytest.approx(2 / 3)
    assert figures["think_rate_easy"] == pytest.approx(1 / 7)
    assert figures["rationale_tokens"] == pytest.approx((5 + 4) / 2)
    assert figures["needed_tokens"] == pytest.approx((5 + 4) / 2)
    assert figures["rationale_correct"] == 0.5
    assert figures["rationale_ends_right"] == 0.5


def test_operations_follow_the_cost_model() -> None:
    model = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    }
    weights = 2 * (8 * 16 + 8 * 8 + 3 * 8 * 16) + 8 * 100
    assert costs.forward_flops(model, 50.0) == 2 * weights + 4 * 2 * 8 * 50
    settings = {
        "warmup": {"snippets_per_step": 2},
        "mstep": {"snippets_per_step": 4},
        "estep": {"snippets_per_step": 3, "rollouts_per_snippet": 5},
    }
    latents = {"think_rate": 0.25, "rationale_tokens": 5.0}
    steps = [
        {"phase": "warmup", "tokens": 100.0, "think_rate": 0.0, "rationale_tokens": 0.0},
        {"phase": "estep", **latents},
        {"phase": "bootstrap", **latents},
        {"phase": "mstep", "tokens": 240.0, **latents},
        {"phase": "evaluate"},
    ]
    found = costs.run_cost(steps, settings, model, lines=8, act_tokens=50.0)
    assert found.training_tokens == 100 + 15 * 60 + 240
    short, long = costs.forward_flops(model, 50.0), costs.forward_flops(model, 60.0)
    assert found.flops == pytest.approx(3 * 100 * short + (5 * 15 * 60 + 4 * 60 + 3 * 240) * long)


def test_table_adds_up_costs_and_averages_over_seeds(tmp_path: Path) -> None:
    seed = {
        **dict.fromkeys(("think_rate_hard", "think_rate_easy", "rationale_correct", "rationale_tokens"), 1.0),
        **dict.fromkeys(("think_rate_hard_base", "think_rate_easy_base", "rationale_correct_base"), 0.5),
        **{f"accuracy_hard_{name}": 0.25 for name in ("base", "base_act", "ra3_act", "ntp")},
        "needed_tokens": 4.0,
        "commits": ["abc"],
        "training_tokens": {"base": 4e6, "ra3": 1e6, "ntp": 5e6},
        "flops": {"base": 2e12, "ra3": 1e12, "ntp": 2.5e12},
    }
    paths = []
    for number, accuracy in enumerate((0.97, 0.99)):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps({**seed, "seed": number, "accuracy_hard_ra3": accuracy}))
    done = results.aggregate(paths)
    assert done["accuracy_hard_ra3"] == pytest.approx(0.98)
    assert done["gain_over_ntp"] == pytest.approx(0.73)
    assert done["interval"]["gain_over_ntp"] == pytest.approx([0.73 - 0.12706, 0.73 + 0.12706], abs=1e-5)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in results.table(done).splitlines()]
    by_model = {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}
    assert list(by_model) == ["base", "base, never thinking", "RA3", "RA3, never thinking", "NTP, as many tokens"]
    assert by_model["RA3"]["accuracy on hard lines, %"] == "98.0 ± 12.7"
    assert [row["trained on, M tokens"] for row in by_model.values()] == [
        f"{m} ± 0.00" for m in ("4.00", "4.00", "5.00", "5.00", "5.00")
    ]


def test_all_goes_from_corpus_to_table_and_keeps_what_is_finished(tmp_path: Path) -> None:
    small = [
        "warmup.steps=2",
        "warmup.snippets_per_step=4",
        "em.rounds=1",
        "estep.steps=1",
        "estep.snippets_per_step=1",
    ]
    small += ["estep.rollouts_per_snippet=2", "mstep.steps=1", "mstep.snippets_per_step=2", "evaluate.snippets=2"]
    command = [sys.executable, str(EXAMPLE / "run.py"), "all", "--seeds", "3", "--out", str(tmp_path), "--only", "ntp"]
    command += ["--programs", "4000", "--heldout", "20", *(f"--set={setting}" for setting in small)]

    def call() -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert call().count(" done in ") == 7  # a corpus, three runs, three evaluations
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["seeds"] == [3]
    assert {"think_rate_hard", "think_rate_easy", "accuracy_hard_ra3", "accuracy_hard_ntp"} <= found.keys()
    tokens = found["per_seed"][0]["training_tokens"]
    assert tokens["ntp"] >= tokens["base"] + tokens["ra3"] > tokens["base"] > 0
    again = call()
    assert " done in " not in again
    assert results.table(found) in again
