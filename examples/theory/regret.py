"""T1 (algorithm.md section 10): what mid-training and RL each lose adds up to the regret, exactly.

Mid-training prunes the options Z to a subset, RL finds a policy pi that uses the subset only, and over tasks M ~ p

    E_M[ V*_Z - V^pi ]  =  E_M[ V*_Z - V*_subset ]  +  E_M[ V*_subset - V^pi ]        (all at the start state)
         regret                 pruning error               RL error

Written like this it is a telescoping sum that no measurement could break. So each term is computed on its own way: the
regret from flat chains of primitive steps, the two errors from option models by the performance-difference lemma,
V*_B - V^pi = sum_s d_pi(s) (V*_B(s) - Q*_B(s, pi)), each with the advantages of its own set B. An error in an option
model, a discount, an occupancy or an optimum then breaks the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mdp import (
    MDP,
    Array,
    Option,
    OptionModel,
    flat_value,
    greedy,
    occupancy,
    optimum,
    option_model,
    random_mdp,
    random_options,
    value_iteration,
)

from megatron_ra3.report.experiments import Estimate


@dataclass(frozen=True, slots=True)
class Terms:
    """The three terms of the identity, in units of return, averaged over tasks."""

    regret: float
    pruning_error: float
    rl_error: float

    @property
    def residual(self) -> float:
        """Absolute violation of the identity."""
        return abs(self.regret - self.pruning_error - self.rl_error)


def shortfall(model: OptionModel, policy: Array, start: Array) -> float:
    """V* - V^policy at `start` within the options of `model`, by the performance-difference lemma."""
    values, _ = optimum(model)
    advantages = (policy * model.action_values(values)).sum(1) - values
    return float(-occupancy(model, policy, start) @ advantages)


def widened(policy: Array, subset: Sequence[int], options: int) -> Array:
    """A policy over a subset [S, len(subset)] as one over all options [S, Z]."""
    wide = np.zeros((len(policy), options))
    wide[:, list(subset)] = policy
    return wide


def terms(
    tasks: Sequence[MDP], law: Array, options: Sequence[Option], subset: Sequence[int], policies: Sequence[Array]
) -> Terms:
    """The terms over tasks with probabilities `law`; `policies` [S, len(subset)] were learned, one per task."""
    sums = np.zeros(3)
    for task, probability, policy in zip(tasks, law, policies, strict=True):
        model = option_model(task, options)
        pruned = model.restricted(subset)
        _, best = optimum(model)
        _, best_pruned = optimum(pruned)
        learned = widened(policy, subset, len(options))
        sums += probability * np.array(
            [
                task.start @ (flat_value(task, options, best) - flat_value(task, options, learned)),
                shortfall(model, widened(best_pruned, subset, len(options)), task.start),
                shortfall(pruned, policy, task.start),
            ]
        )
    return Terms(*(float(value) for value in sums))


def random_instance(rng: np.random.Generator) -> Terms:
    """The terms of a random problem: 3 tasks, 3 to 6 options and a random subset, and a half-trained random policy."""
    states, actions = int(rng.integers(4, 8)), int(rng.integers(2, 5))
    options = random_options(rng, states, actions, int(rng.integers(3, 7)))
    tasks = [random_mdp(rng, states, actions, rng.uniform(0.7, 0.95)) for _ in range(3)]
    size = int(rng.integers(1, len(options) + 1))
    subset = [int(index) for index in rng.choice(len(options), size, replace=False)]
    policies = []
    for task in tasks:
        pruned = option_model(task, options).restricted(subset)
        trained = greedy(pruned, value_iteration(pruned, int(rng.integers(0, 4))))
        noise = rng.random()
        policies.append((1 - noise) * trained + noise * rng.dirichlet(np.ones(size), states))
    return terms(tasks, rng.dirichlet(np.ones(3)), options, subset, policies)


def useful_order(models: Sequence[OptionModel], starts: Sequence[Array], law: Array) -> list[int]:
    """All options, most useful first: each next one leaves the least pruning error over the tasks."""
    chosen: list[int] = []
    rest = list(range(models[0].rewards.shape[1]))
    while rest:
        values = [
            sum(
                weight * float(start @ optimum(model.restricted([*chosen, index]))[0])
                for model, start, weight in zip(models, starts, law, strict=True)
            )
            for index in rest
        ]
        chosen.append(rest.pop(int(np.argmax(values))))
    return chosen


def q_learning(rng: np.random.Generator, model: OptionModel, steps: int, learners: int) -> Array:
    """Greedy policies [learners, S, Z] of independent learners after `steps` options each, begun in random states.

    The transition is drawn from the discounted model, whose missing mass ends the episode, so targets need no discount.
    """
    states, count = model.rewards.shape
    row = np.arange(learners)
    scores, visits = np.zeros((learners, states, count)), np.zeros((learners, states, count))
    cumulative = model.transitions.cumsum(-1)
    for _ in range(steps):
        state, option = rng.integers(states, size=learners), rng.integers(count, size=learners)
        after = (rng.random(learners)[:, None] > cumulative[state, option]).sum(1)
        value = np.append(scores.max(-1), np.zeros((learners, 1)), 1)[row, after]
        visits[row, state, option] += 1
        rate = visits[row, state, option] ** -0.6
        scores[row, state, option] += rate * (model.rewards[state, option] + value - scores[row, state, option])
    return np.eye(count)[scores.argmax(-1)]


def trade_off(rng: np.random.Generator, *, steps: int, learners: int) -> list[dict[str, float]]:
    """Mean terms against the size of the subset, when RL has the same budget of `steps` options for every size.

    Eight tasks share dynamics and 12 options and differ in rewards; subsets are nested, most useful options first.
    """
    states, actions, tasks_count = 10, 4, 8
    shared = random_mdp(rng, states, actions, 0.9)
    options = random_options(rng, states, actions, 12)
    tasks = [
        MDP(shared.transitions, rng.random((states, actions)) ** 3, shared.start, shared.discount)
        for _ in range(tasks_count)
    ]
    models = [option_model(task, options) for task in tasks]
    law = np.full(tasks_count, 1 / tasks_count)
    order = useful_order(models, [task.start for task in tasks], law)
    rows = []
    for size in range(1, len(order) + 1):
        subset = order[:size]
        learned = [q_learning(rng, model.restricted(subset), steps, learners) for model in models]
        samples = [terms(tasks, law, options, subset, [runs[k] for runs in learned]) for k in range(learners)]
        errors = np.array([sample.rl_error for sample in samples])
        rows.append(
            {
                "options": size,
                "regret": float(np.mean([sample.regret for sample in samples])),
                "pruning_error": samples[0].pruning_error,
                "rl_error": float(errors.mean()),
                "rl_error_half_width": Estimate.of(errors.tolist()).half_width,
                "residual": max(sample.residual for sample in samples),
            }
        )
    return rows
