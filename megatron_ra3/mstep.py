"""M-step, warm-up and NTP: next-token training on annotated snippets, and its held-out measure (algorithm.md 5)."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ra3 import objective
from megatron_ra3.batching import TokenBatch, pack
from megatron_ra3.latents import LatentFormat, Trajectory
from megatron_ra3.model.parallel import ParallelLayout
from megatron_ra3.model.trainer import Trainer
from megatron_ra3.observe.spans import TIMELINE
from megatron_ra3.report.metrics import global_means


class NextToken:
    """Next-token training; NTP is the case in which every latent is `<act>`."""

    def __init__(
        self, trainer: Trainer, layout: ParallelLayout, latent_format: LatentFormat, micro_batch_tokens: int
    ) -> None:
        self.trainer = trainer
        self.layout = layout
        self.format = latent_format
        self.micro_batch_tokens = micro_batch_tokens

    def update(self, trajectories: Sequence[Trajectory], *, latent_weight: float, lr: float) -> dict[str, float]:
        """One optimizer step on this replica's annotated snippets; metrics over all replicas, log-probs in nats."""
        batches = self._batches(trajectories, latent_weight)
        global_weight = self.layout.sum_number_over_dp(sum(float(batch.weights.sum()) for batch in batches))
        weights = [objective.next_token_weights(batch.weights, global_weight=global_weight) for batch in batches]
        tokens = self.layout.sum_number_over_dp(sum(len(batch.weights) for batch in batches))
        _require(tokens)
        result = self.trainer.fit([batch.micro_batch for batch in batches], weights, lr=lr)
        return result | {"tokens": tokens, "lr": lr} | latent_means(self.layout, trajectories)

    def evaluate(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Held-out nats, without training.

        `nats_per_code_token` charges gates and rationales too, over original code tokens; `nats_code_only` leaves
        their cost out; `nats_per_token` is the plain mean that comment tokens dilute.
        """
        batches = self._batches(trajectories, latent_weight=1.0)
        with TIMELINE.span("scoring"):
            scored = [values.cpu().double() for values in self.trainer.score([batch.micro_batch for batch in batches])]
        nats = -float(sum(values.sum() for values in scored))
        code = -float(sum(values[batch.is_code].sum() for batch, values in zip(batches, scored, strict=True)))
        original = float(sum(batch.is_code.sum() for batch in batches))
        _require(self.layout.sum_number_over_dp(original))
        sums = {
            "nats_per_code_token": (nats, original),
            "nats_code_only": (code, original),
            "nats_per_token": (nats, float(sum(map(len, scored)))),
        }
        return global_means(self.layout, sums) | latent_means(self.layout, trajectories)

    def _batches(self, trajectories: Sequence[Trajectory], latent_weight: float) -> list[TokenBatch]:
        packing = pack([len(item.token_ids) for item in trajectories], self.micro_batch_tokens)
        return [
            TokenBatch([trajectories[i] for i in indices], self.format, latent_weight=latent_weight)
            for indices in packing
        ]


def _require(tokens: float) -> None:
    if not tokens:
        raise ValueError("no token to learn from: no line of these snippets fits; raise corpus.max_snippet_tokens")


def latent_means(layout: ParallelLayout, trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Think rate per line and mean rationale tokens per rationale, over all replicas."""
    thinks = float(sum(sum(item.thought) for item in trajectories))
    sums = {
        "think_rate": (thinks, float(sum(item.num_lines for item in trajectories))),
        "rationale_tokens": (float(sum(sum(item.rationale_lengths()) for item in trajectories)), thinks),
    }
    return global_means(layout, sums)
