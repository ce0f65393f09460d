"""Opens the sampling engine a run asks for, and keeps its weights current."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from megatron_ra3.config import RunConfig
from megatron_ra3.latents import LatentFormat
from megatron_ra3.model.trainer import Trainer
from megatron_ra3.rollout.engine import Engine

T = TypeVar("T")


class ServedEngine(Protocol):
    """An engine together with the way weights reach it."""

    engine: Engine

    def sync(self, version: int) -> None:
        """Make the trainer's current weights live under `version`; collective over all ranks."""

    def lead(self, work: Callable[[], T]) -> T:
        """Run `work` on each replica's leader and return its result on the whole replica."""

    def close(self) -> None:
        """Stop what was started."""


class InProcess:
    """The trainer's own weights: nothing to start, nothing to send."""

    def __init__(self, trainer: Trainer, latent_format: LatentFormat, max_batch_tokens: int) -> None:
        from megatron_ra3.rollout.inprocess import InProcessEngine

        self.engine = InProcessEngine(trainer, latent_format, max_batch_tokens=max_batch_tokens)

    def sync(self, version: int) -> None:
        """Tag coming samples with `version`."""
        self.engine.set_version(version)

    def lead(self, work: Callable[[], T]) -> T:
        """Every rank works: the forward passes are collective."""
        return work()

    def close(self) -> None:
        """Nothing to stop."""


def open_engine(config: RunConfig, trainer: Trainer, latent_format: LatentFormat, folder: Path) -> ServedEngine:
    """Start or connect the engine of `engine.kind`; collective over all ranks."""
    if config.engine.kind == "inprocess":
        return InProcess(trainer, latent_format, config.parallel.micro_batch_tokens)
    raise NotImplementedError(folder)
