"""Layouts, replica helpers, the CPU view of torch, and the optimizer that replaces torch's."""

import dataclasses
import time
from typing import Any

import pytest
import torch

from megatron_ra3.model import parallel
from megatron_ra3.model.adam import AdamW
from megatron_ra3.model.build import build_model
from tests.distributed import run_ranks
from tests.tiny_model import initialize, llama, qwen2


def _describe(tp: int, pp: int) -> dict[str, Any]:
    layout = initialize(tp, pp)
    received = layout.broadcast_in_replica({"from": layout.rank})
    stage = torch.tensor(float(layout.rank))
    layout.barrier("described")
    return {
        "place": (layout.tp_rank, layout.pp_rank, layout.dp_rank),
        "sizes": (layout.tp_size, layout.pp_size, layout.dp_size, layout.world_size),
        "leader": layout.is_replica_leader,
        "ends": (layout.is_first_stage, layout.is_last_stage),
        "received": received["from"],
        "last_stage": layout.broadcast_from_last_stage(stage).item(),
        "sum": layout.sum_number_over_dp(10.0**layout.rank),
    }


def _refusals() -> list[str]:
    messages = []
    for tp, pp, config in [
        (3, 1, None),
        (4, 1, qwen2()),
        (2, 1, qwen2(intermediate_size=97)),
        (1, 2, llama(num_hidden_layers=3)),
    ]:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller checks the text
            build_model(config or {}, initialize(tp, pp), dtype=torch.float32)
        messages.append(str(caught.value))
    return messages


def _late_rank() -> str:
    layout = dataclasses.replace(initialize(), timeout_s=1)
    if layout.rank == 1:
        time.sleep(3)
        return ""
    with pytest.raises(RuntimeError) as caught:
        layout.barrier("end of step 7")
    return str(caught.value)


def _four_ranks() -> tuple[list[dict[str, Any]], list[str], str]:
    found = [_describe(tp, pp) for tp, pp in [(2, 2), (2, 1), (1, 2)]]
    refusals = _refusals()
    late = _late_rank()
    parallel.destroy()
    return found, refusals, late


@pytest.fixture(scope="module")
def four_ranks() -> list[tuple[list[dict[str, Any]], list[str], str]]:
    return run_ranks(_four_ranks, 4)


def test_layouts_of_four_ranks(four_ranks):
    both, tensor, pipeline = zip(*(found for found, *_ in four_ranks), strict=True)
    assert [found["place"] for found in both] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert [found["received"] for found in both] == [0, 0, 0, 0]
    assert [found["leader"] for found in both] == [True, False, False, False]
    assert [found["last_stage"] for found in both] == [2, 3, 2, 3]
    assert [found["ends"] for found in both] == [(True, False), (True, False), (False, True), (False, True)]
    assert [found["sizes"] for found in tensor] == [(2, 1, 2, 4)] * 4
    assert [found["received"] for found in tensor] == [0, 0, 2, 2]
    assert [found["sum"] for found in tensor] == [101, 1010, 101, 1010]
    assert [found["received"] for found in pipeline] == [0, 1, 0, 1]
    assert [found["sum"] for found in pipeline] == [11, 11, 1100, 1100]


def test_layouts_that_do_not_fit_say_what_to_change(four_ranks):
    world, heads, ffn, layers = four_ranks[3][1]
    assert world == (
        "4 processes cannot be split into replicas of tp=3 x pp=1: start a multiple of 3 processes or lower tp or pp"
    )
    assert heads == "tp=4 does not divide num_key_value_heads=2: choose a tp that does"
    assert ffn == "tp=2 does not divide intermediate_size=97: choose a tp that does"
    assert layers == "pp=2 does not divide num_hidden_layers=3: choose a pp that does"


def test_barrier_names_itself_and_whom_it_awaited(four_ranks):
    message = four_ranks[0][2]
    assert message.startswith("barrier 'end of step 7' failed after at most 1 s")
    assert "Rank 1 failed to pass monitoredBarrier" in message


def _fail_on_rank_1() -> None:
    if initialize().rank == 1:
        raise KeyError("lost")
    time.sleep(60)


def test_a_failing_rank_ends_the_others_with_its_traceback():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed.*KeyError: 'lost'"):
        run_ranks(_fail_on_rank_1, 2)
    assert time.monotonic() - start < 50


def test_single_process_needs_no_launcher():
    layout = initialize()
    assert (layout.world_size, layout.dp_size, layout.is_replica_leader) == (1, 1, True)
    assert layout.broadcast_in_replica("x") == "x"
    assert layout.sum_number_over_dp(2.5) == 2.5


def test_only_megatron_sees_the_cpu_as_cuda():
    initialize()
    from megatron.core.optimizer import clip_grads

    assert clip_grads.torch.zeros(1, device="cuda").device.type == "cpu"
    assert clip_grads.torch.nn is torch.nn
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        torch.zeros(1, device="cuda")


def test_adamw_takes_the_same_steps_as_torch():
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(5, 3, generator=draw), torch.randn(4, generator=draw)]
    gradients = [[torch.randn(tensor.shape, generator=draw) for tensor in start] for _ in range(6)]
    settings = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    ends = []
    for cls in (AdamW, torch.optim.AdamW):
        params = [torch.nn.Parameter(tensor.double()) for tensor in start]
        optimizer = cls(params, **settings)
        for step in gradients:
            for param, gradient in zip(params, step, strict=True):
                param.grad = gradient.double()
            optimizer.step()
        ends.append(params)
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="adam_w_mode=False"):
        AdamW([torch.nn.Parameter(torch.zeros(1))], adam_w_mode=False)
