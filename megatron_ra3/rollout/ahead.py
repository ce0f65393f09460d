"""Samples the rollouts of coming E-steps while the trainer scores and updates the current one.

Else engines idle during updates and trainers during sampling. A thread beside the trainer's, on each replica's leader,
does nothing but talk to the replica's engines: it takes part in no collective, since those must come in one order on
all ranks. Snippets are taken, weights sent and rollouts broadcast by the trainer's own thread. Nothing that is begun
survives a restart: the stream is saved as it stood before the snippets of steps that were not used. Pure Python.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from megatron_ra3.latents import Snippet, Trajectory
from megatron_ra3.observe.spans import TIMELINE
from megatron_ra3.report.consumed import Consumed
from megatron_ra3.rollout.engine import EngineError
from megatron_ra3.rollout.sampler import Sampler, SamplerStats
from megatron_ra3.stall import ACTIVITY

T = TypeVar("T")
THREAD_NAME = "sampling-ahead"
MARGIN, LONGEST_MARGIN_S = 0.25, 60.0
"""How much earlier than collectives, as a share of their limit, a leader gives up: other ranks began to wait before."""


class Lead(Protocol):
    """`fleet.ServedEngine.lead`."""

    def __call__(self, work: Callable[[], T]) -> T:
        """Run `work` where the engine is and return its result on the whole replica."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A replica's share of a step's snippets, and what counts once they are used."""

    snippets: list[Snippet]
    consumed: Consumed
    dropped: int
    """Samples of which nothing fits."""
    stream_before: dict[str, Any]
    """State of the stream before they were taken."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """Rollouts per snippet, what they cost, and how long the update waited for them."""

    groups: list[list[Trajectory]]
    stats: SamplerStats
    waited_s: float


def longest_wait_s(collective_timeout_s: float) -> float:
    """How long one rank may wait for something else before the ranks that wait for it are ended by their own limit."""
    return collective_timeout_s - min(MARGIN * collective_timeout_s, LONGEST_MARGIN_S)


@dataclass(slots=True)
class _Step:
    """How a step is sampled, what comes of it, and whether that was an error."""

    sample: Callable[[], Sampled]
    rollouts: Future[Sampled]
    has_failed: bool = False


class Ahead:
    """The steps whose sampling has begun, in the order of their use. `begin` and `use` are collective over a replica.

    Args:
        lead: of the engine.
        sampler: gives the sampler; called where the engine is.
        overlaps: sample in a thread; else `begin` itself does.
        timeout_s: of collectives (`parallel.timeout_s`); `use` waits for `longest_wait_s` of it.
        replica: this one, for errors.
    """

    def __init__(
        self, lead: Lead, sampler: Callable[[], Sampler], *, overlaps: bool, timeout_s: float, replica: int = 0
    ) -> None:
        self._lead = lead
        self._sampler = sampler
        self._timeout_s = timeout_s
        self._replica = replica
        self._pool = ThreadPoolExecutor(1, THREAD_NAME) if overlaps else None
        self._last: Sampler | None = None
        self._taken: deque[Taken] = deque()
        self._steps: deque[_Step] = deque()  # where the engine is

    @property
    def begun(self) -> int:
        """Steps that are not used yet."""
        return len(self._taken)

    @property
    def stream_before(self) -> dict[str, Any] | None:
        """State of the stream before anything that is not used yet; None where all is used."""
        return self._taken[0].stream_before if self._taken else None

    def begin(self, taken: Taken, *, seed: int) -> None:
        """Sample the rollouts of one more step; without overlap, errors as `Sampler.sample`."""
        self._lead(lambda: self._submit(taken.snippets, seed))
        self._taken.append(taken)

    def use(self) -> tuple[Taken, Sampled]:
        """The oldest step begun, once it is sampled; errors as `Sampler.sample`.

        EngineError: it is not sampled in time; said early enough to reach the ranks that wait for this one.
        """
        sampled = self._lead(self._await)
        return self._taken.popleft(), sampled

    def close(self) -> None:
        """End the thread at the engine's next answer, and forget what was begun."""
        if self._pool is not None:
            if self._last is not None:
                self._last.stop()
            self._pool.shutdown(cancel_futures=True)

    def _submit(self, snippets: Sequence[Snippet], seed: int) -> None:
        self._last = sampler = self._sampler()

        def sample() -> Sampled:
            started = time.monotonic()
            groups = sampler.sample(snippets, seed=seed)
            return Sampled(groups, sampler.stats, time.monotonic() - started)

        self._steps.append(_Step(sample, self._run(sample)))

    def _run(self, sample: Callable[[], Sampled]) -> Future[Sampled]:
        if self._pool is not None:
            return self._pool.submit(sample)
        done: Future[Sampled] = Future()
        done.set_result(sample())
        return done

    def _await(self) -> Sampled:
        """The oldest step's rollouts. Called again after an error, it has them sampled anew."""
        step = self._steps[0]
        if step.has_failed:
            step.rollouts = self._run(step.sample)
        ACTIVITY.moved("waiting for rollouts sampled ahead")
        started = time.monotonic()
        limit_s = longest_wait_s(self._timeout_s)
        if not step.rollouts.done():
            with TIMELINE.span("rollouts", awaits="engines"):
                wait([step.rollouts], limit_s)
        if not step.rollouts.done():
            raise EngineError(
                f"the engines of replica {self._replica} did not sample the rollouts of a step within {limit_s:g} s; "
                f"parallel.timeout_s={self._timeout_s:g} would soon end the ranks that wait for it: raise that, or "
                "give the replica more engines or fewer rollouts per step"
            )
        step.has_failed = True
        sampled = step.rollouts.result()
        self._steps.popleft()
        return sampled if self._pool is None else replace(sampled, waited_s=time.monotonic() - started)
