"""pass@k, intervals and paired tests against values known in closed form; scores of suites with masked samples."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_ra3.evaluate.compare import ModelRecords, summarize, table
from megatron_ra3.evaluate.pass_at_k import mcnemar, mean_interval, paired_difference, pass_at_k


def test_pass_at_k_is_the_share_of_draws_with_a_pass():
    assert pass_at_k(200, 3, 10) == pytest.approx(0.143307, abs=1e-6)
    assert pass_at_k(7, 7, 3) == 1.0
    assert pass_at_k(7, 0, 3) == 0.0
    draws = list(itertools.combinations([True, True, False, False, False], 3))
    assert pass_at_k(5, 2, 3) == pytest.approx(sum(map(any, draws)) / len(draws))
    for samples, passed, k in ((3, 1, 4), (3, 4, 1), (3, 1, 0)):
        with pytest.raises(ValueError, match=f"pass@{k} of {samples} samples, {passed} passed"):
            pass_at_k(samples, passed, k)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    draw = np.random.default_rng(1)
    inside = 0
    for trial in range(200):
        found = mean_interval((draw.random(150) < 0.4).astype(float), seed=trial, resamples=500)
        inside += found.low <= 0.4 <= found.high
    assert 0.90 <= inside / 200 <= 0.99


def test_an_interval_is_over_tasks_not_samples():
    by_chance = math.sqrt(0.25 / 100)
    found = mean_interval([0.0, 1.0] * 50)
    assert found.value == 0.5
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * by_chance, rel=0.06)


def test_no_task_or_every_task_solved_is_no_certainty():
    nothing = mean_interval([0.0] * 164)
    assert (nothing.value, nothing.low) == (0.0, 0.0)
    assert (1 - nothing.high) ** 164 == pytest.approx(0.025)
    assert mean_interval([1.0] * 164).low == pytest.approx(1 - nothing.high)
    with pytest.raises(ValueError, match="over no tasks"):
        mean_interval([])


def test_pairs_see_what_intervals_side_by_side_hide():
    hard = np.random.default_rng(0).random(300)
    before, after = hard, hard * 0.9 + 0.1
    paired = paired_difference(before, after)
    assert paired.difference.low > 0.04
    assert paired.p < 0.001
    assert mean_interval(before).high > mean_interval(after).low
    assert paired_difference(before, before).p == 1.0
    swapped = paired_difference(after, before)
    assert swapped.difference.value == pytest.approx(-paired.difference.value)


def test_chance_alone_is_rarely_significant():
    draw = np.random.default_rng(2)
    p = [paired_difference(*(draw.random((2, 100)) < 0.5), seed=trial, resamples=400).p for trial in range(200)]
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.10


def test_mcnemar_counts_only_tasks_that_one_model_solves():
    first = [True] * 5 + [False] * 12 + [True] * 30
    second = [False] * 5 + [True] * 12 + [True] * 30
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == (5, 12)
    assert found.p == pytest.approx(2 * sum(math.comb(17, i) for i in range(6)) / 2**17)
    assert mcnemar([True], [True]).p == 1.0


def suite(*ids, **groups):
    return SimpleNamespace(tasks=[SimpleNamespace(task_id=task_id) for task_id in ids], groups=groups)


def records(outcomes, **extra):
    verdicts = {
        (task_id, sample): {"outcome": outcome, "reason": "", "lines": 4, "rationales": 1, **extra}
        for task_id, samples in outcomes.items()
        for sample, outcome in enumerate(samples)
    }
    return ModelRecords({key: {"tokens": 10, "finish": "stop"} for key in verdicts}, verdicts)


def test_infrastructure_errors_are_masked_and_counted_never_failures():
    models = {
        "base": records({"a": ["pass", "infrastructure"], "b": ["infrastructure"] * 2, "c": ["fail", "fail"]}),
        "ra3": records({"a": ["pass", "pass"], "b": ["pass", "pass"], "c": ["pass", "fail"]}),
    }
    found = summarize(suite("a", "b", "c"), models, (1, 2), samples_per_task=2, seed=0)
    base = found["models"]["base"]
    assert (base["scores"]["pass@1"]["value"], base["scores"]["pass@1"]["tasks"]) == (0.5, 2)
    assert (base["scores"]["pass@2"]["value"], base["scores"]["pass@2"]["tasks"]) == (0.0, 1)  # only c has two verdicts
    assert (base["infrastructure_errors"], base["tasks_without_a_verdict"], base["missing_samples"]) == (3, 1, 0)
    assert base["rationales_per_line"] == 0.25
    one, two = found["pairs"]
    assert (one["metric"], one["tasks"], one["difference"]["value"]) == ("pass@1", 2, 0.25)
    assert (two["tasks"], two["difference"]["value"], two["mcnemar"]["only_second"]) == (1, 1.0, 1)
    text = table({"suites": {"made": found}})
    assert "ra3 - base" in text
    assert all(len(line) < 140 for line in text.splitlines())


def test_groups_and_base_inputs_have_scores_of_their_own():
    verdicts = records({"a": ["pass"], "b": ["fail"], "c": ["fail"]}, base_passed=True)
    found = summarize(suite("a", "b", "c", half=frozenset("ab")), {"m": verdicts}, (1,), samples_per_task=1, seed=0)
    scores = {name: score["value"] for name, score in found["models"]["m"]["scores"].items()}
    assert scores == {"pass@1": pytest.approx(1 / 3), "pass@1 base inputs only": 1.0, "pass@1 half": 0.5}
    nothing = summarize(suite("a"), {"m": records({"a": ["infrastructure"]})}, (1,), samples_per_task=1, seed=0)
    assert nothing["models"]["m"]["scores"] == {"pass@1": None}
    assert "0" in table({"suites": {"made": nothing}})
