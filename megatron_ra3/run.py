"""One run, assembled: ranks, model, corpus, engine, logs and checkpoints, with nothing left to decide.

`em.py` says what happens; this module owns what it happens to. Everything that must survive a restart is listed in
`_manifest` and read back in `_restore`, nowhere else.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_ra3.annotated import AnnotatedStore
from megatron_ra3.assembly import assemble
from megatron_ra3.checkpoint import Checkpoints, check_compatible, identity, model_digest
from megatron_ra3.config import RunConfig, to_dict
from megatron_ra3.corpus.stream import ShardStream
from megatron_ra3.corpus.tokenized import SnippetTokenizer
from megatron_ra3.deadline import Deadline
from megatron_ra3.estep import EStep
from megatron_ra3.kernels.backends import take_fallbacks
from megatron_ra3.latents import Snippet, Trajectory
from megatron_ra3.model import names, parallel, state
from megatron_ra3.model.reference import Reference
from megatron_ra3.mstep import NextToken
from megatron_ra3.report.consumed import Consumed
from megatron_ra3.report.metrics import MetricsLog, global_means
from megatron_ra3.report.samples import SampleLog
from megatron_ra3.report.signatures import Detector
from megatron_ra3.rollout.engine import EngineError
from megatron_ra3.rollout.fleet import ServedEngine, open_engine
from megatron_ra3.rollout.sampler import Sampler, SamplerConfig
from megatron_ra3.schedule import Phase, Progress, phases
from megatron_ra3.stall import ACTIVITY

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What a scheduler sends before it takes the machine back, and Ctrl-C."""
SAME_CALL_S = 1.0
"""A signal that comes again so soon is the same call: launchers signal a process and its parent, which passes it on."""


class StopRequestedError(Exception):
    """A signal or `checkpoint.stop_after_steps` asked for an end; the state is saved."""


class Run:
    """Context manager around everything a run uses; resumes from its newest checkpoint on entry."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.folder = Path(config.run_folder)
        self.assembly = assembly = assemble(config)
        self.layout = layout = assembly.layout
        self.format = assembly.format
        if layout.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        layout.barrier("run folder")
        self.snippet_tokenizer = SnippetTokenizer(
            assembly.tokenizer,
            self.format,
            config.latents.comments,
            max_tokens=config.corpus.max_snippet_tokens,
            max_rationale_tokens=config.latents.max_rationale_tokens,
            granularity=config.objective.granularity,
        )
        self.train, self.heldout = self._open_corpus()
        self._heldout_start = self.heldout.state_dict()
        self.annotated = AnnotatedStore(self.folder / "annotated", layout.dp_rank)
        tokens = config.parallel.micro_batch_tokens
        self.estep = EStep(
            config.objective,
            config.estep.learning_rate,
            assembly.trainer,
            layout,
            self.format,
            tokens,
            Reference(assembly.trainer, assembly.initial_folder) if config.objective.needs_reference else None,
        )
        self.next_token = NextToken(assembly.trainer, layout, self.format, tokens)
        self.samples = SampleLog(self.folder, assembly.tokenizer, writes=layout.rank == 0)
        self.progress = Progress()
        self.phases = phases(config)
        self.detector = Detector(config)
        self.metrics = MetricsLog(
            self.folder,
            total_steps=sum(phase.steps for phase in self.phases),
            writes=layout.rank == 0,
            wandb_project=config.logging.wandb_project,
            settings=to_dict(config),
            detector=self.detector,
        )
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            keep_every_steps=config.checkpoint.keep_every_steps,
            layout=layout,
        )
        self._deadline = Deadline(
            limit_s=config.checkpoint.wall_clock_limit_s, margin_s=config.checkpoint.stop_before_s
        )
        self._identity = identity(
            config,
            layout,
            model=model_digest(assembly.model.hf_config),
            corpus=self.train.manifest_sha256,
            tokenizer=assembly.tokenizer.fingerprint,
        )
        self._engine: ServedEngine | None = None
        self._samplers: dict[int, Sampler] = {}
        self._think_rates: dict[int, float] = {}
        self._handlers: dict[signal.Signals, Any] = {}
        self._asked_at: dict[int, float] = {}
        self._steps_here = 0
        self._stop_reason = ""
        self._consumed = Consumed()
        self._save_stall_s = 0.0
        self._step_started = time.monotonic()
        self._step_label = ""
        self._last: dict[str, dict[str, float]] = {}

    def __enter__(self) -> Self:
        ACTIVITY.moved("resuming")
        self._restore()
        take_fallbacks()
        for number in STOP_SIGNALS:
            self._handlers[number] = signal.getsignal(number)
            signal.signal(number, self._request_stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.checkpoints.abandon()
        if self._engine is not None:
            self._engine.close()
        self.metrics.close()
        self.train.close()
        self.heldout.close()
        if kind is None or kind is StopRequestedError:
            self.layout.barrier("end of the run")  # a launcher that sees one rank leave early may kill the others
        parallel.destroy()

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
            self._step_label = f"{phase.name} r{phase.round} {self.progress.step + 1}/{phase.steps}"
            ACTIVITY.moved(self._step_label)
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
        for of_rank, share in self.layout.gather_from_ranks((take_fallbacks(), self._consumed)):
            fallbacks += of_rank
            consumed = consumed.plus(share)
        self._consumed = Consumed()
        record: dict[str, Any] = {
            "step": self.progress.total_steps,
            "phase": phase.name,
            "round": phase.round,
            **metrics,
            "dropped_snippets": self.layout.sum_number_over_dp(self.snippet_tokenizer.take_dropped()),
            "bad_samples": self.train.bad_samples + self.heldout.bad_samples,
            "stream_wait_seconds": self.train.take_waited_s() + self.heldout.take_waited_s(),
            **consumed.to_json(),
            "stream_epoch": self.train.cursor.epoch,
            "stream_position": self.train.cursor.position,
            "seconds": seconds,
        }
        if self._save_stall_s:
            record["save_stall_seconds"] = self._save_stall_s
            self._save_stall_s = 0.0
        if fallbacks:
            record["kernel_fallbacks"] = dict(fallbacks)
        return record

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
            self._export(export)
        summary = {
            "steps": self.progress.total_steps,
            "mstep_tokens": self.progress.mstep_tokens,
            **self._last,
            "signatures": self.layout.gather_from_ranks(self.detector.found)[0],
        }
        if self.layout.rank == 0:
            summary_path.write_text(json.dumps(summary, indent=1), encoding="utf-8")
        self.layout.barrier("summary")
        return summary

    # Data

    def next_snippets(self, count: int) -> list[Snippet]:
        """Return this replica's share of the next `count` training snippets."""
        return self._take(self.train, count)

    def heldout_snippets(self) -> list[Snippet]:
        """Return this replica's share of the held-out snippets, the same at every evaluation."""
        self.heldout.load_state_dict(self._heldout_start)
        return self._take(self.heldout, min(self.config.evaluate.snippets, len(self.heldout)))

    def put_annotated(self, trajectories: Sequence[Trajectory]) -> None:
        """Keep bootstrapped snippets for the M-step."""
        if self.layout.is_replica_leader:
            self.annotated.append(trajectories)

    def take_annotated(self, steps_left: int) -> list[Trajectory]:
        """Return the replica's bootstrapped snippets of one of `steps_left` M-steps."""
        taken = self.annotated.take(steps_left) if self.layout.is_replica_leader else []
        self._consume(item.snippet_id for item in taken)
        return self.layout.broadcast_in_replica(taken)

    def write_samples(self, trajectories: Sequence[Trajectory]) -> None:
        """Show annotated snippets in samples.jsonl."""
        self.samples.write(self.progress.total_steps, trajectories)

    # Sampling

    @property
    def samples_latents(self) -> bool:
        """Whether the objective leaves a latent to sample."""
        return self.config.objective.gate != "never"

    def sync_engine(self) -> None:
        """Bring the current weights to the engine, starting it on first use; idle where no latent is sampled."""
        if not self.samples_latents:
            return
        if self._engine is None:
            self._engine = open_engine(self.config, self.assembly.trainer, self.format, self.assembly.initial_folder)
        self._engine.sync(self.progress.weight_version)

    def sample(self, snippets: Sequence[Snippet], rollouts_per_snippet: int) -> list[list[Trajectory]]:
        """Per snippet its rollouts, the same on every rank of the replica.

        EngineError when something was sampled with other weights than the current ones.
        """
        if not self.samples_latents:
            return [[self.format.render(item, observe=False)] * rollouts_per_snippet for item in snippets]
        assert self._engine is not None, "sync_engine comes first"
        seed = self.config.seed * 1_000_003 + self.progress.total_steps
        groups = self._engine.lead(lambda: self._sampler(rollouts_per_snippet).sample(snippets, seed=seed))
        _check_versions(groups, self.progress.weight_version)
        return groups

    def sampling_metrics(self) -> dict[str, float]:
        """What the last `sample` call cost, over all replicas, per rollout."""
        sums = {"requests_per_rollout": (0.0, 0.0), "forced_act_rate": (0.0, 0.0)}
        if self.layout.is_replica_leader:
            stats = self._samplers[self.config.estep.rollouts_per_snippet].stats
            requests = float(stats.gate_queries + stats.generate_requests)
            sums["requests_per_rollout"] = (requests, float(stats.rollouts))
            sums["forced_act_rate"] = (float(stats.forced_acts), float(stats.lines))
        return global_means(self.layout, sums)

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
        rates = self._think_rates | {rollouts: sampler.think_rate for rollouts, sampler in self._samplers.items()}
        replica = {
            "annotated": self.annotated.state_dict(),
            "think_rates": {str(rollouts): rate for rollouts, rate in rates.items()},
        }
        replicas = self.layout.gather_from_leaders(replica)  # a collective, so before anything that can fail
        return self._identity | {
            "at": self._step_label,
            "progress": self.progress.to_json(),
            "stream": self.train.state_dict(),
            "replicas": replicas,
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
        check_compatible(checkpoint, manifest, self._identity)
        before, now = manifest["layout"], self._identity["layout"]
        state.load_state(
            checkpoint / "state", self.assembly.model, self.assembly.trainer.optimizer, generators=before == now
        )
        self.progress = Progress(**manifest["progress"])
        if before != now:
            state.seed_generators(self.config.seed, self.progress.total_steps)
        self.train.load_state_dict(manifest["stream"])
        self._restore_replica(manifest["replicas"])
        self._last = manifest["last"]
        self.metrics.rewind(manifest["metrics_offset"], self.progress.total_steps)
        planned = sum(phase.steps for phase in self.phases[: self.progress.phase]) + self.progress.step
        self.metrics.shorten(planned - self.progress.total_steps)
        self.samples.rewind(manifest["samples_offset"])
        if self.layout.rank == 0:
            print(f"resumed from {checkpoint}", flush=True)
            if before != now:
                print(f"layout changed from {before} to {now}: random generators seeded anew", flush=True)

    def _restore_replica(self, saved: Sequence[dict[str, Any]]) -> None:
        """Take over what the replicas had; for another number of them, deal snippets out and average rates."""
        if self.layout.is_replica_leader:
            self.annotated.load_state_dicts([replica["annotated"] for replica in saved], self.layout.dp_size)
        own = saved if len(saved) != self.layout.dp_size else [saved[self.layout.dp_rank]]
        rates: dict[int, list[float]] = {}
        for replica in own:
            for rollouts, rate in replica["think_rates"].items():
                rates.setdefault(int(rollouts), []).append(rate)
        self._think_rates = {rollouts: sum(found) / len(found) for rollouts, found in rates.items()}

    def _open_corpus(self) -> tuple[ShardStream, ShardStream]:
        """Training and held-out split; what only one rank finds wrong is raised on all."""
        settings = self.config.corpus
        verify = settings.verify_checksums and self.layout.rank == 0
        problem = None
        try:
            train, heldout = (
                ShardStream(settings.folder, split, self.config.seed, verify=verify, config=settings)
                for split in ("train", "heldout")
            )
        except (ValueError, OSError) as error:
            problem = error
        for found in self.layout.gather_from_ranks(problem):
            if found is not None:
                raise found
        return train, heldout

    def _take(self, stream: ShardStream, count: int) -> list[Snippet]:
        """The replica's share of the next `count` samples; its leader reads, and all ranks agree on what is bad."""
        layout = self.layout
        records = stream.take(
            count, layout.dp_rank, layout.dp_size, reads=layout.is_replica_leader, gather=layout.gather_from_ranks
        )
        self._consume(record.id for record in records)
        return self.snippet_tokenizer.snippets(layout.broadcast_in_replica(records))

    def _consume(self, ids: Iterable[str]) -> None:
        if self.layout.is_replica_leader:
            self._consumed = self._consumed.plus(Consumed.of(ids))

    def _sampler(self, rollouts_per_snippet: int) -> Sampler:
        if rollouts_per_snippet not in self._samplers:
            assert self._engine is not None
            settings = SamplerConfig(
                rollouts_per_snippet=rollouts_per_snippet,
                max_rationale_tokens=self.config.latents.max_rationale_tokens,
                max_sequence_tokens=self.config.max_sequence_tokens,
                window=self.config.estep.window or "auto",
                gate_exploration=self.config.objective.gate_exploration if rollouts_per_snippet > 1 else 0.0,
                gate=self.config.objective.gate,
            )
            sampler = Sampler(self._engine.engine, self.format, settings)
            sampler.think_rate = self._think_rates.get(rollouts_per_snippet, sampler.think_rate)
            self._samplers[rollouts_per_snippet] = sampler
        return self._samplers[rollouts_per_snippet]


def _check_versions(groups: Sequence[Sequence[Trajectory]], current: int) -> None:
    versions = {
        version
        for group in groups
        for item in group
        for version, drawn in zip(item.weight_versions, item.sampled, strict=True)
        if drawn
    }
    if versions - {current}:
        raise EngineError(
            f"rollouts came with weight versions {sorted(versions)}, the trainer is at {current}: give every run "
            "engines of its own (engine.urls)"
        )
