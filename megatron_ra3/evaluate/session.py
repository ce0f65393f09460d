"""A program as a module in the jail whose functions are called from outside, one call at a time.

Only arguments go in and only typed values come out (`jail.values`). What is expected never enters the jail, so a
program that walks frames or memory finds nothing to copy; inputs of later calls are not there yet either.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

from megatron_ra3.evaluate.jail import values
from megatron_ra3.evaluate.worker import JailError, Limits, ProgramError, Watch, Worker

_HEADER = struct.Struct("<I")


class Handle:
    """An object that stayed in the jail, for instance an instance of a class of the program.

    Equal only to itself. Can be called, iterated, given attributes and passed back as an argument; its truth is what
    the program said it is.
    """

    def __init__(self, session: Session, number: int, kind: str, truth: bool) -> None:
        for name, value in (("session", session), ("number", number), ("kind", kind), ("truth", truth)):
            object.__setattr__(self, f"_ra3_{name}", value)

    def __bool__(self) -> bool:
        return bool(object.__getattribute__(self, "_ra3_truth"))

    def __repr__(self) -> str:
        return f"<{object.__getattribute__(self, '_ra3_kind')} in the jail>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What calling the object in the jail returns."""
        return session_of(self).call("", *args, on=self, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        return iter(session_of(self).request("list", "", on=self))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return session_of(self).request("get", name, on=self)

    def __setattr__(self, name: str, value: Any) -> None:
        session_of(self).request("set", name, (value,), on=self)


def session_of(handle: Handle) -> Session:
    """The session that keeps the object behind `handle`."""
    session: Session = object.__getattribute__(handle, "_ra3_session")
    return session


class Session:
    """`code` loaded as a module. `limits.time_s` is for loading and all calls together.

    Raises ProgramError for whatever the program does wrong and JailError if the jail fails. After either, every further
    request raises the same again, so that a test which swallows exceptions cannot hide it. Use as a context manager.
    """

    def __init__(self, worker: Worker, code: str, limits: Limits) -> None:
        self.calls = 0
        self.failure: ProgramError | JailError | None = None
        self.seconds = 0.0
        """Duration of the last request."""
        self._remaining_s = limits.time_s
        self._limits = limits
        self._channel, theirs = socket.socketpair()
        self._channel.setblocking(False)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            worker.start("calls", {"code": code}, limits, [null, null, null, theirs.fileno()])
        except JailError:
            self._channel.close()
            raise
        finally:
            os.close(null)
            theirs.close()
        self._watch = Watch(worker, limits)
        self._received = bytearray()
        self._pending = memoryview(b"")
        self._closed = False

    def __enter__(self) -> Self:
        try:
            self._guarded(lambda: self._reply(b"", None))
        except (ProgramError, JailError):
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        if not isinstance(self.failure, JailError):
            self._watch.finish()

    def call(
        self, name: str, /, *args: Any, on: Handle | None = None, limit_s: float | None = None, **kwargs: Any
    ) -> Any:
        """`name(*args, **kwargs)` in the jail, or a method of `on`, or `on` itself if `name` is empty."""
        self.calls += 1
        return self.request("call", name, args, kwargs, on=on, limit_s=limit_s)

    def call_mutable(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Like `call`; lists, dicts and sets among the arguments are changed as the program changed its copies."""
        self.calls += 1
        result, after = self._exchanged("call", name, args, kwargs, mutable=True)
        for before, now in zip(args, after, strict=True):
            if type(before) is type(now) and before is not now:
                if isinstance(before, list):
                    before[:] = now
                elif isinstance(before, dict | set):
                    before.clear()
                    before.update(now)
        return result

    def request(
        self,
        operation: str,
        name: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        on: Handle | None = None,
        limit_s: float | None = None,
    ) -> Any:
        """One exchange with the jail; `operation` is "call", "get", "set" or "list"."""
        return self._exchanged(operation, name, args, kwargs, on=on, limit_s=limit_s)[0]

    def _exchanged(
        self,
        operation: str,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        *,
        on: Handle | None = None,
        mutable: bool = False,
        limit_s: float | None = None,
    ) -> tuple[Any, list[Any]]:
        """The result, and if `mutable` the arguments as the program left them."""
        if self.failure is not None:
            raise self.failure
        message = values.dumps(
            {
                "op": operation,
                "name": name,
                "on": None if on is None else object.__getattribute__(on, "_ra3_number"),
                "args": [values.encode(argument, self._encode_handle) for argument in args],
                "kwargs": {key: values.encode(value, self._encode_handle) for key, value in (kwargs or {}).items()},
                "mutable": mutable,
            }
        )
        result, after = self._guarded(lambda: self._reply(_HEADER.pack(len(message)) + message, limit_s))
        if len(after) != (len(args) if mutable else 0):
            self.failure = ProgramError("data", f"{len(after)} arguments came back")
            raise self.failure
        return result, after

    def _guarded(self, exchange: Callable[[], tuple[Any, list[Any]]]) -> tuple[Any, list[Any]]:
        try:
            return exchange()
        except (ProgramError, JailError) as error:
            if not (isinstance(error, ProgramError) and error.reason == "error"):
                self.failure = error
            raise

    def _reply(self, message: bytes, limit_s: float | None) -> tuple[Any, list[Any]]:
        start = time.monotonic()
        raw = self._exchange(message, min(self._remaining_s, limit_s or self._remaining_s))
        self.seconds = time.monotonic() - start
        self._remaining_s -= self.seconds
        try:
            reply = values.loads(raw)
            if "error" in reply:
                raise ProgramError("error", f"{reply['error']}: {reply['text']}"[:1000])
            after = [values.decode(argument, self._decode_handle) for argument in reply["after"]]
            return values.decode(reply["value"], self._decode_handle), after
        except (ValueError, TypeError, KeyError) as error:
            raise ProgramError("data", str(error)[:1000]) from None

    def _exchange(self, message: bytes, limit_s: float) -> bytes:
        """Send `message`, wait for one frame. Raises ProgramError if there is none in time."""
        self._pending = memoryview(message)
        self._watch.on(self._channel.fileno(), select.POLLIN | (select.POLLOUT if message else 0), self._serve)
        in_time = self._watch.run(lambda: self._closed or self._frame_bytes() is not None, max(limit_s, 0.001))
        length = self._frame_bytes()
        if length is None:
            if self._closed:
                self._watch.run(lambda: False, 1.0)
            if self._watch.ended is not None:
                status = self._watch.ended["code"]
                raise ProgramError("exit", f"the program ended with status {status} instead of answering")
            if not in_time:
                raise ProgramError("time", f"no answer within {max(limit_s, 0.0):.2f} s")
            raise ProgramError("data", "the program closed its channel")
        frame = bytes(self._received[_HEADER.size : _HEADER.size + length])
        del self._received[: _HEADER.size + length]
        return frame

    def _frame_bytes(self) -> int | None:
        """The length of the frame that has arrived; None while it is not complete."""
        if len(self._received) < _HEADER.size:
            return None
        length = int(_HEADER.unpack_from(self._received)[0])
        if length > self._limits.output_bytes:
            raise ProgramError("output", f"a value of more than {self._limits.output_bytes} bytes")
        return length if len(self._received) >= _HEADER.size + length else None

    def _serve(self, events: int) -> None:
        """Send and receive what is possible now."""
        try:
            if events & select.POLLOUT:
                self._pending = self._pending[self._channel.send(self._pending) :]
                if not self._pending:
                    self._watch.on(self._channel.fileno(), select.POLLIN, self._serve)
            if events & ~select.POLLOUT:
                chunk = self._channel.recv(1 << 16)
                self._received += chunk
                self._closed = not chunk
        except BlockingIOError:
            return
        except OSError:  # the program is gone or has closed its end; the server says which
            self._closed = True
        if self._closed:
            self._watch.off(self._channel.fileno())

    def _encode_handle(self, value: Any) -> list[Any]:
        if isinstance(value, Handle):
            return ["h", object.__getattribute__(value, "_ra3_number")]
        raise ValueError(f"cannot pass a {type(value).__name__} into the jail")

    def _decode_handle(self, data: list[Any]) -> Handle:
        _, number, kind, truth = data
        if type(number) is not int or type(kind) is not str or type(truth) is not bool:
            raise ValueError("not an object in the jail")
        return Handle(self, number, kind[:100], truth)
