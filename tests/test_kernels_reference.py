"""linear_logprob against log_softmax in fp64: values, gradients, padding, shards, memory."""

import datetime as dt
import os

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ra3.kernels import linear_logprob, reference
from tests.distributed import run_ranks


def problem(
    rows: int, vocab: int, hidden: int = 24, scale: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, hidden, generator=draw) * scale
    w = torch.randn(vocab, hidden, generator=draw)
    return x, w, torch.randint(0, vocab, (rows,), generator=draw)


def exact(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    logits = x.double() @ w.double().T
    return logits.log_softmax(dim=1).gather(1, targets[:, None]).squeeze(1)


def gradients(function, x: Tensor, w: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    value = function(x, w)
    value.backward(upstream.to(value.dtype))
    return value.detach(), x.grad, w.grad


@pytest.mark.parametrize("rows", [1, 5, 33, 129])
@pytest.mark.parametrize("vocab", [7, 130, 257])
def test_values_and_gradients_match_fp64(rows, vocab):
    x, w, targets = problem(rows, vocab)
    upstream = torch.randn(rows, generator=torch.Generator().manual_seed(1))
    ours = gradients(lambda a, b: linear_logprob(a, b, targets), x, w, upstream)
    true = gradients(lambda a, b: exact(a, b, targets), x.double(), w.double(), upstream)
    assert ours[0].dtype == torch.float32
    for mine, right in zip(ours, true, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("chunk_elements", [1, 40, 10**6])
def test_gradcheck_for_any_chunk(monkeypatch, chunk_elements):
    monkeypatch.setattr(reference, "MAX_CHUNK_ELEMENTS", chunk_elements)
    x, w, targets = problem(5, 12, hidden=6)
    x, w = x.double().requires_grad_(), w.double().requires_grad_()
    targets = targets % 9
    assert torch.autograd.gradcheck(lambda a, b: linear_logprob(a, b, targets, vocab_size=9), (x, w))


def test_chunks_do_not_change_the_result(monkeypatch):
    x, w, targets = problem(257, 130)
    upstream = torch.ones(257)
    whole = gradients(lambda a, b: linear_logprob(a, b, targets), x, w, upstream)
    monkeypatch.setattr(reference, "MAX_CHUNK_ELEMENTS", 130 * 4)
    parts = gradients(lambda a, b: linear_logprob(a, b, targets), x, w, upstream)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_padded_rows_are_never_read():
    x, w, targets = problem(9, 50)
    clean = gradients(lambda a, b: linear_logprob(a, b, targets), x, w, torch.ones(9))
    padded = torch.cat([w, torch.tensor([[float("nan")], [1e30], [3.0]]).expand(3, 24)])
    dirty = gradients(lambda a, b: linear_logprob(a, b, targets, vocab_size=50), x, padded, torch.ones(9))
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])
    assert torch.equal(clean[2], dirty[2][:50])
    assert torch.equal(dirty[2][50:], torch.zeros(3, 24))


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_common_offset_of_all_logits_changes_nothing(offset):
    x, w, targets = problem(9, 50, hidden=4)
    shifted_x = torch.cat([x, torch.ones(9, 1)], dim=1)
    shifted_w = torch.cat([w, torch.full((50, 1), offset)], dim=1)
    value = linear_logprob(shifted_x, shifted_w, targets)
    torch.testing.assert_close(value.double(), exact(x, w, targets), rtol=0, atol=4e-3)  # fp32 spacing at 1e4 is 1e-3
    assert (value < 0).all()


def test_extremes():
    zeros = linear_logprob(torch.zeros(3, 8), torch.randn(17, 8), torch.tensor([0, 5, 16]))
    torch.testing.assert_close(zeros, torch.full((3,), 17.0).log().neg(), rtol=1e-7, atol=0)
    x, w, _ = problem(200, 300, scale=100.0)
    best = (x @ w.T).argmax(dim=1)
    certain = linear_logprob(x, w, best)
    assert (certain <= 0).all()
    assert (certain == 0).any()
    torch.testing.assert_close(certain.double(), exact(x, w, best), rtol=1e-4, atol=1e-3)
    broken = torch.randn(3, 8)
    broken[1] = float("nan")
    value = linear_logprob(broken, torch.randn(17, 8), torch.tensor([0, 5, 16]))
    assert value.isnan().tolist() == [False, True, False]


def test_no_rows():
    x, w, targets = problem(0, 50)
    value, grad_x, grad_w = gradients(lambda a, b: linear_logprob(a, b, targets), x, w, torch.ones(0))
    assert value.shape == (0,)
    assert grad_x.shape == (0, 24)
    assert torch.equal(grad_w, torch.zeros(50, 24))


def test_gradient_of_a_nearly_certain_token():
    x = torch.tensor([[1.0, 0.0]])
    w = torch.tensor([[7.6004023, 0.0], [0.0, 1.0]])  # p(token 0) = 0.9995
    _, grad_x, _ = gradients(lambda a, b: linear_logprob(a, b, torch.tensor([0])), x, w, torch.ones(1))
    _, true, _ = gradients(lambda a, b: exact(a, b, torch.tensor([0])), x.double(), w.double(), torch.ones(1))
    torch.testing.assert_close(grad_x.double(), true, rtol=1e-3, atol=0)


def test_zero_upstream_gives_exact_zero_and_runs_repeat():
    x, w, targets = problem(40, 60)
    upstream = torch.ones(40)
    upstream[7] = 0.0
    first = gradients(lambda a, b: linear_logprob(a, b, targets), x, w, upstream)
    second = gradients(lambda a, b: linear_logprob(a, b, targets), x, w, upstream)
    assert torch.equal(first[1][7], torch.zeros(24))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_tied_weight_gets_both_gradients():
    w, targets = problem(1, 30)[1], torch.tensor([3, 4, 5])
    tokens = torch.tensor([1, 1, 2])

    def loss(function):
        tied = w.clone().double().requires_grad_()
        function(torch.nn.functional.embedding(tokens, tied), tied).sum().backward()
        return tied.grad

    torch.testing.assert_close(
        loss(lambda a, b: linear_logprob(a, b, targets)), loss(lambda a, b: exact(a, b, targets))
    )


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_full_logits_are_never_allocated(monkeypatch):
    monkeypatch.setattr(reference, "MAX_CHUNK_ELEMENTS", 20_000)
    x, w, targets = problem(1000, 500, hidden=16)
    with LargestTensor() as seen:
        gradients(lambda a, b: linear_logprob(a, b, targets), x, w, torch.ones(1000))
    assert 0 < seen.elements <= 20_000 < 1000 * 500


def test_bad_input_is_named():
    x, w, targets = problem(4, 10)
    with pytest.raises(ValueError, match=r"target 10 is outside the vocabulary \[0, 10\)"):
        linear_logprob(x, w, torch.tensor([0, 1, 10, 2]))
    with pytest.raises(ValueError, match="target -100 is outside"):
        linear_logprob(x, w, torch.tensor([0, 1, -100, 2]))
    with pytest.raises(ValueError, match="target 9 is outside"):
        linear_logprob(x, w, torch.full((4,), 9), vocab_size=9)
    with pytest.raises(ValueError, match="vocab_size=11"):
        linear_logprob(x, w, targets, vocab_size=11)


def _shards(vocab: int, real: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    x, w, targets = problem(rows, vocab)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = w.chunk(size)[rank]
    targets = targets % real
    group = dist.group.WORLD
    return gradients(
        lambda a, b: linear_logprob(a, b, targets, tp_group=group, vocab_size=real), x, local, torch.ones(rows)
    )


def _all_shards(cases: list[tuple[int, int, int]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    dist.init_process_group("gloo", timeout=dt.timedelta(seconds=30))
    return [_shards(*case) for case in cases]


def test_vocabulary_shards_agree_with_the_whole():
    cases = [(60, 60, 17), (60, 55, 1), (60, 30, 17), (60, 20, 5), (60, 60, 0)]  # 20 of 60: the last shard is padding
    ranks = run_ranks(_all_shards, 2, cases)
    for index, (vocab, real, rows) in enumerate(cases):
        x, w, targets = problem(rows, vocab)
        targets = targets % real
        whole = gradients(lambda a, b, t=targets, v=real: linear_logprob(a, b, t, vocab_size=v), x, w, torch.ones(rows))
        first, second = ranks[0][index], ranks[1][index]
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
        torch.testing.assert_close(first[0], whole[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(first[1], whole[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.cat([first[2], second[2]]), whole[2], rtol=1e-5, atol=1e-6)
