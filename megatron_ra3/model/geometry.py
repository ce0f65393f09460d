"""Which Hugging Face configs the package takes, and the sizes in them; without torch, so that a run can be planned.

Configs that ask for something the model lacks are refused by name, before anything is built, written or queued: a
silently ignored key (a sliding window, a rope scaling) trains a different model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

FAMILIES = ("llama", "qwen2")
_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "vocab_size",
)
_LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class Split(Protocol):
    """Over how many ranks a model is cut."""

    @property
    def tp_size(self) -> int:
        """Tensor-parallel ranks."""

    @property
    def pp_size(self) -> int:
        """Pipeline stages."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes that the layouts depend on."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool

    @classmethod
    def of(cls, hf_config: Mapping[str, Any]) -> "Geometry":
        """Read the sizes from a Hugging Face config."""
        heads = int(hf_config["num_attention_heads"])
        return cls(
            hidden=int(hf_config["hidden_size"]),
            ffn=int(hf_config["intermediate_size"]),
            layers=int(hf_config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(hf_config.get("num_key_value_heads") or heads),
            head_dim=int(hf_config.get("head_dim") or hf_config["hidden_size"] // heads),
            vocab=int(hf_config["vocab_size"]),
            tied=bool(hf_config.get("tie_word_embeddings", False)),
            qkv_bias=hf_config["model_type"] == "qwen2",
        )


def check_config(hf_config: Mapping[str, Any], layout: Split) -> None:
    """Refuse a Hugging Face config that this mapping or the layout cannot take, before anything is built or written.

    ValueError: an unsupported family or setting, sizes that are missing or not positive numbers (all of them named),
    or a tp or pp that does not divide what it must divide.
    """
    family = hf_config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type={family!r} is not supported: use one of {', '.join(FAMILIES)}")
    lacking = [key for key in _REQUIRED if not _is_positive(hf_config.get(key))]
    if lacking:
        raise ValueError(f"the model config lacks {', '.join(lacking)}: each must be a positive number")
    unsupported = {
        "hidden_act": hf_config.get("hidden_act", "silu") not in ("silu", "swish"),
        "use_sliding_window": bool(hf_config.get("use_sliding_window")),
        "attention_bias": family == "llama" and bool(hf_config.get("attention_bias")),
        "mlp_bias": bool(hf_config.get("mlp_bias")),
        "attention_dropout": bool(hf_config.get("attention_dropout")),
    }
    for key, refused in unsupported.items():
        if refused:
            raise ValueError(f"{key}={hf_config[key]!r} is not supported for model_type={family!r}: change the config")
    settings = rope(hf_config)
    if settings["rope_type"] not in ("default", "llama3"):
        raise ValueError(f"rope_type={settings['rope_type']!r} is not supported: use 'default' or 'llama3'")
    lacking = [key for key in _LLAMA3_ROPE if not _is_positive(settings.get(key))]
    if settings["rope_type"] == "llama3" and lacking:
        raise ValueError(f"rope_type='llama3' lacks {', '.join(lacking)}: each must be a positive number")
    geometry = Geometry.of(hf_config)
    divisors = {
        "num_attention_heads": (geometry.heads, "tp", layout.tp_size),
        "num_key_value_heads": (geometry.kv_heads, "tp", layout.tp_size),
        "intermediate_size": (geometry.ffn, "tp", layout.tp_size),
        "num_hidden_layers": (geometry.layers, "pp", layout.pp_size),
    }
    for key, (value, name, size) in divisors.items():
        if value % size:
            raise ValueError(f"{name}={size} does not divide {key}={value}: choose a {name} that does")


def rope(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rope settings from either form: `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
    settings = {"rope_theta": hf_config.get("rope_theta"), **(hf_config.get("rope_scaling") or {})}
    settings |= hf_config.get("rope_parameters") or {}
    settings["rope_theta"] = settings["rope_theta"] or 10000.0
    settings["rope_type"] = settings.get("rope_type") or settings.get("type") or "default"
    return settings


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
