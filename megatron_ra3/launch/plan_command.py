"""`ra3 plan`: arguments in, a page or one JSON object out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_ra3.config import RunConfig, load_config
from megatron_ra3.corpus.manifest import MANIFEST, Manifest
from megatron_ra3.launch.hardware import GPUS
from megatron_ra3.launch.models import MODELS
from megatron_ra3.launch.plan import Question, make_plan, to_json
from megatron_ra3.launch.plan_report import report
from megatron_ra3.launch.workload import Assumptions
from megatron_ra3.rlvr_config import RlvrRunConfig, load_any_config

WITHOUT_CONFIG = (
    "run_folder=run",
    "corpus.folder=corpus",
    "model.folder=model",
    "model.dtype=bf16",
    "parallel.distributed_optimizer=true",
    "engine.kind=vllm",
)
"""Settings that a plan without a configuration file starts from."""


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, the nodes, and what cannot be known beforehand."""
    assumed = Assumptions()
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file; without one: defaults in bf16")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--model", choices=MODELS, help="a published shape in the place of model.folder/config.json")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="trainers and engines (default %(default)s)")
    parser.add_argument("--engine-nodes", type=int, metavar="M", help="of these; default: as is fastest")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default %(default)s")
    parser.add_argument("--gpu", choices=GPUS, default="h100", help="default %(default)s")
    parser.add_argument("--think-rate", type=float, default=assumed.think_rate, metavar="P", help="rationales per line")
    parser.add_argument(
        "--rationale-tokens", type=float, default=0.0, metavar="N", help="mean; default: half the limit"
    )
    parser.add_argument("--line-tokens", type=float, default=assumed.line_tokens, metavar="N", help="without a corpus")
    parser.add_argument("--gpu-hour-price", type=float, metavar="MONEY", help="also tell the cost in money")
    parser.add_argument("--json", action="store_true", help="one JSON object: bytes, seconds, tokens")


def run_plan(arguments: argparse.Namespace) -> int:
    """Print the plan; ValueError where nothing fits."""
    config = _config(arguments)
    question = Question(
        config=config,
        hf_config=_model(arguments.model, config),
        model=arguments.model or Path(config.model.folder).name,
        gpu=arguments.gpu,
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        engine_nodes=arguments.engine_nodes,
        assumptions=Assumptions(
            think_rate=arguments.think_rate,
            rationale_tokens=arguments.rationale_tokens,
            line_tokens=arguments.line_tokens,
        ),
        gpu_hour_price=arguments.gpu_hour_price,
    )
    plan = make_plan(question, _manifest(config))
    print(json.dumps(to_json(plan)) if arguments.json else report(plan))
    return 0


def _config(arguments: argparse.Namespace) -> RunConfig:
    path, overrides = arguments.config, arguments.overrides
    if path is not None and "=" in path and not Path(path).is_file():
        path, overrides = None, [path, *overrides]
    if path is not None:
        config = load_any_config(path, overrides)
        if isinstance(config, RlvrRunConfig):
            raise ValueError(
                f"{path}: a run of RLVR, of which the time depends on how long answers are and how long programs run; "
                "to see whether the model fits, plan mid-training with the same model, parallel and engine settings: "
                "ra3 plan --model NAME key=value ..."
            )
        return config
    if arguments.model is None:
        raise ValueError("give a CONFIG, or a published shape with --model")
    return load_config(None, [*WITHOUT_CONFIG, *overrides])


def _model(name: str | None, config: RunConfig) -> dict[str, Any]:
    if name is not None:
        return MODELS[name]
    path = Path(config.model.folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a Hugging Face folder, or a published shape by --model")
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be an object, got {type(found).__name__}")
    return found


def _manifest(config: RunConfig) -> Manifest | None:
    """Of the corpus, where it is at hand."""
    folder = Path(config.corpus.folder)
    return Manifest.load(folder) if (folder / MANIFEST).is_file() else None
