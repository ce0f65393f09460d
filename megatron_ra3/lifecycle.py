"""What every kind of run does beside training: it logs, saves, resumes, stops when asked, and ends with an export.

The loops (`em.py`, `rlvr.py`) say what happens in a step; their runs (`run.py`, `rlvr_run.py`) own what it happens to
and build on this. What a kind of run must keep beyond weights and progress it lists in `_state`, and reads back in
`_restore_state`, nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import torch

from megatron_ra3.assembly import Assembly
from megatron_ra3.checkpoint import Checkpoints, check_compatible, identity, model_digest
from megatron_ra3.config import TrainerConfig
from megatron_ra3.deadline import Deadline
from megatron_ra3.kernels.backends import in_use, take_fallbacks
from megatron_ra3.kernels.tuning import table_path, tuning
from megatron_ra3.model import names, parallel, state
from megatron_ra3.observe.profiling import StepProfiler
from megatron_ra3.observe.run_card import write_run_card
from megatron_ra3.observe.spans import TIMELINE
from megatron_ra3.report.consumed import Consumed
from megatron_ra3.report.metrics import MetricsLog
from megatron_ra3.report.samples import SampleLog
from megatron_ra3.report.signatures import Detector
from megatron_ra3.report.wandb_run import open_wandb
from megatron_ra3.rollout.engine import EnginesLostError
from megatron_ra3.rollout.fleet import ServedEngine, open_engine
from megatron_ra3.schedule import Phase, Progress
from megatron_ra3.settings import to_dict
from megatron_ra3.stall import ACTIVITY

T = TypeVar("T")
ConfigT = TypeVar("ConfigT", bound=TrainerConfig)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What a scheduler sends before it takes the machine back, and Ctrl-C."""
SAME_CALL_S = 1.0
"""A signal that comes again so soon is the same call: launchers signal a process and its parent, which passes it on."""


class StopRequestedError(Exception):
    """The run has to end, by a signal, a time limit, `checkpoint.stop_after_steps` or lost engines; it is saved."""


class DurableRun(Generic[ConfigT]):
    """Context manager around everything a run uses; resumes from its newest checkpoint on entry.

    Args:
        config: its settings.
        assembly: ranks, model, optimizer.
        phases: what it will do.
        data: fingerprint of what it learns from, which a resumed run must share.
        detector: looks for failure signatures in its metrics.
    """

    kind: ClassVar[Literal["midtrain", "rlvr"]]

    def __init__(
        self,
        config: ConfigT,
        assembly: Assembly,
        phases: Sequence[Phase],
        *,
        data: str,
        detector: Detector | None = None,
    ) -> None:
        self.assembly = assembly
        self.folder = Path(config.run_folder)
        self.layout = layout = assembly.layout
        self.format = assembly.format
        self.phases = phases
        self.progress = Progress()
        self.detector = detector
        if layout.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        layout.barrier("run folder")
        TIMELINE.join(layout.gather_from_ranks(time.time_ns())[0])
        self._profiler = StepProfiler(
            config.profile, self.folder / "profile", rank=layout.rank, world_size=layout.world_size
        )
        self.samples = SampleLog(self.folder, assembly.tokenizer, writes=layout.rank == 0)
        self.metrics = MetricsLog(
            self.folder,
            total_steps=sum(phase.steps for phase in self.phases),
            writes=layout.rank == 0,
            wandb=open_wandb(
                self.folder,
                config.logging,
                job_type=self.kind,
                settings=to_dict(config),
                start=Path(config.model.folder),
                writes=layout.rank == 0,
            ),
            detector=detector,
        )
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            keep_every_steps=config.checkpoint.keep_every_steps,
            layout=layout,
        )
        self.config = config
        self._deadline = Deadline(
            limit_s=config.checkpoint.wall_clock_limit_s, margin_s=config.checkpoint.stop_before_s
        )
        self._identity = identity(
            config,
            layout,
            model=model_digest(assembly.model.hf_config),
            corpus=data,
            tokenizer=assembly.tokenizer.fingerprint,
        )
        self._engine: ServedEngine | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._asked_at: dict[int, float] = {}
        self._steps_here = 0
        self._stop_reason = ""
        self._consumed = Consumed()
        self._save_stall_s = 0.0
        self._step_started = time.monotonic()
        self._step_label = ""
        self._before_step: dict[str, Any] = {}
        self._last: dict[str, dict[str, float]] = {}

    def __enter__(self) -> Self:
        ACTIVITY.moved("resuming")
        with TIMELINE.span("resuming"):
            self._restore()
        if self.layout.rank == 0:
            write_run_card(self.folder, self.kind, self.layout, self.phases)
        take_fallbacks()
        if self.layout.rank == 0:
            print("kernels:", ", ".join(f"{name} {text}" for name, text in self._kernels().items()), flush=True)
        for number in STOP_SIGNALS:
            self._handlers[number] = signal.getsignal(number)
            signal.signal(number, self._request_stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()
        self.checkpoints.abandon()
        if self._engine is not None:
            self._engine.close()
        self.metrics.close()
        if kind is None or kind is StopRequestedError:
            self.layout.barrier("end of the run")  # a launcher that sees one rank leave early may kill the others
        parallel.destroy()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    # Phases and steps

    def remaining_phases(self) -> Iterator[Phase]:
        """Phases from where the run stands."""
        while self.progress.phase < len(self.phases):
            yield self.phases[self.progress.phase]
            self.progress.phase += 1
            self.progress.step = self.progress.phase_tokens = 0

    def remaining_steps(self, phase: Phase) -> Iterator[int]:
        """Step numbers of `phase` that are still to be done."""
        while self.progress.step < phase.steps:
            self._step_started = time.monotonic()
            self._before_step = self._data_position()
            self._step_label = f"{phase.name} r{phase.round} {self.progress.step + 1}/{phase.steps}"
            ACTIVITY.moved(self._step_label)
            number = self.progress.total_steps + 1
            with (
                self._profiler.step(number),
                TIMELINE.span("step", step=number, phase=phase.name, round=phase.round),
            ):
                yield self.progress.step

    def end_phase(self, phase: Phase) -> None:
        """Let the current step be the last of its phase."""
        self.metrics.shorten(phase.steps - 1 - self.progress.step)
        self.progress.step = phase.steps - 1

    def finish_step(self, phase: Phase, metrics: dict[str, float]) -> None:
        """Count, log and, when due, save a step."""
        if phase.name not in ("bootstrap", "evaluate"):
            self.progress.weight_version += 1
        self.progress.step += 1
        self.progress.total_steps += 1
        self._steps_here += 1
        if self.layout.rank == 0:
            (self.folder / "summary.json").unlink(missing_ok=True)
        self.metrics.write(self._step_label, self._record(phase, metrics))
        self._last[phase.name] = metrics
        self._save_if_due()

    def _record(self, phase: Phase, metrics: dict[str, float]) -> dict[str, Any]:
        seconds = time.monotonic() - self._step_started
        fallbacks: Counter[str] = Counter()
        consumed = Consumed()
        dropped = 0
        own = (take_fallbacks(), self._consumed, TIMELINE.take_dropped())
        for of_rank, share, lost in self.layout.gather_from_ranks(own):
            fallbacks += of_rank
            consumed = consumed.plus(share)
            dropped += lost
        self._consumed = Consumed()
        record: dict[str, Any] = {
            "step": self.progress.total_steps,
            "phase": phase.name,
            "round": phase.round,
            **metrics,
            **(self._engine.take_counts() if self._engine is not None else {}),
            **self._step_figures(),
            **consumed.to_json(),
            "seconds": seconds,
        }
        if self._save_stall_s:
            record["save_stall_seconds"] = self._save_stall_s
            self._save_stall_s = 0.0
        if dropped:
            record["timeline_dropped"] = dropped
        if fallbacks:
            record["kernel_fallbacks"] = dict(fallbacks)
        if self.progress.total_steps == 1:
            record["kernels"] = self._kernels() | {"tiles": asdict(tuning())}
        return record

    def _kernels(self) -> dict[str, str]:
        """What computes rewards and losses, and where its tiles come from."""
        trainer, width = self.assembly.trainer, self.assembly.model.hf_config["hidden_size"]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        uses = {"rewards": trainer.reward_precision, "losses": trainer.loss_precision}
        found = {name: f"{precision} ({in_use(width, precision, device)})" for name, precision in uses.items()}
        return found | {"tiles": str(table_path()) if table_path().is_file() else "as shipped"}

    def _save_if_due(self) -> None:
        """Begin, go on with, or complete a save; StopRequestedError once it is complete and the run shall end."""
        settings, started = self.config.checkpoint, time.monotonic()
        if self._steps_here == settings.stop_after_steps:
            self._stop_reason = f"checkpoint.stop_after_steps={self._steps_here}"
        near = self._deadline.is_near(
            step_s=started - self._step_started, longest_save_s=self.checkpoints.longest_save_s
        )
        self._stop_reason = self._stop_reason or near
        if self.layout.any_rank(bool(self._stop_reason)):
            self.save()
            reason = self._stop_reason or "another rank's signal"
            raise StopRequestedError(
                f"stopped after step {self.progress.total_steps} by {reason}; saved, the same command goes on"
            )
        if self.progress.total_steps % settings.every_steps == 0:
            self._start_saving()
            if not settings.asynchronous:
                self.checkpoints.wait()
        elif self.checkpoints.saving:
            self.checkpoints.poll()
        else:
            return
        self._save_stall_s = time.monotonic() - started

    def finish(self) -> dict[str, Any]:
        """Save, export to Hugging Face format, and write the summary, which stands for: nothing ran since."""
        ACTIVITY.moved("finish")
        self.save()
        export, summary_path = self.folder / "export", self.folder / "summary.json"
        if self.layout.any_rank(self.layout.rank == 0 and not (summary_path.is_file() and export.is_dir())):
            with TIMELINE.span("export"):
                self._export(export)
        found = self.detector.found if self.detector is not None else []
        summary = {
            "steps": self.progress.total_steps,
            **self._summary(),
            **self._last,
            "signatures": self.layout.gather_from_ranks(found)[0],
        }
        if self.layout.rank == 0:
            summary_path.write_text(json.dumps(summary, indent=1), encoding="utf-8")
        self.layout.barrier("summary")
        return summary

    # Sampling

    def sync_engine(self) -> None:
        """Bring the current weights to the engine, starting it on first use.

        StopRequestedError: engines are lost, and the state is saved as it was before this step.
        """
        if self._engine is None:
            trainer, folder = self.assembly.trainer, self.assembly.initial_folder
            self._engine = open_engine(self.config, trainer, self.format, folder, stop_requested=self._must_stop)
        with self._saved_where_engines_are_lost(), TIMELINE.span("weight sync"):
            self._engine.sync(self.progress.weight_version)

    def _lead(self, work: Callable[[], T]) -> T:
        """`ServedEngine.lead`; StopRequestedError as `sync_engine`."""
        assert self._engine is not None, "sync_engine comes first"
        with self._saved_where_engines_are_lost():
            return self._engine.lead(work)

    @contextlib.contextmanager
    def _saved_where_engines_are_lost(self) -> Iterator[None]:
        """Save what was there before this step, its samples unused, and leave: other machines may have engines."""
        try:
            yield
        except EnginesLostError as error:
            self._rewind_data(self._before_step)
            self.save()
            raise StopRequestedError(
                f"stopped after step {self.progress.total_steps}: {error}; saved, the same command goes on"
            ) from error

    # State

    def save(self) -> Path:
        """Save everything; OSError when the disk refuses, earlier checkpoints stay whole."""
        self._start_saving()
        self.checkpoints.wait()
        return self.checkpoints.path(self.progress.total_steps)

    def _start_saving(self) -> None:
        model, optimizer = self.assembly.model, self.assembly.trainer.optimizer
        self.checkpoints.start(
            self.progress.total_steps, self._manifest, lambda folder: state.stage_state(folder, model, optimizer)
        )

    def _must_stop(self) -> bool:
        """Whether a signal or a time limit forbids to wait any longer within a step."""
        near = self._deadline.is_near(step_s=0.0, longest_save_s=self.checkpoints.longest_save_s)
        return bool(self._stop_reason or near)

    def _request_stop(self, number: int, _frame: object) -> None:
        """End after the current step; the same signal once more, later than `SAME_CALL_S`, ends the process at once."""
        self._stop_reason = signal.Signals(number).name
        now = time.monotonic()
        if now - self._asked_at.setdefault(number, now) > SAME_CALL_S:
            signal.signal(number, self._handlers[signal.Signals(number)])
            signal.raise_signal(number)

    def _export(self, export: Path) -> None:
        """Write the weights beside an earlier export, then take its place."""
        new = export.with_name("export.new")
        if self.layout.rank == 0:
            shutil.rmtree(new, ignore_errors=True)
        names.save_hf(self.assembly.model, new, self.assembly.model.hf_config, self.config.tokenizer_folder)
        if self.layout.rank == 0:
            shutil.rmtree(export, ignore_errors=True)
            new.rename(export)

    def _manifest(self) -> dict[str, Any]:
        own = self._state()  # has collectives, so before anything that can fail
        return self._identity | {
            "at": self._step_label,
            "progress": self.progress.to_json(),
            **own,
            "metrics_offset": self.metrics.offset,
            "samples_offset": self.samples.offset,
            "last": self._last,
        }

    def _restore(self) -> None:
        found = self.checkpoints.newest_whole()
        if found is None:
            self.metrics.rewind(0, 0)
            self.samples.rewind(0)
            return
        checkpoint, manifest = found
        check_compatible(checkpoint, manifest, self._identity, type(self.config))
        before, now = manifest["layout"], self._identity["layout"]
        state.load_state(
            checkpoint / "state", self.assembly.model, self.assembly.trainer.optimizer, generators=before == now
        )
        self.progress = Progress(**manifest["progress"])
        if before != now:
            state.seed_generators(self.config.seed, self.progress.total_steps)
        self._restore_state(manifest)
        self._last = manifest["last"]
        self.metrics.rewind(manifest["metrics_offset"], self.progress.total_steps)
        planned = sum(phase.steps for phase in self.phases[: self.progress.phase]) + self.progress.step
        self.metrics.shorten(planned - self.progress.total_steps)
        self.samples.rewind(manifest["samples_offset"])
        if self.layout.rank == 0:
            print(f"resumed from {checkpoint}", flush=True)
            if before != now:
                print(f"layout changed from {before} to {now}: random generators seeded anew", flush=True)

    # What a kind of run adds

    def _state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside weights and progress; collective over all ranks."""
        raise NotImplementedError

    def _restore_state(self, manifest: Mapping[str, Any]) -> None:
        """Take over what `_state` gave."""
        raise NotImplementedError

    def _data_position(self) -> dict[str, Any]:
        """Where the run stands in its data: before the first sample that it has not used."""
        raise NotImplementedError

    def _rewind_data(self, position: Mapping[str, Any]) -> None:
        """Give back samples taken since `_data_position` gave this one."""
        raise NotImplementedError

    def _step_figures(self) -> dict[str, float]:
        """Metrics of every step, whatever its phase; collective over all ranks."""
        raise NotImplementedError

    def _summary(self) -> dict[str, Any]:
        """What the run's summary says beside the last metrics of every phase."""
        return {}

    def _close(self) -> None:
        """Close what the run has opened beyond the engine and the logs; the engine is still there."""
        raise NotImplementedError

    def _consume(self, ids: Iterable[str]) -> None:
        """Count samples that this step uses."""
        if self.layout.is_replica_leader:
            self._consumed = self._consumed.plus(Consumed.of(ids))
