"""How much a round of a configuration reads, samples and trains on, in samples and tokens.

Steps are set in snippets; money is paid for tokens. The corpus manifest tells how long snippets are where there is one;
what nobody can know before the run (how often the model will think, and how long) is an assumption with a name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ra3.config import RunConfig
from megatron_ra3.corpus.manifest import Manifest

CHARS_PER_TOKEN = 3.5
"""Of source code, where a corpus was prepared without a tokenizer."""
LINES_PER_STATEMENT = 3.0
"""Of an innermost compound statement, for `objective.granularity=statement`."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What only the run itself will show. Zero: taken from the corpus or the configuration."""

    think_rate: float = 0.2
    """Rationales per line."""
    rationale_tokens: float = 0.0
    """Mean tokens of a rationale; 0: half of `latents.max_rationale_tokens`."""
    line_tokens: float = 12.0
    """Mean tokens of a line, its gate included, where no corpus manifest says better."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.think_rate <= 1.0:
            raise ValueError(f"--think-rate {self.think_rate}: must lie between 0 and 1")
        if self.rationale_tokens < 0.0 or self.line_tokens <= 0.0:
            raise ValueError("--rationale-tokens must not be negative, and --line-tokens must be positive")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Sizes of the samples, and amounts per step and round."""

    snippet_tokens: float
    """Mean tokens of a snippet, gates included."""
    actions: float
    """Mean gates of a snippet: lines, statements or tokens, as `objective.granularity` says."""
    think_rate: float
    rationale_tokens: float
    max_sequence_tokens: int
    micro_batch_tokens: int
    estep_steps: int
    estep_snippets: int
    rollouts: int
    mstep_steps: int
    mstep_snippets: int
    evaluate_snippets: int
    rounds: int
    reference: bool
    """The E-step scores rationales under the reference weights too."""
    counterfactual: bool
    """The E-step scores every line that followed a rationale once more without it."""
    teaches_lines: bool
    """The policy gradient scores lines too, not latents alone."""
    source: str
    """Where the snippets' sizes come from."""

    @property
    def samples_latents(self) -> bool:
        """Whether engines are needed at all."""
        return self.rounds > 0 and self.think_rate > 0.0

    @property
    def thinks(self) -> float:
        """Mean rationales of a trajectory."""
        return self.actions * self.think_rate

    @property
    def action_tokens(self) -> float:
        """Mean tokens of an action, its gate included."""
        return self.snippet_tokens / self.actions

    @property
    def latent_tokens(self) -> float:
        """Mean sampled tokens of a trajectory, gates left out."""
        return self.thinks * self.rationale_tokens

    @property
    def trajectory_tokens(self) -> float:
        """Mean tokens of an annotated snippet."""
        return self.snippet_tokens + self.latent_tokens

    @property
    def estep_tokens(self) -> float:
        """Tokens of all trajectories of an E-step step."""
        return self.estep_snippets * self.rollouts * self.trajectory_tokens

    @property
    def mstep_tokens(self) -> float:
        """Tokens of an M-step step, over all replicas."""
        return self.mstep_snippets * self.trajectory_tokens

    def micro_batches(self, sequences: float) -> tuple[int, float]:
        """Number of micro-batches that `sequences` trajectories of one replica make, and mean tokens of one.

        As `batching.pack` fills them: so many equally long sequences as fit, at least one.
        """
        per_batch = max(1, int(self.micro_batch_tokens / self.trajectory_tokens))
        count = max(1, math.ceil(sequences / per_batch - 1e-9))
        return count, max(sequences, 1.0) * self.trajectory_tokens / count

    @property
    def widest_batch(self) -> float:
        """Padded tokens of the largest micro-batch: a trajectory that is longer than all of it runs alone."""
        return float(max(self.micro_batch_tokens, self.max_sequence_tokens))


def workload(config: RunConfig, assumptions: Assumptions, manifest: Manifest | None) -> Workload:
    """What `config` does in a round."""
    longest = float(config.corpus.max_snippet_tokens)
    tokens, lines, source = longest, longest / assumptions.line_tokens, "assumed: every snippet as long as allowed"
    if manifest is not None and manifest.splits["train"].snippets:
        tokens, lines = _of_manifest(manifest, longest)
        source = f"manifest of {config.corpus.folder}"
    aim = config.objective
    actions = {"line": lines, "statement": lines / LINES_PER_STATEMENT, "token": tokens, "snippet": 1.0}
    rates = {"sampled": assumptions.think_rate, "always": 1.0, "never": 0.0}
    return Workload(
        snippet_tokens=tokens,
        actions=max(1.0, actions[aim.granularity]),
        think_rate=rates[aim.gate],
        rationale_tokens=assumptions.rationale_tokens or config.latents.max_rationale_tokens / 2,
        max_sequence_tokens=config.max_sequence_tokens,
        micro_batch_tokens=config.parallel.micro_batch_tokens,
        estep_steps=config.estep.steps if aim.gate != "never" else 0,
        estep_snippets=config.estep.snippets_per_step,
        rollouts=config.estep.rollouts_per_snippet,
        mstep_steps=config.mstep.steps,
        mstep_snippets=config.mstep.snippets_per_step,
        evaluate_snippets=config.evaluate.snippets,
        rounds=config.em.rounds,
        reference=aim.needs_reference,
        counterfactual=aim.baseline != "group",
        teaches_lines=aim.line_gradient > 0.0,
        source=source,
    )


def _of_manifest(manifest: Manifest, longest: float) -> tuple[float, float]:
    """Mean tokens and lines of a training snippet, cut to `longest` tokens; every line brings a gate along."""
    train = manifest.splits["train"]
    bare = train.tokens if train.tokens is not None else train.chars / CHARS_PER_TOKEN
    tokens, lines = (bare + train.lines) / train.snippets, train.lines / train.snippets
    kept = min(1.0, longest / tokens)
    return tokens * kept, lines * kept


def uneven(sizes: Sequence[tuple[str, int]], dp_size: int) -> list[str]:
    """Warnings about steps whose snippets do not come out even over the replicas: some then wait for others."""
    return [
        f"{key}={count} over {dp_size} replicas leaves some with one snippet more than others: "
        f"{-(-count // dp_size) * dp_size} would be as fast"
        for key, count in sizes
        if count % dp_size
    ]
