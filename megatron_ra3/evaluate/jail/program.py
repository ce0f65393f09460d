"""What a fork of the server becomes: restricted for good, then a script or a module whose functions are called.

Nothing here is trusted once the program has started: whatever this process sends is only data to the outside.
"""

import atexit
import functools
import gc
import importlib
import io
import json
import marshal
import os
import random
import resource
import struct
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

from . import kernel, values

WARM = (
    *("bisect", "collections", "copy", "functools", "heapq", "itertools", "json", "math", "operator", "random", "re"),
    *("string", "typing"),
)
"""What programs import most. A module that few need is imported sooner than carried along in every fork."""
_TEXT_LIMIT = 2000
_FIXED_LIMITS = {
    resource.RLIMIT_NOFILE: 64,
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_MEMLOCK: 0,
    resource.RLIMIT_MSGQUEUE: 0,
}
_STREAMS: dict[str, Any] = {}
_REPLACED: list[Any] = []
"""The server's own streams: to take them down in every fork would cost more than to keep them."""


def prepare(packages: list[str]) -> None:
    """In the server, once: all that can be done before a fork, since what is done after it is done for every program.

    Imports what programs usually import, and what plain Python offers without being asked (`exit`, `quit`).
    """
    import site

    site.setquit()
    for name in WARM:
        importlib.import_module(name)
    for kind, limit in _FIXED_LIMITS.items():
        resource.setrlimit(kind, _bounds(kind, limit))
    sys.path[:] = [*packages, *(entry for entry in sys.path if not entry.startswith("/ra3"))]
    sys.argv[:] = ["main.py"]
    sys.set_int_max_str_digits(0)
    random.seed(0)
    sys.modules["__main__"] = types.ModuleType("__main__")
    _make_streams()


def _make_streams() -> None:
    """Streams over descriptors 0, 1 and 2 as programs will have them: a file and two pipes, which is remembered."""
    _REPLACED.extend((sys.stdin, sys.stdout, sys.stderr))
    kept = [os.dup(number) for number in range(3)]
    reading, writing = os.pipe()
    file = os.memfd_create("stdin", 0)
    for number, stand_in in enumerate((file, writing, writing)):
        os.dup2(stand_in, number)
    for name, descriptor, how in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = io.open(descriptor, how, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115, UP020
        _STREAMS[name] = _STREAMS[f"__{name}__"] = stream
    for number, before in enumerate(kept):
        os.dup2(before, number)
    for number in (*kept, reading, writing, file):
        os.close(number)


def restrictions(settings: dict[str, Any], request: dict[str, Any], seccomp: list[kernel.Step]) -> list[kernel.Step]:
    """What a fork does first: enter a fresh /proc, set limits, drop user, capabilities and most system calls."""
    isolated, uid = settings["namespaces"], settings["uid"]
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    limits = {
        resource.RLIMIT_CPU: int(request["cpu_s"]) + 1,
        resource.RLIMIT_AS: request["memory_bytes"],
        resource.RLIMIT_STACK: request["stack_bytes"],
        resource.RLIMIT_FSIZE: request["files_bytes"],
        resource.RLIMIT_NPROC: request["max_tasks"],
    }
    steps: list[kernel.Step] = [("setsid", os.setsid, ())]
    if isolated:
        steps.append(kernel.mount("proc", "/proc", flags, "subset=pid"))
    steps += [("oom_score_adj", _volunteer, ()), ("chdir", os.chdir, (settings["folder"],))]
    steps += [("setrlimit", resource.setrlimit, (kind, _bounds(kind, limit))) for kind, limit in limits.items()]
    if uid is not None:
        steps += [("setgroups", os.setgroups, ([],)), ("setresgid", os.setresgid, (uid, uid, uid))]
        steps.append(("setresuid", os.setresuid, (uid, uid, uid)))
    steps.append(kernel.prctl(kernel.PR_SET_DUMPABLE, 1))  # else /proc/self, and with it /dev/stdin, belongs to root
    if isolated:
        steps.append(kernel.drop_capabilities())
    return [*steps, *seccomp]


def _volunteer() -> None:
    """If memory runs out, end this process, not the server."""
    victim = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
    os.write(victim, b"1000")
    os.close(victim)


def _bounds(kind: int, limit: int) -> tuple[int, int]:
    allowed = resource.getrlimit(kind)[1]
    bound = limit if allowed == resource.RLIM_INFINITY else min(limit, allowed)
    return bound, bound


def run(mode: str, job_descriptor: int, channel: int) -> NoReturn:
    """Run the job as `mode` says ("script" or "calls") and end this process."""
    job = marshal.loads(os.read(job_descriptor, os.fstat(job_descriptor).st_size))  # noqa: S302 - written by our side
    os.close(job_descriptor)
    gc.enable()
    if mode == "script":
        os.close(channel)
        _run_script(job)
    _serve_calls(job, channel)


def _run_script(job: dict[str, Any]) -> NoReturn:
    for name, text in job["files"].items():
        with open(name, "w", encoding="utf-8") as writing:  # noqa: PTH123
            writing.write(text)
    sys.argv += job["argv"]
    sys.__dict__.update(_STREAMS)
    main = sys.modules["__main__"]
    code = 0
    try:
        exec(compile(job["code"], "main.py", "exec"), main.__dict__)  # noqa: S102 - running programs is what this is for
    except SystemExit as leaving:
        code = _exit_code(leaving.code)
    except BaseException:  # noqa: BLE001 - what the interpreter itself does with an uncaught error
        sys.excepthook(*sys.exc_info())
        code = 1
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()  # noqa: SLF001 - the interpreter's own last steps, as the next
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
        reply = {"error": type(error).__name__, "text": f"{error}"[:_TEXT_LIMIT] + _where(error.__traceback__)}
    raw = values.dumps(reply)
    raw = struct.pack("<I", len(raw)) + raw
    while raw:
        raw = raw[stream.write(raw) :]


def _where(trace: types.TracebackType | None) -> str:
    """The line of the program that raised, if the last one was one of it."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_code.co_filename != "solution.py":
        return ""
    return f" (line {trace.tb_lineno})"


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
