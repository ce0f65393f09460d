"""The engines of all replicas, as all ranks have them: which weights they serve, and what happens when none is left.

Prevents samples of other weights than the trainer's: an engine serves only between a weight sync that reached it and
the moment it is lost, and every way back leads through the next sync. And prevents ranks that part: what one leader
sees of its engines becomes a decision only after all ranks have heard of it, so all raise, wait and go on alike.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from megatron_ra3.config import TrainerConfig
from megatron_ra3.latents import LatentFormat
from megatron_ra3.model import names
from megatron_ra3.model.build import RA3Model
from megatron_ra3.model.trainer import MicroBatch, Trainer
from megatron_ra3.observe.engine_figures import Figures, merged
from megatron_ra3.observe.spans import TIMELINE
from megatron_ra3.rollout.engine import Engine, EngineError, EnginesLostError, GateQuery
from megatron_ra3.rollout.health import Roster
from megatron_ra3.rollout.inprocess import InProcessEngine
from megatron_ra3.rollout.replica import ReplicaEngines, State, await_all, restart_policy, server_settings
from megatron_ra3.rollout.supervise import serve_forever
from megatron_ra3.rollout.weights import WeightSync
from megatron_ra3.stall import ACTIVITY

T = TypeVar("T")
PROBE_SEQUENCES = 64
PROBE_TOKENS = 24
PARITY_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}
"""Largest log-prob difference (nats) between engine and trainer; in bf16 two correct forward passes differ by 0.06."""
COUNTED = ("engines_alive", "engines_lost", "engines_returned", "requests_reissued", "deadlines_missed", "groups_moved")
WAIT_POLL_S = 1.0
WAIT_REPORT_S = 30.0


class ServedEngine(Protocol):
    """An engine together with the way weights reach it."""

    @property
    def engine(self) -> Engine:
        """What the sampler asks; only on ranks where `lead` runs its work."""

    def sync(self, version: int) -> None:
        """Make the trainer's current weights live under `version`; collective over all ranks.

        EnginesLostError, on every rank: a replica has no engine, and none came in time.
        """

    def lead(self, work: Callable[[], T]) -> T:
        """Run `work` where the engine is and return its result on the whole replica; collective over all ranks.

        Where it raises EnginesLostError, engines are awaited and sent the weights again, which must still be those of
        the last `sync`, and `work` is called once more: it must begin anew. Errors as `sync`.
        """

    def take_counts(self) -> dict[str, float]:
        """Metrics of the engines of all replicas since the last call; collective over all ranks."""

    def close(self) -> None:
        """Stop what was started."""


def open_engine(
    config: TrainerConfig,
    trainer: Trainer,
    latent_format: LatentFormat,
    model_folder: Path,
    *,
    stop_requested: Callable[[], bool] = lambda: False,
) -> InProcess | Servers:
    """Start or connect the engine of `engine.kind`; collective over all ranks.

    `model_folder` is a Hugging Face folder of the trainer's architecture; its weights are replaced by the first sync.
    Where `stop_requested` on any rank, nobody waits for lost engines any more.
    """
    if trainer.layout.rank == 0:
        print(f"engine: {config.engine.resolved_kind}", flush=True)
    if config.engine.resolved_kind == "inprocess":
        return InProcess(trainer, latent_format, config.parallel.micro_batch_tokens)
    return Servers(config, trainer, latent_format, model_folder, stop_requested)


def serve(config: TrainerConfig) -> int:
    """Serve `engine.model_folder` (or what the trainer starts from) on this node until told to stop."""
    settings = config.engine
    folder = Path(settings.model_folder or config.model.folder)
    if not settings.model_folder and config.model.init == "random":
        folder = Path(config.run_folder) / "initial"
        what = f"{folder}, which the trainer writes"
        if not all(await_all([(folder / "config.json").is_file], what, settings.start_timeout_s)):
            raise EngineError(f"{what}, did not appear within engine.start_timeout_s={settings.start_timeout_s:g}")
    log_file = Path(config.run_folder) / f"engine-{socket.gethostname()}-{settings.port}.log"
    serve_forever(
        server_settings(config, folder, log_file, seed=config.seed + settings.port),
        restart_policy(config),
        stuck_after_s=settings.sync_timeout_s + settings.request_timeout_s,
    )
    return 0


class InProcess:
    """The trainer's own weights: nothing to start, nothing to send, and every rank takes part."""

    def __init__(self, trainer: Trainer, latent_format: LatentFormat, max_batch_tokens: int) -> None:
        self.engine = InProcessEngine(trainer, latent_format, max_batch_tokens=max_batch_tokens)

    def sync(self, version: int) -> None:
        """Tag coming samples with `version`."""
        self.engine.set_version(version)

    def lead(self, work: Callable[[], T]) -> T:
        """Work on every rank: the forward passes are collective."""
        return work()

    def take_counts(self) -> dict[str, float]:
        """Nothing: there is no server to lose."""
        return {}

    def close(self) -> None:
        """Stop nothing."""


class Servers:
    """vLLM servers: those that each replica's leader starts, or those of `engine.urls` dealt out to the replicas.

    All methods but `engine` and `close` are collective over all ranks and belong to one thread, the one that trains.
    Another thread of a leader may use `engine` meanwhile: it and `sync` share the replica's roster alone.
    """

    def __init__(
        self,
        config: TrainerConfig,
        trainer: Trainer,
        latent_format: LatentFormat,
        model_folder: Path,
        stop_requested: Callable[[], bool],
    ) -> None:
        self.config = config
        self.trainer = trainer
        self.layout = trainer.layout
        self._gate_ids = latent_format.gate_ids
        self._stop_requested = stop_requested
        self._replica: ReplicaEngines | None = None
        self._sync: WeightSync | None = None
        self._live_version: int | None = None
        self._is_checked = False
        self._waited_s = 0.0
        try:
            self._open(model_folder)
        except BaseException:
            self.close()
            raise

    @property
    def engine(self) -> Engine:
        """The client; on replica leaders only."""
        assert self._replica is not None, "only a replica's leader talks to engines"
        return self._replica.engine

    def lead(self, work: Callable[[], T]) -> T:
        """Run `work` on the replica's leader; its result, or an error of any replica, reaches all ranks."""
        result, problem = self._on_leader(work)
        while self._any_lost(problem):
            assert self._live_version is not None, "sync comes first"
            self.sync(self._live_version)
            if problem is not None:
                result, problem = self._on_leader(work)
        return cast("T", result)

    def sync(self, version: int) -> None:
        """Send the weights to all engines that have others; the first time also compare log-probs with the trainer's.

        Engines that died come back here: whatever answers is sent the weights, compared with them, and admitted.
        Returns when every replica has an engine that serves `version`.
        """
        began_s = time.monotonic()
        told_s = -math.inf
        while True:
            states = self.layout.gather_from_leaders(self._replica.state() if self._replica is not None else None)
            targets = {url: has for state in states for url, has in state.present.items() if has != version}
            if targets:
                self._send(targets, version)
            elif not all(state.serving for state in states):
                told_s = self._await_engines(states, began_s, told_s)
            elif self._is_checked or self._check_parity():
                break
        self._live_version = version

    def take_counts(self) -> dict[str, float]:
        """What happened to the engines of all replicas since the last call."""
        own = (self._replica.take_counts(), self._replica.take_figures()) if self._replica is not None else None
        replicas = self.layout.gather_from_leaders(own)
        counts: dict[str, float] = {name: sum(each[name] for each, _ in replicas) for name in COUNTED}
        figures: list[Figures] = [each for _, (found, _) in replicas for each in found]
        counts |= merged(figures, sum(failed for _, (_, failed) in replicas))
        if self._waited_s:
            counts["engine_wait_seconds"], self._waited_s = self._waited_s, 0.0
        return counts

    def close(self) -> None:
        """Leave the engines; stop those that were started here."""
        if self._sync is not None:
            self._sync.close()
        if self._replica is not None:
            self._replica.close()

    def _open(self, model_folder: Path) -> None:
        problem: Exception | None = None
        if self.layout.is_replica_leader:
            rank, size = self.layout.dp_rank, self.layout.dp_size
            try:
                with TIMELINE.span("engine load", awaits="engines"):
                    self._replica = ReplicaEngines(
                        self.config, model_folder, self._gate_ids, dp_rank=rank, dp_size=size
                    )
            except (EngineError, ValueError, OSError) as error:
                problem = error
        self.layout.raise_on_all(problem)

    def _on_leader(self, work: Callable[[], T]) -> tuple[T | None, Exception | None]:
        """The result of the replica's leader, or its error, on all ranks of the replica."""
        outcome: tuple[T | None, Exception | None] = (None, None)
        if self._replica is not None:
            self._replica.begin_work()
            try:
                outcome = (work(), None)
            except (EngineError, ValueError) as error:
                outcome = (None, error)
        shared: tuple[T | None, Exception | None] = self.layout.broadcast_in_replica(outcome)
        return shared

    def _any_lost(self, problem: Exception | None) -> bool:
        """Whether a replica has lost its engines; any other problem of any rank is raised on all."""
        problems = [each for each in self.layout.gather_from_ranks(problem) if each is not None]
        for each in problems:
            if not isinstance(each, EnginesLostError):
                raise each
        return bool(problems)

    def _send(self, targets: Mapping[str, int | None], version: int) -> None:
        """Send the weights to engines, given what each has; each leader admits its own that got them, or loses them."""
        urls = list(targets)
        if self._sync is None:
            self._sync = WeightSync(
                urls,
                backend="nccl" if torch.cuda.is_available() else "gloo",
                timeout_s=self.config.engine.sync_timeout_s,
                rank=self.layout.rank,
            )
        has_new = None in targets.values()
        if has_new or self._sync.urls != urls:
            self._sync.regroup(urls)
        source = MegatronSource(self.trainer.model)
        roster = self._replica.roster if self._replica is not None else Roster()
        with roster.moving_weights(), TIMELINE.span("weight transfer"):
            try:
                self._sync.send(source, version)
                if has_new:
                    self._sync.check(source)
            except EnginesLostError as error:
                if self.layout.rank == 0:
                    print(error, flush=True)
        for url in roster.present():
            if url in self._sync.dropped:
                roster.lose(url, f"the weight sync lost it: {self._sync.dropped[url]}")
            elif url in targets:
                roster.admit(url, version)

    def _await_engines(self, states: Sequence[State], began_s: float, told_s: float) -> float:
        """Wait a moment for replicas without an engine; returns when that was last told.

        EnginesLostError, on all ranks, when none can come any more, it took too long, or somebody wants the run to end.
        """
        bare = {replica: state for replica, state in enumerate(states) if not state.serving}
        awaited = "; ".join(f"replica {replica} has no engine: {state.awaited}" for replica, state in bare.items())
        now_s, limit_s = time.monotonic(), self.config.engine.wait_timeout_s
        left_s = limit_s - self.layout.gather_from_ranks(now_s - began_s)[0]
        if any(state.is_hopeless for state in bare.values()):
            raise EnginesLostError(f"{awaited}; none will come back")
        if self.layout.any_rank(self._stop_requested()):
            raise EnginesLostError(f"{awaited}; no longer awaited because the run is to end")
        if left_s <= 0.0:
            raise EnginesLostError(f"{awaited}; none came within engine.wait_timeout_s={limit_s:g}")
        if now_s - told_s >= WAIT_REPORT_S:
            told_s = now_s
            if self.layout.rank == 0:
                print(f"waiting for engines, for {left_s:.0f} s at most: {awaited}", flush=True)
        ACTIVITY.moved(f"waiting for engines: {awaited}")
        with TIMELINE.span("no engine", awaits="engines"):
            time.sleep(WAIT_POLL_S)
        self._waited_s += time.monotonic() - now_s
        return told_s

    def _check_parity(self) -> bool:
        """Compare gate log-probs of random sequences, once; False where engines were lost over it.

        EngineError, on all ranks, when they differ by more than the tolerance.
        """
        gate_ids = self._gate_ids
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.trainer.model.vocab_size, (PROBE_SEQUENCES, PROBE_TOKENS), generator=generator)
        last = torch.arange(PROBE_SEQUENCES) * PROBE_TOKENS + PROBE_TOKENS - 1
        batch = MicroBatch(tokens, last.repeat_interleave(len(gate_ids)), torch.tensor(gate_ids * PROBE_SEQUENCES))
        with TIMELINE.span("scoring"):
            own = self.trainer.score([batch])[0].cpu()
        queries = [GateQuery(tuple(row), (PROBE_TOKENS - 1,)) for row in tokens.tolist()]
        theirs, problem = self._on_leader(lambda: [score.logprobs[0] for score in self.engine.gate_logprobs(queries)])
        if self._any_lost(problem):
            return False
        tolerance = PARITY_TOLERANCE[self.config.model.dtype]
        difference = float((torch.tensor(theirs).flatten() - own).abs().max())
        for each in self.layout.gather_from_ranks(difference):
            if not each <= tolerance:
                raise EngineError(
                    f"engines and trainer disagree after the first weight sync: log-probs differ by {each:.3g} nats, "
                    f"at most {tolerance:g} is rounding in {self.config.model.dtype}; is engine.urls serving this "
                    "model with this program's version?"
                )
        self._is_checked = True
        return True


class MegatronSource:
    """The trainer's weights under Hugging Face names, for `WeightSync`; iterating is collective over a replica."""

    def __init__(self, model: RA3Model) -> None:
        self._model = model

    def metadata(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """(name, shape, dtype) of all tensors in export order."""
        dtype = self._model.config.params_dtype
        return [(name, shape, dtype) for name, shape in names.metadata(self._model.hf_config)]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """A fresh export."""
        return names.export_hf(self._model)
