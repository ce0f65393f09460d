"""`ra3 chaos`: runs that are broken at random moments must end as the one that was not.

Every trial breaks a run, starts it again by the same command until it has ended, and compares each step's samples and
figures, and the exported weights, with an uninterrupted run of the same layout. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ra3.chaos.faults import FAULTS, Fault
from megatron_ra3.chaos.launch import Handicap, Ranks
from megatron_ra3.chaos.world import make_corpus, settings
from megatron_ra3.manifest import damage, finished
from megatron_ra3.report.summary import read_metrics
from megatron_ra3.stall import STALLED

TIMEOUT_S = 300.0
STALL_TIMEOUT_S = 5
MOST_STARTS = 4
"""Starts after the faults within which a run must end; a save or stop may be due more than once."""
GO_ON = {75, STALLED}
"""Exit codes after which a launcher is told to start the command again."""
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "single": (1, ()),
    "tensor": (2, ("parallel.tensor=2",)),
    "data": (2, ("parallel.distributed_optimizer=true",)),
}
SAMPLES = ("step", "phase", "samples", "samples_digest", "stream_epoch", "stream_position")


@dataclass
class Outcome:
    """What became of one trial; `problems` is empty where it ended as the run that nobody broke."""

    fault: str
    layout: str
    starts: int = 0
    lost_or_repeated: bool = False
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class World:
    """Where trials run, and what they are compared with; `run_s` is what a run takes, from its start."""

    folder: Path
    corpus: Path
    run_s: dict[str, float]

    @classmethod
    def build(cls, folder: Path, layouts: Sequence[str]) -> World:
        """Prepare the corpus and run every layout uninterrupted."""
        world = cls(folder, make_corpus(folder), {})
        for layout in layouts:
            names = [f"whole-{layout}"] if world.run_s else ["first", f"whole-{layout}"]  # the first imports everything
            for name in names:
                started = time.monotonic()
                code = world.start(name, layout, every_steps=2).wait(TIMEOUT_S)
                world.run_s[layout] = time.monotonic() - started
                if code != 0:
                    busy = f" (nothing moved for {STALL_TIMEOUT_S} s: is the machine busy?)" if code == STALLED else ""
                    raise ValueError(f"the uninterrupted run ended with {code}{busy}; see {folder / name / 'log'}")
        return world

    def start(self, name: str, layout: str, *, every_steps: int, handicap: Handicap = Handicap()) -> Ranks:  # noqa: B008
        """The command of the run in the folder `name`."""
        size, overrides = LAYOUTS[layout]
        pairs = settings(
            self.corpus,
            self.folder / name,
            f"checkpoint.every_steps={every_steps}",
            "checkpoint.keep_last=3",
            f"stall_timeout_s={STALL_TIMEOUT_S}",
            *overrides,
        )
        config = self.folder / "empty.yaml"
        config.touch()
        return Ranks(["midtrain", str(config), *pairs], size, self.folder / name / "log", handicap)

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """All steps of a run but for what took how long."""
        records = read_metrics(self.folder / name / "run")
        return [
            {key: value for key, value in item.items() if not key.endswith(("seconds", "timeline_dropped"))}
            for item in records
        ]


def run_trial(world: World, name: str, fault: Fault, layout: str, draw: random.Random) -> Outcome:
    """Break a run, bring it to its end, and compare."""
    outcome = Outcome(fault.name, layout)
    run, every_steps = world.folder / name / "run", draw.choice([1, 2, 3])
    for _ in range(draw.randint(1, fault.most_strikes)):
        ranks = world.start(name, layout, every_steps=every_steps, handicap=fault.handicap(draw))
        outcome.starts += 1
        fault.during(ranks, run, draw, world.run_s[layout])
        try:
            ranks.wait(TIMEOUT_S)
        except TimeoutError as hang:
            outcome.problems.append(f"not ended by {fault.name}: {hang}")
        if run.is_dir():
            fault.after(run, draw)
    codes: list[int] = []
    while not codes or (codes[-1] in GO_ON and len(codes) < MOST_STARTS):
        outcome.starts += 1
        try:
            codes.append(world.start(name, layout, every_steps=every_steps).wait(TIMEOUT_S))
        except TimeoutError as hang:
            outcome.problems.append(f"ended with {codes}, then not at all instead of 0: {hang}")
            return outcome
    if codes[-1] != 0:
        outcome.problems.append(f"ended with {codes} instead of 0: {_tail(world.folder / name / 'log')}")
        return outcome
    _compare(world, name, outcome)
    return outcome


def _compare(world: World, name: str, outcome: Outcome) -> None:
    found, expected = world.metrics(name), world.metrics(f"whole-{outcome.layout}")
    samples = [[{key: item[key] for key in SAMPLES} for item in items] for items in (found, expected)]
    if samples[0] != samples[1]:
        outcome.lost_or_repeated = True
        outcome.problems.append("other samples than in the uninterrupted run")
    elif found != expected:
        step = next(one["step"] for one, two in zip(found, expected, strict=True) if one != two)
        outcome.problems.append(f"other figures than in the uninterrupted run from step {step} on")
    exports = [world.folder / which / "run/export/model.safetensors" for which in (name, f"whole-{outcome.layout}")]
    if exports[0].read_bytes() != exports[1].read_bytes():
        outcome.problems.append("other weights than those of the uninterrupted run")
    for checkpoint in finished(world.folder / name / "run" / "checkpoints"):
        outcome.problems += [f"unreadable: {problem}" for problem in damage(checkpoint)]


def _tail(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").splitlines()[-4:]) if log.is_file() else "no output"


def summarize(outcomes: Sequence[Outcome], seed: int, seconds: float) -> dict[str, Any]:
    """The figures of the last line: over all trials, and per kind of fault."""
    faults: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        counts = faults.setdefault(outcome.fault, {"trials": 0, "identical": 0, "starts": 0})
        counts["trials"] += 1
        counts["identical"] += not outcome.problems
        counts["starts"] += outcome.starts
    problems = [f"{item.fault} on {item.layout}: {problem}" for item in outcomes for problem in item.problems]
    return {
        "trials": len(outcomes),
        "identical": sum(not outcome.problems for outcome in outcomes),
        "lost_or_repeated": sum(outcome.lost_or_repeated for outcome in outcomes),
        "unreadable": sum("unreadable: " in problem for problem in problems),
        "not_resumed": sum("instead of 0" in problem for problem in problems),
        "faults": faults,
        "problems": problems[:20],
        "seed": seed,
        "seconds": round(seconds, 1),
    }


def add_chaos_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ra3 chaos`."""
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--trials", type=int, default=2 * len(FAULTS), help="kinds of faults take turns")
    parser.add_argument("--seed", type=int, default=0, help="decides moments, ranks and layouts")
    parser.add_argument("--faults", nargs="+", choices=names, default=names, metavar="KIND", help=", ".join(names))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="LAYOUT")
    parser.add_argument("--folder", type=Path, help="new folder to work in, kept; otherwise only failed trials are")


def run_chaos(arguments: argparse.Namespace) -> int:
    """Run the trials; 1 where one did not end as the uninterrupted run."""
    faults = [fault for fault in FAULTS if fault.name in arguments.faults]
    most_ranks = max(LAYOUTS[name][0] for name in arguments.layouts)
    for fault in faults:
        if fault.least_ranks > most_ranks:
            raise ValueError(f"--faults {fault.name}: needs a layout of {fault.least_ranks} ranks")
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="ra3-chaos-")) if arguments.folder is None else arguments.folder
    world = World.build(folder, arguments.layouts)
    outcomes = []
    for number in range(arguments.trials):
        draw = random.Random(f"{arguments.seed}:{number}")
        fault = faults[number % len(faults)]
        fitting = [name for name in arguments.layouts if LAYOUTS[name][0] >= fault.least_ranks]
        name = f"trial-{number:05d}"
        outcome = run_trial(world, name, fault, draw.choice(fitting), draw)
        outcomes.append(outcome)
        print(f"{name} {fault.name:<16}{outcome.layout:<8}{'; '.join(outcome.problems) or 'identical'}", flush=True)
        if not outcome.problems and arguments.folder is None:
            shutil.rmtree(folder / name)
    summary = summarize(outcomes, arguments.seed, time.monotonic() - started)
    if not summary["problems"] and arguments.folder is None:
        shutil.rmtree(folder)
    print(json.dumps(summary))
    return int(bool(summary["problems"]))
