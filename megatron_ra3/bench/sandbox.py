"""`ra3 bench sandbox`: programs per second in the warm jail, beside bubblewrap per program and beside plain processes.

All three run the same trivial script with the same interpreter and check its output. They alternate within one run, so
that a machine that slows down slows all; the figure of each is the median over its turns. Then one worker runs programs
one after the other, and the processor time of everybody who takes part is told apart: that figure hardly depends on
what else the machine does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_ra3.bench.result import publish
from megatron_ra3.evaluate.sandbox import Sandbox
from megatron_ra3.evaluate.worker import bubblewrap_command

CPU_PROGRAMS = 200
_PYTHON_FLAGS = ("-s", "-P", "-S", "-B")


def add_sandbox_arguments(parser: argparse.ArgumentParser) -> None:
    """How many workers, and for how long each way runs."""
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="turns of each way")
    parser.add_argument("--turn-s", type=float, default=1.0, metavar="S", help="seconds per turn")
    parser.add_argument("--out", type=Path, help="also write the result as a JSON file")


def run_sandbox(arguments: argparse.Namespace) -> int:
    """Measure as asked; the result as one JSON object on the last line."""
    result = measure(arguments.workers, arguments.turns, arguments.turn_s)
    return publish(result, arguments.out)


def measure(workers: int, turns: int, turn_s: float) -> dict[str, Any]:
    """`programs_per_s` of the jail, `ratio` over bubblewrap per program, and the rates of all ways and turns.

    Raises IsolationError where there is no jail, ValueError for no turns.
    """
    if turns < 1 or turn_s <= 0:
        raise ValueError(f"turns={turns}, turn_s={turn_s}: both must be above 0")
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    plain = [python, *_PYTHON_FLAGS, "-c"]
    jailed = [*bubblewrap_command(Path(sys.base_prefix), (), root=os.geteuid() == 0), *plain]
    with Sandbox(workers) as sandbox, ThreadPoolExecutor(workers) as pool:
        ways: dict[str, Callable[[str], bytes]] = {
            "jail": lambda code: sandbox.run_script(code).stdout,
            "bubblewrap_each": lambda code: _output([*jailed, code]),
            "plain_process": lambda code: _output([*plain, code]),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(turns):
            for name, way in ways.items():
                rates[name].append(_rate(pool, workers, way, turn_s))
        infrastructure_errors = sandbox.infrastructure_errors
        memory_cgroup = sandbox.memory_cgroup
    with Sandbox(1) as sandbox:
        cpu_ms = cpu_ms_per_program(sandbox, CPU_PROGRAMS)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "programs_per_s": medians["jail"],
        "ratio": medians["jail"] / medians["bubblewrap_each"],
        "ratio_plain_process": medians["jail"] / medians["plain_process"],
        "rates": rates,
        "cpu_ms_per_program": cpu_ms,
        "workers": workers,
        "turn_s": turn_s,
        "infrastructure_errors": infrastructure_errors,
        "memory_cgroup": memory_cgroup,
        "cpus": os.cpu_count(),
        "load_1min": os.getloadavg()[0],
        "python": sys.version.split()[0],
    }


def cpu_ms_per_program(sandbox: Sandbox, programs: int) -> dict[str, float]:
    """Milliseconds of processor time of a trivial script: `outside` the jail, in its `server`, in the `program` itself.

    The program's are those from its fork to its end. What the kernel does for nobody in particular, such as freeing a
    namespace later, is in none of them.
    """
    sandbox.run_script("print(0)")
    outside_s, jails_s, programs_s = time.process_time(), _children_cpu_s(), 0.0
    for number in range(programs):
        programs_s += sandbox.run_script(f"print({number})").cpu_s
    outside_s, jails_s = time.process_time() - outside_s, _children_cpu_s() - jails_s
    parts = {"outside": outside_s, "server": jails_s - programs_s, "program": programs_s}
    return {name: seconds * 1e3 / programs for name, seconds in {"all": outside_s + jails_s, **parts}.items()}


def _children_cpu_s() -> float:
    """Processor seconds of all processes below this one that live, and of those that they have waited for."""
    parents, ticks = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        pid = int(stat.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), sum(map(int, fields[11:15]))
    below: set[int] = set()
    while more := {pid for pid, parent in parents.items() if parent in below | {os.getpid()}} - below:
        below |= more
    return sum(ticks[pid] for pid in below) / os.sysconf("SC_CLK_TCK")


def _output(command: list[str]) -> bytes:
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True).stdout


def _rate(pool: ThreadPoolExecutor, workers: int, way: Callable[[str], bytes], turn_s: float) -> float:
    """Programs per second with `workers` at once; every output is checked."""
    end = time.perf_counter() + turn_s

    def work(worker: int) -> int:
        count = 0
        while time.perf_counter() < end or not count:
            if way(f"print({worker}, {count})") != f"{worker} {count}\n".encode():
                raise ValueError(f"the program {count} of worker {worker} printed something else")
            count += 1
        return count

    start = time.perf_counter()
    counts = list(pool.map(work, range(workers)))
    return sum(counts) / (time.perf_counter() - start)
