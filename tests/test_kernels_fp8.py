"""FP8 likelihoods in torch: quantisation, error against float64, rankings, shards, cache, and what has no gradient."""

import datetime as dt
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from scipy.stats import spearmanr
from torch import Tensor

from megatron_ra3.kernels import HeadCache, backends, fp8, linear_logprob, partials
from megatron_ra3.kernels.problem import Options
from tests.distributed import run_ranks

ROWS, HIDDEN, VOCABULARY = 1024, 128, 16_384


def quantized(values: Tensor, rows_per_scale: int = 1) -> Tensor:
    return fp8.quantize(values, rows_per_scale).dequantized()


@pytest.fixture(scope="module")
def case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states with outlier channels, a head, targets drawn from its law, and the exact log-probs [N, V]."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=draw)
    hidden[:, :4] *= 10.0
    weight = torch.randn(VOCABULARY, HIDDEN, generator=draw) * 0.1
    weight[:, :4] *= 0.3
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    law = (2.0 * hidden.double() @ weight.double().T).log_softmax(dim=1)
    return hidden, weight, torch.multinomial(law.exp().float(), 1, generator=draw).squeeze(1), law


def score(case: tuple[Tensor, Tensor, Tensor, Tensor], precision: str) -> Tensor:
    hidden, weight, targets, _ = case
    return linear_logprob(hidden, weight, targets, precision=precision, temperature=0.5)


def error(case: tuple[Tensor, Tensor, Tensor, Tensor], found: Tensor) -> float:
    _, _, targets, law = case
    return float((found.double() - law.gather(1, targets[:, None]).squeeze(1)).square().mean().sqrt())


def bf16_logits(case: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The usual way: logits rounded to bf16, then log-softmax in fp32."""
    hidden, weight, targets, _ = case
    logits = (2.0 * hidden.float() @ weight.float().T).bfloat16().float()
    return logits.log_softmax(dim=1).gather(1, targets[:, None]).squeeze(1)


def test_quantisation_rounds_to_three_mantissa_bits_and_keeps_zeros():
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(64, 96, generator=draw).exp()  # within 2^14 of the largest, where e4m3 is not subnormal
    relative = ((quantized(values) - values) / values).abs()
    assert relative.max() <= 2**-4
    assert relative.max() > 0.9 * 2**-4
    assert torch.equal(quantized(torch.zeros(3, 8)), torch.zeros(3, 8))
    assert quantized(torch.tensor([[448.0, -448.0, 1e-30]])).tolist() == [[448.0, -448.0, 0.0]]


def test_a_rounded_hidden_state_keeps_its_projection(case):
    """In the metric of the head's moments; its error along the mean column, which log-sum-exp sees, is cut."""
    hidden, weight, _, law = case
    head = fp8.Head.of(weight)
    shared = head.directions.float()
    beside = weight.float() - weight.float() @ shared @ shared.T
    torch.testing.assert_close(head.moments, beside.square().mean(dim=0))
    kept, plain = fp8.quantize_hidden(hidden, head).dequantized()[:, :HIDDEN], quantized(hidden)
    moments = head.moments.double()
    own, left = (hidden * kept).double() @ moments, (kept * kept).double() @ moments
    torch.testing.assert_close(own, left, rtol=1e-6, atol=0)
    mean_column = law.exp() @ weight.double()  # E_p[w]: the error of log-sum-exp is the hidden state's along it
    shift = [
        float((((x - hidden.float()).double() * mean_column).sum(1)).square().mean().sqrt()) for x in (kept, plain)
    ]
    assert shift[0] < 0.5 * shift[1]
    zeros = fp8.quantize_hidden(torch.zeros(2, HIDDEN), head).dequantized()
    assert torch.equal(zeros, torch.zeros(2, HIDDEN + 2 * fp8.RANK))


def low_rank_case() -> tuple[Tensor, Tensor]:
    """Hidden states and a head whose columns share 24 directions, as those of trained models do."""
    draw = torch.Generator().manual_seed(3)
    shared = torch.randn(24, 256, generator=draw)
    weight = torch.randn(8192, 24, generator=draw) @ shared + 0.3 * torch.randn(8192, 256, generator=draw)
    hidden = torch.randn(512, 24, generator=draw) @ shared + torch.randn(512, 256, generator=draw)
    return hidden.bfloat16(), (weight * 0.003).bfloat16()


def test_principal_directions_are_orthonormal_and_hold_what_columns_share():
    _, weight = low_rank_case()
    found = fp8.principal_directions(weight).double()
    torch.testing.assert_close(found.T @ found, torch.eye(64, dtype=torch.float64), rtol=0, atol=2e-2)
    true = torch.linalg.eigh(weight.double().T @ weight.double())
    held = ((weight.double() @ found) ** 2).sum() / (weight.double() ** 2).sum()
    assert held > 0.99 * true.eigenvalues[-64:].sum() / true.eigenvalues.sum()
    assert fp8.principal_directions(weight[:, :48]).shape == (48, 32)
    assert not fp8.principal_directions(torch.zeros(0, 16)).isnan().any()


def test_what_rounding_took_comes_back_along_shared_directions():
    """Of both operands: logits, and the likelihoods that sum over many of them, are far more exact with it."""
    hidden, weight = low_rank_case()
    head = fp8.Head.of(weight)
    x, w = fp8.quantize_hidden(hidden, head).dequantized(), head.weight.dequantized()
    exact = hidden.double() @ weight.double().T

    def errors(logits: Tensor) -> tuple[float, float]:
        gap = logits.double() - exact
        of_sum = logits.double().logsumexp(dim=1) - exact.logsumexp(dim=1)
        return float(gap.square().mean().sqrt()), float(of_sum.square().mean().sqrt())

    with_it, without = errors(x @ w.T), errors(x[:, :256] @ w[:, :256].T)
    assert with_it[0] < 0.4 * without[0]
    assert with_it[1] < 0.2 * without[1]


@pytest.mark.parametrize(("vocab", "columns"), [(0, 256), (4096, 256), (40_960, 256), (40_961, 512), (151_936, 1024)])
def test_groups_are_as_small_as_their_number_allows(vocab, columns):
    assert fp8.group_columns(vocab) == columns


def test_rows_share_scales_by_blocks_and_broken_ones_spoil_only_those():
    values = torch.ones(600, 16)
    values[300] = torch.nan
    found = quantized(values, rows_per_scale=256)
    assert found[:256].equal(values[:256])
    assert found[512:].equal(values[512:])
    assert found[256:512].isnan().all()


def test_rescoring_is_more_exact_than_bf16_logits_and_eight_bits_alone_are_not(case):
    naive, rescored, usual = (
        error(case, found) for found in (score(case, "fp8"), score(case, "fp8_rescored"), bf16_logits(case))
    )
    assert rescored < usual < naive
    assert 0.04 < naive < 0.2
    assert error(case, score(case, "bf16")) < 1e-5


def test_log_probs_are_never_above_zero(case):
    for precision in ("fp8", "fp8_rescored", "bf16"):
        assert (score(case, precision) <= 0).all()


def test_rankings_of_sixteen_lines_survive_rescoring(case):
    _, _, targets, law = case
    true = law.gather(1, targets[:, None]).view(-1, 16, 16).mean(dim=2)  # groups of 16 lines of 16 tokens
    found = score(case, "fp8_rescored").view(-1, 16, 16).mean(dim=2)
    ranks = [spearmanr(a, b).statistic for a, b in zip(true, found, strict=True)]
    assert sum(ranks) / len(ranks) >= 0.999
    assert min(ranks) >= 0.997  # two neighbours of sixteen
    assert (found - true).std() < 1.25e-3
    apart = (true[:, :, None] - true[:, None]) > 0.005
    assert ((found[:, :, None] > found[:, None]) | ~apart).all()  # only rewards that close change places


def test_entropy_of_the_law(case):
    hidden, weight, targets, law = case
    true = -(law.exp() * law).sum(dim=1)
    for precision, most in (("fp32", 1e-5), ("bf16", 1e-5), ("fp8_rescored", 0.03), ("fp8", 0.1)):
        _, entropy = linear_logprob(hidden, weight, targets, precision=precision, temperature=0.5, with_entropy=True)
        assert (entropy.double() - true).square().mean().sqrt() < most


def test_gradient_of_log_prob_and_entropy_is_that_of_autograd():
    draw = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 6, dtype=torch.float64, generator=draw).requires_grad_() for n in (5, 12))
    targets = torch.tensor([0, 8, 3, -100, 7])

    def both(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprob(a, b, targets, vocab_size=9, temperature=0.7, ignore_index=-100, with_entropy=True)

    assert torch.autograd.gradcheck(both, (hidden, weight))


def test_gradient_of_rescored_log_probs(case):
    hidden, weight, targets, _ = case
    found, true = [], []
    for precision, results in (("fp32", true), ("fp8_rescored", found)):
        x, w = hidden[:64].clone().requires_grad_(), weight.clone().requires_grad_()
        linear_logprob(x, w, targets[:64], precision=precision, temperature=0.5).sum().backward()
        results += [x.grad.double(), w.grad.double()]
    for mine, right in zip(found, true, strict=True):
        assert (mine - right).norm() < 0.01 * right.norm()


def test_eight_bits_alone_have_no_gradient():
    hidden, weight = torch.randn(2, 16, requires_grad=True), torch.randn(8, 16)
    with pytest.raises(ValueError, match=r"precision=fp8 has no gradient.*set fp8_rescored or bf16"):
        linear_logprob(hidden, weight, torch.tensor([0, 1]), precision="fp8")
    with pytest.raises(ValueError, match=r"temperature=0\.0 must be positive"):
        linear_logprob(hidden, weight, torch.tensor([0, 1]), temperature=0.0)
    with pytest.raises(ValueError, match="precision='int8' must be one of fp32, bf16, fp8, fp8_rescored"):
        linear_logprob(hidden, weight, torch.tensor([0, 1]), precision="int8")


def test_a_pass_keeps_the_head_it_began_with():
    hidden, weight, targets = torch.randn(4, 16), torch.randn(40, 16), torch.tensor([0, 1, 2, 39])
    cache = HeadCache()
    before = linear_logprob(hidden, weight, targets, precision="fp8", cache=cache)
    assert torch.equal(before, linear_logprob(hidden, weight, targets, precision="fp8"))
    weight.data.mul_(-1.0)  # as an optimizer does, behind torch's back
    assert torch.equal(before, linear_logprob(hidden, weight, targets, precision="fp8", cache=cache))
    assert not torch.equal(before, linear_logprob(hidden, weight, targets, precision="fp8", cache=HeadCache()))


def test_fallbacks_are_counted_with_their_reason():
    backends.take_fallbacks()
    linear_logprob(torch.randn(2, 16), torch.randn(8, 16), torch.tensor([0, 1]), precision="bf16")
    linear_logprob(torch.randn(2, 20), torch.randn(8, 20), torch.tensor([0, 1]), precision="fp8_rescored")
    linear_logprob(torch.randn(2, 20), torch.randn(8, 20), torch.tensor([0, 1]), precision="fp32")
    assert backends.take_fallbacks() == {
        "no CUDA device": 1,
        "hidden size 20 at fp8_rescored: a row must be a multiple of 16 bytes": 1,
    }
    assert not backends.take_fallbacks()


def _all_shards(hidden: Tensor, weight: Tensor, targets: Tensor, reals: list[int]) -> list[tuple[Tensor, Tensor]]:
    dist.init_process_group("gloo", timeout=dt.timedelta(seconds=60))
    local = weight.chunk(int(os.environ["WORLD_SIZE"]))[int(os.environ["RANK"])]
    return [
        linear_logprob(
            hidden, local, targets % real, tp_group=dist.group.WORLD, vocab_size=real, precision=precision,
            with_entropy=True,
        )
        for real in reals
        for precision in ("bf16", "fp8", "fp8_rescored")
    ]  # fmt: skip


def test_vocabulary_shards_agree_on_every_rank_and_with_the_whole(case):
    hidden, weight, targets = (item[:rows] for item, rows in zip(case, (64, 4096, 64), strict=False))
    reals = [4096, 4000, 2000, 1]  # of two shards the second is whole, cut, and all padding
    first, second = run_ranks(_all_shards, 2, hidden, weight, targets, reals)
    cases = [(real, precision) for real in reals for precision in ("bf16", "fp8", "fp8_rescored")]
    for (real, precision), one, other in zip(cases, first, second, strict=True):
        whole = linear_logprob(hidden, weight, targets % real, vocab_size=real, precision=precision, with_entropy=True)
        for mine, twin, right in zip(one, other, whole, strict=True):
            assert torch.equal(mine, twin)
            # Every shard rounds along directions of its own and, rescored, has candidates of its own.
            tolerance = {"bf16": 2e-5, "fp8": 0.2, "fp8_rescored": 0.03}[precision]
            torch.testing.assert_close(mine, right, rtol=0, atol=tolerance)
            assert (mine - right).square().mean().sqrt() < 0.2 * tolerance
        added_up = _without_a_group(hidden, weight, targets % real, real, precision)
        torch.testing.assert_close(one[0], added_up, rtol=0, atol=2e-5)


def _without_a_group(hidden: Tensor, weight: Tensor, targets: Tensor, real: int, precision: str) -> Tensor:
    """Log-probs of two shards, each computed here by itself."""
    parts = []
    for rank, local in enumerate(weight.chunk(2)):
        group = SimpleNamespace(rank=lambda rank=rank: rank)
        problem = Options(group, real, 1.0, precision).problem(hidden, local, targets)
        parts.append(backends.TorchBackend().forward(problem, precision, None))
    shards = torch.stack(parts)
    row_max, total, _ = partials.add_up(shards)
    return shards[:, partials.TARGET].sum(dim=0) - row_max - total.log()
