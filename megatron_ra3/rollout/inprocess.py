"""Samples with the trainer's own weights: no server, no copy of the weights, no weight sync.

For tests, and for machines without vLLM. Every rank of a replica must make the same calls, because each forward pass
is a collective; a rank that draws other tokens would hang the rest, so draws depend on the queries alone. There is no
key-value cache: each token costs a forward pass over its whole prefix, which is fine for small models only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ra3.batching import pack
from megatron_ra3.latents import LatentFormat
from megatron_ra3.model.trainer import MicroBatch, Trainer
from megatron_ra3.rollout.engine import (
    GateQuery,
    GateScores,
    GenerateQuery,
    Generation,
    Query,
    Reply,
    StopRule,
    converse_in_batches,
)

PADDING_ID = 0


class InProcessEngine:
    """`rollout.engine.Engine` on a trainer's Megatron model.

    `max_batch_tokens` bounds the padded tokens of one forward pass; a longer prefix runs alone. `temperature` divides
    the logits of rationales, and their log-probs are those of that law; gates are scored at temperature 1.
    """

    scores_while_generating = False

    def __init__(
        self, trainer: Trainer, latent_format: LatentFormat, *, max_batch_tokens: int, temperature: float = 1.0
    ) -> None:
        if temperature <= 0.0:
            raise ValueError(f"temperature={temperature}: must be positive; 1 samples from the model's own law")
        self.weight_version = 0
        self._trainer = trainer
        self._gate_ids = latent_format.gate_ids
        self._max_batch_tokens = max_batch_tokens
        self._temperature = temperature

    def set_version(self, version: int) -> None:
        """Tag what is sampled from now on with `version`; the weights themselves are the trainer's."""
        self.weight_version = version

    def gate_logprobs(self, queries: Sequence[GateQuery]) -> list[GateScores]:
        """Score gate rows of many prefixes; answers in the order of the queries."""
        batches = pack([len(query.token_ids) for query in queries], self._max_batch_tokens)
        micro_batches = [self._gate_micro_batch([queries[i] for i in batch]) for batch in batches]
        scores: dict[int, GateScores] = {}
        for batch, logprobs in zip(batches, self._trainer.score(micro_batches), strict=True):
            per_row = iter(logprobs.view(-1, len(self._gate_ids)).tolist())
            for i in batch:
                rows = tuple(tuple(next(per_row)) for _ in queries[i].rows)
                scores[i] = GateScores(rows, self.weight_version)
        return [scores[i] for i in range(len(queries))]

    def generate(self, queries: Sequence[GenerateQuery], stop: StopRule) -> list[Generation]:
        """Sample continuations; answers in the order of the queries."""
        assert not any(query.rows for query in queries)
        uniforms = [_uniforms(query.seed, stop.max_tokens) for query in queries]
        drawn: list[list[int]] = [[] for _ in queries]
        logprobs: list[list[float]] = [[] for _ in queries]
        growing = list(range(len(queries)))
        for step in range(stop.max_tokens):
            askers: dict[tuple[int, ...], list[int]] = {}  # rollouts that have written the same need one forward pass
            for i in growing:
                askers.setdefault((*queries[i].token_ids, *drawn[i]), []).append(i)
            sequences = [*askers]
            for batch in pack([len(tokens) for tokens in sequences], self._max_batch_tokens):
                rows = [(row, i) for row, k in enumerate(batch) for i in askers[sequences[k]]]
                logits = self._next_token_logits([sequences[k] for k in batch])[[row for row, _ in rows]]
                uniform = torch.stack([uniforms[i][step] for _, i in rows])
                for (_, i), token, logprob in zip(rows, *_draw(logits / self._temperature, uniform), strict=True):
                    drawn[i].append(token)
                    logprobs[i].append(logprob)
            growing = [i for i in growing if drawn[i][-1] not in stop.stop_ids]
        return [
            Generation(tuple(tokens), tuple(values), self.weight_version)
            for tokens, values in zip(drawn, logprobs, strict=True)
        ]

    def converse(self, queries: Sequence[Query], reply: Reply, stop: StopRule) -> None:
        """Ask `queries`, and whatever `reply` returns for each answer, until nothing is left to ask."""
        converse_in_batches(self, queries, reply, stop)

    def health(self) -> None:
        """There is nothing that could be down."""

    def close(self) -> None:
        """There is nothing to release."""

    def _gate_micro_batch(self, queries: Sequence[GateQuery]) -> MicroBatch:
        """All gate ids as targets at every gate row: [rows · gate ids] pairs, query by query."""
        token_ids = _pad([query.token_ids for query in queries])
        width = token_ids.shape[1]
        rows = torch.tensor([k * width + row for k, query in enumerate(queries) for row in query.rows])
        targets = torch.tensor(self._gate_ids).repeat(len(rows))
        return MicroBatch(token_ids, rows.repeat_interleave(len(self._gate_ids)), targets)

    def _next_token_logits(self, sequences: Sequence[tuple[int, ...]]) -> Tensor:
        token_ids = _pad(sequences)
        ends = torch.tensor([k * token_ids.shape[1] + len(tokens) - 1 for k, tokens in enumerate(sequences)])
        return self._trainer.logits(token_ids, ends).double()


def _pad(sequences: Sequence[tuple[int, ...]]) -> Tensor:
    """[b, s] int64, padded on the right, where a causal model does not see it."""
    width = max(map(len, sequences))
    return torch.tensor([[*tokens, *[PADDING_ID] * (width - len(tokens))] for tokens in sequences])


def _uniforms(seed: int, count: int) -> Tensor:
    """[count] fp64 numbers in [0, 1) of one query's own generator, so that other queries cannot shift its draws."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _draw(logits: Tensor, uniform: Tensor) -> tuple[list[int], list[float]]:
    """Inverse-CDF draw per row of `logits` [K, vocab] fp64 with `uniform` [K]: token ids and their log-probs (nats)."""
    logprobs = torch.log_softmax(logits, dim=-1).cpu()
    cumulative = logprobs.exp().cumsum(dim=-1)
    inner = cumulative[:, :-1].contiguous()  # so that a draw rounded up to the total is the last token, not one more
    tokens = torch.searchsorted(inner, (uniform * cumulative[:, -1]).unsqueeze(-1), right=True)
    return tokens.squeeze(-1).tolist(), logprobs.gather(-1, tokens).squeeze(-1).tolist()
