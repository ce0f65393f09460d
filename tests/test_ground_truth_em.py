"""EM with exact steps on the tabular model: the bound rises in every half of every round (algorithm.md 2, 5).

E: the posterior for the sticky KL, Viterbi's path for the fixed penalty. M: re-estimation from expected counts, which
is where the M-step's next-token loss has no gradient left. Wrong counts must break the rise.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_ra3 import objective
from tests import tabular
from tests.tabular import Model, Paths, Policy

SYMBOLS, LATENTS, LINES, SEQUENCES, ROUNDS = 4, 2, 5, 6, 20
STARTS = range(5)


@dataclass(frozen=True)
class Parameters:
    """pi(a | z) as `emission` [K+1, A], alpha' and p_new [K]: what the M-step estimates."""

    emission: Tensor
    keep: float
    new: Tensor

    def model(self, sequence: Tensor, penalty: float = 0.0) -> Model:
        return Model(torch.log(self.emission)[:, sequence].T, penalty)

    def prior(self, model: Model) -> Policy:
        return tabular.sticky(model, self.keep, self.new)


@dataclass(frozen=True)
class Counts:
    """Expected counts of one sequence: `emitted` [K+1, A], gates that kept, and thoughts of each latent [K]."""

    emitted: Tensor
    kept: Tensor
    thoughts: Tensor

    @classmethod
    def of(cls, policy: Policy, sequence: Tensor) -> "Counts":
        before, thoughts = tabular.visits(policy)
        after = torch.einsum("ts,tsz->tz", before, tabular.transitions(policy))
        symbols = torch.nn.functional.one_hot(sequence, SYMBOLS).double()
        return cls(after.T @ symbols, before.sum() - thoughts.sum(), thoughts.sum((0, 1)))

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.emitted + other.emitted, self.kept + other.kept, self.thoughts + other.thoughts)


def _start(seed: int) -> tuple[Parameters, list[Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    emission = torch.softmax(torch.randn(LATENTS + 1, SYMBOLS, dtype=torch.float64, generator=draw), -1)
    new = torch.softmax(torch.randn(LATENTS, dtype=torch.float64, generator=draw), -1)
    sequences = torch.randint(0, SYMBOLS, (SEQUENCES, LINES), generator=draw)
    return Parameters(emission, 0.6, new), list(sequences)


def _reestimated(counts: Counts) -> Parameters:
    thinks = counts.thoughts.sum()
    emission = counts.emitted / counts.emitted.sum(1, keepdim=True)
    return Parameters(emission, float(counts.kept / (counts.kept + thinks)), counts.thoughts / thinks)


def _bound(parameters: Parameters, sequences: list[Tensor], policies: list[Policy]) -> float:
    total = 0.0
    for sequence, policy in zip(sequences, policies, strict=True):
        model = parameters.model(sequence)
        total += tabular.value_by_recursion(model, policy, parameters.prior(model)).item()
    return total


def _posteriors(parameters: Parameters, sequences: list[Tensor]) -> tuple[float, list[Policy]]:
    """Log marginal of all sequences, and the exact E-step."""
    found = []
    for sequence in sequences:
        model = parameters.model(sequence)
        found.append(tabular.posterior(model, parameters.prior(model)))
    return sum(marginal for marginal, _ in found), [policy for _, policy in found]


def _rounds(seed: int, reestimate: Callable[[Counts], Parameters]) -> tuple[list[float], list[float]]:
    """J after every E and every M step, and the log marginals."""
    parameters, sequences = _start(seed)
    bounds, marginals = [], []
    for _ in range(ROUNDS):
        marginal, policies = _posteriors(parameters, sequences)
        marginals.append(marginal)
        bounds.append(_bound(parameters, sequences, policies))
        counts = [Counts.of(policy, sequence) for policy, sequence in zip(policies, sequences, strict=True)]
        parameters = reestimate(sum(counts[1:], start=counts[0]))
        bounds.append(_bound(parameters, sequences, policies))
    return bounds, marginals


def _falls(values: list[float]) -> float:
    """The largest drop from one value to the next; negative where all rise."""
    return max(a - b for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("seed", STARTS)
def test_counts_are_those_over_every_path(seed):
    parameters, sequences = _start(seed)
    model = parameters.model(sequences[0])
    _, policy = tabular.posterior(model, parameters.prior(model))
    counts = Counts.of(policy, sequences[0])
    paths = tabular.all_paths(model)
    probability = torch.exp(tabular.step_logprobs(policy, paths).sum(-1))
    assert counts.kept.item() == pytest.approx(float(probability @ (~paths.thought).double().sum(-1)), abs=1e-12)
    for latent in range(LATENTS):
        drawn = (paths.thought & (paths.after == latent)).double().sum(-1)
        assert counts.thoughts[latent].item() == pytest.approx(float(probability @ drawn), abs=1e-12)
    for latent, symbol in itertools.product(range(LATENTS + 1), range(SYMBOLS)):
        emitted = ((paths.after == latent) & (sequences[0] == symbol)).double().sum(-1)
        assert counts.emitted[latent, symbol].item() == pytest.approx(float(probability @ emitted), abs=1e-12)


@pytest.mark.parametrize("seed", STARTS)
def test_bound_and_marginal_rise_in_every_round(seed):
    bounds, marginals = _rounds(seed, _reestimated)
    assert _falls(bounds) <= 1e-12
    assert _falls(marginals) <= 1e-12
    assert bounds[::2] == pytest.approx(marginals, abs=1e-12)  # tight after every E-step
    assert all(after <= marginal + 1e-12 for after, marginal in zip(bounds[1::2], marginals[1:], strict=False))
    assert marginals[-1] - marginals[0] > 1.0


def _without_redraws(counts: Counts) -> Parameters:
    """Counts every other thought as having kept."""
    half = counts.thoughts / 2
    return _reestimated(Counts(counts.emitted, counts.kept + half.sum(), half))


def _one_symbol_twice(counts: Counts) -> Parameters:
    emitted = counts.emitted.clone()
    emitted[:, 0] *= 2
    return _reestimated(Counts(emitted, counts.kept, counts.thoughts))


@pytest.mark.parametrize("wrong", [_without_redraws, _one_symbol_twice])
def test_wrong_counts_are_caught_from_every_start(wrong):
    for seed in STARTS:
        bounds, _ = _rounds(seed, wrong)
        assert _falls(bounds) > 1e-3


@pytest.mark.parametrize("seed", STARTS)
def test_reestimation_is_where_the_next_token_loss_is_stationary(seed):
    """The package's M-step loss over all annotations, weighted by the posterior: gates, new latents and lines."""
    parameters, sequences = _start(seed)
    _, policies = _posteriors(parameters, sequences)
    counts = [Counts.of(policy, sequence) for policy, sequence in zip(policies, sequences, strict=True)]
    found = _reestimated(sum(counts[1:], start=counts[0]))
    for estimate, stationary in ((found, True), (parameters, False)):
        emission = torch.log(estimate.emission).requires_grad_()
        gate = torch.logit(torch.tensor(estimate.keep, dtype=torch.float64)).requires_grad_()
        new = torch.log(estimate.new).requires_grad_()
        logprobs, weights = [], []
        for sequence, policy in zip(sequences, policies, strict=True):
            prior = Policy((-gate).expand(LINES, LATENTS + 1), new.expand(LINES, LATENTS + 1, LATENTS))
            model = Model(torch.log_softmax(emission, -1)[:, sequence].T, 0.0)
            paths = tabular.all_paths(model)
            weight = torch.exp(tabular.step_logprobs(policy, paths).sum(-1, keepdim=True)).detach()
            for tokens in (*tabular.decision_logprobs(prior, paths), tabular.line_logprobs(model, paths)):
                logprobs.append(tokens.flatten())
                weights.append(weight.expand_as(tokens).flatten())
        shares = objective.next_token_weights(torch.cat(weights), global_weight=1.0)
        loss = -(shares * torch.cat(logprobs)).sum()
        gradients = torch.autograd.grad(loss, (emission, gate, new))
        largest = max(float(item.abs().max()) for item in gradients)
        assert largest < 1e-12 if stationary else largest > 0.1


# --- hard EM: the fixed penalty


def _best_path(model: Model) -> tuple[float, Paths]:
    """Viterbi's path, by enumeration."""
    paths = tabular.all_paths(model)
    totals = tabular.line_values(model, paths).sum(-1)
    return float(totals.max()), paths[totals.argmax()]


def _hard_rounds(seed: int, penalty: float, shift: int) -> list[float]:
    """J after every E and every M step; `shift` = 1 counts each symbol for the latent of the line before."""
    parameters, sequences = _start(seed)
    bounds = []
    for _ in range(ROUNDS):
        found = [_best_path(parameters.model(sequence, penalty)) for sequence in sequences]
        bounds.append(sum(best for best, _ in found))
        emitted = torch.zeros(LATENTS + 1, SYMBOLS, dtype=torch.float64)
        for sequence, (_, path) in zip(sequences, found, strict=True):
            emitted.index_put_((path.before if shift else path.after, sequence), torch.ones(()).double(), True)
        used = emitted.sum(1, keepdim=True)
        emission = torch.where(used > 0, emitted / used.clamp(min=1), parameters.emission)
        parameters = Parameters(emission, parameters.keep, parameters.new)
        models = [parameters.model(sequence, penalty) for sequence in sequences]
        bounds.append(
            sum(float(tabular.line_values(m, path).sum()) for m, (_, path) in zip(models, found, strict=True))
        )
    return bounds


@pytest.mark.parametrize("seed", STARTS)
@pytest.mark.parametrize("penalty", [0.05, 0.5])
def test_hard_em_rises_in_every_round(seed, penalty):
    bounds = _hard_rounds(seed, penalty, shift=0)
    assert _falls(bounds) <= 1e-12
    assert bounds[-1] - bounds[0] > 1.0


@pytest.mark.parametrize("seed", STARTS)
def test_hard_em_with_wrong_counts_is_caught(seed):
    assert _falls(_hard_rounds(seed, 0.5, shift=1)) > 1e-3


@pytest.mark.parametrize("seed", STARTS)
def test_the_hard_e_step_is_viterbi(seed):
    parameters, sequences = _start(seed)
    for sequence in sequences:
        model = parameters.model(sequence, 0.3)
        assert _best_path(model)[0] == pytest.approx(tabular.viterbi(model)[0], abs=1e-12)
