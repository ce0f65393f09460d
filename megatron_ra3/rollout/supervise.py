"""Brings lost engines back: starts servers again, with growing pauses and an end, and finds others that answer.

Without it a run that lost an engine at night goes on with less until none is left, or restarts one without end that
can never come up. Each step of it is one line of the log.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_ra3.rollout.engine import EngineError
from megatron_ra3.rollout.health import Restarts, Roster
from megatron_ra3.rollout.server import ServerConfig, VllmServer, answers, computes, nth_start, resume

POLL_S = 0.5
PULSE_S = 10.0
PULSE_TIMEOUT_S = 30.0


class KeptServer:
    """A server of this process that is started again when it is lost; `roster` knows it by its present URL."""

    def __init__(self, config: ServerConfig, restarts: Restarts, roster: Roster) -> None:
        self._config = config
        self._restarts = restarts
        self._roster = roster
        self._starts = 0
        self._started_s = 0.0
        self._serves_since_s: float | None = None
        self._next_start_s: float | None = None
        self.server = VllmServer(config)

    def start(self) -> None:
        """Launch it for the first time; ValueError: no model to serve."""
        self.server.start()
        self._roster.add(self.server.url, "starting")

    def await_start(self) -> EngineError | None:
        """Wait until it serves; what went wrong if it does not."""
        try:
            self.server.wait()
        except EngineError as error:
            self._roster.lose(self.server.url, f"it did not start, see {self.server.config.log_file}")
            return error
        self._serves_since_s = time.monotonic()
        self._roster.add(self.server.url, "ready")
        return None

    def keep(self) -> None:
        """Do what is due now: notice its end, stop what is left of it, start it again, see it answer."""
        url, log_file = self.server.url, self.server.config.log_file
        standing = self._roster.standing(url)
        if standing in ("serving", "ready"):
            if not self.server.poll():
                self._roster.lose(url, f"its process ended, see {log_file}")
        elif standing == "starting":
            if answers(url):
                self._serves_since_s = time.monotonic()
                self._roster.ready(url)
            elif not self.server.poll() or time.monotonic() > self._started_s + self._config.start_timeout_s:
                self._roster.lose(url, f"it did not start again, see {log_file}")
        elif standing == "lost":
            if self._next_start_s is None:
                self._plan_restart()
            elif time.monotonic() >= self._next_start_s:
                self._restart()

    def _plan_restart(self) -> None:
        self.server.stop()
        now = time.monotonic()
        pause_s = self._restarts.next_pause_s(now - self._serves_since_s if self._serves_since_s is not None else 0.0)
        self._serves_since_s = None
        if pause_s is None:
            self._roster.give_up(
                self.server.url, f"restarted engine.max_restarts={self._restarts.limit} times in a row"
            )
            return
        self._next_start_s = now + pause_s
        print(
            f"engine {self.server.url}: restart {self._restarts.in_a_row} of {self._restarts.limit} in {pause_s:g} s",
            flush=True,
        )

    def _restart(self) -> None:
        self._next_start_s = None
        self._starts += 1
        try:
            server = VllmServer(nth_start(self._config, self._starts))
            server.start()
        except (EngineError, ValueError, OSError) as error:
            print(f"engine {self.server.url}: cannot be started again: {error}", flush=True)
            return
        self._started_s = time.monotonic()
        self._roster.replace(self.server.url, server.url)
        self.server = server


class FoundServer:
    """A server that others keep running; once lost it counts as back when it computes again, after a pause.

    One that is lost over and over, though it answers whenever it is asked, ends as one that is restarted in vain.
    """

    def __init__(self, url: str, expected_model: str, restarts: Restarts, roster: Roster) -> None:
        self._url = url
        self._expected_model = expected_model
        self._restarts = restarts
        self._roster = roster
        self._back_since_s = time.monotonic()
        self._next_look_s: float | None = None

    def keep(self) -> None:
        """Do what is due now: notice its loss, see it answer."""
        if self._roster.standing(self._url) != "lost":
            return
        now = time.monotonic()
        if self._next_look_s is None:
            pause_s = self._restarts.next_pause_s(now - self._back_since_s)
            if pause_s is None:
                limit = self._restarts.limit
                self._roster.give_up(self._url, f"lost again after engine.max_restarts={limit} returns in a row")
                return
            self._next_look_s = now + pause_s
        elif now >= self._next_look_s and not self._roster.is_moving_weights and self._is_back():
            self._back_since_s, self._next_look_s = time.monotonic(), None
            self._roster.ready(self._url)

    def _is_back(self) -> bool:
        """Whether it computes; it may still be paused by a weight sync that it did not survive."""
        if not answers(self._url):
            return False
        resume(self._url)
        return computes(self._url, PULSE_TIMEOUT_S, expected_model=self._expected_model)


class Keeper:
    """A thread of a replica's leader that brings its servers back, started here or found.

    It only starts processes and asks servers whether they live; weights are sent, and engines admitted, elsewhere.
    `then` is called after every look at all of them.
    """

    def __init__(
        self, kept: Sequence[KeptServer], found: Sequence[FoundServer], then: Callable[[], None] = lambda: None
    ) -> None:
        self._kept = kept
        self._then = then
        self._servers: list[KeptServer | FoundServer] = [*kept, *found]
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine-keeper", daemon=True)

    def start(self) -> None:
        """Begin to keep."""
        self._thread.start()

    def close(self) -> None:
        """Keep no longer, and stop the servers that were started here."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        for kept in self._kept:
            kept.server.stop()

    def _run(self) -> None:
        while not self._closed.wait(POLL_S):
            for server in self._servers:
                server.keep()
            self._then()


class _Pulse:
    """Asks a server for a token now and then; `silent_s` is how long it has given none."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._heard_s = time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="engine-pulse", daemon=True).start()

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self._heard_s

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(PULSE_S):
            if computes(self._url, PULSE_TIMEOUT_S):
                self._heard_s = time.monotonic()


def serve_forever(config: ServerConfig, restarts: Restarts, *, stuck_after_s: float) -> None:
    """Serve until SIGTERM or SIGINT, starting the server again when it ends or has computed nothing for too long.

    Trainers that lost it find it again at the same address. `stuck_after_s` must exceed the longest pause of a weight
    sync and the longest query. EngineError with the end of the log when it cannot be started, at first or any more.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt, also while the server starts
    starts = 0
    try:
        while True:
            served_s, problem, port = _serve_once(nth_start(config, starts), stuck_after_s, is_first=not starts)
            config = replace(config, port=port)
            pause_s = restarts.next_pause_s(served_s)
            if pause_s is None:
                raise EngineError(f"{problem}\ngiven up after engine.max_restarts={restarts.limit} restarts in a row")
            print(f"{problem}\nrestart {restarts.in_a_row} of {restarts.limit} in {pause_s:g} s", flush=True)
            time.sleep(pause_s)
            starts += 1
    except KeyboardInterrupt:
        return


def _serve_once(config: ServerConfig, stuck_after_s: float, *, is_first: bool) -> tuple[float, str, int]:
    """Seconds that a server has served, why no longer, and its port."""
    try:
        with VllmServer(config) as server:
            print(f"serving {config.model_folder} at {server.url}, log in {config.log_file}", flush=True)
            started_s = time.monotonic()
            problem = _until_it_fails(server, stuck_after_s)
            return time.monotonic() - started_s, problem, server.port
    except EngineError as error:
        if is_first:
            raise
        return 0.0, str(error), config.port


def _until_it_fails(server: VllmServer, stuck_after_s: float) -> str:
    pulse = _Pulse(server.url)
    try:
        while server.poll():
            if pulse.silent_s > stuck_after_s:
                return f"vLLM server {server.url} is up but has computed nothing for {stuck_after_s:g} s"
            time.sleep(POLL_S)
        return f"vLLM server {server.url} ended{server.log_tail()}"
    finally:
        pulse.close()
