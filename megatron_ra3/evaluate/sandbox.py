"""The jail: a pool of warm workers in which model-written programs run alone, each in fresh namespaces.

A program never decides its verdict; it returns data, and trusted code outside compares (`graders`). There are three
outcomes: pass, fail, and infrastructure error. The last one is retried on a fresh worker and then reported as such,
because a broken jail that counts as a wrong answer poisons both scores and rewards.
"""

from __future__ import annotations

import itertools
import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self, TypeVar

from megatron_ra3.evaluate.cgroups import sweep
from megatron_ra3.evaluate.scripts import run_script
from megatron_ra3.evaluate.worker import BOUNDED, Finished, JailError, Limits, ProgramError, Worker

Isolation = Literal["bubblewrap", "unsafe"]
Item = TypeVar("Item")
Result = TypeVar("Result")
_SERIALS = itertools.count()
"""Numbers of all workers of this process: no two share a user or a control group."""

_PROBE = r"""
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
facts = {
    "runs as root": os.getuid() == 0 or os.geteuid() == 0,
    "sees processes outside": any(name.isdigit() and name != "1" for name in os.listdir("/proc")),
    "inherits the environment": "RA3_JAIL_PROBE" in os.environ,
    "writes outside /tmp": any(os.access(name, os.W_OK) for name in ("/", "/usr", "/dev", "/dev/shm", "/ra3")),
    "sees a file of the host": os.path.exists(PATH),
    "finds files of another program": os.listdir("/tmp") != [],
    "creates namespaces": libc.unshare(0x10000000) == 0,
    "holds capabilities": "CapEff:\t0000000000000000" not in open("/proc/self/status").read(),
}
try:
    socket.socket()
    facts["opens sockets"] = True
except OSError:
    pass
try:
    os.fork()
    facts["starts processes"] = True
except OSError:
    pass
open("/tmp/left", "w").close()
print(";".join(name for name, found in facts.items() if found), end="")
"""


class IsolationError(ValueError):
    """The machine cannot hold programs in a jail, and running them without one was not asked for."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What trusted code found. `reason` is one word for counting, `detail` a line for people.

    Reasons of a failure: wrong (an answer differs), time, output, exit, error (an exception), data (a value that is no
    data), untested (no test ran). An infrastructure error has the reason "jail".
    """

    outcome: Literal["pass", "fail", "infrastructure"]
    reason: str = ""
    detail: str = ""
    tests_passed: int = 0

    @property
    def passed(self) -> bool:
        """Whether all tests ran and all were answered right."""
        return self.outcome == "pass"


def brief(value: object) -> str:
    """At most 100 characters of what a program returned, whatever it is."""
    try:
        return repr(value)[:100]
    except (ValueError, RecursionError):  # a number of very many digits, or a value nested very deep
        return f"<{type(value).__name__}>"


class Sandbox:
    """`workers` jails, used from as many threads as there are. Use as a context manager.

    `isolation="bubblewrap"` checks on start-up, from inside, that the jail holds, and raises IsolationError if not;
    "unsafe" runs programs as ordinary processes with resource limits and a seccomp filter only, for machines whose
    content does not matter. `packages` are folders that programs may import from. `largest` bounds what any program may
    ask for in memory and files. `infrastructure_errors` counts failures of the jail, retried ones included.
    """

    def __init__(
        self,
        workers: int,
        *,
        isolation: Isolation = "bubblewrap",
        packages: Sequence[Path] = (),
        largest: Limits | None = None,
        retries: int = 2,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers}: must be at least 1")
        if isolation not in {"bubblewrap", "unsafe"}:
            raise ValueError(f"isolation={isolation!r}: must be 'bubblewrap' or 'unsafe'")
        self.isolation = isolation
        self.infrastructure_errors = 0
        self.last_infrastructure_error = ""
        self.largest = largest or Limits(memory_bytes=4 << 30)
        self._retries = retries
        self._packages = [path.resolve() for path in packages]
        self._folder = tempfile.mkdtemp(prefix="ra3-jail-")
        self._idle: queue.SimpleQueue[tuple[int, Worker | None]] = queue.SimpleQueue()
        self._count = workers
        self._lock = threading.Lock()
        self.memory_cgroup = False
        try:
            self._start(workers)
        except BaseException:
            self.close()
            raise

    def _start(self, workers: int) -> None:
        sweep()
        if self.isolation == "bubblewrap" and shutil.which("bwrap") is None:
            raise IsolationError(_refusal("bwrap is not on PATH"))
        try:
            for index in range(workers):
                self._idle.put((index, self._new_worker(index)))
            if self.isolation == "bubblewrap":
                self._probe()
        except JailError as error:
            if self.isolation == "bubblewrap":
                raise IsolationError(_refusal(str(error))) from None
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all idle workers and remove what they used."""
        while not self._idle.empty():
            _, worker = self._idle.get()
            if worker is not None:
                worker.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def worker(self) -> Iterator[Worker]:
        """A worker of one's own; replaced by a new one if it fails. Waits while all are in use."""
        index, worker = self._idle.get()
        try:
            if worker is None:
                worker = self._new_worker(index)
            yield worker
        except ProgramError:
            raise
        except BaseException as error:  # its program may still be running: never give such a worker to the next one
            if isinstance(error, JailError):
                with self._lock:
                    self.infrastructure_errors += 1
                    self.last_infrastructure_error = str(error)
            if worker is not None:
                worker.close()
            worker = None
            raise
        finally:
            self._idle.put((index, worker))

    def judge(self, attempt: Callable[[Worker], Verdict]) -> Verdict:
        """`attempt(worker)`, where a ProgramError is a failure and a JailError is retried on a fresh worker."""
        for left in range(self._retries, -1, -1):
            try:
                with self.worker() as worker:
                    return attempt(worker)
            except ProgramError as error:
                return Verdict(outcome="fail", reason=error.reason, detail=error.detail)
            except JailError as error:
                if not left:
                    return Verdict(outcome="infrastructure", reason="jail", detail=str(error))
        raise AssertionError("unreachable")

    def run_script(self, code: str, stdin: bytes = b"", limits: Limits | None = None) -> Finished:
        """Run a script on the next free worker; see `scripts.run_script`. Raises JailError.

        Without `limits` it has the usual ones, or those of `largest` where they are smaller.
        """
        if limits is None:
            usual = Limits()
            smaller = {name: min(getattr(usual, name), getattr(self.largest, name)) for name in BOUNDED}
            limits = replace(usual, **smaller)
        with self.worker() as worker:
            return run_script(worker, code, stdin, limits)

    def map(self, judge: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """`judge` of every item in order, as many at once as there are workers."""
        with ThreadPoolExecutor(self._count, "ra3-jail") as pool:
            yield from pool.map(judge, items)

    def _new_worker(self, index: int) -> Worker:
        isolated = self.isolation == "bubblewrap"
        folder = Path(self._folder, str(index))
        folder.mkdir(exist_ok=True)
        serial = next(_SERIALS)
        worker = Worker(
            str(serial),
            isolated=isolated,
            uid=_uid(serial) if isolated and os.geteuid() == 0 else None,
            packages=self._packages,
            limits=self.largest,
            folder="/tmp" if isolated else str(folder),  # noqa: S108 - inside the jail
        )
        self.memory_cgroup = worker.cgroup is not None
        return worker

    def _probe(self) -> None:
        """Look at the jail from inside, twice: the second time nothing of the first may be left."""
        probe = _PROBE.replace("PATH", repr(self._folder))
        for _ in range(2):
            finished = self.run_script(probe)
            if finished.code != 0 or finished.stdout:
                found = finished.stdout.decode(errors="replace") or finished.stderr.decode(errors="replace")[-500:]
                raise IsolationError(_refusal(f"a program in it {found or finished}"))


def _uid(serial: int) -> int:
    """A user for one worker that nothing else on the machine is likely to run as: its processes are counted by user."""
    return 30_000 + (os.getpid() * 61 + serial) % 30_000


def _refusal(why: str) -> str:
    return (
        f"the jail does not hold on this machine ({why}). Programs written by a model run only in a jail: install "
        "bubblewrap and allow user namespaces, or start as root; isolation='unsafe' runs them without one"
    )
