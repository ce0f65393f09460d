"""What a fork of the server becomes: restricted for good, then a script or a module whose functions are called.

Nothing here is trusted once the program has started: whatever this process sends is only data to the outside.
"""

import atexit
import functools
import gc
import importlib
import io
import json
import os
import random
import resource
import struct
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any, NoReturn

from . import kernel, values

WARM = (
    *("array", "bisect", "collections", "contextlib", "copy", "dataclasses", "datetime", "decimal", "enum"),
    *("fractions", "functools", "heapq", "io", "itertools", "json", "math", "operator", "queue", "random", "re"),
    *("statistics", "string", "textwrap", "typing"),
)
_TEXT_LIMIT = 2000
PROC_MOUNTED = "proc "
"""Reported once the server has a mount to undo."""


def warm_up() -> None:
    """Import what programs usually import, and what plain Python offers without being asked (`exit`, `quit`)."""
    import site

    site.setquit()
    for name in WARM:
        importlib.import_module(name)


def restrict(settings: dict[str, Any], request: dict[str, Any], reporter: int) -> None:
    """Enter a fresh /proc, and say so; set the limits; drop the user, all capabilities and most system calls."""
    os.setsid()
    if settings["namespaces"]:
        flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
        kernel.mount("proc", "/proc", flags, "subset=pid")
        os.write(reporter, PROC_MOUNTED.encode())
    victim = os.open("/proc/self/oom_score_adj", os.O_WRONLY)  # if memory runs out, end this process, not the server
    os.write(victim, b"1000")
    os.close(victim)
    os.chdir(settings["folder"])
    _set_limits(request)
    if settings["uid"] is not None:
        os.setgroups([])
        os.setresgid(settings["uid"], settings["uid"], settings["uid"])
        os.setresuid(settings["uid"], settings["uid"], settings["uid"])
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # else /proc/self, and with it /dev/stdin, belongs to root
    if settings["namespaces"]:
        kernel.drop_capabilities()
    kernel.install_seccomp(request["filter"])


def _set_limits(request: dict[str, Any]) -> None:
    for name, limit in (
        ("CPU", int(request["cpu_s"]) + 1),
        ("AS", request["memory_bytes"]),
        ("STACK", request["stack_bytes"]),
        ("FSIZE", request["files_bytes"]),
        ("NPROC", request["max_tasks"]),
        ("NOFILE", 64),
        ("CORE", 0),
        ("MEMLOCK", 0),
        ("MSGQUEUE", 0),
    ):
        kind = getattr(resource, f"RLIMIT_{name}")
        allowed = resource.getrlimit(kind)[1]
        bound = limit if allowed == resource.RLIM_INFINITY else min(limit, allowed)
        resource.setrlimit(kind, (bound, bound))


def run(mode: str, job_descriptor: int, channel: int) -> NoReturn:
    """Run the job as `mode` says ("script" or "calls") and end this process."""
    with os.fdopen(job_descriptor, "rb") as reading:
        job = json.loads(reading.read())
    sys.path[:] = [*job["packages"], *(entry for entry in sys.path if not entry.startswith("/ra3"))]
    sys.set_int_max_str_digits(0)
    random.seed(0)
    gc.enable()
    if mode == "script":
        os.close(channel)
        _run_script(job)
    _serve_calls(job, channel)


def _run_script(job: dict[str, Any]) -> NoReturn:
    for name, text in job["files"].items():
        with open(name, "w", encoding="utf-8") as writing:  # noqa: PTH123
            writing.write(text)
    sys.argv = ["main.py", *job["argv"]]
    for name, descriptor, how in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = io.open(descriptor, how, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115, UP020
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    code = 0
    try:
        exec(compile(job["code"], "main.py", "exec"), main.__dict__)  # noqa: S102 - running programs is what this is for
    except SystemExit as leaving:
        code = _exit_code(leaving.code)
    except BaseException:  # noqa: BLE001 - what the interpreter itself does with an uncaught error
        sys.excepthook(*sys.exc_info())
        code = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001 - the interpreter's own last steps
        atexit._run_exitfuncs()  # noqa: SLF001
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001
        code = 120
    finally:
        os._exit(code)


def _exit_code(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


def _serve_calls(job: dict[str, Any], channel: int) -> NoReturn:
    """Load the job as a module and answer one request after another; see `Session` outside for their meaning."""
    stream = os.fdopen(channel, "r+b", buffering=0)
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    objects: list[Any] = []

    def keep(value: Any) -> list[Any]:
        objects.append(value)
        return ["h", len(objects) - 1, type(value).__name__[:100], bool(value)]

    def fetch(data: list[Any]) -> Any:
        return objects[data[1]]

    _answer(stream, functools.partial(_load, job["code"], module), keep)
    while True:
        request = json.loads(_receive(stream))
        _answer(stream, functools.partial(_perform, request, module, fetch), keep)


def _load(code: str, module: types.ModuleType) -> tuple[None, list[Any]]:
    exec(compile(code, "solution.py", "exec"), module.__dict__)  # noqa: S102 - running programs is what this is for
    return None, []


def _perform(request: dict[str, Any], module: types.ModuleType, fetch: values.Foreign) -> tuple[Any, list[Any]]:
    owner: Any = module if request["on"] is None else fetch(["h", request["on"]])
    arguments = [values.decode(argument, fetch) for argument in request["args"]]
    operation, name = request["op"], request["name"]
    if operation == "get":
        return getattr(owner, name), []
    if operation == "set":
        setattr(owner, name, arguments[0])
        return None, []
    if operation == "list":
        return list(owner), []
    keywords = {key: values.decode(value, fetch) for key, value in request["kwargs"].items()}
    result = (getattr(owner, name) if name else owner)(*arguments, **keywords)
    return result, arguments if request["mutable"] else []


def _answer(stream: io.RawIOBase, action: Callable[[], tuple[Any, list[Any]]], keep: values.Foreign) -> None:
    try:
        result, after = action()
        encoded = [values.encode(argument, keep) for argument in after]
        reply: dict[str, Any] = {"value": values.encode(result, keep), "after": encoded}
    except BaseException as error:  # noqa: BLE001 - SystemExit and KeyboardInterrupt are answers here, too
        last = traceback.extract_tb(error.__traceback__)[-1:]
        where = f" (line {last[0].lineno})" if last and last[0].filename == "solution.py" else ""
        reply = {"error": type(error).__name__, "text": f"{error}"[:_TEXT_LIMIT] + where}
    raw = values.dumps(reply)
    raw = struct.pack("<I", len(raw)) + raw
    while raw:
        raw = raw[stream.write(raw) :]


def _receive(stream: io.RawIOBase) -> bytes:
    length = struct.unpack("<I", _read_exactly(stream, 4))[0]
    return _read_exactly(stream, length)


def _read_exactly(stream: io.RawIOBase, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = stream.read(count - len(parts))
        if not part:
            os._exit(0)
        parts += part
    return bytes(parts)
