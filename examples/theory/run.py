"""Checks the three theorems of algorithm.md section 10 on small worlds, in about half a minute on one core.

    python examples/theory/run.py --out runs/theory [--seed 0] [--results FILE] [--figures FOLDER]

Writes t1.png, t2.png and t3.png, the CSV files behind them, and results.json, and prints the table. A theorem that does
not hold ends the command with an error, after everything was written.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import iterations
import numpy as np
import pruning
import regret
from figures import draw_iterations, draw_pruning, draw_regret

Row = dict[str, Any]
DELTA = 0.05
PRUNING_LINE = (
    "| {factor} | {family} | {exponent:.2f} ({exponent_low:.2f} to {exponent_high:.2f}) | {bound_exponent:.2f} "
    "| {sharper_bound_exponent:.2f} | {largest_share_of_bound:.2f} |"
)
LENGTH_LINE = (
    "| {kind} | {length} | {contraction:.3f} | {iterations:.1f} ± {half_width:.1f} | {bound:.1f} | {value_kept:.2f} |"
)
SLOPE_LINE = "| {kind} | {exponent:.3f} ± {half_width:.3f} | {bound_exponent:.3f} |"


def check_regret(rng: np.random.Generator, out: Path, instances: int) -> Row:
    """T1: the identity on random instances, and both errors against the size of the subset."""
    terms = [regret.random_instance(rng) for _ in range(instances)]
    rows = [{**asdict(term), "residual": term.residual} for term in terms]
    trade_off: list[Row] = regret.trade_off(rng, steps=400, learners=12)
    write_csv(out / "t1_instances.csv", rows)
    write_csv(out / "t1.csv", trade_off)
    draw_regret(out / "t1.png", rows, trade_off)
    residuals = [row["residual"] for row in [*rows, *trade_off]]
    best = min(trade_off, key=lambda row: row["regret"])
    return {
        "instances": instances,
        "largest_residual": max(residuals),
        "mean_regret": float(np.mean([term.regret for term in terms])),
        "best_size": best["options"],
        "best_regret": best["regret"],
        "regret_of_all_options": trade_off[-1]["regret"],
        "trade_off": trade_off,
        "holds": max(residuals) < 1e-12,
    }


def check_pruning(rng: np.random.Generator, out: Path, trials: int, problems: int) -> Row:
    """T2: demonstrations required against each factor, and the bound on random problems."""
    points: list[Row] = []
    exponents: list[Row] = []
    for factor in pruning.FACTORS:
        for kind in pruning.KINDS:
            rows, slope = pruning.measure(rng, kind, factor, trials)
            shares = [row["required"] / row["bound"] for row in rows]
            points += [{"factor": factor, "family": kind, **row} for row in rows]
            exponents.append({"factor": factor, "family": kind, **slope, "largest_share_of_bound": max(shares)})
    random = [pruning.check_random(rng, DELTA, trials=400) for _ in range(problems)]
    write_csv(out / "t2.csv", points)
    write_csv(out / "t2_random.csv", random)
    draw_pruning(out / "t2.png", points, exponents)
    shares = [row["required"] / row["bound"] for row in [*points, *random]]
    failures = [row["failure_rate_at_bound"] for row in random]
    return {
        "trials": trials,
        "exponents": exponents,
        "points": points,
        "random_problems": problems,
        "random_median_share_of_bound": float(np.median(shares[len(points) :])),
        "random_largest_failure_rate_at_bound": max(failures),
        "largest_share_of_bound": max(shares),
        "holds": max(shares) <= 1,
    }


def check_iterations(rng: np.random.Generator, out: Path, worlds: int, instances: int) -> Row:
    """T3: iterations against the length of options, and the bound on random instances."""
    samples = iterations.sweep(rng, worlds=worlds)
    rows = iterations.means(samples)
    random = [iterations.random_convergence(rng) for _ in range(instances)]
    write_csv(out / "t3.csv", rows)
    draw_iterations(out / "t3.png", rows)
    runs = [*random, *(run for column in samples.values() for run, _ in column)]
    violations = sum(run.iterations > run.contraction_bound for run in runs)
    return {
        "worlds": worlds,
        "exponents": iterations.slopes(samples),
        "lengths": rows,
        "random_instances": instances,
        "violations": violations,
        "random_median_share_of_bound": float(np.median([run.iterations / run.bound for run in random if run.bound])),
        "holds": violations == 0,
    }


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write `rows`, which share their keys, with all digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def table(results: Row) -> str:
    """The figures of `results` as text and Markdown tables."""
    t1, t2, t3 = results["t1"], results["t2"], results["t3"]
    return f"""\
T1, {t1["instances"]} random problems: |regret - pruning error - RL error| <= {t1["largest_residual"]:.1e}
T1, same RL budget: regret {t1["regret_of_all_options"]:.2f} with all options, {t1["best_regret"]:.2f} with the best \
{t1["best_size"]}
T2, {t2["random_problems"]} random problems: required / bound {t2["random_median_share_of_bound"]:.2f} in the median, \
{t2["largest_share_of_bound"]:.2f} at most, families included
T3, {t3["random_instances"]} random problems: {t3["violations"]} violations; iterations / bound \
{t3["random_median_share_of_bound"]:.2f} in the median

| T2: exponent in | family | measured (95 %) | bound | sharper bound | required / bound, at most |
|---|---|---|---|---|---|
{_lines(t2["exponents"], PRUNING_LINE)}

| T3: options | length | gamma-bar | iterations (95 %) | bound | value kept |
|---|---|---|---|---|---|
{_lines(t3["lengths"], LENGTH_LINE)}

| T3: exponent in the length | measured (95 %) | contraction bound |
|---|---|---|
{_lines(t3["exponents"], SLOPE_LINE)}"""


def _lines(rows: Sequence[Row], line: str) -> str:
    return "\n".join(line.format(**row) for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for plots, data and results.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the repetitions, for a quick look")
    parser.add_argument("--results", type=Path, help="also write results.json to this file")
    parser.add_argument("--figures", type=Path, help="also write the plots to this folder, as theory_t1.png and so on")
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    def repeated(count: int) -> int:
        return max(2, round(count * arguments.scale))

    began = time.process_time()
    streams = [np.random.default_rng(seed) for seed in np.random.SeedSequence(arguments.seed).spawn(3)]
    results: Row = {
        "seed": arguments.seed,
        "scale": arguments.scale,
        "t1": check_regret(streams[0], out, repeated(1000)),
        "t2": check_pruning(streams[1], out, repeated(4000), repeated(60)),
        "t3": check_iterations(streams[2], out, repeated(20), repeated(1000)),
    }
    results["machine"] = {"cpu": platform.machine(), "cores": os.cpu_count(), "numpy": np.__version__}
    results["cpu_seconds"] = round(time.process_time() - began, 1)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if arguments.results:
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / "results.json", arguments.results)
    if arguments.figures:
        arguments.figures.mkdir(parents=True, exist_ok=True)
        for name in ("t1.png", "t2.png", "t3.png"):
            shutil.copyfile(out / name, arguments.figures / f"theory_{name}")
    print(table(results))
    broken = [name for name in ("t1", "t2", "t3") if not results[name]["holds"]]
    if broken:
        print(f"does not hold: {', '.join(broken)}; see {out / 'results.json'}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
