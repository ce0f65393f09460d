"""The engines of one data-parallel replica, as its leader has them: those it starts, or its share of those named.

Everything about them that takes no other rank: starting, asking, keeping. What all ranks decide together, above all
which weights they get, is in `fleet`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_ra3.config import TrainerConfig
from megatron_ra3.observe.engine_figures import Figures, Scraper, Targets
from megatron_ra3.rollout.engine import EngineError
from megatron_ra3.rollout.health import Restarts, Roster
from megatron_ra3.rollout.server import ServerConfig, answers, resume, served_model_name
from megatron_ra3.rollout.supervise import FoundServer, Keeper, KeptServer
from megatron_ra3.rollout.vllm_engine import VllmEngine
from megatron_ra3.stall import ACTIVITY

VLLM_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class State:
    """What a replica's leader tells all ranks: `present` are the engines that can be sent weights, with theirs.

    `awaited` says what became of the others; `is_hopeless` that none of them will come back.
    """

    present: dict[str, int | None]
    serving: int
    awaited: str
    is_hopeless: bool


class ReplicaEngines:
    """Opens a replica's engines and keeps them; `engine` asks those that serve.

    Started engines are `dp_rank * per_replica` and following of all replicas', which numbers logs and seeds.
    EngineError: none came up, or one serves something else. One of several that does not come up begins as lost.
    """

    def __init__(
        self, config: TrainerConfig, model_folder: Path, gate_ids: Sequence[int], *, dp_rank: int, dp_size: int
    ) -> None:
        self.roster = Roster()
        self._config = config
        self._kept: list[KeptServer] = []
        self._keeper: Keeper | None = None
        self._engine: VllmEngine | None = None
        self._scraper: Scraper | None = None
        self._targets = Targets(Path(config.run_folder), dp_rank)
        urls = [url.rstrip("/") for url in config.engine.urls[dp_rank::dp_size]]
        assert urls or not config.engine.urls, "every replica has a server; checked when the run was assembled"
        model = served_model_name(model_folder)
        try:
            if urls:
                self._find(urls)
            else:
                self._start(model_folder, dp_rank)
            self._connect(model, gate_ids)
            found = [FoundServer(url, model, restart_policy(config), self.roster) for url in urls]
            self._tell_targets()
            self._keeper = Keeper(self._kept, found, self._tell_targets)
            self._keeper.start()
            if config.logging.engine_metrics:
                self._scraper = Scraper(self.roster.present)
        except BaseException:
            self.close()
            raise

    @property
    def engine(self) -> VllmEngine:
        """Asks the engines that serve."""
        assert self._engine is not None
        return self._engine

    def state(self) -> State:
        """How the engines are now."""
        roster = self.roster
        return State(roster.present(), len(roster.serving()), roster.described(), roster.is_hopeless)

    def take_counts(self) -> Counter[str]:
        """Metrics since the last call, and how many engines serve now."""
        counts = self.roster.take_counts()
        counts["engines_alive"] = len(self.roster.serving())
        return counts

    def begin_work(self) -> None:
        """Note that the engines are asked from now on."""
        if self._scraper is not None:
            self._scraper.ask()

    def take_figures(self) -> tuple[list[Figures], int]:
        """What engines said of themselves since the last call, and how many did not answer."""
        return self._scraper.take() if self._scraper is not None else ([], 0)

    def close(self) -> None:
        """Leave the engines; stop those that were started here."""
        if self._scraper is not None:
            self._scraper.close()
        if self._engine is not None:
            self._engine.close()
        if self._keeper is not None:
            self._keeper.close()
        else:
            for kept in self._kept:
                kept.server.stop()

    def _tell_targets(self) -> None:
        self._targets.tell(self.roster.urls())

    def _find(self, urls: Sequence[str]) -> None:
        timeout_s = self._config.engine.start_timeout_s
        found = await_all([partial(answers, url) for url in urls], f"engines {', '.join(urls)}", timeout_s)
        missing = f"did not appear within engine.start_timeout_s={timeout_s:g}"
        for url, is_there in zip(urls, found, strict=True):
            self.roster.add(url, "ready" if is_there else "starting")
            if is_there:
                resume(url)
            else:
                self.roster.lose(url, missing)
        if not any(found):
            raise EngineError(f"engine {', '.join(urls)} {missing}")

    def _start(self, model_folder: Path, dp_rank: int) -> None:
        settings = self._config.engine
        for index in range(settings.per_replica):
            number = dp_rank * settings.per_replica + index
            log_file = Path(self._config.run_folder) / f"engine-{number:05d}.log"
            server_config = server_settings(self._config, model_folder, log_file, seed=self._config.seed + 1 + number)
            self._kept.append(KeptServer(server_config, restart_policy(self._config), self.roster))
            self._kept[-1].start()
        problems = [kept.await_start() for kept in self._kept]
        for problem in problems:
            if problem is not None and None not in problems:
                raise problem

    def _connect(self, model: str, gate_ids: Sequence[int]) -> None:
        settings = self._config.engine
        self._engine = VllmEngine(
            self.roster,
            gate_ids,
            expected_model=model,
            min_model_len=self._config.max_sequence_tokens,
            timeout_s=settings.request_timeout_s,
            silence_s=settings.health_interval_s,
            beat_timeout_s=settings.health_timeout_s,
            max_in_flight=settings.max_in_flight,
        )


def restart_policy(config: TrainerConfig) -> Restarts:
    """When a server that died is started again."""
    settings = config.engine
    return Restarts(settings.max_restarts, settings.restart_pause_s, settled_s=settings.start_timeout_s)


def server_settings(config: TrainerConfig, model_folder: Path, log_file: Path, *, seed: int) -> ServerConfig:
    """What a run's configuration says about one server."""
    import torch

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


def await_all(ready: Sequence[Callable[[], bool]], what: str, timeout_s: float) -> list[bool]:
    """Wait until all are `ready`, at most `timeout_s`; which are in the end."""
    deadline = time.monotonic() + timeout_s
    found = [False] * len(ready)
    told = False
    while True:
        found = [was or is_ready() for was, is_ready in zip(found, ready, strict=True)]
        if all(found) or time.monotonic() > deadline:
            return found
        if not told:
            print(f"waiting for {what}", flush=True)
            told = True
        ACTIVITY.moved(f"waiting for {what}")
        time.sleep(0.5)
