"""One jail with its fork server, as seen from outside: started, given programs one by one, watched, replaced.

Nothing a program sends is believed to be anything but data: how it ended is told by the server, time is measured here,
and every stream has a limit. What goes wrong on our side is a `JailError`, and what the program does is a
`ProgramError`; the two are never mixed, because the first must not count as a wrong answer.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import marshal
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ra3.evaluate.cgroups import Cgroup, create_cgroup

MIB = 1 << 20
_START_S = 60.0
_GRACE_S = 30.0
BOUNDED = ("memory_bytes", "files_bytes", "max_tasks")
"""What a jail is made for when it starts; no program may ask for more."""
_SLACK = 10.0
"""A busy machine may stretch a time limit by at most this factor."""
_JAIL = Path(__file__).parent / "jail"
_BOOT = "import sys; sys.path.insert(0, '{root}'); from ra3_jail.zygote import main; main()"
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",  # noqa: S108 - inside the jail
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
}


class JailError(RuntimeError):
    """The jail failed, not the program: worth a retry, and no verdict on the program."""


class ProgramError(Exception):
    """The program failed. `reason` is one word for counting: time, output, exit, error, data."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use. Time on the clock does not count while a busy machine keeps the program waiting."""

    time_s: float = 10.0
    memory_bytes: int = 1024 * MIB
    output_bytes: int = 16 * MIB
    files_bytes: int = 64 * MIB
    files: int = 1024
    stack_bytes: int = 64 * MIB
    max_tasks: int = 32
    processes: bool = False
    """Whether the program may start processes and other programs; threads are always allowed."""

    def __post_init__(self) -> None:
        for name in ("time_s", "memory_bytes", "output_bytes", "files_bytes", "files", "stack_bytes", "max_tasks"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a script ended. `code` is its exit status, negative for a signal, None if it was ended for `exceeded`."""

    code: int | None
    exceeded: str
    """Empty, "time" or "output"."""
    stdout: bytes
    stderr: bytes
    cpu_s: float
    peak_bytes: int


def bubblewrap_command(prefix: Path, packages: Sequence[Path], *, root: bool) -> list[str]:
    """The bwrap arguments up to and without the program: own namespaces, no network, a read-only system, empty /tmp."""
    command = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--new-session", "--clearenv", "--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    if root:
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_KILL"):
            command += ["--cap-add", capability]
    else:
        command.append("--unshare-user")
    for name, value in _ENVIRONMENT.items():
        command += ["--setenv", name, value]
    for name in ("/usr", "/bin", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/etc/localtime"):
        path = Path(name)
        if path.is_symlink() and path.parent == Path("/"):
            command += ["--symlink", str(path.readlink()), name]
        elif path.exists():
            command += ["--ro-bind", name, name]
    command += ["--perms", "0755", "--tmpfs", "/dev"]  # not --dev: its terminals need a user namespace of their own
    for name in ("null", "zero", "full", "random", "urandom"):
        command += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for target, name in (("", "fd"), ("/0", "stdin"), ("/1", "stdout"), ("/2", "stderr")):
        command += ["--symlink", f"/proc/self/fd{target}", f"/dev/{name}"]
    command += ["--proc", "/proc", "--perms", "1777", "--tmpfs", "/tmp"]  # noqa: S108
    bound = {Path("/"), Path("/usr"), Path("/tmp")}  # noqa: S108
    for folder in (prefix, *packages):
        command += _bind(folder, bound)
    command += ["--perms", "0755", "--dir", "/ra3", "--ro-bind", str(_JAIL), "/ra3/ra3_jail"]
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/", "--"]


def _bind(folder: Path, bound: set[Path]) -> list[str]:
    """Bind `folder` read-only at its own path; parents that hide their content from others are made visible first."""
    if folder in bound or Path("/usr") in folder.parents:
        return []
    arguments: list[str] = []
    for parent in reversed(folder.parents):
        if parent not in bound:
            bound.add(parent)
            arguments += ["--perms", "0755", "--dir", str(parent)]
    bound.add(folder)
    return [*arguments, "--ro-bind", str(folder), str(folder)]


class Worker:
    """A jail that runs one program at a time. Raises JailError if it does not start.

    Not for use by several threads at once. `uid` is the user its programs run as when this process is root.
    """

    def __init__(
        self, name: str, *, isolated: bool, uid: int | None, packages: Sequence[Path], limits: Limits, folder: str
    ) -> None:
        self._largest = limits
        self.cgroup = _cgroup(name, limits) if isolated else None
        python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
        if isolated:
            command = bubblewrap_command(Path(sys.base_prefix), packages, root=os.geteuid() == 0)
            root = "/ra3"
        else:
            command = []
            root = _linked_jail(folder)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {
            "namespaces": isolated,
            "uid": uid,
            "folder": folder,
            "packages": [str(path) for path in packages],
            "control": theirs.fileno(),
        }
        command += [python, "-s", "-P", "-S", "-B", "-c", _BOOT.format(root=root), json.dumps(settings)]
        if self.cgroup:
            command = self.cgroup.command(command)
        self._errors = os.memfd_create("errors")
        with theirs:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._errors,
                    pass_fds=[theirs.fileno()],
                    env=_ENVIRONMENT,
                    cwd="/",
                )
            except OSError as error:
                self._control.close()
                os.close(self._errors)
                raise JailError(f"cannot start {command[0]}: {error}") from error
        try:
            if self.receive(_START_S)["event"] != "ready":
                raise JailError("the server of the jail did not report ready")
        except JailError as error:
            self.close()
            raise JailError(f"the jail did not start: {error}") from None

    def close(self) -> None:
        """End the jail and everything in it."""
        self._control.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._errors)
        if self.cgroup:
            self.cgroup.remove()

    def fileno(self) -> int:
        """The socket on which the server reports."""
        return self._control.fileno()

    def start(self, mode: str, job: dict[str, Any], limits: Limits, descriptors: Sequence[int]) -> None:
        """Have a program forked and wait until it runs; `descriptors` become its stdin, stdout, stderr and channel."""
        for name in BOUNDED:
            if getattr(limits, name) > getattr(self._largest, name):
                raise ValueError(
                    f"{name}={getattr(limits, name)}: this worker's jail has {getattr(self._largest, name)}"
                )
        sealed = sealed_file(marshal.dumps(job))
        try:
            socket.send_fds(self._control, [_request(mode, limits)], [*descriptors, sealed])
        except OSError as error:
            raise JailError(f"the server of the jail is gone: {error}") from None
        finally:
            os.close(sealed)
        self.receive(_GRACE_S)

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next report of the server."""
        ready = select.poll()  # select() itself takes no descriptor above 1023
        ready.register(self._control, select.POLLIN)
        if not ready.poll(timeout_s * 1000):
            raise JailError(f"the server of the jail did not answer within {timeout_s:.0f} s")
        try:
            message = self._control.recv(1 << 16)
        except OSError as error:
            raise JailError(f"the server of the jail is gone: {error}") from None
        if not message:
            said = os.pread(self._errors, 2000, 0).decode(errors="replace").strip()
            raise JailError(f"the server of the jail ended; it said {said!r}")
        report: dict[str, Any] = json.loads(message)
        if report["event"] == "failed":
            raise JailError(f"a program could not be started: {report['reason']}")
        return report

    def ask(self, what: bytes) -> None:
        """Send "time" or "kill" while a program runs."""
        try:
            self._control.send(what)
        except OSError as error:
            raise JailError(f"the server of the jail is gone: {error}") from None


@functools.lru_cache
def _request(mode: str, limits: Limits) -> bytes:
    """What the server of a jail is told of a program; equal bytes for equal limits, which it recognises."""
    request = {
        "mode": mode,
        "cpu_s": limits.time_s,
        "wall_s": limits.time_s * _SLACK + _GRACE_S * (4 if mode == "calls" else 1),
        **{name: getattr(limits, name) for name in ("memory_bytes", "files_bytes", "files", "stack_bytes")},
        **{name: getattr(limits, name) for name in ("max_tasks", "processes")},
    }
    return json.dumps(request).encode()


def _cgroup(name: str, limits: Limits) -> Cgroup | None:
    """Room for one program at its limits, its files, and the server."""
    memory_bytes = limits.memory_bytes + limits.files_bytes + 128 * MIB
    return create_cgroup(name, memory_bytes=memory_bytes, max_tasks=limits.max_tasks + 8)


def _linked_jail(folder: str) -> str:
    """For workers without a jail: the server's code under the name it has inside."""
    root = Path(folder).parent / "ra3"
    root.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (root / "ra3_jail").symlink_to(_JAIL)
    return str(root)


def sealed_file(content: bytes) -> int:
    """A descriptor of an anonymous file with `content` that nobody can change any more, placed at its start."""
    descriptor = os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, memoryview(content)[written:], written)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return descriptor


class Watch:
    """One running program: waits for its streams and its end, within its time.

    The clock stops while the machine keeps the program waiting for a processor, but for no longer than `_SLACK` allows.
    """

    def __init__(self, worker: Worker, limits: Limits) -> None:
        self.worker = worker
        self._extension_s = (_SLACK - 1.0) * limits.time_s
        self.ended: dict[str, Any] | None = None
        self._waited_s = 0.0
        self._poller = select.poll()
        self._actions: dict[int, Callable[[int], None]] = {}
        self._poller.register(worker, select.POLLIN)

    def on(self, descriptor: int, events: int, action: Callable[[int], None]) -> None:
        """Call `action(event mask)` when `descriptor` is ready; registering again replaces."""
        self._poller.register(descriptor, events)
        self._actions[descriptor] = action

    def off(self, descriptor: int) -> None:
        """Stop looking at `descriptor`."""
        if self._actions.pop(descriptor, None):
            self._poller.unregister(descriptor)

    def run(self, done: Callable[[], bool], limit_s: float) -> bool:
        """Serve the streams until `done` or the program has ended; False when the time is over before that."""
        deadline = time.monotonic() + limit_s
        while not done() and self.ended is None:
            ready = self._poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not ready and time.monotonic() >= deadline:
                extra_s = min(self._kept_waiting(), self._extension_s)
                if self.ended is None and extra_s < 0.02 * limit_s:
                    return False
                self._extension_s -= extra_s
                deadline = time.monotonic() + extra_s
            for descriptor, events in ready:
                if descriptor == self.worker.fileno():
                    self.ended = self.worker.receive(_GRACE_S)
                else:
                    self._actions[descriptor](events)
        return True

    def _kept_waiting(self) -> float:
        """Seconds since the last call that the program was ready to run and had no processor."""
        self.worker.ask(b"time")
        report = self.worker.receive(_GRACE_S)
        if report["event"] != "time":
            self.ended = report
            return 0.0
        before, self._waited_s = self._waited_s, report["waited_s"]
        return self._waited_s - before

    def finish(self) -> dict[str, Any]:
        """End the program if it still runs; how it ended."""
        if self.ended is None:
            self.worker.ask(b"kill")
        while self.ended is None:
            report = self.worker.receive(_GRACE_S)
            self.ended = report if report["event"] == "ended" else None
        return self.ended
