"""linear_cross_entropy against autograd through linear_logprob: loss, gradients, padding, shards, products."""

import datetime as dt
import os

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ra3.kernels import HeadCache, linear_cross_entropy, linear_logprob, reference
from tests.distributed import run_ranks

VOCABULARY, PADDED, HIDDEN = 50, 54, 24


def case(rows: int = 33, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, HIDDEN, generator=draw, dtype=dtype)
    weight = torch.randn(PADDED, HIDDEN, generator=draw, dtype=dtype)
    weight[VOCABULARY:] = torch.nan
    token_weights = torch.rand(rows, generator=draw)
    token_weights[::5] = 0.0
    return hidden, weight, torch.randint(0, VOCABULARY, (rows,), generator=draw), token_weights


def by_autograd(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, **options) -> Tensor:
    return -(token_weights * linear_logprob(hidden, weight, targets, **options)).sum()


def learnt(loss, hidden: Tensor, weight: Tensor, *rest: Tensor, **options) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = loss(hidden, weight, *rest, **options)
    (value * 3.0).backward()
    return value.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_elements", [1, 200, 10**6])
def test_loss_and_gradients_are_those_of_autograd(monkeypatch, chunk_elements, temperature):
    monkeypatch.setattr(reference, "MAX_CHUNK_ELEMENTS", chunk_elements)
    given, options = case(), {"vocab_size": VOCABULARY, "temperature": temperature}
    found = learnt(linear_cross_entropy, *given, **options)
    for mine, right in zip(found, learnt(by_autograd, *given, **options), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)
    assert (found[1][::5] == 0.0).all()
    assert (found[2][VOCABULARY:] == 0.0).all()


def test_rounded_operands():
    given, options = case(dtype=torch.float32), {"vocab_size": VOCABULARY, "precision": "bf16"}
    found = learnt(linear_cross_entropy, *given, **options)
    assert found[1].dtype == found[2].dtype == torch.float32
    exact = (given[0].bfloat16().double(), given[1].bfloat16().double(), *given[2:])
    for mine, right in zip(found, learnt(by_autograd, *exact, vocab_size=VOCABULARY), strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5)


def test_an_fp8_head_is_quantised_once_for_a_pass():
    hidden, weight, targets, token_weights = case(dtype=torch.float32)
    options = {"vocab_size": VOCABULARY, "precision": "fp8_rescored", "cache": HeadCache()}
    before = linear_cross_entropy(hidden, weight, targets, token_weights, **options)
    weight[:VOCABULARY] *= 0.9
    kept = linear_cross_entropy(hidden, weight, targets, token_weights, **options)
    anew = linear_cross_entropy(hidden, weight, targets, token_weights, **options | {"cache": HeadCache()})
    assert len({before.item(), kept.item(), anew.item()}) == 3  # rescored with the new weights, summed with the old


def test_it_is_differentiable_once_and_its_weights_are_constants():
    hidden, weight, targets, token_weights = case()
    hidden, token_weights = hidden.requires_grad_(), token_weights.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, token_weights, vocab_size=VOCABULARY)
    (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()
    assert token_weights.grad is None


def test_gradient_of_a_nearly_certain_token():
    hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[7.6004023, 0.0], [0.0, 1.0]])  # p(token 0) = 0.9995
    rest = (torch.tensor([0]), torch.ones(1))
    _, found, _ = learnt(linear_cross_entropy, hidden, weight, *rest)
    _, true, _ = learnt(by_autograd, hidden.double(), weight.double(), *rest)
    torch.testing.assert_close(found.double(), true, rtol=1e-3, atol=0)


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return function(*args, **(kwargs or {}))


def test_three_products_instead_of_four():
    hidden, weight, *rest = case(64)
    counts = []
    for loss in (linear_cross_entropy, by_autograd):
        with Products() as products:
            learnt(loss, hidden, weight, *rest, vocab_size=VOCABULARY)
        counts.append(products.count)
    assert counts == [3, 4]


def test_without_a_gradient_or_rows():
    given = case()
    with torch.no_grad():
        value = linear_cross_entropy(*given, vocab_size=VOCABULARY)
    assert value.item() == pytest.approx(by_autograd(*given, vocab_size=VOCABULARY).item(), rel=1e-12)
    value, grad_hidden, grad_weight = learnt(linear_cross_entropy, *case(0), vocab_size=VOCABULARY)
    assert (value.item(), grad_hidden.shape, float(grad_weight.abs().sum())) == (0.0, (0, HIDDEN), 0.0)


def test_a_target_outside_the_vocabulary_is_named():
    hidden, weight, targets, token_weights = case()
    with pytest.raises(ValueError, match=r"target 50 is outside the vocabulary \[0, 50\)"):
        linear_cross_entropy(hidden, weight, targets + 50 - targets[0], token_weights, vocab_size=VOCABULARY)


def _on_shards(sizes: list[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    dist.init_process_group("gloo", timeout=dt.timedelta(seconds=60))
    reference.MAX_CHUNK_ELEMENTS = 200
    hidden, weight, targets, token_weights = case()
    local = weight.chunk(int(os.environ["WORLD_SIZE"]))[int(os.environ["RANK"])]
    return [
        learnt(
            linear_cross_entropy, hidden, local, targets % size, token_weights,
            tp_group=dist.group.WORLD, vocab_size=size,
        )
        for size in sizes
    ]  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 3])
def test_vocabulary_shards_agree_with_the_whole(ranks):
    hidden, weight, targets, token_weights = case()
    sizes = [VOCABULARY, PADDED // ranks]  # the second leaves shards without a real token
    shards = run_ranks(_on_shards, ranks, sizes)
    for number, size in enumerate(sizes):
        whole = learnt(linear_cross_entropy, hidden, weight, targets % size, token_weights, vocab_size=size)
        parts = [found[number] for found in shards]
        for part in parts:
            torch.testing.assert_close(part[:2], whole[:2], rtol=1e-12, atol=1e-12)
            assert torch.equal(part[0], parts[0][0])
        torch.testing.assert_close(torch.cat([part[2] for part in parts]), whole[2], rtol=1e-12, atol=1e-12)
