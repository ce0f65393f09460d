"""Seconds of training steps, of sampling and of weight syncs: arithmetic over rates, no magic factor per phase.

Matrix products run at the rate of the matrix units, everything between them at the rate of the memory, collectives at
the rate of the slowest link they cross; nothing of ours overlaps with anything else yet. `ra3 bench plan` holds the
training part against real steps.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from megatron_ra3.launch.hardware import DTYPE_BYTES, Device, Dtype
from megatron_ra3.launch.layout import Layout
from megatron_ra3.launch.memory import (
    Sharding,
    kv_bytes_per_token,
    layer_parameters,
    model_parameters,
    stage_parameters,
    vocabulary_parameters,
)
from megatron_ra3.launch.workload import Workload
from megatron_ra3.model.geometry import Geometry
from megatron_ra3.rollout.window import LARGEST_WINDOW_LINES, WORTH_SCORING

LAUNCH_S = 2e-4
"""Host time that Python and Megatron take for one layer in one direction; the GPU idles where it is faster."""
ENGINE_STEP_S = 2e-3
"""vLLM's own time per engine step beside the model (scheduling, sampling, answers): an assumption."""
REQUEST_S = 1e-3
"""Time of an API server and its client per request, one after the other: an assumption."""
SYNC_FIXED_S = 0.1
"""Pause, drain, reset and resume of a sync; 0.07 s was measured over HTTP with a tiny model."""
TP_LATENCY_S = 1.5e-5
"""Of one small all-reduce inside a node."""
CACHE_BLOCK_TOKENS = 16
"""vLLM's prefix cache keeps whole blocks; half a one is computed again by every request."""

Limit = Literal["engine.max_in_flight", "KV cache", "trajectories"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a model runs: the device, its layout and how the model is cut."""

    device: Device
    layout: Layout
    dtype: Dtype
    distributed_optimizer: bool = False

    @property
    def sharding(self) -> Sharding:
        """The cut, for `memory`."""
        return Sharding(
            tp_size=self.layout.tp_size,
            pp_size=self.layout.pp_size,
            dp_size=self.layout.dp_size,
            distributed_optimizer=self.distributed_optimizer,
        )

    @property
    def data_bytes_per_s(self) -> float:
        """Per rank, of a collective over the replicas: as many adapters as the group has ranks on a node."""
        if self.layout.data_group_nodes() == 1:
            return self.device.nvlink_bytes_per_s
        adapters = self.layout.data_group_ranks_per_node()
        return min(self.device.nvlink_bytes_per_s, adapters * self.device.network_bytes_per_s)

    @property
    def tensor_bytes_per_s(self) -> float:
        """Per rank, of a collective inside a tensor-parallel group."""
        inside = self.layout.tensor_group_nodes() == 1
        return self.device.nvlink_bytes_per_s if inside else self.device.network_bytes_per_s


@dataclass(frozen=True)
class StepTime:
    """Seconds of a pass over a replica's micro-batches, by what they go into."""

    layers: float = 0.0
    head: float = 0.0
    tensor_parallel: float = 0.0
    bubble: float = 0.0
    data_parallel: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(dataclasses.astuple(self))

    def __add__(self, other: StepTime) -> StepTime:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return StepTime(*(one + two for one, two in pairs))


@dataclass(frozen=True)
class Sampling:
    """One `sample` call over all engines."""

    seconds: float
    decode: float
    """Seconds of engine steps that wait for the weights to be read."""
    prefill: float
    requests: float
    """Seconds that servers and clients spend on requests, if that is longer than the engines take."""
    in_flight: int
    """Trajectories at a time per engine."""
    limit: Limit
    """What keeps it from being more."""
    tokens_per_s: float
    """Sampled tokens, over all engines."""


def layer_flops(g: Geometry, tokens: float, sequence_tokens: float, *, fused: bool) -> float:
    """Forward pass of a whole layer; fused attention skips the half that the causal mask hides."""
    matrices = 2 * (layer_parameters(g, 1) - 2 * g.hidden)
    seen = sequence_tokens / 2 if fused else sequence_tokens
    return tokens * (matrices + 4 * g.heads * g.head_dim * seen)


def layer_traffic_bytes(
    g: Geometry, tp_size: int, dtype: Dtype, tokens: float, sequence_tokens: float, *, fused: bool
) -> float:
    """Bytes that the operations between the products of a layer read and write on a rank, forward.

    Norms, residual sums, rotary embedding, gated activation; without fused layers also what each of their parts stores,
    keys and values repeated, and the passes over [s, s] scores.
    """
    size = DTYPE_BYTES[dtype]
    width, ffn = g.heads * g.head_dim / tp_size, g.ffn / tp_size
    rotated = 2 * (width + g.kv_heads * g.head_dim / tp_size)
    if fused:
        return tokens * size * (10 * g.hidden / tp_size + rotated + 3 * ffn)
    scores = 6 * sequence_tokens * g.heads / tp_size
    return tokens * size * (20 * g.hidden + 4 * rotated + 4 * width + 7 * ffn + scores)


def layers_seconds(g: Geometry, machine: Machine, tokens: float, sequence_tokens: float, passes: int) -> StepTime:
    """The layers of one stage over one micro-batch; `passes` is 1 for forward, 3 with backward.

    Tensor parallelism reduces [tokens, H] twice per layer and direction; a reduction moves 2 (t-1)/t of it per rank.
    """
    layout, device = machine.layout, machine.device
    tp_size = layout.tp_size
    products = layer_flops(g, tokens, sequence_tokens, fused=device.fused) / tp_size / device.flops
    between = layer_traffic_bytes(g, tp_size, machine.dtype, tokens, sequence_tokens, fused=device.fused)
    directions = 1 if passes == 1 else 2
    computing = max(passes * (products + between / device.memory_bytes_per_s), directions * LAUNCH_S)
    moved = tokens * g.hidden * DTYPE_BYTES[machine.dtype] * 2 * (tp_size - 1) / tp_size
    reducing = 2 * directions * moved / machine.tensor_bytes_per_s
    layers = g.layers / layout.pp_size
    return StepTime(layers=layers * computing, tensor_parallel=layers * reducing)


def head_seconds(g: Geometry, machine: Machine, rows: float, products: int, *, fp8: bool = False) -> float:
    """The output layer over `rows` scored tokens; `products` counts its matrix products (docs/kernels.md)."""
    table = vocabulary_parameters(g, machine.layout.tp_size, machine.device.row_multiple)
    rate = machine.device.fp8_flops if fp8 else machine.device.flops
    between = 0.0
    if not machine.device.fused:  # the torch backend writes its blocks of logits and passes over them
        between = 6 * rows * table / g.hidden * 4 / machine.device.memory_bytes_per_s
    return 2 * rows * table * products / rate + between


def pipelined(per_batch: StepTime, head: float, micro_batches: int, pp_size: int) -> StepTime:
    """All micro-batches through all stages, whose last one also has the output layer: 1F1B waits for the slowest."""
    stage = per_batch.total
    slowest = stage + head
    whole = (micro_batches - 1) * slowest + pp_size * stage + head
    own = micro_batches * (stage + head)
    return StepTime(
        layers=micro_batches * per_batch.layers,
        tensor_parallel=micro_batches * per_batch.tensor_parallel,
        head=micro_batches * head,
        bubble=max(0.0, whole - own),
    )


def optimizer_seconds(g: Geometry, machine: Machine) -> float:
    """Reading and writing parameters, gradients and moments; unfused AdamW passes over them operation by operation."""
    parameters = stage_parameters(g, machine.sharding, 0, machine.device.row_multiple)
    owned = parameters / (machine.layout.dp_size if machine.distributed_optimizer else 1)
    per_parameter = 30 if machine.device.fused else 88
    clearing_and_norm = 8 * parameters
    return (per_parameter * owned + clearing_and_norm) / machine.device.memory_bytes_per_s


def data_parallel_seconds(g: Geometry, machine: Machine) -> float:
    """Gradients are summed in fp32; the distributed optimizer scatters them and gathers weights in the model's type."""
    dp_size = machine.layout.dp_size
    if dp_size == 1:
        return 0.0
    parameters = stage_parameters(g, machine.sharding, 0, machine.device.row_multiple)
    per_parameter = 4 + DTYPE_BYTES[machine.dtype] if machine.distributed_optimizer else 8
    return per_parameter * parameters * (dp_size - 1) / dp_size / machine.data_bytes_per_s


def training_step(
    g: Geometry, machine: Machine, work: Workload, sequences: float, *, head_rows: float = 1.0, head_products: int = 3
) -> StepTime:
    """Forward, backward and update on `sequences` trajectories over all replicas.

    `head_rows` is the part of a trajectory's tokens whose log-probs are trained on. A next-token loss takes its
    gradients on the way (3 products of the output layer), a policy gradient computes its logits twice (4).
    """
    count, tokens = work.micro_batches(math.ceil(sequences / machine.layout.dp_size))
    per_batch = layers_seconds(g, machine, tokens, work.trajectory_tokens, passes=3)
    head = head_seconds(g, machine, tokens * head_rows, products=head_products)
    return pipelined(per_batch, head, count, machine.layout.pp_size) + StepTime(
        data_parallel=data_parallel_seconds(g, machine), optimizer=optimizer_seconds(g, machine)
    )


def scoring_pass(g: Geometry, machine: Machine, work: Workload, sequences: float, *, fp8: bool = False) -> StepTime:
    """Log-probs of all tokens of `sequences` trajectories over all replicas, without gradients."""
    count, tokens = work.micro_batches(math.ceil(sequences / machine.layout.dp_size))
    per_batch = layers_seconds(g, machine, tokens, work.trajectory_tokens, passes=1)
    head = head_seconds(g, machine, tokens, products=1, fp8=fp8)
    return pipelined(per_batch, head, count, machine.layout.pp_size)


def queries_per_trajectory(work: Workload) -> float:
    """Gate queries of one trajectory: one to the end, and one anew after each rationale, as windows find them."""
    return 1.0 + work.thinks / (1.0 - WORTH_SCORING)


def prefilled_tokens(work: Workload, rollouts: int) -> float:
    """Tokens that an engine computes of prompts per trajectory.

    A group shares its first pass over the snippet. Every query after a rationale scores a window ahead, on average half
    of what is left at most, and half a cache block that the prefix cache does not hold.
    """
    window = LARGEST_WINDOW_LINES
    if 0.0 < work.think_rate < 1.0:
        window = min(window, math.ceil(math.log(WORTH_SCORING) / math.log1p(-work.think_rate)))
    elif work.think_rate == 1.0:
        window = 1
    ahead = min(window, 1.0 + work.actions / 2) * work.action_tokens
    again = queries_per_trajectory(work) - 1.0
    return work.snippet_tokens / rollouts + again * (ahead + CACHE_BLOCK_TOKENS / 2)


def sampling(
    g: Geometry,
    machine: Machine,
    work: Workload,
    *,
    snippets: int,
    rollouts: int,
    max_in_flight: int,
    cached_sequences: int,
) -> Sampling:
    """Latents for `snippets` x `rollouts` trajectories on the layout's engines, all engines equally loaded.

    A trajectory is a chain of queries and rationales; engines decode those in flight together, reading all weights in
    every step. Stragglers at the end of a step are not modelled.
    """
    layout, device = machine.layout, machine.device
    tp_size = layout.engine_tp_size
    per_replica = math.ceil(snippets / layout.dp_size) * rollouts
    own = math.ceil(per_replica / max(1, layout.engines // layout.dp_size))
    bounds: dict[Limit, int] = {
        "engine.max_in_flight": max_in_flight,
        "KV cache": cached_sequences,
        "trajectories": own,
    }
    limit = min(bounds, key=lambda name: bounds[name])
    in_flight = max(1, bounds[limit])
    parameters = model_parameters(g)
    weights_s = parameters / tp_size * DTYPE_BYTES[machine.dtype] / device.memory_bytes_per_s
    products_s = 2 * parameters * in_flight / tp_size / device.flops
    cache_bytes = in_flight * work.trajectory_tokens / 2 * kv_bytes_per_token(g, tp_size, machine.dtype)
    reducing_s = 2 * g.layers * TP_LATENCY_S if tp_size > 1 else 0.0
    step_s = max(weights_s, products_s) + cache_bytes / device.memory_bytes_per_s + reducing_s + ENGINE_STEP_S
    queries = queries_per_trajectory(work)
    waves = max(1.0, own / in_flight)
    decode_s = waves * (work.latent_tokens + queries) * step_s
    flops_per_token = layer_flops(g, 1.0, work.trajectory_tokens, fused=True) * g.layers + 2 * g.hidden * g.vocab
    prefill_s = own * prefilled_tokens(work, rollouts) * flops_per_token / tp_size / device.flops
    requests_s = own * (queries + work.thinks) * REQUEST_S
    seconds = max(decode_s + prefill_s, requests_s)
    return Sampling(
        seconds=seconds,
        decode=decode_s,
        prefill=prefill_s,
        requests=max(0.0, requests_s - decode_s - prefill_s),
        in_flight=in_flight,
        limit=limit,
        tokens_per_s=snippets * rollouts * work.latent_tokens / seconds,
    )


def sync_seconds(g: Geometry, machine: Machine) -> float:
    """One broadcast of all weights from the first trainer rank, tensors gathered over tensor-parallel ranks before."""
    size = model_parameters(g) * DTYPE_BYTES[machine.dtype]
    same_node = machine.layout.nodes == 1
    rate = machine.device.nvlink_bytes_per_s if same_node else machine.device.network_bytes_per_s
    gathering = size / machine.tensor_bytes_per_s if machine.layout.tp_size > 1 else 0.0
    return SYNC_FIXED_S + size / rate + gathering
