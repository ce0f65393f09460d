"""Does mid-training carry over? RLVR from RA3, from next-token training and from the base model, on the same tasks.

For every seed: the models of the positive control (made first where they are missing), tasks whose chains are longer
than in mid-training (`tasks.py`), and one `ra3 rlvr` run from each start, all with the same settings and tasks. What is
finished is not repeated, so the same command goes on where it stopped.

Starts: `ra3`; `base`, which RA3 started from; `ntp`, trained from scratch on as many tokens as base and RA3 together,
comments stripped; `ntp_comments`, which goes on from base as RA3 does, for as many tokens as RA3's, but by next-token
training on the corpus as it stands, comments and all.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "positive_control"))
from commands import RA3, call, call_once
from results import cost, tokens_per_program
from tasks import TaskConfig, write_tasks

from megatron_ra3.report.experiments import Column, Record, markdown, over_seeds, write_results
from megatron_ra3.report.plots import Panel, draw
from megatron_ra3.report.rlvr_summary import evaluations_of
from megatron_ra3.report.summary import read_metrics

HERE = Path(__file__).parent
CONTROL = HERE.parent / "positive_control"
CONFIG = HERE / "run.yaml"
STARTS = {"ra3": "RA3", "ntp_comments": "NTP with comments", "base": "base", "ntp": "NTP"}
LAST = 4
"""Evaluations at the end of a run whose mean is its asymptote."""
HIGH = 0.95
TASKS = {"train": 2048, "heldout": 200}
SMALL_TASKS = {"train": 8, "heldout": 4}
SMALL = (
    *("rlvr.steps=2", "evaluate.every_steps=1", "rlvr.tasks_per_step=2", "rlvr.samples_per_task=2"),
    *("rlvr.max_answer_tokens=4", "rlvr.check_tokens=4"),
)
COLUMNS = (
    Column("first", "pass rate at the start, %", 1, 100),
    Column("last", "at the end, %", 1, 100),
    Column("last_minus", "minus base", 1, 100),
    Column("to_ntp", "steps to NTP's end", 1),
    Column("to_high", f"steps to {100 * HIGH:.0f} %", 1),
    Column("reached_high", f"seeds that reach {100 * HIGH:.0f} %, %", 0, 100),
    Column("mean", "mean over the run, %", 1, 100),
    Column("mean_minus", "minus base", 1, 100),
    Column("answer_tokens", "answer at the end, tokens", 1),
)


def main() -> None:
    given = _arguments()
    with ThreadPoolExecutor(given.jobs) as pool:
        by_seed = list(pool.map(functools.partial(one_seed, given), given.seeds))
    curves = [point for curve, _ in by_seed for point in curve]
    records = [record for _, found in by_seed for record in found]
    publish(given, records, curves)


def one_seed(given: argparse.Namespace, seed: int) -> tuple[list[Record], list[Record]]:
    """All runs of one seed: its curves (one record per evaluation), and one record per start."""
    tasks = given.out / "tasks" / f"seed{seed}"
    size = SMALL_TASKS if given.small else TASKS
    if not (tasks / "heldout.jsonl").is_file():
        write_tasks(tasks, TaskConfig(), seed=seed, **size)
    evaluations = {start: rlvr(given, start, tasks, seed) for start in given.starts}
    target = asymptote(evaluations["ntp"]) if "ntp" in evaluations else None
    found_of = {start: figures(found, target) for start, found in evaluations.items()}
    records: list[Record] = [
        {"start": STARTS[start], "seed": seed, **found, **minus(found, found_of.get("base"))}
        for start, found in found_of.items()
    ]
    steps = [record["rlvr_step"] for record in next(iter(evaluations.values()))]
    curves: list[Record] = [{"rlvr_step": step, "seed": seed} for step in steps]
    for start, found in evaluations.items():
        for point, evaluation in zip(curves, found, strict=True):
            point[start] = evaluation["pass_rate"]
            point[f"{start}_tokens"] = evaluation["answer_tokens"]
    return curves, records


def rlvr(given: argparse.Namespace, start: str, tasks: Path, seed: int) -> list[Record]:
    """Run, resume or skip `ra3 rlvr` from a start; its evaluations with `rlvr_step`, the steps before each."""
    model = start_folder(given, start, seed)
    folder = given.out / "runs" / f"{start}-seed{seed}"
    places = [f"run_folder={folder}", f"model.folder={model}", f"seed={seed}"]
    files = [f"{section}.file={tasks / name}.jsonl" for section, name in (("tasks", "train"), ("heldout", "heldout"))]
    command = [*RA3, "rlvr", CONFIG, *places, *files, *(SMALL if given.small else ()), *given.set]
    inputs = [CONFIG, model, tasks / "train.jsonl", tasks / "heldout.jsonl"]
    call_once(command, folder / "summary.json", folder.with_name(f"{folder.name}.log"), folder.name, inputs=inputs)
    return evaluations_of(read_metrics(folder))


def start_folder(given: argparse.Namespace, start: str, seed: int) -> Path:
    """Weights of a start, made unless they are there."""
    mid = given.mid / f"seed{seed}"
    if start == "ntp_comments":
        return next_token_with_comments(given, mid, seed)
    for name in ("base", *([start] if start != "base" else [])):
        if not (mid / name / "summary.json").is_file():
            only = ["--only", "ntp"] if name == "ntp" else []
            if name == "ntp":  # its budget is that of base and RA3
                start_folder(given, "ra3", seed)
            command = [sys.executable, CONTROL / "run.py", name, "--out", mid, "--seed", seed, *only]
            call(command, mid / f"{name}.make.log", f"{mid.name}/{name}")
    return mid / start / "export"


def next_token_with_comments(given: argparse.Namespace, mid: Path, seed: int) -> Path:
    """The base model after as many more tokens of next-token training as RA3 trained on, comments kept."""
    base, _ = start_folder(given, "base", seed), start_folder(given, "ra3", seed)
    folder = given.out / "ntp_comments" / f"seed{seed}"
    tokens = math.ceil(cost(mid, "ra3").training_tokens)
    batch = 32
    steps = math.ceil(tokens / (batch * tokens_per_program(mid)))
    places = [f"run_folder={folder}", f"corpus.folder={mid / 'corpus'}", f"model.folder={base}", f"seed={seed}"]
    length = [f"warmup.steps={steps}", f"warmup.max_tokens={tokens}", f"warmup.snippets_per_step={batch}"]
    as_mstep = ["em.rounds=0", "warmup.learning_rate=1e-3", "warmup.latent_weight=1", "warmup.lr_final_fraction=0.1"]
    config = CONTROL / "run.yaml"
    call_once(
        [*RA3, "midtrain", config, *places, *length, *as_mstep],
        folder / "summary.json",
        folder.with_name(f"{folder.name}.log"),
        folder.name,
        inputs=[config, mid / "corpus" / "manifest.json", base],
    )
    return folder / "export"


def asymptote(evaluations: Sequence[Record]) -> float:
    """Mean pass rate of the last evaluations."""
    return statistics.fmean(record["pass_rate"] for record in evaluations[-LAST:])


def figures(evaluations: Sequence[Record], target: float | None) -> Record:
    """Figures of one run; steps to a pass rate are missing where it was never reached."""
    found: Record = {
        "first": evaluations[0]["pass_rate"],
        "last": asymptote(evaluations),
        "mean": statistics.fmean(record["pass_rate"] for record in evaluations),
        "answer_tokens": evaluations[-1]["answer_tokens"],
        "reached_high": float(any(record["pass_rate"] >= HIGH for record in evaluations)),
    }
    for name, level in (("to_ntp", target), ("to_high", HIGH)):
        reached = [record["rlvr_step"] for record in evaluations if level is not None and record["pass_rate"] >= level]
        found |= {name: reached[0]} if reached else {}
    return found


def minus(found: Record, base: Record | None) -> Record:
    """Differences to the run from `base` of the same seed; none for that run itself or where there is none."""
    if base is None or found is base:
        return {}
    return {f"{name}_minus": found[name] - base[name] for name in ("last", "mean")}


def publish(given: argparse.Namespace, records: Sequence[Record], curves: Sequence[Record]) -> None:
    """Write table, data, curves and plot, and print the table."""
    rows = over_seeds(records, ["start"])
    table = markdown(rows, {"start": "start"}, COLUMNS)
    description = {
        "experiment": "rlvr_transfer",
        "seeds": given.seeds,
        "small": given.small,
        "settings": given.set,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
    write_results(given.out, description, records, rows, table)
    points = over_seeds(curves, ["rlvr_step"])
    (given.out / "curves.json").write_text(json.dumps(list(curves), indent=1) + "\n", encoding="utf-8")
    shown = {start: label for start, label in STARTS.items() if start in given.starts}
    draw(
        given.out / "rlvr_transfer.png",
        points,
        [
            Panel("held-out pass rate, %", shown, 100, bounds=(0.0, 100.0)),
            Panel("answer, tokens", {f"{start}_tokens": label for start, label in shown.items()}),
        ],
        x="rlvr_step",
        xlabel="RLVR steps",
        title=f"RLVR from different starts, seeds {', '.join(map(str, given.seeds))} (bands: 95 % intervals)",
    )
    print(f"\n{table}\n\n{given.out}: table.md, results.json, data.csv, curves.json, rlvr_transfer.png", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for tasks, runs, table, data and plot")
    parser.add_argument(
        "--mid", type=Path, help="the positive control's --out, used or made (default OUT/mid-training)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="S", help="default 0 1 2 3 4")
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=list(STARTS), help="default: all")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for `ra3 rlvr`; repeat")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="seeds at a time; default %(default)s")
    parser.add_argument("--small", action="store_true", help="seconds per run, to see that everything works")
    given = parser.parse_args()
    given.mid = given.mid or given.out / "mid"
    return given


if __name__ == "__main__":
    main()
