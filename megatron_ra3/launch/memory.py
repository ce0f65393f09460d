"""What lies in a GPU's memory: exactly where it is ours to count, with a named reserve where it is not.

A run that does not fit otherwise ends after an hour in the queue. Tensors of parameters, gradients, optimizer and of
activations kept for the backward pass are counted one by one, as `model.build` and Megatron-Core 0.16 make them: no
activation is recomputed, gradients are reduced in fp32. `ra3 bench plan` compares these counts with real tensors.
Transformer Engine's layers cannot be built on a CPU, so their count follows from its sources alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_ra3.launch.hardware import DTYPE_BYTES, GIB, Device, Dtype
from megatron_ra3.model.geometry import Geometry

RESERVED_BYTES = 4 * GIB
"""CUDA context, NCCL's and cuBLAS's buffers, fragments that the allocator cannot use: an assumption."""
ENGINE_RESERVED_BYTES = 4 * GIB
"""What vLLM takes beside weights and cache: activations of a step, logits of scored prompts, graphs; an assumption."""
HEAD_BLOCK_ELEMENTS = 2**29
"""`kernels.linear_cross_entropy.BLOCK_ELEMENTS`: logits that are alive at a time on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How a model and its optimizer are cut over the trainer ranks."""

    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    distributed_optimizer: bool = False


@dataclass(frozen=True, kw_only=True)
class MicroBatchShape:
    """A padded micro-batch: `tokens` in rows of `sequence_tokens` each."""

    tokens: float
    sequence_tokens: float


@dataclass(frozen=True)
class TrainerMemory:
    """Bytes on one trainer GPU at the peak of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    """Gradients that the fused output layer holds, and its block of logits; last stage only."""
    reserved: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head + self.reserved


@dataclass(frozen=True)
class EngineMemory:
    """Bytes on one GPU of an engine, and what its cache holds."""

    weights: float
    reserved: float
    kv_cache: float
    """What `engine.memory_fraction` leaves for keys and values; negative where the model does not fit."""
    kv_bytes_per_token: int
    sequences: int
    """Mean trajectories whose keys and values fit at a time."""


def layer_parameters(g: Geometry, tp_size: int) -> int:
    """Parameters of one layer on one tensor-parallel rank."""
    qkv_rows = (g.heads + 2 * g.kv_heads) * g.head_dim
    bias = qkv_rows if g.qkv_bias else 0
    matrices = g.hidden * (qkv_rows + g.heads * g.head_dim) + 3 * g.hidden * g.ffn
    return (matrices + bias) // tp_size + 2 * g.hidden


def vocabulary_parameters(g: Geometry, tp_size: int, row_multiple: int) -> int:
    """Parameters of one embedding or output layer on one tensor-parallel rank, padded rows included."""
    multiple = tp_size * row_multiple
    return math.ceil(g.vocab / multiple) * row_multiple * g.hidden


def stage_parameters(g: Geometry, sharding: Sharding, stage: int, row_multiple: int) -> int:
    """Parameters of a rank in pipeline stage `stage`; the last stage of a tied model holds an embedding of its own."""
    tables = int(stage == 0)
    last = stage == sharding.pp_size - 1
    if last and not (g.tied and sharding.pp_size == 1):
        tables += 1
    layers = g.layers // sharding.pp_size * layer_parameters(g, sharding.tp_size)
    return layers + tables * vocabulary_parameters(g, sharding.tp_size, row_multiple) + (g.hidden if last else 0)


def model_parameters(g: Geometry) -> int:
    """Parameters of the whole model, as they are counted by whoever publishes it."""
    return stage_parameters(g, Sharding(), 0, row_multiple=1)


def optimizer_bytes_per_parameter(dtype: Dtype, sharding: Sharding) -> float:
    """Two fp32 moments, and an fp32 copy of bf16 weights; over the replicas with the distributed optimizer."""
    per_parameter = 8.0 if dtype == "fp32" else 12.0
    return per_parameter / sharding.dp_size if sharding.distributed_optimizer else per_parameter


def layer_activation_bytes(g: Geometry, tp_size: int, dtype: Dtype, batch: MicroBatchShape, *, fused: bool) -> float:
    """What one layer keeps of a micro-batch for its backward pass.

    Transformer Engine: input and output of both norms (split over the ranks by sequence parallelism), q, k, v and the
    context, both halves of the first product of the feed-forward part and the product's input to the second.
    Megatron's own layers: norms that keep a normalised copy too (in fp32), keys and values repeated to as many heads
    as queries have, scores [s, s] in fp32 (and rounded), and four parts of the gated activation.
    """
    size = DTYPE_BYTES[dtype]
    heads, ffn = g.heads // tp_size, g.ffn // tp_size
    width = heads * g.head_dim
    if fused:
        norms = 2 * (2 * size * g.hidden + 4) / tp_size
        attention = size * (2 * width + 2 * g.kv_heads * g.head_dim / tp_size) + 4 * heads
        return batch.tokens * (norms + attention + size * 3 * ffn)
    norms = 2 * ((8 + size) * g.hidden + 4)
    scores = batch.sequence_tokens * heads * (4 if dtype == "fp32" else 4 + size)
    per_token = norms + size * (4 * width + 5 * ffn) + scores
    rotary_and_mask = batch.sequence_tokens * (4 * size * g.head_dim + batch.sequence_tokens)
    return batch.tokens * per_token + rotary_and_mask


def activation_bytes(
    g: Geometry, sharding: Sharding, stage: int, dtype: Dtype, batch: MicroBatchShape, *, in_flight: int, fused: bool
) -> float:
    """What a stage keeps of the `in_flight` micro-batches that are between their forward and backward passes."""
    layer = layer_activation_bytes(g, sharding.tp_size, dtype, batch, fused=fused)
    kept = g.layers // sharding.pp_size * layer
    if stage == 0:
        kept += 8 * batch.tokens  # token ids
    if stage == sharding.pp_size - 1:
        size = DTYPE_BYTES[dtype] if fused else 4
        kept += batch.tokens * (2 * size * g.hidden + 4)
    return in_flight * kept


def head_kept_bytes(g: Geometry, tp_size: int, dtype: Dtype, tokens: float, *, row_multiple: int) -> float:
    """What `kernels.linear_cross_entropy` keeps for the backward pass: both its gradients, and row numbers."""
    table = vocabulary_parameters(g, tp_size, row_multiple)
    return DTYPE_BYTES[dtype] * (table + tokens * g.hidden) + 8 * tokens


def head_bytes(g: Geometry, tp_size: int, dtype: Dtype, tokens: float, *, row_multiple: int) -> float:
    """Peak of `kernels.linear_cross_entropy` on a GPU.

    The gradient of the weight in fp32 beside either the block of logits (with its bf16 gradient) or its own copy in
    `dtype`; and the gradient of the hidden states with its copy, and row numbers.
    """
    table = vocabulary_parameters(g, tp_size, row_multiple)
    block = min(HEAD_BLOCK_ELEMENTS, tokens * table / g.hidden) * (4 if dtype == "fp32" else 6)
    copied = 0 if dtype == "fp32" else DTYPE_BYTES[dtype]
    return 4 * table + max(block, copied * table) + tokens * ((4 + copied) * g.hidden + 8)


def trainer_memory(
    g: Geometry,
    sharding: Sharding,
    stage: int,
    dtype: Dtype,
    batch: MicroBatchShape,
    *,
    micro_batches: int,
    device: Device,
) -> TrainerMemory:
    """A trainer GPU of pipeline stage `stage` while it takes a next-token step, the larger of the two kinds of step."""
    parameters = stage_parameters(g, sharding, stage, device.row_multiple)
    last = stage == sharding.pp_size - 1
    head = 0.0
    if last:
        head = head_bytes(g, sharding.tp_size, dtype, batch.tokens, row_multiple=device.row_multiple)
    return TrainerMemory(
        weights=DTYPE_BYTES[dtype] * parameters,
        gradients=4.0 * parameters,
        optimizer=optimizer_bytes_per_parameter(dtype, sharding) * parameters,
        activations=activation_bytes(
            g,
            sharding,
            stage,
            dtype,
            batch,
            in_flight=min(sharding.pp_size - stage, micro_batches),
            fused=device.fused,
        ),
        head=head,
        reserved=RESERVED_BYTES,
    )


def kv_bytes_per_token(g: Geometry, tp_size: int, dtype: Dtype) -> int:
    """Keys and values of a token on one GPU of an engine; a head that cannot be split is held by several."""
    return 2 * g.layers * math.ceil(g.kv_heads / tp_size) * g.head_dim * DTYPE_BYTES[dtype]


def engine_memory(
    g: Geometry, tp_size: int, dtype: Dtype, *, memory_bytes: float, trajectory_tokens: float
) -> EngineMemory:
    """One GPU of an engine that may take `memory_bytes` of it."""
    weights = model_parameters(g) / tp_size * DTYPE_BYTES[dtype]
    per_token = kv_bytes_per_token(g, tp_size, dtype)
    cache = memory_bytes - weights - ENGINE_RESERVED_BYTES
    return EngineMemory(
        weights=weights,
        reserved=ENGINE_RESERVED_BYTES,
        kv_cache=cache,
        kv_bytes_per_token=per_token,
        sequences=max(0, int(cache / per_token / trajectory_tokens)),
    )
