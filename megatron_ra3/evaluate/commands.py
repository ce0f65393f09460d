"""`ra3 eval`: the command line of an evaluation."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ra3.report.wandb_run import open_wandb
from megatron_ra3.settings import to_dict

if TYPE_CHECKING:
    from megatron_ra3.evaluate.settings import EvalConfig


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
    models = parse_models(arguments.models)
    with _logged(config, next(iter(models.values()))) as run:
        result = evaluate(config, models)
        if run is not None:
            run.log(score_metrics(result))
    print(table(result))
    print(f"result: {Path(config.out_folder) / RESULT}, pages: {Path(config.out_folder) / 'pages' / 'index.html'}")
    return 0


def score_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """All scores of a result as `suite/model/score`; what could not be scored is left out."""
    return {
        f"{suite}/{model}/{score}": found["value"]
        for suite, summary in result["suites"].items()
        for model, scored in summary["models"].items()
        for score, found in scored["scores"].items()
        if found is not None
    }


@contextlib.contextmanager
def _logged(config: EvalConfig, first_model: Path) -> Iterator[Any]:
    """The wandb run of the evaluation's folder, where one is asked for, else None."""
    folder = Path(config.out_folder)
    folder.mkdir(parents=True, exist_ok=True)
    run = open_wandb(folder, config.logging, job_type="eval", settings=to_dict(config), start=first_model)
    try:
        yield run
    finally:
        if run is not None:
            run.finish()
