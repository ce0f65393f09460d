"""`linear_logprob` on a real GPU at the sizes it is for: values, gradients, memory, and that the kernels were used."""

import pytest
import torch
from torch import Tensor

from megatron_ra3.kernels import Precision, fp8, linear_cross_entropy, linear_logprob
from megatron_ra3.kernels.backends import take_fallbacks

pytestmark = pytest.mark.gpu
ROWS, HIDDEN, VOCABULARY, PADDED = 4096, 2048, 151_665, 151_936
RMS_NATS: dict[Precision, float] = {"fp32": 1e-5, "bf16": 1e-5, "fp8": 0.15, "fp8_rescored": 0.01}
TRAINABLE: tuple[Precision, ...] = ("fp32", "bf16", "fp8_rescored")


@pytest.fixture(scope="module")
def case() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of standard deviation 2.3, and targets drawn from their law."""
    draw = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, device="cuda", dtype=torch.bfloat16, generator=draw)
    weight = torch.randn(PADDED, HIDDEN, device="cuda", dtype=torch.bfloat16, generator=draw) * 0.05
    weight[VOCABULARY:] = torch.nan
    laws = [(rows @ weight[:VOCABULARY].T).float().softmax(dim=1) for rows in hidden.split(256)]
    return hidden, weight, torch.cat([torch.multinomial(law, 1, generator=draw).squeeze(1) for law in laws])


@pytest.fixture(autouse=True)
def no_fallback():
    take_fallbacks()
    yield
    assert not take_fallbacks()


@pytest.mark.parametrize("precision", RMS_NATS)
def test_values_and_entropies_equal_float64_on_sampled_rows(case, precision):
    hidden, weight, targets = case
    found, entropy = linear_logprob(
        hidden, weight, targets, vocab_size=VOCABULARY, precision=precision, with_entropy=True
    )
    rows = torch.arange(0, ROWS, 32, device="cuda")
    law = torch.log_softmax(hidden[rows].double() @ weight[:VOCABULARY].double().T, dim=1)
    gap = found[rows].double() - law.gather(1, targets[rows, None]).squeeze(1)
    assert gap.square().mean().sqrt() < RMS_NATS[precision]
    assert (entropy[rows].double() + (law.exp() * law).sum(1)).square().mean().sqrt() < 2 * RMS_NATS[precision]
    assert found.max() <= 0


@pytest.mark.parametrize("precision", RMS_NATS)
def test_a_row_depends_neither_on_its_company_nor_on_the_run(case, precision):
    hidden, weight, targets = case
    whole = linear_logprob(hidden, weight, targets, vocab_size=VOCABULARY, precision=precision)
    assert torch.equal(whole, linear_logprob(hidden, weight, targets, vocab_size=VOCABULARY, precision=precision))
    if precision != "fp32":  # cuBLAS chooses by shape
        few = linear_logprob(hidden[37:40], weight, targets[37:40], vocab_size=VOCABULARY, precision=precision)
        assert torch.equal(few, whole[37:40])


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("precision", TRAINABLE)
def test_gradients_equal_float64_on_a_small_case(case, precision, with_entropy):
    hidden, weight, targets = (item.detach()[:2048] for item in case)
    hidden, targets = hidden[:64], targets[:64] % 2048
    upstream = torch.linspace(-1, 1, 64, device="cuda")
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    found = linear_logprob(hidden, weight, targets, precision=precision, with_entropy=with_entropy)
    pair = found if with_entropy else (found,)
    torch.autograd.backward(pair, [upstream] * len(pair))
    exact = [item.detach().double().requires_grad_() for item in (hidden, weight)]
    law = torch.log_softmax(exact[0] @ exact[1].T, dim=1)
    value = law.gather(1, targets[:, None]).squeeze(1)
    if with_entropy:
        value = value - (law.exp() * law).sum(dim=1)
    (value * upstream.double()).sum().backward()
    tolerance = 5e-2 if precision == "fp8_rescored" else 1e-2  # eight of 2,048 columns are exact
    for mine, expected in zip((hidden, weight), exact, strict=True):
        assert (mine.grad.double() - expected.grad).norm() < tolerance * expected.grad.norm()


@pytest.mark.parametrize("precision", ["bf16", "fp8_rescored"])
def test_forward_holds_less_than_64_mb(case, precision):
    """Beyond its inputs and, in FP8, their copies of one byte a number and 128 more a row."""
    hidden, weight, targets = case
    linear_logprob(hidden[:8], weight, targets[:8], vocab_size=VOCABULARY, precision=precision)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_logprob(hidden, weight, targets, vocab_size=VOCABULARY, precision=precision)
    copies = 0 if precision == "bf16" else (len(weight) + len(hidden)) * (HIDDEN + 2 * fp8.RANK)
    assert torch.cuda.max_memory_allocated() - before < copies + 64 * 2**20


@pytest.mark.parametrize("rows", [ROWS, 64])
def test_loss_and_gradients_taken_on_the_way_are_those_of_autograd(case, rows):
    hidden, weight, targets = (item.detach() for item in case)
    token_weights = torch.rand(rows, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    found = []
    for fused in (True, False):
        inputs = hidden[:rows].clone().requires_grad_(), weight.clone().requires_grad_()
        options = {"vocab_size": VOCABULARY, "precision": "bf16"}
        if fused:
            loss = linear_cross_entropy(*inputs, targets[:rows], token_weights, **options)
        else:
            loss = -(token_weights * linear_logprob(*inputs, targets[:rows], **options)).sum()
        loss.backward()
        found.append([loss.detach(), *(item.grad for item in inputs)])
    for mine, expected in zip(*found, strict=True):
        assert (mine.double() - expected.double()).norm() < 5e-3 * expected.double().norm()


def test_a_loss_holds_one_block_of_logits_beside_its_gradients(case):
    hidden, weight, targets = (item.detach().clone() for item in case)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    ones = torch.ones(ROWS, device="cuda")
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = linear_cross_entropy(*inputs, targets, ones, vocab_size=VOCABULARY, precision="bf16")
        peak = torch.cuda.max_memory_allocated() - before
        loss.backward()
        hidden.grad = weight.grad = None
    block = 6 * 2**29
    gradients = 6 * weight.numel() + 8 * hidden.numel()
    assert peak < block + gradients + 64 * 2**20
