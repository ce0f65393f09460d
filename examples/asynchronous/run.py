"""Do rollouts that are sampled ahead teach the same, and how much sooner? Asynchronous against synchronous E-steps.

    python examples/asynchronous/run.py --corpus positive_control --out runs/asynchronous --seeds 0 1 2

Per seed, all from one base model, each run with a vLLM server of its own: RA3 whose E-steps wait for their own rollouts
(staleness 0), and RA3 that samples while it updates, with weights at most so many updates old. The corpus and its order
are the same. With `--engine inprocess`, and with `--small`, nothing overlaps: staleness is emulated in lock-step, which
compares what is learnt and not how fast.

`minus synchronous`: difference to the synchronous run of the same seed. Seconds are of one E-step, the mean over all
but the first, in which the server starts; `waiting`: of these, what the update waited for its rollouts; `times as
fast`: the synchronous run's seconds by these.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from experiments import PERCENT, POSITIVE, Experiment, experiment

from megatron_ra3.report.experiments import Column, Record, over_seeds, step_figures
from megatron_ra3.report.plots import Panel, draw

SAMPLING = ("effective_samples", "mismatch", "staleness", "max_staleness")
SECONDS = {"seconds": "estep_seconds_each", "rollout_wait_seconds": "rollout_wait_seconds_each"}
COMPARED = ("think_rate_hard", "think_rate_easy", "accuracy_hard", "nats_code_only")
COLUMNS = (
    Column("think_rate", "thinks, % of lines", 1, 100),
    Column("think_rate_hard", "of hard lines, %", 1, 100),
    Column("think_rate_hard_minus", "minus synchronous", 1, 100),
    Column("think_rate_easy", "of easy lines, %", 1, 100),
    Column("think_rate_easy_minus", "minus synchronous", 1, 100),
    Column("accuracy_hard", "accuracy on hard lines, %", 1, 100),
    Column("accuracy_hard_minus", "minus synchronous", 1, 100),
    Column("nats_code_only", "lines alone, nats/code token", 4),
    Column("nats_code_only_minus", "minus synchronous", 4),
    Column("effective_samples", "effective samples, %", 2, 100),
    Column("mismatch", "mismatch, nats/decision", 5),
    Column("staleness", "mean staleness, updates", 2),
    Column("max_staleness", "most", 0),
    Column("estep_seconds_each", "E-step, s", 3),
    Column("rollout_wait_seconds_each", "waiting, s", 3),
    Column("speedup", "times as fast", 2),
)


def main() -> None:
    shared, given = experiment(str(__doc__), _add_arguments)
    engine = "inprocess" if shared.small else given.engine
    bounds = [0, *given.staleness]
    records, steps = [], []
    for seed in shared.seeds:
        found = [one_run(shared, seed, engine, bound) for bound in bounds]
        records += [against(record, found[0]) for record in found]
        steps += by_step(shared, seed, bounds)
    rows = over_seeds(records, ["max_staleness_steps"])
    shared.publish(records, rows, {"max_staleness_steps": "staleness, at most"}, COLUMNS)
    names = {bound: f"at most {bound} old" if bound else "synchronous" for bound in bounds}
    panels = (
        Panel("reward, nats per line", {f"reward_{bound}": name for bound, name in names.items()}),
        Panel(
            "think rate, % of lines", {f"think_rate_{bound}": name for bound, name in names.items()}, 100, {}, PERCENT
        ),
        Panel("seconds", {f"seconds_{bound}": name for bound, name in names.items()}, bounds=POSITIVE),
    )
    title = f"E-steps, {shared.corpus}, {engine} engine, seeds {shared.seed_list} (95 % intervals)"
    by = over_seeds(steps, ["phase_step"])
    draw(shared.out / "esteps.png", by, panels, x="phase_step", xlabel="E-steps, over all rounds", title=title)


def one_run(shared: Experiment, seed: int, engine: str, bound: int) -> Record:
    """RA3 from the seed's base model, sampled at most `bound` updates ahead; with the means over its E-steps."""
    settings = [f"engine.kind={engine}", f"estep.max_staleness_steps={bound}"]
    lockstep = ["estep.lockstep=true"] if bound and engine == "inprocess" else []
    base = shared.base(seed)
    figures = shared.run(base, _name(bound), *settings, *lockstep)
    return {"max_staleness_steps": bound, **figures, **estep_means(shared.folder(base, _name(bound)))}


def estep_means(run_folder: Path) -> Record:
    """Means over a run's E-steps; the first, in which the engine starts, has no part in those of seconds."""
    steps = step_figures(run_folder, "estep", [*SAMPLING, *SECONDS])
    means = {name: statistics.fmean(step[name] for step in steps) for name in SAMPLING if name != "max_staleness"}
    times = {figure: statistics.fmean(step[name] for step in steps[1:]) for name, figure in SECONDS.items()}
    return {**means, **times, "max_staleness": max(step["max_staleness"] for step in steps)}


def against(record: Record, synchronous: Record) -> Record:
    """A run's record beside the synchronous one of its seed."""
    if record is synchronous:
        return record
    differences = {f"{name}_minus": record[name] - synchronous[name] for name in COMPARED if name in record}
    return {**record, **differences, "speedup": synchronous["estep_seconds_each"] / record["estep_seconds_each"]}


def by_step(shared: Experiment, seed: int, bounds: list[int]) -> list[Record]:
    """Per E-step of one seed the figures of all its runs, named after their bound; no seconds of the first."""
    found: dict[int, Record] = {}
    for bound in bounds:
        folder = shared.folder(shared.base(seed), _name(bound))
        for step in step_figures(folder, "estep", ["reward", "think_rate", "seconds"]):
            number = step.pop("phase_step")
            if number == 1:
                del step["seconds"]
            record = found.setdefault(number, {"phase_step": number, "seed": seed})
            record |= {f"{name}_{bound}": value for name, value in step.items()}
    return list(found.values())


def _name(bound: int) -> str:
    return f"staleness{bound}"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--staleness", type=int, nargs="+", default=[1], metavar="S", help="bounds; default 1")
    parser.add_argument("--engine", choices=("vllm", "inprocess"), default="vllm")


if __name__ == "__main__":
    main()
