"""A small real world for tests: a corpus of standard-library files, its tokenizer, and a tiny Qwen2 config."""

import json
import sysconfig
from pathlib import Path
from typing import Any

from megatron_ra3.config import RunConfig, load_config
from megatron_ra3.corpus.prepare import PrepareConfig, prepare
from megatron_ra3.corpus.snippets import SnippetLimits

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
    sources = folder / "sources"
    sources.mkdir(parents=True)
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in ("bisect", "heapq", "textwrap", "queue", "sched", "shlex", "csv", "stat", "graphlib", "colorsys"):
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


def make_config(corpus: Path, folder: Path, *overrides: str) -> RunConfig:
    """A run of a few seconds on `corpus`: one EM round, in-process engine."""
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(MODEL))
    return load_config(
        None,
        [
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
        ],
    )
