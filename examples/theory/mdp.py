"""Tabular MDPs with options: the small worlds in which the theory of algorithm.md section 10 can be computed exactly.

An action abstraction z is an option: a policy over primitive actions that runs until it terminates after a random
number tau of steps. Everything section 10 says about a set Z of them depends on two tables only,

    R(s, z) = E[ sum_{t<tau} gamma^t r_t ]      P(s, z, s') = E[ gamma^tau 1{s_tau = s'} ]

so that V*_Z(s) = max_{z in Z} R(s, z) + sum_s' P(s, z, s') V*_Z(s') and the row sums of P are E[gamma^tau].
`flat_value` does without these tables, one primitive step after another, so that a mistake in them cannot hide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class MDP:
    """`transitions` [S, A, S] (rows sum to 1), `rewards` [S, A] per step, `start` [S], `discount` in (0, 1)."""

    transitions: Array
    rewards: Array
    start: Array
    discount: float


@dataclass(frozen=True, slots=True)
class Option:
    """`policy` [S, A]; ends with probability `termination[s]` on arriving in s, and in any case after `max_steps`."""

    policy: Array
    termination: Array
    max_steps: int | None = None

    def stop_probability(self, steps: int) -> Array:
        """[S]: probability to end on arrival after `steps` steps."""
        return np.ones_like(self.termination) if steps == self.max_steps else self.termination


@dataclass(frozen=True, slots=True)
class OptionModel:
    """`rewards` [S, Z] and discounted `transitions` [S, Z, S] of options, each as defined above."""

    rewards: Array
    transitions: Array

    def restricted(self, subset: Sequence[int]) -> OptionModel:
        """The model of a pruned set: the options of these indices, in this order."""
        chosen = list(subset)
        return OptionModel(self.rewards[:, chosen], self.transitions[:, chosen])

    def action_values(self, values: Array) -> Array:
        """Q [S, Z] of one option followed by `values` [S]."""
        return self.rewards + self.transitions @ values

    def contraction(self) -> float:
        """gamma-bar, the largest E[gamma^tau] over states and options."""
        return float(self.transitions.sum(-1).max())


def option_model(mdp: MDP, options: Sequence[Option]) -> OptionModel:
    """Exact R and P of `options` in `mdp`; every option must have a cap or an ending it cannot avoid."""
    columns = [_one_option(mdp, option) for option in options]
    return OptionModel(np.stack([reward for reward, _ in columns], 1), np.stack([ends for _, ends in columns], 1))


def _one_option(mdp: MDP, option: Option) -> tuple[Array, Array]:
    rewards, steps = _under(mdp, option)
    size = len(rewards)
    if option.max_steps is None:
        going_on = np.eye(size) - mdp.discount * steps * (1 - option.termination)
        ending = mdp.discount * steps * option.termination
        return np.linalg.solve(going_on, rewards), np.linalg.solve(going_on, ending)
    running, earned, ended = np.eye(size), np.zeros(size), np.zeros((size, size))
    for step in range(1, option.max_steps + 1):
        earned += running @ rewards
        arrived = mdp.discount * running @ steps
        stop = option.stop_probability(step)
        ended += arrived * stop
        running = arrived * (1 - stop)
    return earned, ended


def _under(mdp: MDP, option: Option) -> tuple[Array, Array]:
    """Expected reward [S] and transition [S, S] of one primitive step of an option."""
    rewards: Array = (option.policy * mdp.rewards).sum(1)
    steps: Array = np.einsum("sa,sat->st", option.policy, mdp.transitions)
    return rewards, steps


def policy_value(model: OptionModel, policy: Array) -> Array:
    """V [S] of a policy over options [S, Z]."""
    rewards = (policy * model.rewards).sum(1)
    return np.linalg.solve(np.eye(len(rewards)) - np.einsum("sz,szt->st", policy, model.transitions), rewards)


def occupancy(model: OptionModel, policy: Array, start: Array) -> Array:
    """[S]: discounted number of decisions that a policy over options [S, Z] takes in each state."""
    follow = np.einsum("sz,szt->st", policy, model.transitions)
    return np.linalg.solve(np.eye(len(start)) - follow.T, start)


def greedy(model: OptionModel, values: Array) -> Array:
    """[S, Z]: the deterministic policy that is greedy with respect to `values` [S]."""
    return np.eye(model.rewards.shape[1])[model.action_values(values).argmax(1)]


def optimum(model: OptionModel) -> tuple[Array, Array]:
    """V* [S] and an optimal policy [S, Z], by policy iteration: exact up to the rounding of one linear system."""
    policy = greedy(model, np.zeros(len(model.rewards)))
    while True:
        values = policy_value(model, policy)
        scores = model.action_values(values)
        gain = scores.max(1) - (policy * scores).sum(1)
        if gain.max() <= 1e-12 * max(1.0, float(np.abs(values).max())):
            return values, policy
        policy = np.where((gain > 0)[:, None], greedy(model, values), policy)


def value_iteration(model: OptionModel, iterations: int) -> Array:
    """V_n [S] from V_0 = 0."""
    values = np.zeros(len(model.rewards))
    for _ in range(iterations):
        values = model.action_values(values).max(1)
    return values


def flat_value(mdp: MDP, options: Sequence[Option], policy: Array) -> Array:
    """V [S] of a policy over options [S, Z], from the chain of primitive steps over (state, option, steps run).

    One linear system in the values U(s, z, n) of being in s when option z has run for n steps:
    U(s, z, n) = r_z(s) + gamma sum_s' P_z(s, s') [stop V(s') + (1 - stop) U(s', z, n + 1)], and V(s) is the mean of
    U(s, z, 0) under the policy. Uncapped options do not count their steps.
    """
    size = len(policy)
    offsets = np.cumsum([0, *(size * (option.max_steps or 1) for option in options)])
    system, constant = np.eye(offsets[-1]), np.zeros(offsets[-1])
    decide = np.zeros((size, offsets[-1]))
    for index, offset in enumerate(offsets[:-1]):
        decide[np.arange(size), offset + np.arange(size)] = policy[:, index]
    for option, offset in zip(options, offsets[:-1], strict=True):
        rewards, steps = _under(mdp, option)
        for count in range(option.max_steps or 1):
            here = slice(offset + count * size, offset + (count + 1) * size)
            after = here if option.max_steps is None else slice(here.stop, here.stop + size)
            stop = option.stop_probability(count + 1)
            constant[here] = rewards
            system[here] -= mdp.discount * (steps * stop) @ decide
            if (stop < 1).any():
                system[here, after] -= mdp.discount * steps * (1 - stop)
    return decide @ np.linalg.solve(system, constant)


def random_mdp(rng: np.random.Generator, states: int, actions: int, discount: float, successors: int = 3) -> MDP:
    """Each action leads to `successors` random states; rewards are uniform in [0, 1]; starts anywhere."""
    transitions = np.zeros((states, actions, states))
    for row in transitions.reshape(-1, states):
        row[rng.choice(states, successors, replace=False)] = rng.dirichlet(np.ones(successors))
    return MDP(transitions, rng.random((states, actions)), rng.dirichlet(np.ones(states)), discount)


def random_options(rng: np.random.Generator, states: int, actions: int, count: int) -> list[Option]:
    """Random policies, half of them with random endings and no cap, half with a cap of one to four steps."""
    options = []
    for index in range(count):
        cap = int(rng.integers(1, 5)) if index % 2 else None
        termination = rng.uniform(0.1, 0.9, states) if index % 4 < 3 else np.zeros(states)
        options.append(Option(rng.dirichlet(np.full(actions, 0.5), states), termination, cap))
    return options
