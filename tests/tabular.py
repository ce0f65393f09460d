"""A sticky-latent model small enough to enumerate: the ground truth of the E-step (algorithm.md 2, 3), in float64.

T lines and K latents; state K means "no rationale yet". `act` keeps the state, `think` draws a new latent. Everything
is written from the definitions and uses none of the package, so that a mistake there cannot repeat itself here.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Model:
    """log pi(a_t | z) of the expert's lines as `emission` [T, K+1] in nats, and `penalty` c in nats per think."""

    emission: Tensor
    penalty: float

    @property
    def lines(self) -> int:
        return self.emission.shape[0]

    @property
    def latents(self) -> int:
        return self.emission.shape[1] - 1

    @property
    def act_value(self) -> float:
        """J of never thinking."""
        return float(self.emission[:, self.latents].sum())


@dataclass(frozen=True)
class Policy:
    """Causal policy: logits of thinking [..., T, K+1] and of the new latent [..., T, K+1, K], by the current latent.

    Leading dimensions are copies, which give every group of rollouts a gradient of its own.
    """

    gate: Tensor
    content: Tensor

    def copies(self, count: int) -> Policy:
        """`count` equal copies as leaves that take gradients."""
        return Policy(*(item.detach().expand(count, *item.shape).clone().requires_grad_() for item in self.tensors))

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.gate, self.content


@dataclass(frozen=True)
class Paths:
    """Latents [..., T] before and after each gate, and whether it thought."""

    before: Tensor
    after: Tensor
    thought: Tensor

    @classmethod
    def of(cls, choices: Tensor, latents: int) -> Paths:
        """From choices [..., T]: the new latent, or `latents` for act."""
        state = torch.full_like(choices[..., 0], latents)
        before, after = [], []
        for choice in choices.unbind(-1):
            before.append(state)
            state = torch.where(choice < latents, choice, state)
            after.append(state)
        return cls(torch.stack(before, -1), torch.stack(after, -1), choices < latents)

    def __getitem__(self, index: Tensor) -> Paths:
        return Paths(self.before[index], self.after[index], self.thought[index])


def random_model(seed: int, *, lines: int = 4, latents: int = 3, penalty: float = 0.3) -> Model:
    generator = torch.Generator().manual_seed(seed)
    emission = -3.0 * torch.rand(lines, latents + 1, dtype=torch.float64, generator=generator)
    return Model(emission, penalty)


def random_policy(model: Model, seed: int, *, scale: float = 0.7) -> Policy:
    generator = torch.Generator().manual_seed(1000 + seed)
    shape = (model.lines, model.latents + 1)
    return Policy(
        scale * torch.randn(shape, dtype=torch.float64, generator=generator),
        scale * torch.randn(*shape, model.latents, dtype=torch.float64, generator=generator),
    )


def all_paths(model: Model) -> Paths:
    """Every sequence of decisions, [(K+1)^T, T]."""
    choices = itertools.product(range(model.latents + 1), repeat=model.lines)
    return Paths.of(torch.tensor(list(choices)), model.latents)


def sample_paths(policy: Policy, shape: tuple[int, ...], generator: torch.Generator, exploration: float = 0.0) -> Paths:
    """Paths [*shape, T] drawn from the policy, its gate mixed with a coin."""
    lines, latents = policy.content.shape[0], policy.content.shape[2]
    think = (1 - exploration) * torch.sigmoid(policy.gate) + exploration / 2
    content = torch.softmax(policy.content, -1)
    state = torch.full(shape, latents)
    choices = []
    for t in range(lines):
        thinks = torch.rand(shape, dtype=torch.float64, generator=generator) < think[t][state]
        drawn = torch.multinomial(content[t][state.flatten()], 1, generator=generator).view(shape)
        choices.append(torch.where(thinks, drawn, latents))
        state = torch.where(thinks, drawn, state)
    return Paths.of(torch.stack(choices, -1), latents)


def decision_logprobs(policy: Policy, paths: Paths) -> tuple[Tensor, Tensor]:
    """log q of each gate's choice and of each new latent (0 where none was drawn), both [..., T]."""
    sign = torch.where(paths.thought, 1.0, -1.0)
    gate = torch.nn.functional.logsigmoid(sign * _pick(policy.gate, paths.before))
    content = torch.log_softmax(policy.content, -1).flatten(-2)
    drawn = paths.before * policy.content.shape[-1] + torch.where(paths.thought, paths.after, 0)
    return gate, torch.where(paths.thought, _pick(content, drawn), 0.0)


def line_logprobs(model: Model, paths: Paths) -> Tensor:
    """log pi(a_t | z_t), [..., T]."""
    return _pick(model.emission, paths.after)


def line_values(model: Model, paths: Paths) -> Tensor:
    """log pi(a_t | z_t) - c 1{think}, [..., T]."""
    return line_logprobs(model, paths) - model.penalty * paths.thought.double()


def step_logprobs(policy: Policy, paths: Paths, exploration: float = 0.0) -> Tensor:
    """log-prob of everything decided before each line, [..., T], the gate mixed with a coin."""
    gate, content = decision_logprobs(policy, paths)
    return torch.log((1 - exploration) * torch.exp(gate) + exploration / 2) + content


def sticky(model: Model, keep: float, new: Tensor) -> Policy:
    """The sticky prior, a policy too: keeps with probability alpha' = `keep`, else draws from `new` [..., K]."""
    shape = model.emission.shape
    gate = torch.full(shape, math.log1p(-keep) - math.log(keep), dtype=torch.float64)
    return Policy(gate, torch.log(new).expand(*shape, model.latents))


def charges(policy: Policy, prior: Policy, exploration: float = 0.0) -> Tensor:
    """KL_Bern(rho ‖ 1 - alpha') + rho KL(q~ ‖ p_new) at every gate, [T, K+1] (algorithm.md 2).

    Where gates explore, a new latent is paid for as often as one is drawn: the last rho becomes (1-eps) rho + eps/2.
    """
    act, think = torch.sigmoid(-policy.gate), torch.sigmoid(policy.gate)
    log_act, log_think = (torch.nn.functional.logsigmoid(sign * policy.gate) for sign in (-1, 1))
    prior_act, prior_think = (torch.nn.functional.logsigmoid(sign * prior.gate) for sign in (-1, 1))
    content, new = torch.log_softmax(policy.content, -1), torch.log_softmax(prior.content, -1)
    gate = think * (log_think - prior_think) + act * (log_act - prior_act)
    drawn = (1 - exploration) * think + exploration / 2
    return gate + drawn * (torch.exp(content) * (content - new)).sum(-1)


def line_terms(model: Model, policy: Policy, paths: Paths, prior: Policy | None, exploration: float = 0.0) -> Tensor:
    """What J adds per line, [..., T]: minus c per thought, or with a prior minus the KL to it."""
    if prior is None:
        return line_values(model, paths)
    return line_logprobs(model, paths) - _pick(charges(policy, prior, exploration), paths.before)


def value(model: Model, policy: Policy, exploration: float = 0.0, prior: Policy | None = None) -> Tensor:
    """J(q) = E_q sum_t [log pi(a_t|z_t) - c 1{think}], or with a prior the ELBO: a sum over every path.

    With `exploration` the paths are those of the exploring policy.
    """
    paths = all_paths(model)
    probability = torch.exp(step_logprobs(policy, paths, exploration).sum(-1))
    return (probability * line_terms(model, policy, paths, prior, exploration).sum(-1)).sum()


def credited_value(
    model: Model,
    policy: Policy,
    *,
    horizon: int = 99,
    discount: float = 1.0,
    exploration: float = 0.0,
    prior: Policy | None = None,
) -> Tensor:
    """Surrogate whose gradient is the truncated-credit gradient: sum_t E sum_{k=t}^{t+H-1} gamma^(k-t) r_k.

    In the t-th expectation only line t follows `policy`; the others follow a copy of it held fixed.
    """
    paths = all_paths(model)
    steps = step_logprobs(policy, paths, exploration)
    rewards = line_terms(model, policy, paths, prior, exploration)
    total = torch.zeros((), dtype=torch.float64)
    for t in range(model.lines):
        is_t = torch.arange(model.lines) == t
        only_t = torch.where(is_t, steps, steps.detach())
        window = torch.where(is_t, rewards, rewards.detach())[:, t : t + horizon]
        credit = window @ discount ** torch.arange(window.shape[1], dtype=torch.float64)
        total = total + (torch.exp(only_t.sum(-1)) * credit).sum()
    return total


def weighted_value(model: Model, policy: Policy, behaviour: Policy, exploration: float = 0.0) -> Tensor:
    """Surrogate whose gradient one importance weight per decision has, on paths of an exploring `behaviour`.

    The sum over decisions, gates and new latents apart, of E sum_{k>=t} r_k, in which that decision alone follows
    `policy`.
    """
    paths = all_paths(model)
    gate, content = (item.detach() for item in decision_logprobs(behaviour, paths))
    gate = torch.log((1 - exploration) * torch.exp(gate) + exploration / 2)
    drawn = (gate + content).sum(-1, keepdim=True)
    credit = line_values(model, paths).flip(-1).cumsum(-1).flip(-1)
    own = zip(decision_logprobs(policy, paths), (gate, content), strict=True)
    return sum(((torch.exp(drawn + new - old) * credit).sum() for new, old in own), torch.zeros(()))


def value_by_recursion(model: Model, policy: Policy, prior: Policy | None = None) -> Tensor:
    """J(q) once more, by V_t(z') = sum over decisions, backwards over lines."""
    after = torch.zeros(model.latents + 1, dtype=torch.float64)
    think, content = torch.sigmoid(policy.gate), torch.softmax(policy.content, -1)
    cost = model.penalty * think if prior is None else charges(policy, prior)
    for t in reversed(range(model.lines)):
        stay = model.emission[t] + after
        after = (1 - think[t]) * stay + think[t] * (content[t] @ stay[: model.latents]) - cost[t]
    return after[model.latents]


def viterbi(model: Model) -> tuple[float, Tensor]:
    """Maximum of J and the gains [T, K+1] of the best new latent over keeping, before the cost c (algorithm.md 2)."""
    after = torch.zeros(model.latents + 1, dtype=torch.float64)
    gains = []
    for t in reversed(range(model.lines)):
        stay = model.emission[t] + after
        gains.append(stay[: model.latents].max() - stay)
        after = torch.maximum(stay, stay[: model.latents].max() - model.penalty)
    return float(after[model.latents]), torch.stack(gains[::-1])


def posterior(model: Model, prior: Policy) -> tuple[float, Policy]:
    """log p(a | no rationale yet) and the exact law of decisions given all lines (algorithm.md 2).

    V_t(z') = log[alpha' e^(l_t + V_{t+1})(z') + (1 - alpha') sum_z p_new(z) e^(l_t + V_{t+1})(z)], the best J there is.
    """
    after = torch.zeros(model.latents + 1, dtype=torch.float64)
    gates: list[Tensor] = []
    contents: list[Tensor] = []
    for t in reversed(range(model.lines)):
        stay = model.emission[t] + after
        joint = torch.log_softmax(prior.content[t], -1) + stay[: model.latents]
        think = torch.nn.functional.logsigmoid(prior.gate[t]) + torch.logsumexp(joint, -1)
        keep = torch.nn.functional.logsigmoid(-prior.gate[t]) + stay
        gates.insert(0, think - keep)
        contents.insert(0, joint)
        after = torch.logaddexp(think, keep)
    return float(after[model.latents]), Policy(torch.stack(gates), torch.stack(contents))


def visits(policy: Policy) -> tuple[Tensor, Tensor]:
    """Probability of each latent before every gate, [T, K+1], and of each thought there, [T, K+1, K]."""
    lines, latents = policy.content.shape[0], policy.content.shape[2]
    steps = transitions(policy)
    before = [torch.nn.functional.one_hot(torch.tensor(latents), latents + 1).double()]
    for t in range(lines - 1):
        before.append(before[t] @ steps[t])
    stacked = torch.stack(before)
    think = stacked * torch.sigmoid(policy.gate)
    return stacked, think.unsqueeze(-1) * torch.softmax(policy.content, -1)


def sticky_prior(latents: int, alpha: float) -> Tensor:
    """p(z | z') = alpha delta(z = z') + (1 - alpha) / K over the K latents, [K+1, K+1], row z'."""
    prior = alpha * torch.eye(latents + 1, dtype=torch.float64)
    prior[:, :latents] += (1 - alpha) / latents
    return prior


def transitions(policy: Policy) -> Tensor:
    """q(z | z') of a policy whose new latent may also be the old one, [T, K+1, K+1]."""
    think, content = torch.sigmoid(policy.gate), torch.softmax(policy.content, -1)
    kept = torch.diag_embed(1 - think)
    return kept + torch.nn.functional.pad(think.unsqueeze(-1) * content, (0, 1))


def forward_backward(model: Model, prior: Tensor) -> tuple[float, Tensor, Tensor]:
    """log p(a | no latent yet), posterior q(z_t | z_{t-1}, a_{t:}) [T, K+1, K+1], and V [T+1, K+1] (algorithm.md 2)."""
    values = [torch.zeros(model.latents + 1, dtype=torch.float64)]
    posterior: list[Tensor] = []
    for t in reversed(range(model.lines)):
        joint = torch.log(prior) + model.emission[t] + values[0]
        values.insert(0, torch.logsumexp(joint, -1))
        posterior.insert(0, torch.exp(joint - values[0].unsqueeze(-1)))
    return float(values[0][model.latents]), torch.stack(posterior), torch.stack(values)


def state_sequences(model: Model) -> Tensor:
    """Every sequence of T states, led by "no rationale yet": [(K+1)^T, T+1]."""
    tails = torch.tensor(list(itertools.product(range(model.latents + 1), repeat=model.lines)))
    return torch.nn.functional.pad(tails, (1, 0), value=model.latents)


def probabilities(sequences: Tensor, steps: Tensor) -> Tensor:
    """Probability [P] of state sequences [P, T+1] under transitions [T, K+1, K+1]."""
    return steps[torch.arange(steps.shape[0]), sequences[:, :-1], sequences[:, 1:]].prod(-1)


def log_marginal(model: Model, prior: Tensor) -> float:
    """log p(a) as a sum over every state sequence."""
    sequences = state_sequences(model)
    joint = probabilities(sequences, prior.expand(model.lines, -1, -1)) * torch.exp(
        _pick(model.emission, sequences[:, 1:]).sum(-1)
    )
    return float(torch.log(joint.sum()))


def divergence(q: Tensor, p: Tensor) -> Tensor:
    """KL(q ‖ p) over the last axis."""
    return torch.where(q > 0, q * (torch.log(q) - torch.log(p)), 0.0).sum(-1)


def elbo(model: Model, q: Tensor, prior: Tensor) -> float:
    """E_q sum_t [log pi(a_t|z_t) - KL(q(.|z') ‖ p(.|z'))] over every state sequence, for q [T, K+1, K+1]."""
    sequences = state_sequences(model)
    kl = _pick(divergence(q, prior), sequences[:, :-1])
    bound = (_pick(model.emission, sequences[:, 1:]) - kl).sum(-1)
    return float((probabilities(sequences, q) * bound).sum())


def _pick(table: Tensor, index: Tensor) -> Tensor:
    """table[..., t, index[..., t]]: one entry of the last axis of [..., T, n] per index [..., T]."""
    return table.expand(*index.shape, table.shape[-1]).gather(-1, index.unsqueeze(-1)).squeeze(-1)
