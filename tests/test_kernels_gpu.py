"""`linear_logprob` on a real GPU at the sizes it is for: values, gradients and memory."""

import pytest
import torch

from megatron_ra3.kernels import linear_logprob

pytestmark = pytest.mark.gpu
ROWS, HIDDEN, VOCABULARY, PADDED = 4096, 2048, 151_665, 151_936


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, device="cuda", dtype=torch.bfloat16, generator=draw)
    weight = torch.randn(PADDED, HIDDEN, device="cuda", dtype=torch.bfloat16, generator=draw) * 0.05
    weight[VOCABULARY:] = torch.nan
    targets = torch.randint(VOCABULARY, (ROWS,), device="cuda", generator=draw)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def test_values_equal_float64_on_sampled_rows(case):
    hidden, weight, targets = case
    result = linear_logprob(hidden, weight, targets, vocab_size=VOCABULARY)
    rows = torch.arange(0, ROWS, 64, device="cuda")
    logits = hidden[rows].double() @ weight[:VOCABULARY].double().T
    expected = torch.log_softmax(logits, dim=1).gather(1, targets[rows, None]).squeeze(1)
    assert (result[rows].double() - expected).abs().max() < 1e-4
    assert result.max() <= 0


def test_gradients_equal_float64_on_a_small_case(case):
    hidden, weight, targets = (item.detach()[:64] for item in case)
    hidden, weight, targets = hidden.requires_grad_(), weight.requires_grad_(), targets % 64
    upstream = torch.linspace(-1, 1, 64, device="cuda")
    (linear_logprob(hidden, weight, targets) * upstream).sum().backward()
    exact = [item.detach().double().requires_grad_() for item in (hidden, weight)]
    logprob = torch.log_softmax(exact[0] @ exact[1].T, dim=1).gather(1, targets[:, None]).squeeze(1)
    (logprob * upstream.double()).sum().backward()
    for found, expected in zip((hidden, weight), exact, strict=True):
        assert (found.grad.double() - expected.grad).norm() < 5e-3 * expected.grad.norm()


def test_no_block_of_logits_is_ever_held(case):
    hidden, weight, targets = case
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        linear_logprob(hidden, weight, targets, vocab_size=VOCABULARY)
    copies_in_fp32 = 4 * (weight.numel() + hidden.numel())
    assert torch.cuda.max_memory_allocated() - before < copies_in_fp32 + 0.1 * ROWS * VOCABULARY * 4
