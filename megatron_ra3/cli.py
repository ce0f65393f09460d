"""The `ra3` command. Each subcommand parses its arguments and hands over; user errors end in one line, not a trace."""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_ra3 import __version__
from megatron_ra3.config import load_config
from megatron_ra3.rlvr_config import load_any_config, load_rlvr_config
from megatron_ra3.rollout.engine import EngineError

STOPPED = 75
"""Exit status of a run that saved and left because it was asked to: start it again.

So is one that ended with 76, because nothing moved any more (`stall.STALLED`).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status (2: bad input, 75: see STOPPED, 141: nobody reads what it prints)."""
    arguments = _parse(argv)
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()
    except BrokenPipeError as error:
        if not _has_lost_its_reader(sys.stdout.fileno()):
            return _fail(arguments, error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the exit
        return 128 + signal.SIGPIPE
    except (ValueError, OSError, EngineError) as error:
        return _fail(arguments, error)
    return status


def _fail(arguments: argparse.Namespace, error: Exception) -> int:
    print(f"ra3 {arguments.command}: {error}", file=sys.stderr)
    return 2


def _has_lost_its_reader(descriptor: int) -> bool:
    """Whether a pipe is closed at its other end, as by `ra3 corpus head CORPUS | head`."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; argparse alone takes no `key=value` that follows an option, once a config file came before it."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    unknown = [item for item in rest if item.startswith("-") or "=" not in item]
    if unknown or (rest and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    from megatron_ra3.bench.command import add_bench_arguments
    from megatron_ra3.chaos.trial import add_chaos_arguments, run_chaos
    from megatron_ra3.checkpoint_cli import add_checkpoint_arguments
    from megatron_ra3.corpus.commands import add_corpus_arguments, add_prepare_arguments, run_prepare
    from megatron_ra3.doctor.command import add_doctor_arguments, run_doctor
    from megatron_ra3.evaluate.commands import add_eval_arguments, run_eval
    from megatron_ra3.launch.plan_command import add_plan_arguments, run_plan
    from megatron_ra3.launch.submit import add_submit_arguments, run_submit
    from megatron_ra3.observe.timeline_command import add_timeline_arguments
    from megatron_ra3.observe.watch_command import add_watch_arguments

    parser = argparse.ArgumentParser(prog="ra3", description="RA3 mid-training on Megatron-Core")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    prepare = commands.add_parser("prepare", help="turn source files into a corpus of shards")
    add_prepare_arguments(prepare)
    prepare.set_defaults(run=run_prepare)

    add_corpus_arguments(commands.add_parser("corpus", help="look at, check, split and merge corpora"))

    for name, run, text in (
        ("midtrain", _midtrain, "run or resume mid-training (under torchrun or srun for several ranks)"),
        ("rlvr", _rlvr, "run or resume RLVR on programming tasks (under torchrun or srun for several ranks)"),
        ("serve", _serve, "serve the model to trainers on this node"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("config", type=Path, help="YAML file")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="for instance objective.penalty=0.05")
        command.set_defaults(run=run)

    submitting = commands.add_parser(
        "submit", help="print or submit the sbatch command of a run, or of a chain of jobs"
    )
    add_submit_arguments(submitting)
    submitting.set_defaults(run=run_submit)

    exporting = commands.add_parser("export", help="write a run's newest checkpoint as a Hugging Face folder")
    exporting.add_argument("config", type=Path, help="YAML file of the run")
    exporting.add_argument("out", type=Path, help="new folder")
    exporting.add_argument("overrides", nargs="*", metavar="key=value")
    exporting.set_defaults(run=_export)

    importing = commands.add_parser("import", help="write a Hugging Face folder as a run's first checkpoint")
    importing.add_argument("config", type=Path, help="YAML file of the run; model.folder is what is imported")
    importing.add_argument("overrides", nargs="*", metavar="key=value")
    importing.set_defaults(run=_import)

    checkpoint = commands.add_parser("checkpoint", help="list, verify or prune the checkpoints of a run")
    add_checkpoint_arguments(checkpoint)

    chaos = commands.add_parser("chaos", help="break small runs at random and compare them with unbroken ones")
    add_chaos_arguments(chaos)
    chaos.set_defaults(run=run_chaos)

    evaluating = commands.add_parser("eval", help="score models on programming benchmarks, side by side")
    add_eval_arguments(evaluating)
    evaluating.set_defaults(run=run_eval)

    report = commands.add_parser("report", help="compare runs of mid-training, or of RLVR, in a table")
    report.add_argument("runs", nargs="+", metavar="name=RUN_FOLDER", help="for instance base=runs/base ra3=runs/ra3")
    report.add_argument("--out", type=Path, help="also write the figures as JSON")
    report.set_defaults(run=_report)

    timing = commands.add_parser("timeline", help="where a run's time went, and for whom its ranks waited")
    add_timeline_arguments(timing)

    watching = commands.add_parser("watch", help="follow a run on a terminal, from its files")
    add_watch_arguments(watching)

    plan = commands.add_parser("plan", help="layout, memory, seconds and cost of a run on given nodes, without a GPU")
    add_plan_arguments(plan)
    plan.set_defaults(run=run_plan)

    doctor = commands.add_parser(
        "doctor", help="what would stop or slow a run here: versions, GPUs, ranks, files, kernels"
    )
    add_doctor_arguments(doctor)
    doctor.set_defaults(run=run_doctor)

    add_bench_arguments(commands.add_parser("bench", help="measure a part of the system on this machine"))
    return parser


def _midtrain(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    from megatron_ra3.em import midtrain

    return _until_stopped(lambda: midtrain(config))


def _rlvr(arguments: argparse.Namespace) -> int:
    config = load_rlvr_config(arguments.config, arguments.overrides)
    from megatron_ra3.rlvr import rlvr

    return _until_stopped(lambda: rlvr(config))


def _until_stopped(train: Callable[[], object]) -> int:
    """Exit status of a run that may save and leave before its end."""
    from megatron_ra3.lifecycle import StopRequestedError

    try:
        train()
    except StopRequestedError as stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers end the other ranks when the first one leaves
        if os.environ.get("RANK", "0") == "0":
            print(stop, flush=True)
        return STOPPED
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    config = load_any_config(arguments.config, arguments.overrides)
    from megatron_ra3.rollout.fleet import serve

    return serve(config)


def _export(arguments: argparse.Namespace) -> int:
    config = load_any_config(arguments.config, arguments.overrides)
    from megatron_ra3.convert import export_checkpoint

    print(f"exported {export_checkpoint(config, arguments.out)} to {arguments.out}")
    return 0


def _import(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    from megatron_ra3.convert import import_checkpoint

    print(f"imported {config.model.folder} as {import_checkpoint(config)}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from megatron_ra3.report.rlvr_summary import is_rlvr, rlvr_table, summarize_rlvr
    from megatron_ra3.report.summary import summarize, table

    pairs = [item.partition("=") for item in arguments.runs]
    if any(not folder for _, _, folder in pairs):
        raise ValueError(f"runs {arguments.runs}: write each as name=RUN_FOLDER")
    runs = {name: Path(folder) for name, _, folder in pairs}
    of_rlvr = [name for name, folder in runs.items() if is_rlvr(folder)]
    if of_rlvr and len(of_rlvr) < len(runs):
        raise ValueError(f"{', '.join(of_rlvr)}: RLVR and mid-training have no figure in common; report them apart")
    summary = summarize_rlvr(runs) if of_rlvr else summarize(runs)
    print(rlvr_table(summary) if of_rlvr else table(summary))
    if arguments.out:
        arguments.out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return 0
