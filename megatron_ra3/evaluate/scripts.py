"""A program as a real process with a real stdin and stdout: one input in, its output and exit status out.

A mocked stdin fails correct programs that read bytes, iterate over lines or open descriptor 0; a descriptor does not.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Mapping, Sequence

from megatron_ra3.evaluate.worker import Finished, Limits, Watch, Worker, sealed_file

_CHUNK = 1 << 16


class _Drain:
    """Collects a pipe up to a limit."""

    def __init__(self, descriptor: int, limit_bytes: int) -> None:
        self.descriptor = descriptor
        self.content = bytearray()
        self.open = True
        self._limit_bytes = limit_bytes
        os.set_blocking(descriptor, False)

    @property
    def flooded(self) -> bool:
        return len(self.content) > self._limit_bytes

    def read(self) -> bool:
        """Take one chunk; False when there is nothing to take now."""
        try:
            chunk = os.read(self.descriptor, _CHUNK)
        except BlockingIOError:
            return False
        self.open = bool(chunk)
        self.content += chunk
        return self.open


def run_script(
    worker: Worker,
    code: str,
    stdin: bytes,
    limits: Limits,
    *,
    argv: Sequence[str] = (),
    files: Mapping[str, str] | None = None,
) -> Finished:
    """Run `code` as a script with `stdin`; `files` (name -> text) lie in its working folder.

    Raises JailError if the jail fails; whatever the program does is in the result.
    """
    source = sealed_file(stdin)
    out, out_end = os.pipe2(os.O_CLOEXEC)
    err, err_end = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            job = {"code": code, "argv": list(argv), "files": dict(files or {})}
            worker.start("script", job, limits, [source, out_end, err_end, source])
        finally:
            for descriptor in (source, out_end, err_end):
                os.close(descriptor)
        return _collect(worker, _Drain(out, limits.output_bytes), _Drain(err, limits.output_bytes), limits)
    finally:
        os.close(out)
        os.close(err)


def _collect(worker: Worker, out: _Drain, err: _Drain, limits: Limits) -> Finished:
    watch = Watch(worker, limits)

    def taking(drain: _Drain) -> Callable[[int], None]:
        def take(_: int) -> None:
            drain.read()
            if not drain.open:
                watch.off(drain.descriptor)

        return take

    for drain in (out, err):
        watch.on(drain.descriptor, select.POLLIN, taking(drain))
    in_time = watch.run(lambda: out.flooded or err.flooded, limits.time_s)
    ended = watch.finish()
    for drain in (out, err):  # what was written before the end is in the pipes; nobody is left to write more
        while drain.open and not drain.flooded and drain.read():
            pass
    exceeded = "output" if out.flooded or err.flooded else "" if in_time else "time"
    return Finished(
        code=None if exceeded else ended["code"],
        exceeded=exceeded,
        stdout=bytes(out.content[: limits.output_bytes]),
        stderr=bytes(err.content[: limits.output_bytes]),
        cpu_s=ended["cpu_s"],
        peak_bytes=ended["peak_kib"] * 1024,
    )
