"""The in-process engine against the same weights in transformers (float64), and across layouts."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from megatron_ra3.latents import Kind, LatentFormat, Snippet
from megatron_ra3.model import names, parallel
from megatron_ra3.model.build import build_model
from megatron_ra3.model.trainer import Trainer
from megatron_ra3.rollout.engine import GateQuery, GenerateQuery, StopRule
from megatron_ra3.rollout.inprocess import InProcessEngine
from megatron_ra3.rollout.sampler import Sampler, SamplerConfig
from tests.distributed import run_ranks
from tests.table_tokenizer import TableTokenizer
from tests.tiny_model import initialize, qwen2, random_folder

# A vocabulary that two ranks cannot divide: the padded row must never be drawn.
CONFIG = qwen2(vocab_size=13, hidden_size=32, intermediate_size=48, initializer_range=0.4)
TOKENS = ("<eos>", "\n", "#", "\n\n", "<act>", "<think>", "</think>", "a", "b", "c", "d", "e", "f")
STOP = StopRule(frozenset({0, 1, 3}), 6)
GATES = [
    GateQuery((0, 7, 1, 8, 9, 1, 10, 1), (2, 5, 7)),
    GateQuery((0, 1), (1,)),
    GateQuery((0, 12, 11, 1), (3,)),
    GateQuery((0, 7, 8, 9, 10, 11, 12, 1, 7, 8, 9, 1), (7, 11)),
]
PROMPTS = [GenerateQuery((0, *range(7, 7 + i % 6), 1, 2), seed=1000 + i) for i in range(24)]
SNIPPET = Snippet("s", (0, 7), ((8, 9), (10,), (11, 12, 7), (8,), (9, 9)), (None,) * 5)


NEWLINE = LatentFormat.build("newline", TableTokenizer(TOKENS))
SPECIAL = LatentFormat.build("special", TableTokenizer(TOKENS))


def load_trainer(folder: Path, tp: int, pp: int) -> Trainer:
    layout = initialize(tp, pp)
    model = build_model(CONFIG, layout, dtype=torch.float32)
    names.import_hf(model, folder)
    return Trainer(model, None, layout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_folder(tmp_path_factory.mktemp("model") / "hf", CONFIG)


@pytest.fixture(scope="module")
def trainer(folder: Path) -> Iterator[Trainer]:
    yield load_trainer(folder, 1, 1)
    parallel.destroy()


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    from transformers import Qwen2ForCausalLM

    return Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def law(reference: Any, prefix: Sequence[int], temperature: float = 1.0) -> list[float]:
    """Log-probs (nats, fp64) of the token after `prefix`."""
    with torch.no_grad():
        logits = reference(torch.tensor([list(prefix)])).logits[0, -1]
    return torch.log_softmax(logits / temperature, dim=-1).tolist()


@pytest.mark.parametrize("max_batch_tokens", [1, 16, 1000])
@pytest.mark.parametrize("fmt", [NEWLINE, SPECIAL], ids=["newline", "special"])
def test_gate_logprobs_are_the_models(
    trainer: Trainer, reference: Any, fmt: LatentFormat, max_batch_tokens: int
) -> None:
    engine = InProcessEngine(trainer, fmt, max_batch_tokens=max_batch_tokens)
    engine.set_version(3)
    for query, scores in zip(GATES, engine.gate_logprobs(GATES), strict=True):
        assert scores.weight_version == 3
        for row, logprobs in zip(query.rows, scores.logprobs, strict=True):
            exact = law(reference, query.token_ids[: row + 1])
            assert logprobs == pytest.approx([exact[gate] for gate in fmt.gate_ids], abs=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_generations_carry_the_logprobs_of_their_law(trainer: Trainer, reference: Any, temperature: float) -> None:
    engine = InProcessEngine(trainer, NEWLINE, max_batch_tokens=64, temperature=temperature)
    engine.set_version(8)
    generations = engine.generate(PROMPTS, STOP)
    for query, generation in zip(PROMPTS, generations, strict=True):
        tokens = generation.token_ids
        assert not STOP.stop_ids & set(tokens[:-1])
        assert len(tokens) == STOP.max_tokens or tokens[-1] in STOP.stop_ids
        exact = [law(reference, query.token_ids + tokens[:i], temperature)[t] for i, t in enumerate(tokens)]
        assert generation.logprobs == pytest.approx(exact, abs=5e-5)
        assert generation.weight_version == 8
    assert len({len(generation.token_ids) for generation in generations}) > 2


def test_draw_depends_on_its_own_query_alone(trainer: Trainer) -> None:
    together = InProcessEngine(trainer, NEWLINE, max_batch_tokens=1000).generate(PROMPTS, STOP)
    backwards = InProcessEngine(trainer, NEWLINE, max_batch_tokens=40).generate(PROMPTS[::-1], STOP)[::-1]
    engine = InProcessEngine(trainer, NEWLINE, max_batch_tokens=1)
    for query, first, second in zip(PROMPTS, together, backwards, strict=True):
        (alone,) = engine.generate([query], STOP)
        assert alone.token_ids == first.token_ids == second.token_ids
    reseeded = [GenerateQuery(query.token_ids, query.seed + 1) for query in PROMPTS]
    assert [g.token_ids for g in engine.generate(reseeded, STOP)] != [g.token_ids for g in together]


def test_draws_follow_the_models_law(trainer: Trainer, reference: Any) -> None:
    prefix = (0, 7, 1)
    engine = InProcessEngine(trainer, NEWLINE, max_batch_tokens=4096)
    queries = [GenerateQuery(prefix, seed) for seed in range(5000)]
    counts = Counter(generation.token_ids[0] for generation in engine.generate(queries, StopRule(frozenset(), 1)))
    expected = [len(queries) * math.exp(logprob) for logprob in law(reference, prefix)]
    likely = [token for token, count in enumerate(expected) if count >= 5]
    rest = len(queries) - sum(expected[token] for token in likely)
    observed = [counts[token] for token in likely]
    assert len(likely) >= 4
    pooled = ([*observed, len(queries) - sum(observed)], [*(expected[token] for token in likely), rest])
    assert chisquare(*pooled).pvalue > 0.001


def test_temperature_must_be_positive(trainer: Trainer) -> None:
    with pytest.raises(ValueError, match=r"temperature=0\.0: must be positive"):
        InProcessEngine(trainer, NEWLINE, max_batch_tokens=1, temperature=0.0)


def sample_everything(trainer: Trainer, window: int) -> list[dict[str, Any]]:
    """Trajectories of both surfaces."""
    config = SamplerConfig(
        rollouts_per_snippet=6, max_rationale_tokens=4, max_sequence_tokens=60, window=window, gate_exploration=0.3
    )
    trajectories = []
    for fmt in (NEWLINE, SPECIAL):
        engine = InProcessEngine(trainer, fmt, max_batch_tokens=100)
        (group,) = Sampler(engine, fmt, config).sample([SNIPPET], seed=11)
        trajectories += [trajectory.to_json() for trajectory in group]
    return trajectories


def test_sampler_on_the_engine_records_the_models_law(trainer: Trainer, reference: Any) -> None:
    expected = sample_everything(trainer, 1)
    assert 5 < sum(sum(record["thought"]) for record in expected) < 55
    for window in (2, 5):
        for record, wanted in zip(sample_everything(trainer, window), expected, strict=True):
            assert record["engine_logprobs"] == pytest.approx(wanted["engine_logprobs"], abs=2e-5)
            assert record | {"engine_logprobs": 0} == wanted | {"engine_logprobs": 0}
    for number, record in enumerate(expected):
        tokens = record["token_ids"]
        for i, kind in enumerate(record["kinds"]):
            if kind == Kind.RATIONALE and record["sampled"][i]:
                assert record["engine_logprobs"][i] == pytest.approx(law(reference, tokens[:i])[tokens[i]], abs=5e-5)
            if kind == Kind.GATE and record["sampled"][i]:
                thought = record["thought"][record["line_index"][i]]
                if number < 6:
                    think = math.exp(law(reference, tokens[: i + (not thought)])[2])
                else:
                    act_logprob, think_logprob = law(reference, tokens[:i])[4:6]
                    think = 1 / (1 + math.exp(act_logprob - think_logprob))
                behaviour = 0.7 * think + 0.15
                exact = math.log(behaviour if thought else 1 - behaviour)
                assert record["engine_logprobs"][i] == pytest.approx(exact, abs=5e-5)


def sample_on_two_ranks(folder: Path) -> list[list[dict[str, Any]]]:
    sampled = [sample_everything(load_trainer(folder, tp, pp), 2) for tp, pp in ((2, 1), (1, 2))]
    parallel.destroy()
    return sampled


def test_layouts_sample_the_same(trainer: Trainer, folder: Path) -> None:
    single = sample_everything(trainer, 2)
    ranks = run_ranks(sample_on_two_ranks, 2, folder)
    assert ranks[0] == ranks[1]
    for layout in ranks[0]:
        for record, wanted in zip(layout, single, strict=True):
            assert record["engine_logprobs"] == pytest.approx(wanted["engine_logprobs"], abs=2e-5)
            assert record | {"engine_logprobs": 0} == wanted | {"engine_logprobs": 0}
