"""A small real world to run in: a corpus of standard-library files, its tokenizer, a tiny Qwen2, a run of seconds."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

MODULES = ("bisect", "heapq", "textwrap", "queue", "sched", "shlex", "csv", "stat", "graphlib", "colorsys")
MODEL: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "vocab_size": 0,
}


def make_corpus(folder: Path) -> Path:
    """Prepare a few standard-library files under `folder`, with a tokenizer of 400 entries; return the corpus."""
    from megatron_ra3.corpus.prepare import PrepareConfig, prepare
    from megatron_ra3.corpus.snippets import SnippetLimits

    sources = folder / "sources"
    sources.mkdir(parents=True)
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in MODULES:
        (sources / f"{name}.py").write_bytes((library / f"{name}.py").read_bytes())
    corpus = folder / "corpus"
    prepare(
        PrepareConfig(
            sources=(str(sources),),
            out=str(corpus),
            limits=SnippetLimits(max_lines=8, max_chars=240),
            heldout_fraction=0.2,
            tokenizer_vocab=400,
        )
    )
    return corpus


def settings(corpus: Path, folder: Path, *overrides: str) -> list[str]:
    """`key=value` settings of a run of a few seconds in `folder`: one EM round, in-process engine.

    Writes the model's config. Later settings win.
    """
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(MODEL))
    return [
        f"run_folder={folder / 'run'}",
        f"corpus.folder={corpus}",
        "corpus.max_snippet_tokens=80",
        f"model.folder={model}",
        "model.init=random",
        "latents.max_rationale_tokens=4",
        "parallel.micro_batch_tokens=600",
        "warmup.steps=2",
        "warmup.snippets_per_step=4",
        "warmup.learning_rate=1e-2",
        "estep.steps=3",
        "estep.snippets_per_step=2",
        "estep.rollouts_per_snippet=3",
        "objective.gate_exploration=0.5",
        "estep.learning_rate=1e-3",
        "mstep.steps=2",
        "mstep.snippets_per_step=3",
        "em.rounds=1",
        "evaluate.snippets=3",
        "checkpoint.every_steps=1000",
        "engine.kind=inprocess",
        *overrides,
    ]
