"""T2 (algorithm.md section 10): how many demonstrations it takes to prune the options Z to a near-optimal subset.

Tasks M ~ p. The pruning loss of a subset is Delta(M, Z') = V*_Z(M) - V*_Z'(M) at the start state. Z' is eps-optimal if
Delta <= eps on every task, |Z_eps| is the size of the smallest such subset, and Z' is (eps, sigma)-suboptimal if
Pr_M[Delta(M, Z') > eps] >= sigma. A demonstration is a task with its expert's return: it prunes every subset of size
|Z_eps| that stays more than eps below. Pruning has succeeded once no (eps, sigma)-suboptimal subset is left, so that
any survivor will do. Then, with probability at least 1 - delta, n demonstrations are enough if

    n  >=  |Z_eps| log(|Z| / delta) / sigma                                             (the bound)
    n  >=  ( log C(|Z|, |Z_eps|) + log(1 / delta) ) / sigma                             (the sharper bound)

since one such subset survives n demonstrations with probability at most (1 - sigma)^n <= exp(-n sigma), and there are
at most C(|Z|, |Z_eps|) <= |Z|^|Z_eps| of them. `required` measures the smallest such n. A bound for all task laws need
not be tight for any one, so three families of tasks show what each factor is there for: see `Family`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from fits import exponent
from mdp import MDP, Array, Option, optimum, option_model, random_mdp, random_options
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Kind = Literal["named", "chance", "bits"]
Factor = Literal["subset_size", "log_options", "inverse_sigma", "log_inverse_delta"]
KINDS: tuple[Kind, ...] = ("named", "chance", "bits")
FACTORS: tuple[Factor, ...] = ("subset_size", "log_options", "inverse_sigma", "log_inverse_delta")
EPSILON = 0.5
"""Pruning loss that is tolerated in the families, where an option earns about 1 or nothing."""


def bound(options: int, subset_size: int, sigma: float, delta: float) -> int:
    """Demonstrations that suffice by the bound: |Z_eps| log(|Z| / delta) / sigma, rounded up."""
    return math.ceil(subset_size * math.log(options / delta) / sigma)


def sharper_bound(options: int, subset_size: int, sigma: float, delta: float) -> int:
    """Demonstrations that suffice when subsets are counted exactly instead of by |Z|^|Z_eps|."""
    return math.ceil((math.log(math.comb(options, subset_size)) + math.log(1 / delta)) / sigma)


@dataclass(frozen=True, slots=True)
class Family:
    """Tasks over `contexts` = |Z_eps| situations, each with `per_context` = |Z| / |Z_eps| options made for it alone.

    A task starts in one context; a share of the tasks accepts every option and teaches nothing. Each context has one
    good option, accepted by all its tasks. What its bad options get away with makes the kind:

    - `named`: nothing. A context is met with probability sigma, and one demonstration names its option.
    - `chance`: each with an independent probability 1/2. A context is met with probability 2 sigma.
    - `bits`: options are bit strings and a task checks one bit in one context, so it halves what is left. All checks
      together are met with probability 2 sigma.

    `sigma` is the least probability with which a suboptimal choice shows (for `bits`, that of half the checks failing).
    """

    kind: Kind
    contexts: int
    per_context: int
    sigma: float
    delta: float

    def __post_init__(self) -> None:
        """ValueError for a family that does not exist."""
        if self.per_context < 2:
            raise ValueError(f"per_context {self.per_context}: there is nothing to prune; raise it to 2 or more")
        if self.teaching > 1:
            raise ValueError(
                f"{self.kind}: sigma {self.sigma} in {self.contexts} contexts needs tasks of probability "
                f"{self.teaching:g} > 1; lower one of the two"
            )
        if self.kind == "bits" and self.per_context != 1 << self.bits:
            raise ValueError(f"bits: per_context {self.per_context} must be a power of two")

    @property
    def options(self) -> int:
        """|Z|."""
        return self.contexts * self.per_context

    @property
    def bits(self) -> int:
        """Checks per context of the kind `bits`."""
        return self.per_context.bit_length() - 1

    @property
    def teaching(self) -> float:
        """Probability of a task that does not accept every option."""
        return {"named": self.sigma * self.contexts, "chance": 2 * self.sigma * self.contexts, "bits": 2 * self.sigma}[
            self.kind
        ]

    def bound(self) -> int:
        """The published bound for this family."""
        return bound(self.options, self.contexts, self.sigma, self.delta)

    def sharper_bound(self) -> int:
        """The sharper bound for this family."""
        return sharper_bound(self.options, self.contexts, self.sigma, self.delta)


def success_times(rng: np.random.Generator, family: Family, trials: int) -> Integers:
    """[trials], sorted: demonstrations until no (eps, sigma)-suboptimal subset is left, drawn from their exact law.

    Only the tasks that teach are drawn one by one; the number of others in between is negative binomial.
    """
    if family.kind == "bits":
        return np.sort(_bits_times(rng, family, trials))
    if family.kind == "named":
        needed = np.ones((trials, family.contexts), dtype=np.int64)
    else:
        needed = _visits_to_eliminate(rng, family, trials)
    visits = _draws_to_cover(rng, needed)
    return np.sort(visits + rng.negative_binomial(visits, family.teaching))


def _bits_times(rng: np.random.Generator, family: Family, trials: int) -> Integers:
    """Suboptimal subsets survive while half the checks or more are unseen: wait for new ones, one after another."""
    checks = family.contexts * family.bits
    chances = [(checks - seen) / checks * family.teaching for seen in range(checks // 2 + 1)]
    return np.sum([rng.geometric(chance, trials) for chance in chances], axis=0)


def _visits_to_eliminate(rng: np.random.Generator, family: Family, trials: int) -> Integers:
    """[trials, contexts]: visits until the last bad option has failed; the largest of geometric(1/2) numbers."""
    uniform = rng.random((trials, family.contexts)) ** (1 / (family.per_context - 1))
    return np.maximum(1, np.ceil(-np.log2(-np.expm1(np.log(uniform))))).astype(np.int64)


def _draws_to_cover(rng: np.random.Generator, needed: Integers) -> Integers:
    """[trials]: uniform draws of contexts until each has been met as often as `needed` [trials, contexts]."""
    trials, contexts = needed.shape
    met, draws = np.zeros_like(needed), np.zeros(trials, dtype=np.int64)
    open_trials = np.arange(trials)
    while open_trials.size:
        met[open_trials, rng.integers(contexts, size=open_trials.size)] += 1
        draws[open_trials] += 1
        open_trials = open_trials[(met[open_trials] < needed[open_trials]).any(1)]
    return draws


def required(times: Integers, delta: float) -> int:
    """The smallest n with success in a share of at least 1 - delta of the sorted `times`."""
    return int(times[math.ceil((1 - delta) * len(times)) - 1])


def resampled(rng: np.random.Generator, times: Integers, delta: float, count: int) -> Integers:
    """[count] bootstrap replicates of `required`: how many times lie below a quantile is binomial."""
    ranks = len(times) - rng.binomial(len(times), delta, count) - 1
    return times[np.clip(ranks, 0, len(times) - 1)]


def grid(kind: Kind, factor: Factor) -> list[tuple[float, Family]]:
    """Families of a kind that differ in one factor alone, with the factor's value."""
    middle = Family(kind, contexts=4, per_context=256, sigma=0.005, delta=0.05)
    if factor == "subset_size":
        options = 1 << 16
        chosen = [replace(middle, contexts=k, per_context=options // k) for k in (1, 2, 4, 8, 16, 32)]
        return [(family.contexts, family) for family in chosen]
    if factor == "log_options":
        chosen = [replace(middle, per_context=1 << bits) for bits in (2, 4, 6, 8, 12, 16, 20)]
        return [(math.log(family.options), family) for family in chosen]
    if factor == "inverse_sigma":
        chosen = [replace(middle, sigma=sigma) for sigma in (0.1, 0.05, 0.02, 0.01, 0.005, 0.002)]
        return [(1 / family.sigma, family) for family in chosen]
    chosen = [replace(middle, delta=delta) for delta in (0.3, 0.1, 0.03, 0.01, 0.003)]
    return [(math.log(1 / family.delta), family) for family in chosen]


def measure(
    rng: np.random.Generator, kind: Kind, factor: Factor, trials: int
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Points along a grid and the exponents fitted to them, with 95 % bootstrap intervals."""
    points, replicates = [], []
    for x, family in grid(kind, factor):
        times = success_times(rng, family, trials)
        spread = resampled(rng, times, family.delta, 1000)
        replicates.append(spread)
        low, high = np.quantile(spread, [0.025, 0.975])
        points.append(
            {
                "x": x,
                "options": family.options,
                "subset_size": family.contexts,
                "sigma": family.sigma,
                "delta": family.delta,
                "required": required(times, family.delta),
                "required_low": float(low),
                "required_high": float(high),
                "bound": family.bound(),
                "sharper_bound": family.sharper_bound(),
                "failure_rate_at_bound": float(np.mean(times > family.bound())),
            }
        )
    places = [point["x"] for point in points]
    low, high = np.quantile(exponent(places, np.stack(replicates, -1)), [0.025, 0.975])
    slopes = {
        "exponent": float(exponent(places, np.array([point["required"] for point in points]))),
        "exponent_low": float(low),
        "exponent_high": float(high),
        "bound_exponent": float(exponent(places, np.array([point["bound"] for point in points]))),
        "sharper_bound_exponent": float(exponent(places, np.array([point["sharper_bound"] for point in points]))),
    }
    return points, slopes


@dataclass(frozen=True, slots=True)
class LossTable:
    """Delta(M, Z') of every subset of one size: `losses` [tasks, subsets], over tasks with probabilities `law`."""

    losses: Array
    law: Array
    options: int
    subset_size: int

    def suboptimality(self, epsilon: float) -> Array:
        """[subsets]: Pr_M[Delta > epsilon]."""
        return self.law @ (self.losses > epsilon)

    def success_times(self, rng: np.random.Generator, epsilon: float, sigma: float, trials: int, most: int) -> Integers:
        """[trials], sorted: demonstrations until no (eps, sigma)-suboptimal subset is left; `most` + 1 if more."""
        bad = (self.losses > epsilon)[:, self.suboptimality(epsilon) >= sigma * (1 - 1e-9)]
        draws = rng.choice(len(self.law), (trials, most), p=self.law)
        first = np.full((trials, len(self.law)), most + 1)
        for task in range(len(self.law)):
            seen = draws == task
            first[:, task] = np.where(seen.any(1), seen.argmax(1) + 1, most + 1)
        pruned_at = np.stack([first[:, fails].min(1) for fails in bad.T], 1) if bad.size else np.zeros((trials, 1), int)
        return np.sort(pruned_at.max(1))


def loss_table(tasks: Sequence[MDP], law: Array, options: Sequence[Option], size: int) -> LossTable:
    """Delta of all subsets with `size` options by exact planning: C(|Z|, size) times len(tasks) small MDPs."""
    subsets = list(itertools.combinations(range(len(options)), size))
    losses = np.empty((len(tasks), len(subsets)))
    for row, task in zip(losses, tasks, strict=True):
        model = option_model(task, options)
        best = task.start @ optimum(model)[0]
        row[:] = [best - task.start @ optimum(model.restricted(subset))[0] for subset in subsets]
    return LossTable(losses, law, len(options), size)


def bits_tasks(contexts: int, bits: int, sigma: float, steps: int = 2) -> tuple[list[MDP], Array, list[Option]]:
    """The family `bits` as MDPs: tasks (the last accepts everything), their law, and options that last `steps` steps.

    State `context * steps + t` is step t of a context, the last state is the end. Primitive action (context, string)
    earns 1 / steps at each step of its context if the checked bit of the string is 0, which is the good string's.
    """
    strings = 1 << bits
    actions, end = contexts * strings, contexts * steps
    transitions = np.zeros((end + 1, actions, end + 1))
    transitions[end, :, end] = 1
    for state in range(end):
        transitions[state, :, end if state % steps == steps - 1 else state + 1] = 1
    tasks = []
    for context, bit in itertools.product(range(contexts), range(bits)):
        rewards, start = np.zeros((end + 1, actions)), np.zeros(end + 1)
        good = [context * strings + string for string in range(strings) if not string >> bit & 1]
        rewards[context * steps : (context + 1) * steps, good] = 1 / steps
        start[context * steps] = 1
        tasks.append(MDP(transitions, rewards, start, 0.95))
    everything = np.ones_like(tasks[0].rewards) / steps
    everything[end] = 0
    tasks.append(replace(tasks[0], rewards=everything))
    law = np.append(np.full(len(tasks) - 1, 2 * sigma / (len(tasks) - 1)), 1 - 2 * sigma)
    running = np.zeros(end + 1)
    options = [Option(np.tile(np.eye(actions)[action], (end + 1, 1)), running, steps) for action in range(actions)]
    return tasks, law, options


def random_table(rng: np.random.Generator) -> tuple[LossTable, float, float]:
    """Losses of random tasks with random options, an eps, and the sigma below which every subset is eps-optimal.

    eps is drawn between the losses; |Z_eps| is the smallest size with an eps-optimal subset. Problems that leave
    nothing to prune, or a sigma under 0.005, are drawn again.
    """
    states, actions, count = 5, 3, int(rng.integers(5, 8))
    options = random_options(rng, states, actions, count)
    tasks = [random_mdp(rng, states, actions, 0.9) for _ in range(int(rng.integers(4, 13)))]
    law = rng.dirichlet(np.ones(len(tasks)))
    epsilon = 0.0
    for size in range(1, count):
        table = loss_table(tasks, law, options, size)
        epsilon = epsilon or float(np.quantile(table.losses.max(0), rng.uniform(0.05, 0.5)) * rng.uniform(0.2, 1.0))
        misses = table.suboptimality(epsilon)
        sigma = float(misses[misses > 0].min(initial=1.0))
        if misses.min() == 0 and misses.max() > 0 and sigma > 0.005:
            return table, epsilon, sigma
    return random_table(rng)


def check_random(rng: np.random.Generator, delta: float, trials: int) -> dict[str, float]:
    """One random problem: the bound, what was required, and how often pruning failed at the bound."""
    table, epsilon, sigma = random_table(rng)
    enough = bound(table.options, table.subset_size, sigma, delta)
    times = table.success_times(rng, epsilon, sigma, trials, enough)
    return {
        "options": table.options,
        "subset_size": table.subset_size,
        "sigma": sigma,
        "bound": enough,
        "required": required(times, delta),
        "failure_rate_at_bound": float(np.mean(times > enough)),
    }
