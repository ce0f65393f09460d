"""Build Megatron-Core's GPTModel from a Hugging Face config, for the Qwen2 and Llama families.

The model ends in hidden states, not in logits: the likelihood kernel takes hidden states and the output layer's
weight, so [tokens, vocabulary] never exists. `geometry.check_config` says which configs this mapping takes.
"""

import contextlib
import importlib.util
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional
from torch import Tensor

from megatron_ra3.model import cpu
from megatron_ra3.model.geometry import Geometry, check_config, rope
from megatron_ra3.model.parallel import ParallelLayout
from megatron_ra3.stall import ACTIVITY

cpu.enable()

from megatron.core import tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


class HiddenStatesModel(GPTModel):
    """GPTModel whose last stage returns the final hidden states [s, b, H], complete on every tensor-parallel rank."""

    def _postprocess(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        if self.post_process and self.config.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden_states

    def head_weight(self) -> Tensor:
        """Return this rank's rows [V_padded/tp, H] of the output layer (the embedding if tied); last stage only."""
        assert self.post_process, "only the last pipeline stage has an output layer"
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


class RA3Model:
    """One rank's part of the model, wrapped for data parallelism, with the config it came from.

    Gradients are SUMMED over micro-batches and replicas: losses arrive already divided by global counts.
    """

    def __init__(self, hf_config: Mapping[str, Any], layout: ParallelLayout, dtype: torch.dtype, distributed: bool):
        self.hf_config = dict(hf_config)
        self.layout = layout
        self.vocab_size = int(hf_config["vocab_size"])
        self.padded_vocab_size = padded_vocab_size(self.vocab_size, layout.tp_size)
        self.config = transformer_config(hf_config, layout, dtype)
        self.module = _gpt_model(self.config, hf_config, layout, self.padded_vocab_size)
        if dtype != torch.float32:
            self.module.to(dtype)
        self.ddp = DistributedDataParallel(
            self.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=False,
                use_distributed_optimizer=distributed,
                average_in_collective=False,
            ),
            self.module,
        )

    @property
    def tied(self) -> bool:
        """Input embedding and output layer are one tensor."""
        return bool(self.module.share_embeddings_and_output_weights)


def build_model(
    hf_config: Mapping[str, Any], layout: ParallelLayout, *, dtype: torch.dtype, distributed_optimizer: bool = False
) -> RA3Model:
    """Build this rank's uninitialised part of the model; `names.import_hf` fills it.

    `distributed_optimizer` must match `trainer.build_optimizer`'s: it decides how gradients are reduced.
    ValueError: see `check_config`.
    """
    check_config(hf_config, layout)
    return RA3Model(hf_config, layout, dtype, distributed_optimizer)


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Round up so that every rank holds equally many rows; on a GPU a multiple of 128 each, for its matrix units."""
    multiple = tp_size * (128 if torch.cuda.is_available() else 1)
    return math.ceil(vocab_size / multiple) * multiple


def has_transformer_engine() -> bool:
    """Transformer Engine's fused layers are used when this holds, else Megatron's own ("local") ones."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def transformer_config(hf_config: Mapping[str, Any], layout: ParallelLayout, dtype: torch.dtype) -> TransformerConfig:
    """Translate a Hugging Face config. Fusions and sequence parallelism need Transformer Engine's layers."""
    geometry = Geometry.of(hf_config)
    fused = has_transformer_engine()
    return TransformerConfig(
        num_layers=geometry.layers,
        hidden_size=geometry.hidden,
        num_attention_heads=geometry.heads,
        num_query_groups=geometry.kv_heads,
        kv_channels=geometry.head_dim,
        ffn_hidden_size=geometry.ffn,
        layernorm_epsilon=hf_config["rms_norm_eps"],
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=geometry.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=_leave_uninitialised,
        output_layer_init_method=_leave_uninitialised,
        use_cpu_initialization=not torch.cuda.is_available(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        sequence_parallel=fused and layout.tp_size > 1,
        variable_seq_lengths=layout.pp_size > 1,
        moe_token_dispatcher_type="alltoall",  # noqa: S106 - the default refuses variable lengths, experts or not
        cuda_graph_scope=[],
        calculate_per_token_loss=True,
        finalize_model_grads_func=partial(_finalize_summed_grads, layout.replicas if layout.dp_size > 1 else ""),
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )


def _leave_uninitialised(_weight: Tensor) -> None:
    """Do nothing: the weights come from a Hugging Face folder.

    `perform_initialization=False` would also leave out the marks that a weight is split over tensor-parallel ranks, and
    the gradient norm would miss all shards but the first.
    """


def _finalize_summed_grads(replicas: str, model: list[Any], _num_tokens: Any = None, **kwargs: Any) -> None:
    """Megatron's reduction over replicas and embeddings, without its division by a token count."""
    with ACTIVITY.waiting("gradients of the replicas", replicas) if replicas else contextlib.nullcontext():
        finalize_model_grads(model, None, **kwargs)


def _gpt_model(
    config: TransformerConfig, hf_config: Mapping[str, Any], layout: ParallelLayout, vocab_rows: int
) -> HiddenStatesModel:
    if has_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    settings = rope(hf_config)
    model = HiddenStatesModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=vocab_rows,
        max_sequence_length=hf_config["max_position_embeddings"],
        pre_process=layout.is_first_stage,
        post_process=layout.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=bool(hf_config.get("tie_word_embeddings", False)),
        position_embedding_type="rope",
        rotary_base=settings["rope_theta"],
    )
    if settings["rope_type"] == "llama3":
        model.rotary_pos_emb.inv_freq = _llama3_frequencies(model.rotary_pos_emb.inv_freq, settings)
    return model.to(layout.device)


def _llama3_frequencies(inv_freq: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: short wavelengths stay, long ones are divided by `factor`, those between are blended."""
    turns = settings["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - blend) * inv_freq / settings["factor"] + blend * inv_freq
