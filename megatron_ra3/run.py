"""One mid-training run, assembled: ranks, model, corpus, engine and logs, with nothing left to decide.

`em.py` says what happens; this module owns what it happens to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ra3.annotated import AnnotatedStore
from megatron_ra3.assembly import assemble
from megatron_ra3.config import RunConfig
from megatron_ra3.corpus.manifest import TokenForm
from megatron_ra3.corpus.stream import ShardStream
from megatron_ra3.corpus.tokenized import SnippetTokenizer, why_unused
from megatron_ra3.estep import EStep
from megatron_ra3.latents import Snippet, Trajectory
from megatron_ra3.lifecycle import DurableRun
from megatron_ra3.model.parallel import ParallelLayout
from megatron_ra3.model.reference import Reference
from megatron_ra3.mstep import NextToken
from megatron_ra3.observe.spans import TIMELINE
from megatron_ra3.report.consumed import Consumed
from megatron_ra3.report.metrics import global_means
from megatron_ra3.report.signatures import Detector
from megatron_ra3.rollout.ahead import Ahead, Sampled, Taken
from megatron_ra3.rollout.sampler import Sampler, SamplerConfig
from megatron_ra3.rollout.staleness import Staleness, staleness, steps_to_begin
from megatron_ra3.schedule import phases


class Run(DurableRun[RunConfig]):
    """A mid-training run."""

    kind = "midtrain"

    def __init__(self, config: RunConfig) -> None:
        assembly = assemble(config)
        layout = assembly.layout
        self.train, self.heldout = _open_corpus(config, layout)
        form = TokenForm(assembly.tokenizer.fingerprint, config.latents.surface, config.latents.comments)
        self.snippet_tokenizer = SnippetTokenizer(
            assembly.tokenizer,
            assembly.format,
            config.latents.comments,
            max_tokens=config.corpus.max_snippet_tokens,
            max_rationale_tokens=config.latents.max_rationale_tokens,
            granularity=config.objective.granularity,
            use_stored=_can_use_stored_tokens(self.train, form, says_why=layout.rank == 0),
        )
        self._heldout_start = self.heldout.state_dict()
        tokens = config.parallel.micro_batch_tokens
        self.estep = EStep(
            config.objective,
            config.estep.learning_rate,
            assembly.trainer,
            layout,
            assembly.format,
            tokens,
            Reference(assembly.trainer, assembly.initial_folder) if config.objective.needs_reference else None,
        )
        self.next_token = NextToken(assembly.trainer, layout, assembly.format, tokens)
        super().__init__(config, assembly, phases(config), data=self.train.manifest_sha256, detector=Detector(config))
        self.annotated = AnnotatedStore(self.folder / "annotated", layout.dp_rank)
        self._ahead: Ahead | None = None
        self._sampled: tuple[Sampled, Staleness] | None = None
        self._dropped = 0
        self._samplers: dict[int, Sampler] = {}
        self._think_rates: dict[int, float] = {}

    # Data

    def next_snippets(self, count: int) -> list[Snippet]:
        """Return this replica's share of the next `count` training snippets."""
        return self._use(self._take(self.train, count))

    def heldout_snippets(self) -> list[Snippet]:
        """Return this replica's share of the held-out snippets, the same at every evaluation."""
        self.heldout.load_state_dict(self._heldout_start)
        return self._use(self._take(self.heldout, min(self.config.evaluate.snippets, len(self.heldout))))

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
        if self.samples_latents:
            super().sync_engine()

    def begin_sampling(self, steps_left: int) -> None:
        """Begin this E-step's rollouts, and those of coming ones that the live weights are fresh enough for.

        Args:
            steps_left: of the phase, this step included.
        """
        ahead, settings = self._open_ahead(), self.config.estep
        bound = settings.max_staleness_steps
        for _ in range(steps_to_begin(ahead.begun, steps_left=steps_left, max_staleness_steps=bound)):
            seed = self._seed(ahead.begun)
            ahead.begin(self._take(self.train, settings.snippets_per_step), seed=seed)

    def take_rollouts(self) -> list[list[Trajectory]]:
        """Return this E-step's rollouts per snippet, the same on every rank of the replica.

        EngineError when a latent was sampled with other weights than `estep.max_staleness_steps` allows.
        StopRequestedError as `sync_engine`.
        """
        taken, sampled = self._open_ahead().use()
        self._use(taken)
        bound = self.config.estep.max_staleness_steps
        self._sampled = sampled, staleness(sampled.groups, self.progress.weight_version, max_staleness_steps=bound)
        return sampled.groups

    def sample(self, snippets: Sequence[Snippet], rollouts_per_snippet: int) -> list[list[Trajectory]]:
        """Per snippet its rollouts, the same on every rank of the replica.

        EngineError when something was sampled with other weights than the current ones.
        StopRequestedError as `sync_engine`.
        """
        if not self.samples_latents:
            return [[self.format.render(item, observe=False)] * rollouts_per_snippet for item in snippets]
        assert self._ahead is None or not self._ahead.begun, "the engine is in use"
        groups = self._lead(lambda: self._sampler(rollouts_per_snippet).sample(snippets, seed=self._seed()))
        staleness(groups, self.progress.weight_version, max_staleness_steps=0)
        return groups

    def sampling_metrics(self) -> dict[str, float]:
        """What this E-step's rollouts cost, per rollout, and how stale they were; over all replicas."""
        assert self._sampled is not None, "take_rollouts comes first"
        (sampled, age), leads = self._sampled, self.layout.is_replica_leader
        stats = sampled.stats
        sums = {
            "requests_per_rollout": (stats.requests, stats.rollouts),
            "forced_act_rate": (stats.forced_acts, stats.lines),
            "staleness": (age.total_steps, age.decisions),
        }
        metrics = global_means(self.layout, {name: (a, b) if leads else (0, 0) for name, (a, b) in sums.items()})
        each = self.layout.gather_from_leaders((age.most_steps, sampled.waited_s))
        return metrics | {
            "max_staleness": max(most for most, _ in each),
            "rollout_wait_seconds": max(waited_s for _, waited_s in each),
        }

    # State

    def _state(self) -> dict[str, Any]:
        rates = self._think_rates | {rollouts: sampler.think_rate for rollouts, sampler in self._samplers.items()}
        replica = {
            "annotated": self.annotated.state_dict(),
            "think_rates": {str(rollouts): rate for rollouts, rate in rates.items()},
        }
        return {"stream": self._data_position(), "replicas": self.layout.gather_from_leaders(replica)}

    def _restore_state(self, manifest: Mapping[str, Any]) -> None:
        self.train.load_state_dict(manifest["stream"])
        self._restore_replica(manifest["replicas"])

    def _data_position(self) -> dict[str, Any]:
        before = None if self._ahead is None else self._ahead.stream_before
        return before or self.train.state_dict()

    def _rewind_data(self, position: Mapping[str, Any]) -> None:
        self._close_ahead()
        self.train.load_state_dict(dict(position))

    def _step_figures(self) -> dict[str, float]:
        dropped, self._dropped = self._dropped, 0
        stream = self._data_position()
        return {
            "dropped_snippets": self.layout.sum_number_over_dp(dropped),
            "bad_samples": stream["bad_samples"] + self.heldout.bad_samples,
            "stream_wait_seconds": self.train.take_waited_s() + self.heldout.take_waited_s(),
            "stream_epoch": stream["epoch"],
            "stream_position": stream["position"],
        }

    def _summary(self) -> dict[str, Any]:
        return {"mstep_tokens": self.progress.mstep_tokens}

    def _close(self) -> None:
        self._close_ahead()
        self.train.close()
        self.heldout.close()

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

    def _take(self, stream: ShardStream, count: int) -> Taken:
        """The replica's share of the next `count` samples; its leader reads, and all ranks agree on what is bad."""
        layout, before = self.layout, stream.state_dict()
        with TIMELINE.span("corpus"):
            records = stream.take(
                count, layout.dp_rank, layout.dp_size, reads=layout.is_replica_leader, gather=layout.gather_from_ranks
            )
        consumed = Consumed.of(record.id for record in records)  # on the leader; the others have read nothing
        snippets = self.snippet_tokenizer.snippets(layout.broadcast_in_replica(records))
        return Taken(snippets, consumed, self.snippet_tokenizer.take_dropped(), before)

    def _use(self, taken: Taken) -> list[Snippet]:
        """Count what was taken among the samples of this step."""
        self._consumed = self._consumed.plus(taken.consumed)
        self._dropped += taken.dropped
        return taken.snippets

    def _seed(self, steps_ahead: int = 0) -> int:
        """Of what is sampled for this step, or for one to come."""
        return self.config.seed * 1_000_003 + self.progress.total_steps + steps_ahead

    def _open_ahead(self) -> Ahead:
        if self._ahead is None:
            settings = self.config.estep
            self._ahead = Ahead(
                self._lead,
                lambda: self._sampler(settings.rollouts_per_snippet),
                overlaps=settings.max_staleness_steps > 0 and not settings.lockstep,
                timeout_s=self.config.parallel.timeout_s,
                replica=self.layout.dp_rank,
            )
        return self._ahead

    def _close_ahead(self) -> None:
        """Forget what was begun for coming steps."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

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


def _open_corpus(config: RunConfig, layout: ParallelLayout) -> tuple[ShardStream, ShardStream]:
    """Training and held-out split; what only one rank finds wrong is raised on all."""
    settings = config.corpus
    verify = settings.verify_checksums and layout.rank == 0
    problem = None
    try:
        train, heldout = (
            ShardStream(settings.folder, split, config.seed, verify=verify, config=settings)
            for split in ("train", "heldout")
        )
    except (ValueError, OSError) as error:
        problem = error
    layout.raise_on_all(problem)
    return train, heldout


def _can_use_stored_tokens(stream: ShardStream, form: TokenForm, *, says_why: bool) -> bool:
    """Whether the corpus holds the token ids this run would make."""
    if stream.token_form is None:
        return False
    reason = why_unused(stream.token_form, form)
    if reason and says_why:
        print(reason, flush=True)
    return not reason
