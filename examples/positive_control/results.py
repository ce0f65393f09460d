"""Figures of one seed, their mean over seeds with intervals, and the budgets of the baselines.

Reads the run folders' own metrics and configs, so that budgets and reported costs are one count. Pure Python.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from commands import commit_of
from costs import Cost, forward_flops, run_cost
from evaluate import run_config
from programs import ProgramConfig

from megatron_ra3.report.experiments import Column, Estimate, Record, markdown, over_seeds
from megatron_ra3.report.summary import read_metrics
from megatron_ra3.settings import to_dict

RUNS = ("base", "ra3", "ntp", "ntp_flops")
THINKING = ("think_rate_hard", "think_rate_easy", "rationale_correct", "rationale_tokens", "needed_tokens")
"""Of `evaluate.measure`; the last three are missing where no hard line has a rationale."""
COLUMNS = (
    Column("think_rate_hard", "thinks on hard lines, %", 2, 100),
    Column("think_rate_easy", "on easy lines, %", 2, 100),
    Column("accuracy_hard", "accuracy on hard lines, %", 1, 100),
    Column("rationale_correct", "rationale right, %", 1, 100),
    Column("rationale_tokens", "rationale, tokens", 2),
    Column("needed_tokens", "needed", 2),
    Column("training_tokens", "trained on, M tokens", 2, 1e-6),
    Column("flops", "operations, 10^12", 1, 1e-12),
)


def matched_tokens(out: Path) -> dict[str, int]:
    """Training tokens of the baselines `ntp` and `ntp_flops` for the finished runs `base` and `ra3` in `out`."""
    pipeline = cost(out, "base") + cost(out, "ra3")
    length = tokens_per_program(out)
    per_token = 3.0 * forward_flops(_model(out), length)
    return {"ntp": math.ceil(pipeline.training_tokens), "ntp_flops": math.ceil(pipeline.flops / per_token)}


def cost(out: Path, name: str) -> Cost:
    """Cost of the run `name`."""
    settings = to_dict(run_config(out / name))
    lines, length = program_lines(out), tokens_per_program(out)
    return run_cost(read_metrics(out / name), settings, _model(out), lines=lines, act_tokens=length)


def program_lines(out: Path) -> int:
    """T: lines of every program."""
    saved = json.loads((out / "program.json").read_text(encoding="utf-8"))
    return ProgramConfig(**{key: value for key, value in saved.items() if key not in ("programs", "seed")}).lines


def tokens_per_program(out: Path) -> float:
    """N: mean tokens of a program with `<act>` before every line, from what the base model was trained on."""
    lines = program_lines(out)
    count = run_config(out / "base").warmup.snippets_per_step
    return statistics.fmean(
        step["tokens"] / count - step["think_rate"] * lines * step["rationale_tokens"]
        for step in read_metrics(out / "base")
        if step["phase"] == "warmup"
    )


def seed_result(out: Path, seed: int) -> dict[str, Any]:
    """All figures of one seed; `ntp` and `ntp_flops` are judged with `<act>` everywhere, as they were trained.

    A baseline that was not evaluated is left out.
    """
    runs = [name for name in RUNS if name in RUNS[:2] or (out / f"{name}.json").is_file()]
    found = {name: json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in runs}
    ra3, base = found["ra3"], found["base"]
    costs = {name: cost(out, name) for name in runs}
    steps = {name: read_metrics(out / name) for name in runs}
    return {
        "seed": seed,
        **{name: ra3[name] for name in THINKING if name in ra3},
        "accuracy_hard_ra3": ra3["accuracy_hard"],
        "accuracy_hard_ra3_act": ra3["accuracy_hard_act"],
        **{f"accuracy_hard_{name}": found[name]["accuracy_hard_act"] for name in runs[2:]},
        "accuracy_hard_base": base["accuracy_hard"],
        "accuracy_hard_base_act": base["accuracy_hard_act"],
        **{f"{name}_base": base[name] for name in THINKING if name in base},
        **{
            figure: {name: found[name][figure if name in RUNS[:2] else f"{figure}_act"] for name in runs}
            for figure in ("accuracy_hard_by_hops", "nats_per_code_token")
        },
        "hard_lines": ra3["hard_lines"],
        "commits": sorted({commit_of(out / f"{name}.log") for name in runs}),
        "training_tokens": {name: round(item.training_tokens) for name, item in costs.items()},
        "flops": {name: item.flops for name, item in costs.items()},
        "seconds": {name: round(sum(step["seconds"] for step in steps[name]), 1) for name in runs},
        "estep_think_rate": [round(step["think_rate"], 4) for step in steps["ra3"] if step["phase"] == "estep"],
        "estep_reward": [round(step["reward"], 4) for step in steps["ra3"] if step["phase"] == "estep"],
    }


def aggregate(paths: Sequence[Path]) -> dict[str, Any]:
    """Means over the seeds that have a figure at the top level, 95 % intervals (Student's t), and every seed."""
    seeds = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    names = list(dict.fromkeys(name for seed in seeds for name, value in seed.items() if isinstance(value, float)))
    estimates = {name: Estimate.of([seed[name] for seed in seeds if name in seed]) for name in names}
    gains = {
        f"gain_over_{name}": Estimate.of(
            [seed["accuracy_hard_ra3"] - seed[key] for seed in seeds if (key := f"accuracy_hard_{name}") in seed]
        )
        for name in ("base", *RUNS[2:])
        if f"accuracy_hard_{name}" in names
    }
    estimates |= gains
    return {
        **{name: estimate.mean for name, estimate in estimates.items()},
        "seeds": [seed["seed"] for seed in seeds],
        "interval": {
            name: [estimate.mean - estimate.half_width, estimate.mean + estimate.half_width]
            for name, estimate in estimates.items()
            if estimate.half_width is not None
        },
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), one in use",
        "commits": sorted({commit for seed in seeds for commit in seed["commits"]}),
        "per_seed": seeds,
    }


def table(done: Mapping[str, Any]) -> str:
    """The results of `aggregate` as Markdown: a line per model, means over seeds with interval half-widths."""
    records = [record for seed in done["per_seed"] for record in _by_model(seed)]
    return markdown(over_seeds(records, ["model"]), {"model": "model"}, COLUMNS)


def _by_model(seed: Mapping[str, Any]) -> list[Record]:
    """What a model costs includes the base it came from."""
    cost = {name: {measure: seed[measure][name] for measure in ("training_tokens", "flops")} for name in seed["flops"]}
    both = {measure: cost["base"][measure] + cost["ra3"][measure] for measure in cost["base"]}
    shown: list[Record] = [
        {"model": "base", **{name: seed[key] for name in THINKING if (key := f"{name}_base") in seed}, **cost["base"]},
        {"model": "base, never thinking", **cost["base"]},
        {"model": "RA3", **{name: seed[name] for name in THINKING if name in seed}, **both},
        {"model": "RA3, never thinking", **both},
        {"model": "NTP, as many tokens", **cost.get("ntp", {})},
        {"model": "NTP, as many operations", **cost.get("ntp_flops", {})},
    ]
    names = ("base", "base_act", "ra3", "ra3_act", "ntp", "ntp_flops")
    return [
        {"seed": seed["seed"], **record, "accuracy_hard": seed[key]}
        for record, key in zip(shown, (f"accuracy_hard_{name}" for name in names), strict=True)
        if key in seed
    ]


def _model(out: Path) -> Mapping[str, Any]:
    model: dict[str, Any] = json.loads((out / "base" / "export" / "config.json").read_text(encoding="utf-8"))
    return model
