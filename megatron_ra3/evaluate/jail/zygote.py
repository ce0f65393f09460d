"""The fork server inside the jail: a warm interpreter that forks once per program, and never reads a program itself.

Every program is a fresh fork in a PID namespace of its own, with a fresh /tmp and /proc, under the worker's own user.
It is the first process of that namespace, so that the kernel ends everything it started when it ends. The server tells
the outside how the program ended over a socket that the program never has.
"""

import contextlib
import fcntl
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any

from . import kernel, program

CHANNEL, JOB = 3, 4
"""Descriptors of a program, after the three that every program has."""
_RUNNING = "running"
_FIRST_FREE = 32


def main() -> None:
    """Serve requests until the outside closes the socket. The settings are the last argument, as JSON."""
    settings = json.loads(sys.argv[-1])
    del sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    control = socket.socket(fileno=settings["control"])
    control.set_inheritable(False)
    namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC) if settings["namespaces"] else -1
    filters = {flag: kernel.seccomp_program(processes=flag) for flag in (False, True)}
    program.warm_up()
    gc.collect()
    gc.freeze()
    gc.disable()
    control.send(b'{"event":"ready"}')
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 8)
        if not message:
            return
        if message in {b"time", b"kill"}:  # crossed with the end of the program they were meant for
            continue
        request = json.loads(message)
        request["filter"] = filters[bool(request["processes"])]
        _execute(control, namespace, settings, request, descriptors)


def _execute(
    control: socket.socket, namespace: int, settings: dict[str, Any], request: dict[str, Any], descriptors: list[int]
) -> None:
    isolated = settings["namespaces"]
    report, reporter = os.pipe()
    if isolated:
        options = f"mode=1777,size={request['files_bytes']},nr_inodes={request['files']}"
        kernel.mount("tmpfs", "/tmp", kernel.MS_NOSUID | kernel.MS_NODEV, options)  # noqa: S108
        kernel.unshare(kernel.CLONE_NEWPID)
    pid = os.fork()
    if pid == 0:
        _become_program(settings, request, descriptors, reporter)
    if isolated:
        kernel.setns(namespace, kernel.CLONE_NEWPID)
    for descriptor in (*descriptors, reporter):
        os.close(descriptor)
    with os.fdopen(report, "rb") as reading:
        setup = reading.read().decode(errors="replace")
    outside_left = False
    if setup.endswith(_RUNNING):
        control.send(b'{"event":"started"}')
        outside_left, status = _watch(control, pid, "/proc/1" if isolated else f"/proc/{pid}", request["wall_s"])
    else:
        os.waitpid(pid, 0)
        status = {"event": "failed", "reason": setup or "it ended before it began"}
    if isolated:
        if setup.startswith(program.PROC_MOUNTED):
            kernel.detach("/proc")
        kernel.detach("/tmp")  # noqa: S108
    if outside_left:
        sys.exit(0)
    control.send(json.dumps(status).encode())


def _watch(control: socket.socket, pid: int, proc: str, wall_s: float) -> tuple[bool, dict[str, Any]]:
    """Wait for the program to end; whether the outside is gone, and how the program ended."""
    ended = os.pidfd_open(pid)
    poller = select.poll()
    poller.register(ended, select.POLLIN)
    poller.register(control, select.POLLIN)
    deadline = time.monotonic() + wall_s
    outside_left = False
    while True:
        ready = {number for number, _ in poller.poll(max(0.0, deadline - time.monotonic()) * 1000)}
        if ended in ready:
            break
        if not ready:
            signal.pidfd_send_signal(ended, signal.SIGKILL)
            poller.unregister(control)
            deadline = time.monotonic() + 3600
            continue
        message = control.recv(1 << 12)
        if message == b"time":
            control.send(json.dumps({"event": "time", **_times(proc)}).encode())
            continue
        outside_left = not message
        signal.pidfd_send_signal(ended, signal.SIGKILL)
        if outside_left:
            poller.unregister(control)
    _, wait_status, usage = os.wait4(pid, 0)
    os.close(ended)
    code = os.waitstatus_to_exitcode(wait_status)
    cpu_s = usage.ru_utime + usage.ru_stime
    return outside_left, {"event": "ended", "code": code, "cpu_s": cpu_s, "peak_kib": usage.ru_maxrss}


def _times(proc: str) -> dict[str, float]:
    """Seconds the main thread has run, and has been ready to run while the machine was busy with something else."""
    try:
        with open(f"{proc}/schedstat", encoding="utf-8") as reading:  # noqa: PTH123
            ran_ns, waited_ns, _ = reading.read().split()
    except (OSError, ValueError):
        return {"ran_s": 0.0, "waited_s": 0.0}
    return {"ran_s": int(ran_ns) / 1e9, "waited_s": int(waited_ns) / 1e9}


def _become_program(settings: dict[str, Any], request: dict[str, Any], descriptors: list[int], reporter: int) -> None:
    """In the fork: give everything up, then run the program. Never returns."""
    try:
        reporter = _arrange_descriptors(descriptors, reporter)
        program.restrict(settings, request, reporter)
        os.write(reporter, _RUNNING.encode())
        os.close(reporter)
    except BaseException as error:  # noqa: BLE001 - whatever went wrong, the outside must hear of it
        with contextlib.suppress(OSError):
            os.write(reporter, f"{type(error).__name__}: {error}".encode())
        os._exit(70)
    try:
        program.run(request["mode"], JOB, CHANNEL)
    finally:
        os._exit(71)


def _arrange_descriptors(descriptors: list[int], reporter: int) -> int:
    """Put stdin, stdout, stderr, channel and job at 0..4 and the reporter after them; close everything else."""
    moved = [fcntl.fcntl(number, fcntl.F_DUPFD, _FIRST_FREE + 1) for number in (*descriptors, reporter)]
    for target, number in enumerate(moved):
        os.dup2(number, target)
    os.closerange(len(moved), os.sysconf("SC_OPEN_MAX"))
    return len(moved) - 1
