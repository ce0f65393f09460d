"""`ra3 eval`: the command line of an evaluation."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """A settings file, overrides, and the models."""
    parser.add_argument("config", type=Path, help="YAML file (docs/evaluation.md)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance sampling.preset=greedy")
    parser.add_argument(
        "--models",
        nargs="+",
        required=True,
        metavar="name=FOLDER",
        help="Hugging Face folders or run folders, for instance base=models/base ntp=runs/ntp ra3=runs/ra3",
    )


def run_eval(arguments: argparse.Namespace) -> int:
    """Evaluate what is missing and print the table of all models in the folder."""
    from megatron_ra3.evaluate.compare import table
    from megatron_ra3.evaluate.evaluation import RESULT, evaluate
    from megatron_ra3.evaluate.models import parse_models
    from megatron_ra3.evaluate.settings import load_eval_config

    config = load_eval_config(arguments.config, arguments.overrides)
    result = evaluate(config, parse_models(arguments.models))
    print(table(result))
    print(f"result: {Path(config.out_folder) / RESULT}, pages: {Path(config.out_folder) / 'pages' / 'index.html'}")
    return 0
