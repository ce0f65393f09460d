"""T3 (algorithm.md section 10): longer action abstractions, fewer iterations.

Value iteration with options, V_{n+1}(s) = max_z R(s, z) + sum_s' P(s, z, s') V_n(s') from V_0 = 0, contracts by
gamma-bar = sup_{s, z} E[gamma^tau] in the largest norm. With R_max = max |R(s, z)|, the error of V_n is at most
gamma-bar^n R_max / (1 - gamma-bar), hence at most eps as soon as

    n  >=  log(R_max / (eps (1 - gamma-bar))) / log(1 / gamma-bar)                        (the contraction bound)
    n  >=  1 / (1 - gamma-bar)  log(R_max / (eps (1 - gamma-bar)))                           (the bound)

of which the first is smaller because log(1/x) >= 1 - x. For options of exactly L steps gamma-bar = gamma^L. A random
duration of the same mean helps less: E[gamma^tau] >= gamma^E[tau]. And a set that also holds primitive actions has
gamma-bar = gamma, so the bound promises nothing for it, whatever value iteration does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from fits import exponent
from mdp import MDP, Array, Option, OptionModel, optimum, option_model, random_mdp, random_options

from megatron_ra3.report.experiments import Estimate

Durations = Literal["fixed", "random", "fixed and primitive"]
KINDS: tuple[Durations, ...] = ("fixed", "random", "fixed and primitive")
LENGTHS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Convergence:
    """Iterations until the largest error is at most eps, and what the two bounds say; all counted from V_0 = 0."""

    contraction: float
    iterations: int
    contraction_bound: int
    bound: int


def convergence(model: OptionModel, epsilon: float) -> Convergence:
    """Measure and bound the iterations for one set of options; `epsilon` in units of return."""
    contraction = model.contraction()
    largest = float(np.abs(model.rewards).max())
    scale = max(0.0, math.log(largest / (epsilon * (1 - contraction))))
    best, _ = optimum(model)
    values, iterations = np.zeros_like(best), 0
    while np.abs(best - values).max() > epsilon:
        values, iterations = model.action_values(values).max(1), iterations + 1
    return Convergence(
        contraction, iterations, math.ceil(scale / -math.log(contraction)), math.ceil(scale / (1 - contraction))
    )


def random_convergence(rng: np.random.Generator) -> Convergence:
    """`convergence` of a random MDP with random options of all kinds, and a random eps."""
    states, actions = int(rng.integers(4, 9)), int(rng.integers(2, 5))
    mdp = random_mdp(rng, states, actions, rng.uniform(0.8, 0.99))
    options = random_options(rng, states, actions, int(rng.integers(2, 7)))
    return convergence(option_model(mdp, options), 10 ** rng.uniform(-4, 0))


def lasting(policies: Array, length: int, kind: Durations) -> list[Option]:
    """Options that follow `policies` [Z, S, A] for `length` steps, exactly or (kind `random`) in the geometric mean."""
    states, actions = policies.shape[1:]
    if kind == "random":
        return [Option(policy, np.full(states, 1 / length)) for policy in policies]
    options = [Option(policy, np.zeros(states), length) for policy in policies]
    if kind == "fixed and primitive":
        options += [Option(np.tile(row, (states, 1)), np.ones(states), 1) for row in np.eye(actions)]
    return options


def primitive(mdp: MDP) -> OptionModel:
    """The primitive actions as options of one step."""
    return OptionModel(mdp.rewards, mdp.discount * mdp.transitions)


Samples = dict[tuple[Durations, int], list[tuple[Convergence, float]]]


def sweep(rng: np.random.Generator, *, worlds: int, discount: float = 0.99, epsilon: float = 1e-2) -> Samples:
    """Per kind and length, one `Convergence` and `value kept` per random world.

    The same eight random deterministic policies of a world are run for every length. The value kept is V*_Z over the
    optimum of primitive actions, at the start: what the options cost, which the iterations do not show.
    """
    samples: Samples = {(kind, length): [] for kind in KINDS for length in LENGTHS}
    for _ in range(worlds):
        mdp = random_mdp(rng, 12, 4, discount)
        policies = np.eye(4)[rng.integers(4, size=(8, 12))]
        best = mdp.start @ optimum(primitive(mdp))[0]
        for (kind, length), runs in samples.items():
            model = option_model(mdp, lasting(policies, length, kind))
            runs.append((convergence(model, epsilon), float(mdp.start @ optimum(model)[0] / best)))
    return samples


def means(samples: Samples) -> list[dict[str, float | str]]:
    """One row per kind and length: means over worlds, with the half-width of the iterations' 95 % interval."""
    rows: list[dict[str, float | str]] = []
    for (kind, length), runs in samples.items():
        results = [run for run, _ in runs]
        rows.append(
            {
                "kind": kind,
                "length": length,
                "contraction": float(np.mean([run.contraction for run in results])),
                "iterations": float(np.mean([run.iterations for run in results])),
                "half_width": _half_width([run.iterations for run in results]),
                "contraction_bound": float(np.mean([run.contraction_bound for run in results])),
                "bound": float(np.mean([run.bound for run in results])),
                "largest_share_of_bound": max(run.iterations / run.bound for run in results),
                "value_kept": float(np.mean([kept for _, kept in runs])),
            }
        )
    return rows


def slopes(samples: Samples) -> list[dict[str, float | str]]:
    """Per kind, the exponents of iterations and of their contraction bound in the length, fitted world by world.

    Exactly -1 for fixed durations up to the logarithm of R_max / (1 - gamma-bar), which hardly changes with the length.
    """
    rows: list[dict[str, float | str]] = []
    for kind in KINDS:
        worlds = list(zip(*(samples[kind, length] for length in LENGTHS), strict=True))
        fitted = exponent(LENGTHS, np.array([[run.iterations for run, _ in world] for world in worlds]))
        predicted = exponent(LENGTHS, np.array([[run.contraction_bound for run, _ in world] for world in worlds]))
        rows.append(
            {
                "kind": kind,
                "exponent": float(fitted.mean()),
                "half_width": _half_width(fitted),
                "bound_exponent": float(predicted.mean()),
            }
        )
    return rows


def _half_width(values: Sequence[float] | Array) -> float:
    found = Estimate.of([float(value) for value in values]).half_width
    return math.nan if found is None else found
