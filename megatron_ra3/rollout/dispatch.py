"""Brings many queries to several engines and back, whatever becomes of an engine on the way.

An engine is taken out at once when a connection to it breaks, when it says nothing for too long, or when it answers
with other weights than it was sent. Whatever is open there is asked anew elsewhere.

Why this has no bias. A query is asked again because of its engine, never because of its answer: nothing of an answer
is known before it is whole, the first whole answer is taken whatever it says, and a part of one is thrown away. No
query is ever given up for another, so long answers, which are likelier to be open when an engine dies, are as frequent
as before. And a query fixes its draw by its seed, so that the second answer is, to rounding, the one that was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_ra3.rollout.engine import Answer, EngineError, EnginesLostError, GenerateQuery, Query, Reply
from megatron_ra3.rollout.health import Roster, overdue
from megatron_ra3.rollout.routing import Router
from megatron_ra3.stall import ACTIVITY

TICK_S = 0.25
"""How often deadlines, health and the roster are looked at while no answer comes."""
ATTEMPTS = 4
"""Engines that may fail over one query before it is held to be the reason."""
ENGINE_LOST = "its engine was lost"
ROUTING_TOKENS = 64
"""Queries without a group that begin with the same so many tokens are one."""


class EngineGoneError(EngineError):
    """The connection broke or was refused. `was_sent`: the engine may have had the query."""

    def __init__(self, message: str, *, was_sent: bool = True) -> None:
        super().__init__(message)
        self.was_sent = was_sent


class UnansweredError(EngineError):
    """An engine that lives did not answer a query: it failed over it, or was told to abort it."""


class Wire(Protocol):
    """How one engine is asked."""

    async def ask(self, url: str, query: Query) -> Answer:
        """The engine's answer, however long it takes; EngineGoneError, UnansweredError, EngineError: ours to mend."""

    async def beat(self, url: str, timeout_s: float) -> None:
        """Return when the engine shows that it lives; EngineGoneError when it does not."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`timeout_s` for an answer; an engine silent for `silence_s` has `beat_timeout_s` more to show that it lives."""

    timeout_s: float
    silence_s: float
    beat_timeout_s: float


@dataclass(slots=True, eq=False)
class _Asked:
    """A query, its group and size, and the engines that have failed over it."""

    query: Query
    group: Hashable
    tokens: int
    failed_at: list[str] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Open:
    """A query at an engine; `version` is that of the weights the engine had been sent when it was asked."""

    asked: _Asked
    url: str
    version: int | None
    sent_s: float


class Conversation:
    """One call of `Engine.converse`: all that is asked and all that becomes of it, in one thread and one event loop."""

    def __init__(self, wire: Wire, roster: Roster, router: Router, limits: Limits, *, max_tokens: int) -> None:
        self._wire = wire
        self._roster = roster
        self._router = router
        self._limits = limits
        self._max_tokens = max_tokens
        self._pending: deque[_Asked] = deque()
        self._open: dict[asyncio.Task[Any], _Open] = {}
        self._beats: dict[asyncio.Task[Any], str] = {}
        self._answered_s: dict[str, float] = {}
        self._alive_s: dict[str, float] = {}
        self._finished: asyncio.Queue[asyncio.Task[Any]] = asyncio.Queue()

    async def run(self, queries: Sequence[Query], reply: Reply) -> None:
        """Ask `queries` and what `reply` adds to them until all is answered; errors as `Engine.converse`."""
        self._add(queries)
        try:
            next_look_s = 0.0
            while self._pending or self._open:
                if asyncio.get_running_loop().time() >= next_look_s:
                    self._look()
                    next_look_s = asyncio.get_running_loop().time() + TICK_S
                self._send()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TICK_S):
                        task = await self._finished.get()
                    self._settle(task, reply)
        finally:
            await self._drop()

    def _add(self, queries: Iterable[Query]) -> None:
        for query in queries:
            group = query.group or hash(query.token_ids[:ROUTING_TOKENS])
            generated = self._max_tokens if isinstance(query, GenerateQuery) else 1
            self._pending.append(_Asked(query, group, len(query.token_ids) + generated))

    def _send(self) -> None:
        """Send what finds a place; the rest keeps its order."""
        serving = self._roster.serving()
        self._router.serve(serving)
        if not serving:
            raise EnginesLostError(f"no engine is left to sample with: {self._roster.described()}")
        waiting: deque[_Asked] = deque()
        while self._pending and self._router.has_room():
            asked = self._pending.popleft()
            url = self._router.choose(asked.group, asked.tokens, asked.failed_at)
            if url is None:
                waiting.append(asked)
                continue
            self._router.sent(url, asked.group, asked.tokens)
            task = asyncio.create_task(self._wire.ask(url, asked.query))
            task.add_done_callback(self._finished.put_nowait)
            self._open[task] = _Open(asked, url, serving[url], self._roster.at_work_s())
        self._pending.extendleft(reversed(waiting))

    def _settle(self, task: asyncio.Task[Any], reply: Reply) -> None:
        """Take an answer or a beat, or what came instead."""
        if task in self._beats:
            self._settle_beat(task)
            return
        if task not in self._open:  # recalled and asked anew, perhaps as it failed by itself
            _ = task.cancelled() or task.exception()
            return
        opened = self._open.pop(task)
        self._router.done(opened.url, opened.asked.tokens)
        try:
            answer: Answer = task.result()
        except EngineGoneError as error:
            self._lose(opened.url, str(error))
            self._ask_anew(opened, failed=error.was_sent)
            return
        except UnansweredError as error:
            self._ask_anew(opened, str(error))
            return
        ACTIVITY.moved()
        if opened.version is not None and answer.weight_version < opened.version:
            self._lose(
                opened.url,
                f"it answers with weights version {answer.weight_version} though it was sent {opened.version}: it was "
                "restarted, or another run sends it weights (give every run engines of its own)",
            )
            self._ask_anew(opened, failed=False)
            return
        self._answered_s[opened.url] = self._alive_s[opened.url] = self._roster.at_work_s()
        self._add(reply(opened.asked.query, answer))

    def _look(self) -> None:
        """Find what is overdue, what others have taken out, and who has been silent."""
        now_s, timeout_s = self._roster.at_work_s(), self._limits.timeout_s
        serving = self._roster.serving()
        for task, opened in list(self._open.items()):
            if task not in self._open:
                continue  # recalled with its engine
            if opened.url not in serving:
                self._recall(task)
                continue
            silent_s = now_s - self._answered_s.get(opened.url, -math.inf)
            verdict = overdue(now_s - opened.sent_s, silent_s, timeout_s)
            if verdict == "stuck":
                self._lose(opened.url, f"no answer to any query within timeout_s={timeout_s:g}")
            elif verdict == "slow":
                self._roster.count("deadlines_missed")
                self._recall(task, f"no answer within timeout_s={timeout_s:g}")
        self._feel_pulses(now_s)

    def _feel_pulses(self, now_s: float) -> None:
        for url in {opened.url for opened in self._open.values()}.difference(self._beats.values()):
            if now_s - self._alive_s.setdefault(url, now_s) >= self._limits.silence_s:
                beat = asyncio.create_task(self._wire.beat(url, self._limits.beat_timeout_s))
                beat.add_done_callback(self._finished.put_nowait)
                self._beats[beat] = url

    def _settle_beat(self, task: asyncio.Task[Any]) -> None:
        url = self._beats.pop(task)
        try:
            task.result()
        except EngineGoneError as error:
            self._lose(url, str(error))
        else:
            self._alive_s[url] = self._roster.at_work_s()
            ACTIVITY.moved()

    def _lose(self, url: str, reason: str) -> None:
        """Take an engine out and ask anew what is open there."""
        self._roster.lose(url, reason)
        for task, opened in list(self._open.items()):
            if opened.url == url:
                self._recall(task)

    def _recall(self, task: asyncio.Task[Any], why: str = ENGINE_LOST) -> None:
        opened = self._open.pop(task)
        task.cancel()
        self._router.done(opened.url, opened.asked.tokens)
        self._ask_anew(opened, why)

    def _ask_anew(self, opened: _Open, why: str = ENGINE_LOST, *, failed: bool = True) -> None:
        """Put a query first in the line again; EngineError where too many engines have `failed` over it."""
        asked = opened.asked
        if failed:
            asked.failed_at.append(opened.url)
        if len(asked.failed_at) >= ATTEMPTS:
            raise EngineError(
                f"engines {', '.join(asked.failed_at)} did not answer a query of {len(asked.query.token_ids)} tokens, "
                f"the last one: {why}; raise engine.request_timeout_s or lower engine.max_in_flight where engines are "
                "slow, else see their logs"
            )
        self._roster.count("requests_reissued")
        self._pending.appendleft(asked)

    async def _drop(self) -> None:
        """Leave nothing behind: engines abort what nobody waits for."""
        for opened in self._open.values():
            self._router.done(opened.url, opened.asked.tokens)
        await _cancel([*self._open, *self._beats])


async def _cancel(tasks: Collection[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
