"""torch.profiler traces of chosen steps and ranks, which open in https://ui.perfetto.dev as the timeline does.

One file per step and rank, so that one can be looked at without the others. A trace that cannot be written is said and
costs nothing but itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from megatron_ra3.config import ProfileConfig
from megatron_ra3.observe.spans import NOTHING


class StepProfiler:
    """Profiles the steps of `config` on its ranks; ValueError for a rank that does not exist."""

    def __init__(self, config: ProfileConfig, folder: Path, *, rank: int, world_size: int) -> None:
        if config.steps and max(config.ranks) >= world_size:
            raise ValueError(f"profile.ranks={list(config.ranks)}: this run has ranks 0 to {world_size - 1}")
        self._steps = range(config.steps[0], config.steps[1] + 1) if config.steps and rank in config.ranks else ()
        self._folder = folder
        self._rank = rank

    def step(self, number: int) -> AbstractContextManager[None]:
        """Around the step of that number, from 1 on."""
        return self._profiled(number) if number in self._steps else NOTHING

    @contextlib.contextmanager
    def _profiled(self, number: int) -> Iterator[None]:
        from torch.profiler import profile

        with profile() as trace:
            yield
        path = self._folder / f"step-{number:08d}-rank-{self._rank:05d}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            print(f"profile: {path} cannot be written: {error}", flush=True)
