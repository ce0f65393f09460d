"""`ra3 watch RUN_FOLDER`: a run on one screen of a terminal, from its files; with `--once` as text, for scripts."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

TEXT_WIDTH = 160
"""Where nobody has said how wide a line may be."""


def add_watch_arguments(parser: argparse.ArgumentParser) -> None:
    """The run folder, and how often to look."""
    parser.add_argument("run_folder", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--once", action="store_true", help="print it once and leave")
    parser.add_argument("--every", type=float, default=5.0, metavar="S", help="seconds between looks")
    parser.set_defaults(run=run_watch)


def run_watch(arguments: argparse.Namespace) -> int:
    """Show the run until Ctrl-C, or once."""
    from rich.console import Console
    from rich.live import Live

    from megatron_ra3.observe.run_view import Follower
    from megatron_ra3.observe.watch import ASCII_BARS, BARS, render

    if arguments.every <= 0:
        raise ValueError(f"--every {arguments.every:g}: must be positive")
    console = Console(width=None if sys.stdout.isatty() else TEXT_WIDTH)
    follower = Follower(arguments.run_folder)
    bars = BARS if "utf" in (sys.stdout.encoding or "").lower() else ASCII_BARS
    if arguments.once:
        console.print(render(follower.look(time.time()), bars))
        return 0
    with Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                live.update(render(follower.look(time.time()), bars), refresh=True)
                time.sleep(arguments.every)
        except KeyboardInterrupt:
            return 0
