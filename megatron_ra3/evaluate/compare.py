"""From verdicts to scores: models side by side on one suite, every pair tested on the same tasks.

A sample whose verdict is an infrastructure error is masked, never a failure: its task counts with the samples that are
left, and is left out where those are too few. How many were masked stands beside every score.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ra3.evaluate.pass_at_k import mcnemar, mean_interval, paired_difference, pass_at_k
from megatron_ra3.evaluate.records import Key
from megatron_ra3.evaluate.suites import Suite

Records = Mapping[Key, Mapping[str, Any]]
INFRASTRUCTURE = "infrastructure"


@dataclass(frozen=True)
class ModelRecords:
    """What one model wrote for one suite, and what was found."""

    completions: Records
    verdicts: Records


@dataclass(frozen=True)
class _Tally:
    """Samples of one task that were judged, and those that passed."""

    judged: int
    passed: int


def summarize(
    suite: Suite, models: Mapping[str, ModelRecords], pass_k: Sequence[int], *, samples_per_task: int, seed: int
) -> dict[str, Any]:
    """Scores of every model and differences of every pair, in the order of `models`.

    Scores are fractions, with `value`, `low` and `high`; a metric no task can be scored for is None.
    """
    metrics = list(_metrics(suite, pass_k, models))
    scores = {
        name: {metric: _per_task(suite, records, field, k, ids) for metric, field, k, ids in metrics}
        for name, records in models.items()
    }
    return {
        "models": {
            name: {
                "scores": {metric: _score(values, seed) for metric, values in scores[name].items()},
                **_counts(suite, records),
                "missing_samples": len(suite.tasks) * samples_per_task - len(records.verdicts),
            }
            for name, records in models.items()
        },
        "pairs": [
            _pair(first, second, metric, scores[first][metric], scores[second][metric], seed)
            for first, second in itertools.combinations(models, 2)
            for metric, *_ in metrics
        ],
    }


def _metrics(
    suite: Suite, pass_k: Sequence[int], models: Mapping[str, ModelRecords]
) -> Iterator[tuple[str, str, int, frozenset[str]]]:
    """Name, field of the verdict, k, and the tasks of each score."""
    everything = frozenset(task.task_id for task in suite.tasks)
    has_base = any("base_passed" in verdict for records in models.values() for verdict in records.verdicts.values())
    for k in pass_k:
        yield f"pass@{k}", "passed", k, everything
        if has_base:
            yield f"pass@{k} base inputs only", "base_passed", k, everything
        for title, ids in suite.groups.items():
            yield f"pass@{k} {title}", "passed", k, ids


def _per_task(suite: Suite, records: ModelRecords, field: str, k: int, ids: frozenset[str]) -> dict[str, float]:
    """pass@k of every task with at least k judged samples."""
    tallies = _tallies(records.verdicts, field)
    return {
        task.task_id: pass_at_k(tally.judged, tally.passed, k)
        for task in suite.tasks
        if task.task_id in ids and (tally := tallies.get(task.task_id)) is not None and tally.judged >= k
    }


def _tallies(verdicts: Records, field: str) -> dict[str, _Tally]:
    judged: collections.Counter[str] = collections.Counter()
    passed: collections.Counter[str] = collections.Counter()
    for (task_id, _), verdict in verdicts.items():
        if verdict["outcome"] != INFRASTRUCTURE:
            judged[task_id] += 1
            passed[task_id] += bool(verdict.get(field, verdict["outcome"] == "pass"))
    return {task_id: _Tally(count, passed[task_id]) for task_id, count in judged.items()}


def _score(values: Mapping[str, float], seed: int) -> dict[str, Any] | None:
    if not values:
        return None
    return {**dataclasses.asdict(mean_interval(list(values.values()), seed)), "tasks": len(values)}


def _pair(
    first: str, second: str, metric: str, before: Mapping[str, float], after: Mapping[str, float], seed: int
) -> dict[str, Any]:
    """Second minus first over the tasks that both were judged on."""
    shared = [task_id for task_id in before if task_id in after]
    found: dict[str, Any] = {"first": first, "second": second, "metric": metric, "tasks": len(shared)}
    if not shared:
        return found
    old, new = ([scores[task_id] for task_id in shared] for scores in (before, after))
    paired = paired_difference(old, new, seed)
    found |= {"difference": dataclasses.asdict(paired.difference), "p_bootstrap": paired.p}
    if all(score in (0.0, 1.0) for score in (*old, *new)):
        found["mcnemar"] = dataclasses.asdict(mcnemar([score == 1.0 for score in old], [score == 1.0 for score in new]))
    return found


def _counts(suite: Suite, records: ModelRecords) -> dict[str, Any]:
    """What happened to the samples, and how much of the answers is rationales."""
    verdicts = list(records.verdicts.values())
    lines = sum(verdict.get("lines", 0) for verdict in verdicts)
    rationales = sum(verdict.get("rationales", 0) for verdict in verdicts)
    tokens = [completion["tokens"] for completion in records.completions.values()]
    reasons = collections.Counter(verdict["reason"] or verdict["outcome"] for verdict in verdicts)
    return {
        "samples": len(verdicts),
        "infrastructure_errors": sum(verdict["outcome"] == INFRASTRUCTURE for verdict in verdicts),
        "tasks_without_a_verdict": len(suite.tasks) - len(_tallies(records.verdicts, "passed")),
        "reasons": dict(reasons.most_common()),
        "finish": dict(collections.Counter(item["finish"] for item in records.completions.values()).most_common()),
        "tokens_per_answer": sum(tokens) / len(tokens) if tokens else 0.0,
        "lines_of_code": lines,
        "rationales": rationales,
        "rationales_per_line": rationales / lines if lines else 0.0,
    }


def table(result: Mapping[str, Any]) -> str:
    """All suites as aligned text: scores in percent with their intervals, then differences in points."""
    rows = [
        f"{'suite':<16}{'model':<14}{'metric':<34}{'%':>7}{'interval':>17}{'tasks':>7}{'masked':>8}{'rationales':>12}"
    ]
    for name, suite in result["suites"].items():
        for model, found in suite["models"].items():
            for metric, score in found["scores"].items():
                rows.append(f"{name:<16}{model:<14}{metric:<34}{_shown(score)}{_margins(found)}")
            if found["missing_samples"]:
                rows.append(f"{name:<16}{model:<14}{found['missing_samples']} samples are missing: evaluate it again")
    pairs = [(name, pair) for name, suite in result["suites"].items() for pair in suite["pairs"]]
    if pairs:
        rows += [
            "",
            f"{'suite':<16}{'difference':<28}{'metric':<34}{'points':>8}{'interval':>17}{'p':>8}{'McNemar':>20}",
        ]
    rows += [f"{name:<16}{_shown_pair(pair)}" for name, pair in pairs]
    return "\n".join(rows)


def _shown(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return f"{'-':>7}{'':>17}{0:>7}"
    interval = f"{100 * score['low']:.1f} to {100 * score['high']:.1f}"
    return f"{100 * score['value']:>7.1f}{interval:>17}{score['tasks']:>7}"


def _margins(found: Mapping[str, Any]) -> str:
    return f"{found['infrastructure_errors']:>8}{found['rationales_per_line']:>12.2f}"


def _shown_pair(pair: Mapping[str, Any]) -> str:
    names = f"{pair['second']} - {pair['first']}"
    if "difference" not in pair:
        return f"{names:<28}{pair['metric']:<34}{'-':>8}"
    gap = pair["difference"]
    interval = f"{100 * gap['low']:+.1f} to {100 * gap['high']:+.1f}"
    test = pair.get("mcnemar")
    shown = f"{test['only_second']}:{test['only_first']} p={test['p']:.3f}" if test else ""
    value = f"{100 * gap['value']:>+8.1f}"
    return f"{names:<28}{pair['metric']:<34}{value}{interval:>17}{pair['p_bootstrap']:>8.3f}{shown:>20}"
