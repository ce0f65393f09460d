"""How well the E-step agrees with a model that can be enumerated: z-scores, variance, share of the optimum.

    python benchmarks/ground_truth.py --out FILE

The tests assert the same quantities; this prints them, for `docs/evidence.md`. One core, under two minutes.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import tabular
from tests.estimator import (
    CONFIGURATIONS,
    SEEDS,
    Agreement,
    averaged,
    estimates,
    every_group,
    exact,
    instance,
    learn,
    leaves,
    prior_of,
    share_of_optimum,
)
from tests.tabular import Policy

PENALTY: dict[str, Any] = {"groups": 32, "learning_rate": 0.1}
STICKY: dict[str, Any] = {"groups": 32, "learning_rate": 0.05, "latent_cost": "sticky_kl"}
LEARNERS: dict[str, dict[str, Any]] = {
    "penalty, exact gradient": {**PENALTY, "groups": 0},
    "penalty, 32 groups of 8": PENALTY,
    "penalty, 32 groups of 8, both": {**PENALTY, "baseline": "both"},
    "sticky KL, exact gradient": {**STICKY, "groups": 0},
    "sticky KL, 32 groups of 8": STICKY,
    "sticky KL, 32 groups of 8, both": {**STICKY, "baseline": "both"},
}
STEPS = 400


def agreement(settings: dict[str, Any], groups: int) -> dict[str, float]:
    """Of sampled gradients with the exact one, and of the mean over every pair of rollouts, for one configuration."""
    found = Agreement.of(settings, groups=groups)
    model, policy = instance(2, lines=2)
    prior = prior_of(model, 2, settings)
    paths, probability = every_group(model, policy, 2, settings.get("gate_exploration", 0.0))
    mean = averaged(probability, estimates(model, policy, paths, prior=prior, **settings)[0])
    return {
        "coordinates": len(found.z),
        "max_abs_z": float(found.z.abs().max()),
        "rms_z": float((found.z**2).mean().sqrt()),
        "baseline_max_abs_z": float(found.baseline_z.abs().max()),
        "relative_variance": found.variance,
        "exact_error": float((mean - exact(model, policy, settings, prior)).abs().max()),
    }


def optimum(options: dict[str, Any]) -> dict[str, Any]:
    """Share of the optimum reached in 400 steps of Adam, per model, from gates opened wide."""
    shares, above = [], []
    for seed in SEEDS:
        model, start = instance(seed)
        policy = leaves(Policy(start.gate + 3.0, start.content))
        prior = prior_of(model, seed, options)
        curve = learn(model, policy, STEPS, prior=prior, **options)
        best = tabular.viterbi(model)[0] if prior is None else tabular.posterior(model, prior)[0]
        shares.append(share_of_optimum(model, policy, prior))
        above.append(max(curve) - best)
    return {"share_per_model": shares, "least_share": min(shares), "largest_excess_over_bound": max(above)}


def report(groups: int) -> dict[str, Any]:
    """Everything, with what it was measured on."""
    begin = time.monotonic()
    return {
        "groups": groups,
        "models": len(SEEDS),
        "estimators": {name: agreement(settings, groups) for name, settings in CONFIGURATIONS.items()},
        "optimisation": {name: optimum(options) for name, options in LEARNERS.items()},
        "torch": torch.__version__,
        "machine": platform.machine(),
        "seconds": time.monotonic() - begin,
    }


def table(found: dict[str, Any]) -> str:
    """Both tables in Markdown."""
    rows = [
        "| estimator | coordinates | max abs z | rms z | variance vs no baseline | error of the exact mean |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["estimators"].items():
        rows.append(
            f"| {name} | {row['coordinates']} | {row['max_abs_z']:.2f} | {row['rms_z']:.2f} "
            f"| {row['relative_variance']:.3f} | {row['exact_error']:.0e} |"
        )
    rows += ["", "| learner | least share of the optimum, 5 models | most J above the bound |", "|---|---|---|"]
    for name, row in found["optimisation"].items():
        rows.append(f"| {name} | {row['least_share']:.4f} | {row['largest_excess_over_bound']:.0e} |")
    return "\n".join(rows)


def main() -> None:
    """Measure, write the figures and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--groups", type=int, default=10_000, help="sampled groups of four rollouts per model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = report(arguments.groups)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
