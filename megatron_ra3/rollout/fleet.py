"""Opens the sampling engine a run asks for, and keeps its weights current and checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from megatron_ra3.config import TrainerConfig
from megatron_ra3.latents import LatentFormat
from megatron_ra3.model import names
from megatron_ra3.model.build import RA3Model
from megatron_ra3.model.trainer import MicroBatch, Trainer
from megatron_ra3.rollout.engine import Engine, EngineError, GateQuery
from megatron_ra3.rollout.inprocess import InProcessEngine
from megatron_ra3.rollout.server import ServerConfig, VllmServer, answers, serve_forever, served_model_name
from megatron_ra3.rollout.vllm_engine import VllmEngine
from megatron_ra3.rollout.weights import WeightSync
from megatron_ra3.stall import ACTIVITY

T = TypeVar("T")
PROBE_SEQUENCES = 64
PROBE_TOKENS = 24
PARITY_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}
"""Largest log-prob difference (nats) between engine and trainer; in bf16 two correct forward passes differ by 0.06."""
VLLM_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class ServedEngine(Protocol):
    """An engine together with the way weights reach it."""

    @property
    def engine(self) -> Engine:
        """What the sampler asks; only on ranks where `lead` runs its work."""

    def sync(self, version: int) -> None:
        """Make the trainer's current weights live under `version`; collective over all ranks."""

    def lead(self, work: Callable[[], T]) -> T:
        """Run `work` where the engine is and return its result on the whole replica."""

    def close(self) -> None:
        """Stop what was started."""


def open_engine(
    config: TrainerConfig, trainer: Trainer, latent_format: LatentFormat, model_folder: Path
) -> InProcess | Servers:
    """Start or connect the engine of `engine.kind`; collective over all ranks.

    `model_folder` is a Hugging Face folder of the trainer's architecture; its weights are replaced by the first sync.
    """
    if trainer.layout.rank == 0:
        print(f"engine: {config.engine.resolved_kind}", flush=True)
    if config.engine.resolved_kind == "inprocess":
        return InProcess(trainer, latent_format, config.parallel.micro_batch_tokens)
    return Servers(config, trainer, latent_format, model_folder)


def serve(config: TrainerConfig) -> int:
    """Serve `engine.model_folder` (or what the trainer starts from) on this node until told to stop."""
    folder = Path(config.engine.model_folder or config.model.folder)
    if not config.engine.model_folder and config.model.init == "random":
        folder = Path(config.run_folder) / "initial"
        _await((folder / "config.json").is_file, f"{folder}, which the trainer writes", config.engine.start_timeout_s)
    log_file = Path(config.run_folder) / f"engine-{config.engine.port}.log"
    serve_forever(_server_config(config, folder, log_file, seed=config.seed + config.engine.port))
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

    def close(self) -> None:
        """Stop nothing."""


class Servers:
    """vLLM servers: one started by each replica's leader, or those of `engine.urls` dealt out to the replicas."""

    def __init__(
        self, config: TrainerConfig, trainer: Trainer, latent_format: LatentFormat, model_folder: Path
    ) -> None:
        self.config = config
        self.trainer = trainer
        self.layout = trainer.layout
        self._format = latent_format
        self._model_folder = model_folder
        self._server: VllmServer | None = None
        self._engine: VllmEngine | None = None
        self._sync: WeightSync | None = None
        self._live_version: int | None = None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    @property
    def engine(self) -> Engine:
        """The client; on replica leaders only."""
        assert self._engine is not None, "only a replica's leader talks to engines"
        return self._engine

    def lead(self, work: Callable[[], T]) -> T:
        """Run `work` on the replica's leader; its result, or its EngineError, reaches all ranks of the replica."""
        outcome: tuple[T | None, Exception | None] = (None, None)
        if self.layout.is_replica_leader:
            try:
                outcome = (work(), None)
            except (EngineError, ValueError) as error:
                outcome = (None, error)
        result, problem = self.layout.broadcast_in_replica(outcome)
        if problem is not None:
            raise problem
        return result

    def sync(self, version: int) -> None:
        """Send the weights; the first time also compare checksums and log-probs with the trainer's."""
        if version == self._live_version:
            return
        source = MegatronSource(self.trainer.model)
        if self._sync is None:
            self._sync = WeightSync(
                self._all_urls,
                backend="nccl" if torch.cuda.is_available() else "gloo",
                timeout_s=self.config.engine.sync_timeout_s,
                rank=self.layout.rank,
            )
            self._sync.connect()
            self._sync.send(source, version)
            self._sync.check(source)
            self._check_parity()
        else:
            self._sync.send(source, version)
        self._live_version = version
        self.layout.barrier(f"weights version {version} live on all engines")

    def close(self) -> None:
        """Leave the engines; stop the one that was started here."""
        if self._sync is not None:
            self._sync.close()
        if self._engine is not None:
            self._engine.close()
        if self._server is not None:
            self._server.stop()

    def _open(self) -> None:
        urls = self.lead(self._start)
        self._all_urls = [url for group in self.layout.gather_from_leaders(urls) for url in group]

    def _start(self) -> list[str]:
        settings, rank, size = self.config.engine, self.layout.dp_rank, self.layout.dp_size
        urls = list(settings.urls[rank::size])
        assert urls or not settings.urls, "every replica has a server; checked when the run was assembled"
        for url in urls:
            _await(partial(answers, url), f"engine {url}", settings.start_timeout_s)
        if not urls:
            log_file = Path(self.config.run_folder) / f"engine-{rank:05d}.log"
            seed = self.config.seed + 1 + rank
            self._server = VllmServer(_server_config(self.config, self._model_folder, log_file, seed=seed))
            self._server.start()
            self._server.wait()
            urls = [self._server.url]
        self._engine = VllmEngine(
            urls,
            self._format.gate_ids,
            expected_model=served_model_name(self._model_folder),
            min_model_len=self.config.max_sequence_tokens,
            timeout_s=settings.request_timeout_s,
            max_in_flight=settings.max_in_flight,
        )
        return urls

    def _check_parity(self) -> None:
        """Compare gate log-probs of random sequences; EngineError when they differ by more than the tolerance."""
        gate_ids = self._format.gate_ids
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.trainer.model.vocab_size, (PROBE_SEQUENCES, PROBE_TOKENS), generator=generator)
        last = torch.arange(PROBE_SEQUENCES) * PROBE_TOKENS + PROBE_TOKENS - 1
        batch = MicroBatch(tokens, last.repeat_interleave(len(gate_ids)), torch.tensor(gate_ids * PROBE_SEQUENCES))
        own = self.trainer.score([batch])[0].cpu()
        queries = [GateQuery(tuple(row), (PROBE_TOKENS - 1,)) for row in tokens.tolist()]
        theirs = self.lead(lambda: [score.logprobs[0] for score in self.engine.gate_logprobs(queries)])
        difference = float((torch.tensor(theirs).flatten() - own).abs().max())
        tolerance = PARITY_TOLERANCE[self.config.model.dtype]
        if not difference <= tolerance:
            raise EngineError(
                f"engines and trainer disagree after the first weight sync: log-probs differ by {difference:.3g} nats, "
                f"at most {tolerance:g} is rounding in {self.config.model.dtype}; is engine.urls serving this model "
                "with this program's version?"
            )


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


def _server_config(config: TrainerConfig, model_folder: Path, log_file: Path, *, seed: int) -> ServerConfig:
    settings = config.engine
    on_gpu = torch.cuda.is_available()
    return ServerConfig(
        model_folder=model_folder,
        log_file=log_file,
        host=settings.host,
        port=settings.port,
        dtype=VLLM_DTYPES[config.model.dtype],
        max_model_len=config.max_sequence_tokens,
        gpu_memory_utilization=settings.memory_fraction,
        kv_cache_bytes=None if on_gpu else settings.cpu_kv_cache_bytes,
        block_size=None if on_gpu else settings.block_size,
        tensor_parallel_size=settings.tensor_parallel,
        max_num_seqs=settings.max_in_flight,
        seed=seed,
        start_timeout_s=settings.start_timeout_s,
    )


def _await(ready: Callable[[], bool], what: str, timeout_s: float) -> None:
    """Wait until `ready`; EngineError naming what did not come."""
    if ready():
        return
    print(f"waiting for {what}", flush=True)
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise EngineError(f"{what} did not appear within engine.start_timeout_s={timeout_s:g}")
        ACTIVITY.moved(f"waiting for {what}")
        time.sleep(0.5)
