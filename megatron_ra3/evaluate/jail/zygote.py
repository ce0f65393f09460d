"""The fork server inside the jail: a warm interpreter that forks once per program, and never reads a program itself.

Every program is a fresh fork in a PID namespace of its own, with a fresh /tmp and /proc, under the worker's own user.
It is the first process of that namespace, so that the kernel ends everything it started when it ends. The server tells
the outside how the program ended over a socket that the program never has.

A page that either side writes to after a fork is copied, and that is what a program costs. So whatever can be is done
before the fork, once: see `program.prepare`.
"""

import contextlib
import gc
import json
import os
import select
import signal
import struct
import sys
import time
from _socket import CMSG_SPACE, socket  # the module around it would be carried along in every fork
from typing import Any, NamedTuple, NoReturn

from . import kernel, program

CHANNEL, JOB = 3, 4
"""Descriptors of a program, after the three that every program has."""
_DESCRIPTORS = struct.Struct("5i")
_LAST = 1 << 16
_RUNNING = b"running"
_STARTED = b'{"event":"started"}'
_TMP = "/tmp"  # noqa: S108 - inside the jail
_MOST_PLANS = 64
_DYING_S = 3600.0


class Plan(NamedTuple):
    """What one kind of request comes to; requests recur, since most tasks have the same limits."""

    mode: str
    wall_s: float
    before: list[kernel.Step]
    """In the server, before the fork."""
    restrictions: list[kernel.Step]
    """In the fork."""


def main() -> None:
    """Serve requests until the outside closes the socket. The settings are the last argument, as JSON."""
    settings = json.loads(sys.argv[-1])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    while os.dup(0) <= JOB:  # so that nothing of the server's lies where a program's descriptors go
        pass
    control = socket(fileno=os.dup(settings["control"]))
    os.dup2(0, settings["control"])
    program.prepare(settings["packages"])
    server = Server(control, settings)
    gc.collect()
    gc.freeze()
    gc.disable()
    control.send(b'{"event":"ready"}')
    server.serve()


class Server:
    """Runs one program at a time, as the outside asks.

    Args:
        control: socket to the outside.
        settings: of the worker: `namespaces`, `uid`, `folder`, `packages`.
    """

    def __init__(self, control: socket, settings: dict[str, Any]) -> None:
        self._control = control
        self._settings = settings
        self._plans: dict[bytes, Plan] = {}
        self._filters = {flag: kernel.seccomp(kernel.seccomp_program(processes=flag)) for flag in (False, True)}
        self._poller = select.poll()
        self._poller.register(control, select.POLLIN)
        self._isolated = settings["namespaces"]
        self._return: list[kernel.Step] = []
        self._clean: list[kernel.Step] = []
        if self._isolated:
            own = os.open("/proc/self/ns/pid", os.O_RDONLY)
            self._return = [kernel.setns(own, kernel.CLONE_NEWPID)]
            self._clean = [kernel.detach("/proc"), kernel.detach(_TMP)]

    def serve(self) -> None:
        """Answer requests until the outside is gone."""
        room = CMSG_SPACE(_DESCRIPTORS.size)
        while True:
            message, passed, _, _ = self._control.recvmsg(1 << 12, room)
            if not message:
                return
            if message in (b"time", b"kill"):  # crossed with the end of the program they were meant for
                continue
            ((_, _, descriptors),) = passed
            self._execute(self._plans.get(message) or self._plan(message), _DESCRIPTORS.unpack(descriptors))

    def _plan(self, message: bytes) -> Plan:
        request = json.loads(message)
        before: list[kernel.Step] = []
        if self._isolated:
            options = f"mode=1777,size={request['files_bytes']},nr_inodes={request['files']}"
            before.append(kernel.mount("tmpfs", _TMP, kernel.MS_NOSUID | kernel.MS_NODEV, options))
            before.append(kernel.unshare(kernel.CLONE_NEWPID))
        restrictions = program.restrictions(self._settings, request, self._filters[bool(request["processes"])])
        if len(self._plans) == _MOST_PLANS:
            self._plans.clear()
        plan = self._plans[message] = Plan(request["mode"], request["wall_s"], before, restrictions)
        return plan

    def _execute(self, plan: Plan, descriptors: tuple[int, ...]) -> None:
        report, reporter = os.pipe()
        for step in plan.before:
            kernel.take(step)
        pid = kernel.fork()
        if pid == 0:
            _become_program(plan, descriptors, reporter)
        for step in self._return:
            kernel.take(step)
        for descriptor in (*descriptors, reporter):
            os.close(descriptor)
        setup = os.read(report, 1 << 12)
        os.close(report)
        if setup != _RUNNING:
            reason = setup.decode(errors="replace") or "it ended before it began"
            self._control.send(json.dumps({"event": "failed", "reason": reason}).encode())
            sys.exit(1)  # what it has mounted goes with this jail
        self._control.send(_STARTED)
        status = self._watch(pid, plan.wall_s)
        for step in self._clean:
            kernel.take(step)
        self._control.send(status)

    def _watch(self, pid: int, wall_s: float) -> bytes:
        """Wait for the program to end, and say how; SystemExit if the outside is gone."""
        ended = os.pidfd_open(pid)
        self._poller.register(ended, select.POLLIN)
        deadline = time.monotonic() + wall_s
        left_s = wall_s
        while True:
            ready = [number for number, _ in self._poller.poll(left_s * 1000)]
            if ended in ready:
                break
            message = self._control.recv(1 << 12) if ready else b"kill"
            if message == b"time":
                times = _times("/proc/1" if self._isolated else f"/proc/{pid}")
                self._control.send(json.dumps({"event": "time", **times}).encode())
            else:
                signal.pidfd_send_signal(ended, signal.SIGKILL)
            if not message:
                sys.exit(0)
            left_s = max(0.0, deadline - time.monotonic()) if ready else _DYING_S
        self._poller.unregister(ended)
        os.close(ended)
        _, wait_status, usage = os.wait4(pid, 0)
        code, cpu_s = os.waitstatus_to_exitcode(wait_status), usage.ru_utime + usage.ru_stime
        return b'{"event":"ended","code":%d,"cpu_s":%f,"peak_kib":%d}' % (code, cpu_s, usage.ru_maxrss)


def _become_program(plan: Plan, descriptors: tuple[int, ...], reporter: int) -> NoReturn:
    """In the fork: give everything up, then run the program."""
    try:
        for place, number in enumerate(descriptors):
            os.dup2(number, place)
        os.closerange(len(descriptors), reporter)
        os.closerange(reporter + 1, _LAST)
        for step in plan.restrictions:
            kernel.take(step)
        os.write(reporter, _RUNNING)
        os.close(reporter)
    except BaseException as error:  # noqa: BLE001 - whatever went wrong, the outside must hear of it
        with contextlib.suppress(OSError):
            os.write(reporter, f"{type(error).__name__}: {error}".encode())
        os._exit(70)
    try:
        program.run(plan.mode, JOB, CHANNEL)
    finally:
        os._exit(71)


def _times(proc: str) -> dict[str, float]:
    """Seconds the main thread has run, and has been ready to run while the machine was busy with something else."""
    try:
        with open(f"{proc}/schedstat", encoding="utf-8") as reading:  # noqa: PTH123
            ran_ns, waited_ns, _ = reading.read().split()
    except (OSError, ValueError):
        return {"ran_s": 0.0, "waited_s": 0.0}
    return {"ran_s": int(ran_ns) / 1e9, "waited_s": int(waited_ns) / 1e9}
