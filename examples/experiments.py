"""What the experiments share: their command line, base models on two corpora, runs that are kept, and their results.

A run is a subprocess of `ra3 midtrain` with a folder and a log of its own. One that the same command has finished from
the same inputs is not started again (`commands.call_once`), so an interrupted experiment goes on where it stopped, and
its plots can be redrawn at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from commands import CONTROL_EM, RA3, call, call_once

from megatron_ra3.config import NextTokenConfig, RunConfig, load_config
from megatron_ra3.report.experiments import Column, Record, Row, markdown, run_figures, write_results

EXAMPLES = Path(__file__).parent
CONTROL = EXAMPLES / "positive_control" / "run.py"
CONFIGS = {
    "positive_control": EXAMPLES / "positive_control" / "run.yaml",
    "stdlib": EXAMPLES / "quickstart" / "run.yaml",
}
STDLIB_CORPUS = ("--tokenizer-vocab", "4096", "--max-lines", "16", "--max-chars", "640", "--heldout-fraction", "0.05")
SMALL_CORPUS = (
    *("--limit-files", "40", "--tokenizer-vocab", "512", "--max-lines", "8"),
    *("--max-chars", "200", "--heldout-fraction", "0.2"),
)
PERCENT = (0.0, 100.0)
POSITIVE = (0.0, float("inf"))
CONTROL_FIGURES = ("accuracy_hard", "accuracy_hard_act", "think_rate_hard", "think_rate_easy", "rationale_correct")
"""What is taken from the positive control's own evaluation, fractions; `_act`: with `<act>` everywhere."""
SMALL_CONTROL = ("--programs", "10000")
SMALL = (
    "warmup.snippets_per_step=4",
    "estep.steps=2",
    "estep.snippets_per_step=2",
    "estep.rollouts_per_snippet=3",
    "mstep.steps=2",
    "mstep.snippets_per_step=4",
    "latents.max_rationale_tokens=4",
    "evaluate.snippets=8",
    "engine.kind=inprocess",
)
"""Settings of a run that shows that everything works and nothing else."""
NOTHING_LEARNT = (
    "em.rounds=1",
    "estep.steps=0",
    "mstep.steps=1",
    "mstep.snippets_per_step=8",
    "mstep.learning_rate=0",
)
"""One EM round that leaves the weights alone: the base model's own latents, measured as after any other round."""


@dataclass(frozen=True)
class Base:
    """Where all runs of one seed start: a corpus, a base model trained on it, and the settings that go with them."""

    corpus: Path
    model: Path
    seed: int
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """One experiment of several runs: where it happens, on what, and with which settings."""

    corpus: str
    out: Path
    bases: Path
    seeds: Sequence[int]
    small: bool
    base_steps: int | None
    base_settings: Sequence[str]
    settings: Sequence[str]

    @property
    def seed_list(self) -> str:
        """For titles."""
        return ", ".join(map(str, self.seeds))

    @property
    def config(self) -> Path:
        """The YAML file of all its runs."""
        return CONFIGS[self.corpus]

    def base(
        self,
        seed: int,
        name: str = "line",
        *,
        granularity: str = "line",
        settings: Sequence[str] = (),
        blocks: bool = False,
    ) -> Base:
        """The base model of one seed, trained unless it is there: native comments observed at `granularity`.

        One made by `positive_control/run.py base` and put (or linked) in its place is taken as it is.

        Args:
            seed: of the weights, the order of the data and, on the positive control, the data.
            name: of its folder, `<corpus>-<name>-seed<seed>`.
            granularity: what one action is.
            settings: further settings of the base model and of all runs from it.
            blocks: on the positive control, write pairs of lines as compound statements.
        """
        inherited = [f"seed={seed}", f"objective.granularity={granularity}", *settings, *self.base_settings]
        corpus = f"{self.corpus}{'-small' if self.small else ''}"
        folder = self.bases / f"{corpus}-{name}-seed{seed}"
        if self.corpus == "positive_control":
            command = ["base", "--seed", str(seed), *(["--program", "blocks=true"] if blocks else [])]
            return self._control_base(folder, command, seed, inherited)
        return self._stdlib_base(folder, self.bases / f"{corpus}-corpus", seed, ["parallel.tensor=1", *inherited])

    def run(self, base: Base, name: str, *settings: str) -> Record:
        """Train from `base` unless that is done; returns the run's figures (`run_figures`), with `seed`.

        On the positive control also `CONTROL_FIGURES`.
        """
        folder = self.folder(base, name)
        self.midtrain(folder, base.corpus, base.model, *self._start(base), *settings)
        figures: Record = {"seed": base.seed, **run_figures(folder)}
        return figures | self._control_figures(folder) if self.corpus == "positive_control" else figures

    def folder(self, base: Base, name: str) -> Path:
        """The run folder of `name` from `base`."""
        return self.out / "runs" / f"{name}-seed{base.seed}"

    def resolved(self, base: Base, *settings: str) -> RunConfig:
        """The configuration of a run from `base`."""
        places = [f"run_folder={self.out}", f"corpus.folder={base.corpus}", f"model.folder={base.model}"]
        return load_config(self.config, [*places, *self._start(base), *settings])

    def ntp_settings(self, base: Base) -> list[str]:
        """Settings of the NTP baseline: as many snippets and updates as the M-steps of a run from `base`."""
        config = self.resolved(base)
        names = [item.name for item in fields(NextTokenConfig) if item.name not in ("steps", "max_tokens")]
        same = [f"warmup.{name}={getattr(config.mstep, name)}" for name in names]
        steps = config.em.rounds * config.mstep.steps
        return ["em.rounds=0", "latents.comments=strip", f"warmup.steps={steps}", *same]

    def midtrain(self, folder: Path, corpus: Path, model: Path, *settings: str) -> None:
        """Run, resume or skip `ra3 midtrain`; SystemExit with the end of its log when it fails."""
        places = [f"run_folder={folder}", f"corpus.folder={corpus}", f"model.folder={model}"]
        call_once(
            [*RA3, "midtrain", self.config, *places, *settings],
            folder / "summary.json",
            folder.with_name(f"{folder.name}.log"),
            folder.name,
            inputs=[self.config, corpus / "manifest.json", model],
        )

    def publish(
        self, records: Sequence[Record], rows: Sequence[Row], headings: Mapping[str, str], columns: Sequence[Column]
    ) -> None:
        """Write data, results and table into the experiment's folder, and print the table."""
        table = markdown(rows, headings, columns)
        description = {
            "experiment": self.out.name,
            "corpus": self.corpus,
            "seeds": list(self.seeds),
            "small": self.small,
            "settings": [*self.base_settings, *self.settings],
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        }
        write_results(self.out, description, records, rows, table)
        print(f"\n{table}\n\n{self.out}: table.md, results.json, data.csv, *.png", flush=True)

    def _start(self, base: Base) -> list[str]:
        """Settings of every run from `base`."""
        control = CONTROL_EM if self.corpus == "positive_control" else ()
        return ["warmup.steps=0", *control, *(SMALL if self.small else ()), *base.settings, *self.settings]

    def _stdlib_base(self, folder: Path, corpus: Path, seed: int, settings: Sequence[str]) -> Base:
        if not (corpus / "manifest.json").is_file():
            size = SMALL_CORPUS if self.small else STDLIB_CORPUS
            call([*RA3, "prepare", "--stdlib", "--out", corpus, *size], corpus.with_suffix(".log"), "corpus")
        steps = 3 if self.small else self.base_steps or 300
        small = SMALL if self.small else ()
        model = EXAMPLES / "quickstart" / "model"
        start = ["model.init=random", "em.rounds=0", f"warmup.steps={steps}"]
        self.midtrain(folder, corpus, model, *small, *settings, *start)
        return Base(corpus, folder / "export", seed, tuple(settings))

    def _control_base(self, folder: Path, command: Sequence[str], seed: int, settings: Sequence[str]) -> Base:
        steps = 3 if self.small else self.base_steps
        training = [*(SMALL if self.small else ()), *settings, *([f"warmup.steps={steps}"] if steps else [])]
        result, log = folder / "base" / "summary.json", folder.with_name(f"{folder.name}.log")
        if log.is_file() or not result.is_file():
            size = SMALL_CONTROL if self.small else ()
            whole = [sys.executable, CONTROL, *command, "--out", folder, *size, *(f"--set={item}" for item in training)]
            call_once(whole, result, log, folder.name, inputs=[self.config])
        return Base(folder / "corpus", folder / "base" / "export", seed, tuple(settings))

    def _control_figures(self, folder: Path) -> Record:
        """What the positive control measures on its held-out programs, kept beside the run."""
        path, name = folder.with_name(f"{folder.name}-control.json"), f"{folder.name} evaluated"
        size = ["--programs", "20"] if self.small else []
        command = [sys.executable, CONTROL, "evaluate", "--run", folder, "--out", path, *size]
        call_once(command, path, path.with_suffix(".log"), name, inputs=[folder / "export"])
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: found[name] for name in CONTROL_FIGURES if name in found}


def experiment(description: str, add_arguments: Any = None) -> tuple[Experiment, argparse.Namespace]:
    """Parse the command line that all experiments share; `add_arguments(parser)` adds those of one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", choices=list(CONFIGS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, table, data and plots")
    parser.add_argument("--bases", type=Path, help="folder of base models, shared by experiments (default OUT/bases)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="default 0 1 2")
    parser.add_argument("--base-steps", type=int, help="of a base model (default: 300 on stdlib, else as configured)")
    for option, text in (("--base-set", "a setting of base models and runs; repeat"), ("--set", "of the runs alone")):
        parser.add_argument(option, action="append", default=[], metavar="KEY=VALUE", help=text)
    parser.add_argument("--small", action="store_true", help="a minute or two, to see that everything works")
    if add_arguments is not None:
        add_arguments(parser)
    given = parser.parse_args()
    if len(set(given.seeds)) < len(given.seeds):
        parser.error(f"--seeds {' '.join(map(str, given.seeds))}: a seed counts once")
    shared = Experiment(
        corpus=given.corpus,
        out=given.out,
        bases=given.bases or given.out / "bases",
        seeds=given.seeds,
        small=given.small,
        base_steps=given.base_steps,
        base_settings=given.base_set,
        settings=given.set,
    )
    return shared, given
