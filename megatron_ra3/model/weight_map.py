"""Which Hugging Face tensors make up which Megatron parameter, and how they are cut over tensor-parallel ranks.

Pure tensor arithmetic. Megatron interleaves q, k and v per query group and stacks gate on up per rank; a wrong order
loads without any error and trains a scrambled model, so both directions live here side by side.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from megatron_ra3.model.geometry import Geometry

Kind = Literal["replicated", "columns", "qkv", "gate_up", "vocab"]


@dataclasses.dataclass(frozen=True)
class Slot:
    """One Megatron parameter: its candidate names (local spec, Transformer Engine spec), stage, and HF tensors."""

    megatron_names: tuple[str, ...]
    stage: int
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    kind: Kind


def slots(geometry: Geometry, pp_size: int) -> list[Slot]:
    """List every parameter of the whole model in file order. With tied embeddings the last stage's copy is left out."""
    g = geometry
    per_stage = g.layers // pp_size
    found = [
        Slot(("embedding.word_embeddings.weight",), 0, ("model.embed_tokens.weight",), ((g.vocab, g.hidden),), "vocab")
    ]
    for layer in range(g.layers):
        found += _layer_slots(g, layer, layer % per_stage, layer // per_stage)
    last = pp_size - 1
    found.append(Slot(("decoder.final_layernorm.weight",), last, ("model.norm.weight",), ((g.hidden,),), "replicated"))
    if not g.tied:
        found.append(Slot(("output_layer.weight",), last, ("lm_head.weight",), ((g.vocab, g.hidden),), "vocab"))
    return found


def _layer_slots(g: Geometry, layer: int, local_layer: int, stage: int) -> list[Slot]:
    hf, megatron = f"model.layers.{layer}", f"decoder.layers.{local_layer}"
    attention, mlp = f"{megatron}.self_attention", f"{megatron}.mlp"
    q_rows, kv_rows = g.heads * g.head_dim, g.kv_heads * g.head_dim
    qkv = tuple(f"{hf}.self_attn.{part}_proj" for part in "qkv")

    def slot(names: tuple[str, ...], hf_names: Sequence[str], shapes: Sequence[tuple[int, ...]], kind: Kind) -> Slot:
        return Slot(names, stage, tuple(hf_names), tuple(shapes), kind)

    found = [
        slot(
            (f"{megatron}.input_layernorm.weight", f"{attention}.linear_qkv.layer_norm_weight"),
            (f"{hf}.input_layernorm.weight",),
            ((g.hidden,),),
            "replicated",
        ),
        slot(
            (f"{attention}.linear_qkv.weight",),
            [f"{name}.weight" for name in qkv],
            ((q_rows, g.hidden), (kv_rows, g.hidden), (kv_rows, g.hidden)),
            "qkv",
        ),
    ]
    if g.qkv_bias:
        found.append(
            slot(
                (f"{attention}.linear_qkv.bias",),
                [f"{name}.bias" for name in qkv],
                ((q_rows,), (kv_rows,), (kv_rows,)),
                "qkv",
            )
        )
    return [
        *found,
        slot(
            (f"{attention}.linear_proj.weight",), (f"{hf}.self_attn.o_proj.weight",), ((g.hidden, q_rows),), "columns"
        ),
        slot(
            (f"{megatron}.pre_mlp_layernorm.weight", f"{mlp}.linear_fc1.layer_norm_weight"),
            (f"{hf}.post_attention_layernorm.weight",),
            ((g.hidden,),),
            "replicated",
        ),
        slot(
            (f"{mlp}.linear_fc1.weight",),
            (f"{hf}.mlp.gate_proj.weight", f"{hf}.mlp.up_proj.weight"),
            ((g.ffn, g.hidden), (g.ffn, g.hidden)),
            "gate_up",
        ),
        slot((f"{mlp}.linear_fc2.weight",), (f"{hf}.mlp.down_proj.weight",), ((g.hidden, g.ffn),), "columns"),
    ]


def shard(slot: Slot, tensors: Sequence[Tensor], geometry: Geometry, tp_rank: int, tp_size: int, rows: int) -> Tensor:
    """Cut full Hugging Face tensors to one rank's Megatron parameter. `rows`: that parameter's rows, for padding."""
    match slot.kind:
        case "replicated":
            return tensors[0]
        case "columns":
            return tensors[0].chunk(tp_size, dim=1)[tp_rank]
        case "gate_up":
            return torch.cat([tensor.chunk(tp_size)[tp_rank] for tensor in tensors])
        case "qkv":
            groups = [tensor.unflatten(0, (geometry.kv_heads, -1)) for tensor in tensors]
            return torch.cat(groups, dim=1).chunk(tp_size)[tp_rank].flatten(0, 1)
        case "vocab":
            real = tensors[0][rows * tp_rank : rows * (tp_rank + 1)]
            padding = real.new_zeros(rows - real.shape[0], real.shape[1])
            return torch.cat([real, padding])


def unshard(slot: Slot, shards: Sequence[Tensor], geometry: Geometry) -> tuple[Tensor, ...]:
    """Undo `shard`: assemble full Hugging Face tensors from all tensor-parallel ranks' parameters."""
    match slot.kind:
        case "replicated":
            return (shards[0],)
        case "columns":
            return (torch.cat(list(shards), dim=1),)
        case "gate_up":
            halves = [part.chunk(2) for part in shards]
            return torch.cat([half[0] for half in halves]), torch.cat([half[1] for half in halves])
        case "qkv":
            groups = torch.cat(list(shards)).unflatten(0, (geometry.kv_heads, -1))
            q_rows = geometry.heads // geometry.kv_heads * geometry.head_dim
            parts = groups.split([q_rows, geometry.head_dim, geometry.head_dim], dim=1)
            return tuple(part.flatten(0, 1) for part in parts)
        case "vocab":
            return (torch.cat(list(shards))[: geometry.vocab],)
