"""Figures of finished runs, their mean over seeds, and the table and files of an experiment.

Every figure comes from the run folders' own metrics files, so table, plot and data cannot disagree, and all of them can
be made again without training anything. One seed is no evidence: intervals stand beside every mean. Pure Python.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from megatron_ra3.report.summary import read_metrics

Record = dict[str, Any]
"""One run (or one round or step of it): what it varies, its seed, and its figures."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean over seeds and the half-width of its 95 % interval (Student's t); None with fewer than two seeds."""

    mean: float
    half_width: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Estimate the mean behind one value per seed; at least one."""
        mean, count = statistics.fmean(values), len(values)
        if count < 2:
            return cls(mean, None, count)
        quantile = float(student_t.ppf(0.975, count - 1))
        return cls(mean, quantile * statistics.stdev(values) / math.sqrt(count), count)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table, one point of a plot: what was varied, and an estimate per figure."""

    setting: Record
    figures: dict[str, Estimate]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table: a figure, its heading with the unit, and how it is shown."""

    figure: str
    heading: str
    decimals: int = 3
    scale: float = 1.0


def run_figures(run_folder: Path) -> dict[str, float]:
    """Figures of a finished run; ValueError when it has not reached its evaluation.

    Held-out, from the last evaluation, nats per original code token: `nats` (E_q[-log pi(a, z)]: lines, gates and
    rationales), `nats_code_only` (E_q[-log pi(a | z)]: lines alone), `act_nats` and `act_nats_code_only` (the same with
    `<act>` everywhere). `elbo`, nats per token of the lines, and `objective`, nats per action (`EStep.evaluate`).
    `think_rate` per action, `thinks_per_code_token`, `latent_tokens_per_code_token`, `rationale_tokens` (mean length,
    where there is one). A run that only ever acts, such as NTP, has `nats` equal to `act_nats` and thinks at rate 0.
    Cost: `tokens` trained on, `seconds` of all steps and `<phase>_seconds`. Of an E-step: `requests_per_rollout`, mean
    over its steps.
    """
    steps = read_metrics(run_folder)
    evaluations = [step for step in steps if step["phase"] == "evaluate"]
    if not evaluations:
        raise ValueError(f"{run_folder}: the run has not reached its evaluation yet; start it again to resume it")
    figures = _heldout(evaluations[-1])
    figures["tokens"] = float(sum(step["tokens"] for step in steps if "tokens" in step))
    figures["seconds"] = 0.0
    for step in steps:
        name = f"{step['phase']}_seconds"
        figures[name] = figures.get(name, 0.0) + step["seconds"]
        figures["seconds"] += step["seconds"]
    requests = [step["requests_per_rollout"] for step in steps if "requests_per_rollout" in step]
    if requests:
        figures["requests_per_rollout"] = statistics.fmean(requests)
    return figures


def round_figures(run_folder: Path) -> list[Record]:
    """Per EM round, from 1: the held-out figures of `run_figures`, and means over the round's own steps.

    `reward`, `reward_think` and `reward_act` (nats per action; the latter two over steps that had such actions) and
    `estep_think_rate` come from the E-step, `bootstrap_think_rate` from the annotation, `mstep_nats` (nats per token
    trained on, latents included) from the M-step.
    """
    sources = {
        "reward": ("estep", "reward"),
        "reward_think": ("estep", "reward_think"),
        "reward_act": ("estep", "reward_act"),
        "estep_think_rate": ("estep", "think_rate"),
        "bootstrap_think_rate": ("bootstrap", "think_rate"),
        "mstep_nats": ("mstep", "loss"),
    }
    rounds: dict[int, list[Record]] = {}
    for step in read_metrics(run_folder):
        rounds.setdefault(step["round"], []).append(step)
    records = []
    for number, steps in sorted(rounds.items()):
        evaluations = [step for step in steps if step["phase"] == "evaluate"]
        if number == 0 or not evaluations:
            continue
        record: Record = {"round": number, **_heldout(evaluations[-1])}
        for name, (phase, metric) in sources.items():
            values = [step[metric] for step in steps if step["phase"] == phase and _measured(step, metric)]
            if values:
                record[name] = statistics.fmean(values)
        records.append(record)
    return records


def step_figures(run_folder: Path, phase: str, names: Sequence[str]) -> list[Record]:
    """Per step of one phase, numbered from 1 over all rounds: those of `names` that it measured."""
    steps = [step for step in read_metrics(run_folder) if step["phase"] == phase]
    return [
        {"phase_step": number, **{name: step[name] for name in names if _measured(step, name)}}
        for number, step in enumerate(steps, start=1)
    ]


def over_seeds(records: Sequence[Record], by: Sequence[str]) -> list[Row]:
    """Average records that agree in the settings `by`, in order of first appearance; `seed` is no figure.

    A figure that only some records of a setting hold is averaged over those.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in by), []).append(record)
    rows = []
    for key, members in groups.items():
        names = dict.fromkeys(name for member in members for name in member if name not in (*by, "seed"))
        figures = {name: Estimate.of([member[name] for member in members if name in member]) for name in names}
        rows.append(Row(dict(zip(by, key, strict=True)), figures))
    return rows


def markdown(rows: Sequence[Row], settings: Mapping[str, str], columns: Sequence[Column]) -> str:
    """A Markdown table of means and interval half-widths.

    Args:
        rows: its lines.
        settings: heading per name of what was varied; these columns come first.
        columns: figures; one that no row has is left out, and where a row lacks one the cell holds a dash.
    """
    shown = [column for column in columns if any(column.figure in row.figures for row in rows)]
    headings = [*settings.values(), *(column.heading for column in shown)]
    cells = [
        [*(str(row.setting[name]) for name in settings), *(_cell(row, column) for column in shown)] for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [headings, ["---"] * len(headings), *cells])


def write_results(
    folder: Path, description: Mapping[str, Any], records: Sequence[Record], rows: Sequence[Row], table: str
) -> None:
    """Write `data.csv` (every record), `results.json` (description, records, rows) and `table.md` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for record in records for name in record))
    with (folder / "data.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    results = {**description, "rows": [asdict(row) for row in rows], "records": list(records)}
    (folder / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")


def _heldout(evaluation: Mapping[str, float]) -> dict[str, float]:
    act_nats, nats = evaluation["act_nats_per_code_token"], evaluation["nats_per_code_token"]
    figures = {
        **{name: evaluation[name] for name in ("elbo", "objective") if name in evaluation},
        "act_nats": act_nats,
        "act_nats_code_only": evaluation["act_nats_code_only"],
        "nats": nats,
        "nats_code_only": evaluation.get("nats_code_only", evaluation["act_nats_code_only"]),
        "think_rate": evaluation.get("think_rate", 0.0),
        "latent_tokens_per_code_token": 0.0,
        "thinks_per_code_token": 0.0,
    }
    if figures["think_rate"]:
        act_targets = act_nats / evaluation["act_nats_per_token"]  # scored tokens per code token
        latent_tokens = nats / evaluation["nats_per_token"] - act_targets
        opening = 0.0 if act_targets > 1.0 + 1e-6 else 1.0  # tokens by which opening a rationale is longer than acting
        figures["rationale_tokens"] = evaluation["rationale_tokens"]
        figures["latent_tokens_per_code_token"] = latent_tokens
        figures["thinks_per_code_token"] = latent_tokens / (evaluation["rationale_tokens"] + opening)
    return figures


def _measured(step: Record, name: str) -> bool:
    """Whether a step has a metric: means over no rationale, or over no `<act>`, are written as 0."""
    if name in ("rationale_tokens", "reward_think") and step.get("think_rate") == 0.0:
        return False
    return name in step and not (name == "reward_act" and step.get("think_rate") == 1.0)


def _cell(row: Row, column: Column) -> str:
    estimate = row.figures.get(column.figure)
    if estimate is None:
        return "-"
    shown = f"{column.scale * estimate.mean:.{column.decimals}f}"
    if estimate.half_width is None:
        return shown
    return f"{shown} ± {column.scale * estimate.half_width:.{column.decimals}f}"
