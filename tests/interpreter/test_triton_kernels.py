"""The Triton kernels under Triton's interpreter, against float64 on the operands as they are after rounding.

The interpreter must be on before Triton is imported, so these run in a pytest process of their own
(`tests/test_kernels_triton.py` starts it). Shapes are tiny: a tile costs milliseconds here.
"""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from megatron_ra3.kernels import (
    HeadCache,
    fp8,
    linear_cross_entropy,
    linear_logprob,
    partials,
    reference,
    triton_backend,
)
from megatron_ra3.kernels.backends import TorchBackend, take_fallbacks
from megatron_ra3.kernels.problem import Options
from megatron_ra3.kernels.tuning import Tiles, Tuning, use

SMALL = Tuning(
    bf16=Tiles(16, 64, 32, 4, 1),
    fp8=Tiles(16, fp8.TILE, 32, 4, 1),
    gradient=Tiles(16, 64, 32, 4, 1),
    gradient_with_entropy=Tiles(16, 64, 32, 4, 1),
    gradient_columns=128,
)
PRECISIONS = ("bf16", "fp8", "fp8_rescored")


@pytest.fixture(autouse=True)
def small_tiles():
    take_fallbacks()
    with use(SMALL):
        yield
    assert not take_fallbacks()


def problem(rows: int, vocab: int, hidden: int, *, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = (scale * torch.randn(rows, hidden, generator=draw)).bfloat16()
    w = torch.randn(vocab, hidden, generator=draw).bfloat16() / hidden**0.5 * 3
    return x, w, torch.randint(0, vocab, (rows,), generator=draw)


def decoded(x: Tensor, w: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    if precision == "bf16":
        return x.double(), w.double()
    head = fp8.Head.of(w)
    return fp8.quantize_hidden(x, head).dequantized().double(), head.weight.dequantized().double()


def law(x: Tensor, w: Tensor, precision: str, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-softmax [N, V] in float64 of what the precision promises: rescored columns exact, the rest as rounded."""
    rough, weight = decoded(x, w, precision)
    logits = rough @ weight.T / temperature
    if precision == "fp8_rescored":
        exact = x.double() @ w.double().T / temperature
        others = logits.scatter(1, targets[:, None], -torch.inf)
        size = fp8.group_columns(len(w))
        grouped = torch.nn.functional.pad(others, (0, -w.shape[0] % size), value=-torch.inf)
        best, column = grouped.view(len(x), -1, size).max(dim=2)
        column = column + size * torch.arange(column.shape[1])
        chosen = column.gather(1, best.topk(min(fp8.CANDIDATES, column.shape[1]), dim=1).indices)
        for columns in (chosen, targets[:, None]):
            logits = logits.scatter(1, columns, exact.gather(1, columns))
    return logits.log_softmax(dim=1)


@pytest.mark.parametrize("hidden", [16, 208])
def test_hidden_states_are_quantised_as_torch_does_it(hidden):
    x, w, _ = problem(70, 300, hidden)
    x[1], x[2, 3], x[3] = 0.0, 300.0, x[3] * 2e-9
    head = fp8.Head.of(w)
    mine, right = triton_backend.quantize_hidden(x, head), fp8.quantize_hidden(x, head)
    torch.testing.assert_close(mine.scales, right.scales, rtol=1e-6, atol=0)
    codes, expected = mine.values.view(torch.uint8), right.values.view(torch.uint8)
    assert torch.equal(codes[:, :hidden], expected[:, :hidden])
    # Of what rounding took the last bit may differ, where sums in another order fall beside a tie.
    assert (codes != expected).float().mean() < 1e-3
    torch.testing.assert_close(mine.dequantized(), right.dequantized(), rtol=0.15, atol=1e-5)
    x[5, 7], x[6, 0] = torch.nan, torch.inf
    broken = triton_backend.quantize_hidden(x, head).dequantized().isnan().any(dim=1)
    assert broken.nonzero().flatten().tolist() == [5, 6]


def test_rounding_to_e4m3_is_torchs_at_ties_subnormals_and_the_largest():
    steps = torch.arange(16, 32).float() / 16 * 2.0 ** torch.arange(-12, 9)[:, None]  # two bits more than e4m3 has
    x = torch.cat([steps.flatten(), -steps.flatten()]).clamp(-448, 448)[None].bfloat16()  # a scale of 1
    head = fp8.Head.of(torch.zeros(4, x.shape[1]).bfloat16())
    mine = triton_backend.quantize_hidden(x, head).values[:, : x.shape[1]]
    assert torch.equal(mine.float(), x.float().to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("rows", "vocab", "hidden"), [(1, 7, 32), (17, 130, 48), (33, 1300, 32), (5, 4200, 96)])
def test_log_probs_and_entropies_equal_float64_on_rounded_operands(precision, rows, vocab, hidden):
    x, w, targets = problem(rows, vocab, hidden)
    targets[0], targets[-1] = 0, vocab - 1
    logprob, entropy = linear_logprob(x, w, targets, precision=precision, with_entropy=True, temperature=0.7)
    true = law(x, w, precision, targets, 0.7)
    expected = true.gather(1, targets[:, None]).squeeze(1)
    # The column that a packed logit carries moves it by 2^-15 of itself.
    tolerance = 2e-3 if precision == "fp8_rescored" else 2e-5
    torch.testing.assert_close(logprob.double(), expected, rtol=tolerance, atol=tolerance)
    assert (logprob <= 0).all()
    torch.testing.assert_close(entropy.double(), -(true.exp() * true).sum(1), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("vocab", [1, 2, 1025, 2049])
def test_a_target_alone_in_its_group_counts_once(precision, vocab):
    x, w, _ = problem(3, vocab, 32)
    targets = torch.full((3,), vocab - 1)
    found = linear_logprob(x, w, targets, precision=precision)
    expected = law(x, w, precision, targets)[:, -1]
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_kernels_and_emulation_agree(precision):
    """Not only with what was promised, but with each other: candidates, merged segments, what rounding took."""
    x, w, targets = problem(9, 3000, 64)
    options = Options(None, 3000, 0.7, precision, with_entropy=True)
    given = options.problem(x, w, targets)
    mine, right = (
        partials.merge(backend.forward(given, precision, None), None)
        for backend in (triton_backend.TritonBackend(), TorchBackend())
    )
    tolerance = 5e-4 if precision == "fp8_rescored" else 5e-5  # the column in a packed logit
    torch.testing.assert_close(mine.logprob, right.logprob, rtol=0, atol=tolerance)
    torch.testing.assert_close(mine.entropy, right.entropy, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_padded_rows_of_the_vocabulary_are_never_read(precision):
    x, w, targets = problem(6, 300, 32)
    padded = torch.cat([w, torch.full((212, 32), torch.nan, dtype=torch.bfloat16)])
    clean = linear_logprob(x, w, targets, precision=precision)
    assert torch.equal(linear_logprob(x, padded, targets, vocab_size=300, precision=precision), clean)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_does_not_depend_on_its_company(precision):
    x, w, targets = problem(18, 1100, 32)
    whole = linear_logprob(x, w, targets, precision=precision)
    assert torch.equal(linear_logprob(x[17:], w, targets[17:], precision=precision), whole[17:])
    assert torch.equal(linear_logprob(x, w, targets, precision=precision), whole)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_extreme_logits(precision):
    flat = linear_logprob(
        torch.zeros(3, 32).bfloat16(), torch.ones(1100, 32).bfloat16(), torch.tensor([0, 5, 1099]), precision=precision
    )
    torch.testing.assert_close(flat, torch.full((3,), -7.003065), rtol=1e-6, atol=0)
    x, w, _ = problem(20, 300, 32, scale=300.0)
    best = (x.float() @ w.float().T).argmax(dim=1)
    certain = linear_logprob(x, w, best, precision=precision)
    assert (certain <= 0).all()
    assert (certain == 0).any()
    _, worst = (x.float() @ w.float().T).min(dim=1)
    unlikely = linear_logprob(x, w, worst, precision=precision)
    assert (unlikely.double() < 0.8 * law(x, w, "bf16", worst).gather(1, worst[:, None]).squeeze(1)).all()
    low = torch.full((300, 32), -40.0).bfloat16()  # all logits near -20,000
    value = linear_logprob(torch.full((2, 32), 16.0).bfloat16(), low, torch.tensor([0, 299]), precision=precision)
    tolerance = 20_480 * 2**-15 if precision == "fp8_rescored" else 4e-3  # what a packed column moves; fp32 spacing
    torch.testing.assert_close(value, torch.full((2,), -5.7037825), rtol=0, atol=tolerance)
    broken = x.clone()
    broken[1] = torch.nan
    assert linear_logprob(broken, w, best, precision=precision).isnan().nonzero().tolist() == [[1]]


@pytest.mark.parametrize("precision", ["bf16", "fp8_rescored"])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_gradients_equal_float64_within_rounding(precision, with_entropy):
    x, w, targets = problem(21, 330, 48)
    draw = torch.Generator().manual_seed(1)
    upstream = [torch.randn(21, generator=draw) for _ in range(2)]
    upstream[0][4] = upstream[1][4] = 0.0
    x, w = x.requires_grad_(), w.requires_grad_()
    found = linear_logprob(x, w, targets, precision=precision, with_entropy=with_entropy, temperature=1.3)
    pair = found if with_entropy else (found,)
    torch.autograd.backward(pair, upstream[: len(pair)])
    a, b = (item.detach().double().requires_grad_() for item in (x, w))
    true = (a @ b.T / 1.3).log_softmax(dim=1)
    value = (true.gather(1, targets[:, None]).squeeze(1) * upstream[0]).sum()
    if with_entropy:
        value = value - ((true.exp() * true).sum(1) * upstream[1]).sum()
    value.backward()
    for mine, right in ((x.grad, a.grad), (w.grad, b.grad)):
        # Of so small a vocabulary two columns are rescored; the rest leaves its rounding in the normaliser.
        assert (mine.double() - right).norm() < (1e-2 if precision == "bf16" else 5e-2) * right.norm()
    assert not x.grad[4].any()


@pytest.mark.parametrize("block_rows", [8, 64])
@pytest.mark.parametrize("vocab", [5, 330])
def test_loss_and_gradients_taken_on_the_way_equal_float64_within_rounding(monkeypatch, vocab, block_rows):
    x, w, targets = problem(21, vocab, 48)
    monkeypatch.setattr(reference, "MAX_CHUNK_ELEMENTS", block_rows * (vocab + 6))
    monkeypatch.setattr(triton_backend, "COLUMNS_AT_ONCE", 128)
    padded = torch.cat([w, torch.full((6, 48), torch.nan, dtype=torch.bfloat16)]).requires_grad_()
    token_weights = torch.rand(21, generator=torch.Generator().manual_seed(1))
    token_weights[4] = 0.0
    x = x.requires_grad_()
    found = linear_cross_entropy(x, padded, targets, token_weights, vocab_size=vocab, precision="bf16", temperature=1.3)
    (2.0 * found).backward()
    a, b = (item.detach().double().requires_grad_() for item in (x, w))
    true = (a @ b.T / 1.3).log_softmax(dim=1).gather(1, targets[:, None]).squeeze(1)
    loss = -(token_weights * true).sum()
    (2.0 * loss).backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    for mine, right in ((x.grad, a.grad), (padded.grad[:vocab], b.grad)):
        assert (mine.double() - right).norm() < 5e-3 * right.norm()
    assert not x.grad[4].any()
    assert not padded.grad[vocab:].any()


def test_ignored_rows_have_no_log_prob_and_no_gradient():
    x, w, targets = problem(9, 90, 32)
    targets[[2, 5]] = -100
    x = x.requires_grad_()
    found = linear_logprob(x, w, targets, precision="bf16", ignore_index=-100)
    found.sum().backward()
    assert found[[2, 5]].tolist() == [0.0, 0.0]
    assert not x.grad[[2, 5]].any()
    kept = [0, 1, 3, 4, 6, 7, 8]
    assert torch.equal(found[kept], linear_logprob(x.detach()[kept], w, targets[kept], precision="bf16"))


class Launches(TorchDispatchMode):
    """Counts torch operations that do work, and those of Triton."""

    FREE = frozenset({"empty", "view", "slice", "select", "transpose", "detach", "unsqueeze", "unbind"})

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.torch, self.kernels = 0, []
        launch = GridExecutor.__call__

        def counted(executor, *args, **options):
            self.kernels.append(executor.fn.__name__)
            with _disable_current_modes():
                launch(executor, *args, **options)

        monkeypatch.setattr(GridExecutor, "__call__", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.torch += func.overloadpacket.__name__ not in self.FREE
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_call_launches_few_kernels(monkeypatch, precision):
    """The head quantised before. Of torch's, 6 check the targets, which is left out on a GPU."""
    x, w, targets = problem(2, 300, 32)
    cache = HeadCache()
    cache.get(w)
    with Launches(monkeypatch) as launches:
        linear_logprob(x, w, targets, precision=precision, cache=cache)
    expected = ["quantize_kernel", "forward_kernel", "finish_kernel"]
    assert launches.kernels == expected[precision == "bf16" :]
    assert launches.torch == 22
