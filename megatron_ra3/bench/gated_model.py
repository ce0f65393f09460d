"""A small random model that thinks at a chosen rate, to measure sampling without training anything first.

The rate must come out of the model's own law: forcing gates from outside would bypass the scoring that is measured.
One dimension of the hidden state is the same at every position, so the output layer has a bias along it; the biases
of the think token and of the token that closes a rationale are solved for on the snippets that will be sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ra3.latents import Kind, LatentFormat, Snippet

if TYPE_CHECKING:
    from torch import Tensor

SPELLED = ("<eos>", "\n", "#", "<act>", "<think>", "</think>")
INITIALIZER_RANGE = 0.2
CONSTANT = 1.0
"""Value of every embedding in the constant dimension; the others have a standard deviation of INITIALIZER_RANGE."""
HEAD_DIM = 32
"""The least that vLLM's CPU attention takes."""


@dataclass(frozen=True)
class SyntheticTokenizer:
    """`latents.Tokenizer` of the surface forms' own tokens and `vocab_size` - 6 others without a text of use."""

    vocab_size: int
    eos_id: int = 0

    def encode(self, text: str) -> list[int]:
        """The one token spelled exactly so."""
        return [SPELLED.index(text)]

    def id_of(self, token: str) -> int:
        """Id of a spelled token."""
        return SPELLED.index(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The token's spelling."""
        return (SPELLED[token_id] if token_id < len(SPELLED) else f"w{token_id}").encode()


@dataclass(frozen=True, kw_only=True)
class GatedModel:
    """What to make: a Qwen2 of `hidden_size` / 32 heads, sampled over whole rationales of a mean length.

    `gate_spread` (nats) is the standard deviation of the think token's logit over contexts.
    """

    latent_format: LatentFormat
    vocab_size: int
    layers: int
    hidden_size: int
    think_rate: float
    rationale_tokens: float
    gate_spread: float = 1.0
    max_positions: int = 4096


def write_gated_model(folder: Path, model: GatedModel, snippets: Sequence[Snippet], *, seed: int) -> None:
    """Write a Hugging Face folder whose mean gate probability over the snippets' lines is `model.think_rate`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=2 * model.hidden_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.hidden_size // HEAD_DIM,
        num_key_value_heads=model.hidden_size // HEAD_DIM,
        max_position_embeddings=model.max_positions,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=False,
    )
    network = Qwen2ForCausalLM(config).float().eval().requires_grad_(False)
    network.model.embed_tokens.weight[:, 0] = CONSTANT
    for layer in network.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    _set_output_layer(network, model, snippets)
    network.save_pretrained(folder)


def _set_output_layer(network: Any, model: GatedModel, snippets: Sequence[Snippet]) -> None:
    import torch

    form = model.latent_format
    think, close = form.gate_ids[-1], form.close[-1]
    head = network.lm_head.weight
    head[:, 0] = 0.0
    head[list(form.gate_ids)] = 0.0
    head[think, 1:] = torch.randn(model.hidden_size - 1) * model.gate_spread / math.sqrt(model.hidden_size)
    states, at_gate = _hidden_states(network, form, snippets)

    logits = states @ head.T
    logits[:, think] = -math.inf
    full_vocabulary = form.surface == "newline"  # there the think token is one among all, also inside a rationale
    kept = 1.0 - model.think_rate if full_vocabulary else 1.0
    closes = logits[:, close] - _others(logits, close)
    head[close, 0] = _bias(closes, states[:, 0], 1.0 / (model.rationale_tokens * kept))

    logits = states[at_gate] @ head.T
    against = _others(logits, think) if full_vocabulary else logits[:, form.gate_ids[0]]
    head[think, 0] = _bias(logits[:, think] - against, states[at_gate, 0], model.think_rate)


def _hidden_states(network: Any, form: LatentFormat, snippets: Sequence[Snippet]) -> tuple[Tensor, Tensor]:
    """States before the output layer of all tokens [N, H], and which of them decide a gate [N]."""
    import torch

    states, at_gate = [], []
    for snippet in snippets:
        trajectory = form.render(snippet, observe=False)
        kinds = trajectory.kinds
        firsts = [i for i, kind in enumerate(kinds) if kind == Kind.LINE and kinds[i - 1] != Kind.LINE]
        is_gate = torch.zeros(len(trajectory.token_ids), dtype=torch.bool)
        is_gate[[i - 1 - len(form.act_suffix) for i in firsts]] = True
        states.append(network.model(torch.tensor([trajectory.token_ids])).last_hidden_state[0])
        at_gate.append(is_gate)
    return torch.cat(states), torch.cat(at_gate)


def _others(logits: Tensor, token: int) -> Tensor:
    """Log of the summed exponentials of all logits [N, V] but those of `token`: [N]."""
    import torch

    masked = logits.clone()
    masked[:, token] = -math.inf
    return torch.logsumexp(masked, dim=-1)


def _bias(log_odds: Tensor, constant: Tensor, rate: float) -> float:
    """The b for which the mean of sigmoid(log_odds + b * constant) is `rate`, by bisection."""
    import torch

    low, high = -100.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        if float(torch.sigmoid(log_odds + middle * constant).mean()) < rate:
            low = middle
        else:
            high = middle
    return (low + high) / 2
