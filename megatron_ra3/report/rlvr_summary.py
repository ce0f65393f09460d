"""What RLVR runs did, from their own metrics files: the curve in parts, and the held-out pass rate.

A rising reward alone may hide that groups no longer teach, answers run into the cap, or the policy has left its
reference; so those stand in the same line.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ra3.report.summary import read_metrics

PARTS = 10
"""Rows of a curve at most."""
COLUMNS = {
    "reward": ("reward", "9.4f"),
    "pass_rate": ("pass rate", "11.4f"),
    "zero_advantage": ("zero adv.", "11.4f"),
    "truncated": ("truncated", "11.4f"),
    "kl": ("KL", "10.2e"),
    "entropy": ("entropy", "9.3f"),
    "answer_tokens": ("tokens", "9.1f"),
    "mismatch": ("mismatch", "10.1e"),
}
"""Figures of a part, in the order of the table: heading and format."""


def is_rlvr(run_folder: Path) -> bool:
    """Whether the metrics of a run are those of RLVR; FileNotFoundError: it has none."""
    return any("pass_rate" in record for record in read_metrics(run_folder))


def summarize_rlvr(runs: Mapping[str, Path]) -> dict[str, Any]:
    """Figures of each run by name; ValueError: it has taken no step yet.

    `curve`: up to `PARTS` parts of the run, with `first` and `last` step and the means over its steps of `reward`,
    `pass_rate`, `truncated`, `answer_tokens`, `entropy` (nats per token), `mismatch` (nats) and `kl` (None without a
    reference); `zero_advantage`: groups that taught nothing, of all. `heldout`: [steps taken, pass rate] of every
    evaluation. `steps`, `answers`, `infrastructure_errors`, `skipped_steps` (no optimizer step), `seconds` by phase.
    """
    return {name: _figures(folder) for name, folder in runs.items()}


def evaluations_of(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations of a run, each with the number of RLVR steps before it as `rlvr_step`."""
    found: list[dict[str, Any]] = []
    steps = 0
    for record in records:
        steps += record["phase"] == "rlvr"
        if record["phase"] == "evaluate":
            found.append({**record, "rlvr_step": steps})
    return found


def rlvr_table(summary: Mapping[str, Any]) -> str:
    """The summary as aligned text, a block per run."""
    return "\n\n".join(_block(name, figures) for name, figures in summary.items())


def _figures(folder: Path) -> dict[str, Any]:
    records = read_metrics(folder)
    steps = [record for record in records if record["phase"] == "rlvr"]
    if not steps:
        raise ValueError(f"{folder}: the run has taken no step yet; start it again to resume it")
    seconds: dict[str, float] = defaultdict(float)
    for record in records:
        seconds[record["phase"]] += record["seconds"]
    edges = [len(steps) * part // PARTS for part in range(PARTS + 1)]
    parts = [(first, last) for first, last in itertools.pairwise(edges) if last > first]
    return {
        "steps": len(steps),
        "answers": sum(step["answers"] for step in steps),
        "infrastructure_errors": sum(step["infrastructure_errors"] for step in steps),
        "skipped_steps": sum(step["updates"] == 0 for step in steps),
        "curve": [{"first": first + 1, "last": last, **_part(steps[first:last])} for first, last in parts],
        "heldout": [(found["rlvr_step"], found["pass_rate"]) for found in evaluations_of(records)],
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }


def _part(steps: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    means = {
        name: statistics.fmean(step[name] for step in steps) if all(name in step for step in steps) else None
        for name in COLUMNS
        if name != "zero_advantage"
    }
    groups = sum(step["groups"] for step in steps)
    return {**means, "zero_advantage": sum(step["zero_advantage_groups"] for step in steps) / groups}


def _block(name: str, figures: Mapping[str, Any]) -> str:
    widths = {key: int(form.split(".")[0]) for key, (_, form) in COLUMNS.items()}
    steps, answers = f"{figures['steps']} steps", f"{figures['answers']} answers"
    skipped, unjudged = figures["skipped_steps"], figures["infrastructure_errors"]
    rows = [
        f"{name}: {steps}, {skipped} without an update; {answers}, {unjudged} without a verdict",
        f"{'steps':<12}" + "".join(f"{heading:>{widths[key]}}" for key, (heading, _) in COLUMNS.items()),
    ]
    for part in figures["curve"]:
        cells = [
            f"{'-':>{widths[key]}}" if part[key] is None else f"{part[key]:{form}}"
            for key, (_, form) in COLUMNS.items()
        ]
        rows.append(f"{part['first']}-{part['last']}".ljust(12) + "".join(cells))
    rows.append(_heldout_row(figures["heldout"]))
    spent = ", ".join(f"{phase} {value:.1f}" for phase, value in figures["seconds"].items())
    return "\n".join([*rows, f"seconds: {spent}"])


def _heldout_row(heldout: Sequence[tuple[int, float]]) -> str:
    if not heldout:
        return "held-out pass rate: never evaluated (evaluate.every_steps=0)"
    (begun, before), (taken, now) = heldout[0], heldout[-1]
    best_at, best = max(heldout, key=lambda point: point[1])
    return (
        f"held-out pass rate: {before:.4f} after {begun} steps -> {now:.4f} after {taken}; best {best:.4f} after "
        f"{best_at}"
    )
