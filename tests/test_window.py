"""What sampling costs: how far queries look ahead, what rollouts share, and what a wrong guess wastes."""

from typing import Any

import pytest

from megatron_ra3.latents import Snippet
from megatron_ra3.rollout.sampler import Sampler
from megatron_ra3.rollout.window import Plan, plan, think_probability
from tests.tabular_engine import (
    CAP,
    EOS,
    LAWS,
    NEWLINE,
    SNIPPET,
    TWELVE,
    WORD,
    TabularEngine,
    ThinkAt,
    X,
    make_sampler,
    path_of,
)


def test_a_wrong_guess_costs_a_rationale_and_is_counted() -> None:
    engine = TabularEngine(LAWS["newline"])
    sampler = make_sampler(engine, "newline", 200)
    (trajectories,) = sampler.sample([SNIPPET], seed=5)
    stats = sampler.stats
    assert stats.generate_requests == stats.thinks + stats.discarded_rationales
    assert 0 < stats.discarded_rationales < stats.thinks / 2
    drawn = sum(map(len, (rationale for trajectory in trajectories for rationale in path_of(trajectory) if rationale)))
    assert stats.rationale_tokens == drawn
    assert stats.discarded_rationales <= stats.discarded_tokens <= CAP * stats.discarded_rationales


def test_jump_ahead_asks_less_and_rollouts_share_their_past() -> None:
    """All four rollouts think before line 5; afterwards there is one past per distinct rationale."""

    def counts(window: Any) -> tuple[int, int, int]:
        engine = TabularEngine(ThinkAt(5))
        sampler = make_sampler(engine, "newline", 4, window=window)
        (trajectories,) = sampler.sample([TWELVE], seed=3)
        assert [trajectory.thought.index(True) for trajectory in trajectories] == [5] * 4
        assert len({path_of(trajectory) for trajectory in trajectories}) == 3
        stats = sampler.stats
        assert stats.gate_queries == sum(map(len, engine.gate_calls))
        assert stats.gate_rows == sum(len(query.rows) for call in engine.gate_calls for query in call)
        assert (stats.generate_requests, stats.lines, stats.thinks, stats.forced_acts) == (4, 48, 4, 0)
        assert stats.rationale_tokens == sum(
            len(rationale) for trajectory in trajectories for rationale in path_of(trajectory) if rationale
        )
        assert stats.prompt_tokens == sum(
            len(query.token_ids) for call in (*engine.gate_calls, *engine.generate_calls) for query in call
        )
        assert len(engine.generate_calls) == 1
        return stats.gate_queries, stats.gate_rows, len(engine.gate_calls)

    # 6 gates are shared by all, the last 6 are asked for each of the 3 distinct rationales
    assert counts(1) == (6 + 3 * 6, 6 + 3 * 6, 12)
    assert counts(4) == (2 + 3 * 2, 4 + 4 + 3 * 6, 4)
    assert counts(12) == (1 + 3, 12 + 3 * 6, 2)


def test_rare_thinks_cost_a_tenth_of_the_requests() -> None:
    long = Snippet("long", (EOS,), ((X,),) * 120, (None,) * 120)
    requests = {}
    for window in (1, "auto"):
        sampler = make_sampler(TabularEngine(ThinkAt(40)), "newline", 8, window=window, max_sequence_tokens=1000)
        sampler.sample([long], seed=0)
        requests[window] = sampler.stats.requests
    assert requests[1] == 41 + 3 * 79 + 8
    assert requests["auto"] < requests[1] / 10


LONG = Snippet("long", (EOS,), ((X,),) * 400, (None,) * 400)


def sample_twice(law: Any, *, fused: bool) -> tuple[TabularEngine, Sampler]:
    engine = TabularEngine(law, scores_while_generating=fused)
    sampler = make_sampler(engine, "newline", 1, max_sequence_tokens=10_000)
    sampler.sample([LONG], seed=0)
    engine.gate_calls.clear()
    engine.generate_calls.clear()
    sampler.sample([LONG], seed=1)
    return engine, sampler


def test_where_every_line_thinks_a_gate_and_its_rationale_are_one_request() -> None:
    engine, sampler = sample_twice(ThinkAt(*range(400)), fused=True)
    stats = sampler.stats
    assert (stats.lines, stats.thinks) == (400, 400)
    assert stats.requests < 1.05 * 400
    asked = [query for call in engine.generate_calls for query in call]
    assert stats.generate_requests == len(asked) == 400 + stats.discarded_rationales
    assert sum(len(query.rows) == 1 for query in asked) > 380
    assert sampler.think_rate == pytest.approx(1 - (1 - 1 / 8) * (1 - 1 / 256) ** 800)

    _, sampler = sample_twice(ThinkAt(*range(400)), fused=False)
    assert (sampler.stats.gate_queries, sampler.stats.generate_requests) == (400, 400)


def test_where_no_line_thinks_queries_look_far_ahead() -> None:
    engine, sampler = sample_twice(ThinkAt(), fused=False)
    assert sampler.stats.gate_rows == 400
    assert sampler.stats.requests == len(engine.gate_calls) < 20
    for seed in range(10):
        sampler.sample([LONG], seed=seed)
    assert sampler.stats.requests == 7  # of 64 lines each


def test_what_the_first_pass_shows_foretells_the_rest() -> None:
    """All rollouts think before lines 2 and 9: after the shared first pass there is one request per rationale."""

    class TwoThinks(ThinkAt):
        def rationale(self, prefix: tuple[int, ...]) -> dict[int, float]:
            return {WORD: 0.99, NEWLINE: 0.01}

    engine = TabularEngine(TwoThinks(2, 9))
    sampler = make_sampler(engine, "newline", 3, max_rationale_tokens=6, max_sequence_tokens=1000)
    (trajectories,) = sampler.sample([TWELVE], seed=2)
    assert [line for line, thought in enumerate(trajectories[0].thought) if thought] == [2, 9]
    assert [len(query.rows) for query in engine.gate_calls[0]] == [12]
    distinct = len({path_of(trajectory)[:3] for trajectory in trajectories})
    assert sampler.stats.discarded_rationales == 0
    assert sampler.stats.generate_requests == 6
    fused = [query for call in engine.generate_calls for query in call if query.rows]
    assert [len(query.rows) for query in fused] == [7] * distinct


@pytest.mark.parametrize(
    ("probabilities", "may_generate", "expected"),
    [
        ([0.01, 0.02, 0.9, 0.9], True, Plan(3, generates=True)),
        ([0.01, 0.02, 0.8, 0.9], False, Plan(4, generates=False)),
        ([0.0, 0.01, 0.95, 0.9], False, Plan(3, generates=False)),
        ([0.4, 0.9], True, Plan(2, generates=True)),
        ([0.45, 0.9], True, Plan(2, generates=False)),  # the second line is reached and thinks with 0.495
        ([0.0] * 10, True, Plan(10, generates=False)),
        ([0.0] * 100, True, Plan(64, generates=False)),
        ([0.5], True, Plan(1, generates=True)),
    ],
)
def test_plans_end_where_a_think_is_expected(probabilities: list[float], may_generate: bool, expected: Plan) -> None:
    assert plan(probabilities, may_generate=may_generate) == expected


def test_think_probability_is_a_half_where_draw_and_guess_agree() -> None:
    for guess in (1e-4, 0.3, 0.999):
        assert think_probability(guess, guess, 0.4) == pytest.approx(0.5)
    odds = think_probability(0.1, 0.2, 0.5) / (1 - think_probability(0.1, 0.2, 0.5))
    assert odds == pytest.approx(((0.2 / 0.8) / (0.1 / 0.9)) ** 2)
    assert think_probability(0.0, 0.01, 1.5) > 0.999
    assert think_probability(0.999, 0.0, 0.4) < 1e-9
    assert think_probability(0.999, 0.0, 1e-3) == 0.0
    assert think_probability(0.001, 1.0, 1e-3) == 1.0
