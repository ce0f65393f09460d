"""The seam between the losses and Megatron: score tokens, look at a few logits, take one optimizer step.

Everything above works with log-probabilities of chosen tokens; everything below (stages, shards, replicas, schedules,
gradient reduction) stays here. Losses are sums that the caller has divided by global counts, so the number and size of
micro-batches and replicas change nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ra3.kernels import HeadCache, Precision, linear_cross_entropy, linear_logprob
from megatron_ra3.model.build import RA3Model
from megatron_ra3.model.parallel import ParallelLayout
from megatron_ra3.observe.spans import TIMELINE
from megatron_ra3.stall import ACTIVITY

LossFn = Callable[[int, Tensor], Tensor]
_Head = Callable[[int, "MicroBatch", Tensor], tuple[Tensor, Tensor, Tensor]]
"""From a micro-batch, its number and its hidden states: loss, a count Megatron wants, and what is returned."""


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Sequences, and the tokens in them whose log-probability matters.

    token_ids: [b, s] int64, right-padded with any valid id. rows: [K] int64, flat index b_index·s + position of the
    hidden state that predicts the token. targets: [K] int64, the tokens. K may be 0. rewarded: that many of the K, the
    last ones, serve rewards alone, so that `Trainer.score` may take them in `reward_precision`.
    """

    token_ids: Tensor
    rows: Tensor
    targets: Tensor
    rewarded: int = 0

    def to(self, device: torch.device) -> "MicroBatch":
        """Return a copy on `device`."""
        moved = (self.token_ids.to(device), self.rows.to(device), self.targets.to(device))
        return MicroBatch(*moved, self.rewarded)

    def widened(self, multiple: int) -> "MicroBatch":
        """Return the same with s padded to a multiple of `multiple`, as sequence parallelism needs."""
        width = self.token_ids.shape[1]
        extra = -width % multiple
        rows = self.rows + self.rows // width * extra
        return MicroBatch(torch.nn.functional.pad(self.token_ids, (0, extra)), rows, self.targets, self.rewarded)


def build_optimizer(
    model: RA3Model,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_grad: float = 1.0,
    distributed: bool = False,
) -> Any:
    """Return Megatron's optimizer (AdamW, fp32 state) for `model`, whose weights must already be imported.

    Norms and biases are not decayed. `clip_grad` bounds the global gradient norm; 0 switches clipping off.
    `distributed` shards the state over replicas and must equal `build_model`'s `distributed_optimizer`.
    """
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    if distributed != model.ddp.ddp_config.use_distributed_optimizer:
        raise ValueError(f"distributed={distributed} differs from build_model's distributed_optimizer: use one value")
    config = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=lr,
        weight_decay=weight_decay,
        adam_beta1=betas[0],
        adam_beta2=betas[1],
        adam_eps=eps,
        clip_grad=clip_grad,
        bf16=model.config.bf16,
        params_dtype=model.config.params_dtype,
        use_distributed_optimizer=distributed,
    )
    optimizer = get_megatron_optimizer(config, [model.ddp], use_gloo_process_groups=False)
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)  # a checkpoint before the first step has the same keys as later
    for group in optimizer.param_groups:  # Megatron leaves this to its learning-rate scheduler
        group["weight_decay"] = weight_decay * group["wd_mult"]
    return optimizer


class Trainer:
    """Scores and trains one model. All methods are collective over the replica, `step` and `fit` over all ranks.

    Every rank of a replica must pass the same micro-batches. `reward_precision` and `loss_precision` are those of the
    output layer's operands (see `kernels.linear_logprob`): the first for `MicroBatch.rewarded` pairs in `score`.
    """

    def __init__(
        self,
        model: RA3Model,
        optimizer: Any,
        layout: ParallelLayout,
        *,
        reward_precision: Precision = "fp32",
        loss_precision: Precision = "fp32",
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.layout = layout
        self.reward_precision = reward_precision
        self.loss_precision = loss_precision

    @torch.no_grad()
    def score(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Return log p(target) in nats per micro-batch, [K] fp32 each, on every rank of the replica. No gradient."""
        exact, rewards = self._logprob(self.loss_precision), self._logprob(self.reward_precision)

        def head(batch: MicroBatch, hidden: Tensor) -> Tensor:
            split = [len(batch.rows) - batch.rewarded, batch.rewarded]
            pairs = zip(batch.rows.split(split), batch.targets.split(split), strict=True)
            return torch.cat([part(hidden, *pair) for part, pair in zip((exact, rewards), pairs, strict=True)])

        outputs = self._forward(micro_batches, head)
        return self._from_last_stage(outputs, [tuple(batch.rows.shape) for batch in micro_batches])

    @torch.no_grad()
    def score_with_entropy(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """As `score`, in the loss's precision: [2, K] each, log p(target) and the entropy of the law, nats."""
        logprob = self._logprob(self.loss_precision, with_entropy=True)
        outputs = self._forward(micro_batches, lambda batch, hidden: logprob(hidden, batch.rows, batch.targets))
        return self._from_last_stage(outputs, [(2, len(batch.rows)) for batch in micro_batches])

    @torch.no_grad()
    def logits(self, token_ids: Tensor, rows: Tensor) -> Tensor:
        """Return fp32 logits [K, vocab] at `rows` (see MicroBatch) of `token_ids` [b, s], on every rank of the replica.

        Holds K·vocab floats: meant for the next token of a few sequences.
        """
        batch = MicroBatch(token_ids, rows, torch.zeros_like(rows))
        outputs = self._forward([batch], self._full_logits)
        return self._from_last_stage(outputs, [(rows.numel(), self.model.vocab_size)])[0]

    def step(
        self, micro_batches: Sequence[MicroBatch], loss_fn: LossFn, lr: float, *, with_entropy: bool = False
    ) -> dict[str, float]:
        """Take one optimizer step; return `loss` and `grad_norm`, the same on all ranks.

        `loss_fn(i, logprobs [K])` returns the scalar loss of micro-batch i, already divided by GLOBAL counts; with
        `with_entropy` it gets [2, K], log-probs and the entropies of their laws, both with gradient. It is
        called on the last stage only, once per micro-batch with K > 0. Replicas may pass different numbers of
        micro-batches, even none. `loss` is summed over micro-batches and replicas, `grad_norm` is taken before
        clipping. FloatingPointError: the loss or the gradient is not finite; weights and optimizer are then unchanged.
        """
        return self._take_step(micro_batches, self._loss_head(loss_fn, with_entropy=with_entropy), lr)

    def fit(self, micro_batches: Sequence[MicroBatch], weights: Sequence[Tensor], lr: float) -> dict[str, float]:
        """`step` on the loss -sum(weights[i] [K] · log p(target)): a quarter fewer products in the output layer.

        `weights` are already divided by GLOBAL counts.
        """
        return self._take_step(micro_batches, self._cross_entropy_head(weights), lr)

    def _take_step(self, micro_batches: Sequence[MicroBatch], head: _Head, lr: float) -> dict[str, float]:
        micro_batches = self._padded(micro_batches)
        self.model.ddp.train()
        self.model.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        with TIMELINE.span("backward"):
            losses = self._schedule(micro_batches, head, forward_only=False)
            own = torch.zeros((), dtype=torch.float64, device=self.layout.device)
            if losses:
                own = torch.stack(losses).double().sum()
            loss = float(self.layout.sum_over_dp(self.layout.broadcast_from_last_stage(own)).item())
        with TIMELINE.span("optimizer"):
            return {"loss": loss, "grad_norm": self._update(loss, lr)}

    def _update(self, loss: float, lr: float) -> float:
        """Clip and apply the finished gradients unless they are broken; return their norm.

        Megatron's own `step` does the same without the check: it would write NaN into fp32 weights.
        """
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        overflow = self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if overflow or not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"loss {loss}, gradient norm {grad_norm}: no step was taken, weights are unchanged"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for part in self.optimizer.chained_optimizers:
            if part.config.clip_grad > 0.0:
                clip_grad_by_total_norm_fp32(part.get_parameters(), part.config.clip_grad, grad_norm)
        self.optimizer.step_with_ready_grads()
        return grad_norm

    def _loss_head(self, loss_fn: LossFn, *, with_entropy: bool) -> _Head:
        logprob = self._logprob(self.loss_precision, with_entropy=with_entropy)

        def head(index: int, batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logprobs = logprob(hidden, batch.rows, batch.targets)
            return _as_result(loss_fn(index, logprobs) if logprobs.numel() else logprobs.sum())

        return head

    def _cross_entropy_head(self, weights: Sequence[Tensor]) -> _Head:
        cache = HeadCache()

        def head(index: int, batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            nothing = torch.zeros(0, device=hidden.device)
            loss = linear_cross_entropy(
                _select(hidden, batch.rows),
                self.model.module.head_weight(),
                batch.targets,
                weights[index].to(hidden.device) if len(batch.rows) else nothing,
                tp_group=self.layout.tp_group,
                vocab_size=self.model.vocab_size,
                precision=self.loss_precision,
                cache=cache,
            )
            return _as_result(loss)

        return head

    def _forward(
        self, micro_batches: Sequence[MicroBatch], head: Callable[[MicroBatch, Tensor], Tensor]
    ) -> list[Tensor]:
        """Run the pipeline without gradients; the last stage gets head's result per micro-batch, others nothing."""
        if not micro_batches:
            return []
        self.model.ddp.eval()

        def outputs(_index: int, batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            zero = torch.zeros((), device=hidden.device)
            return zero, zero.int(), head(batch, hidden)

        return self._schedule(micro_batches, outputs, forward_only=True)

    def _schedule(
        self,
        micro_batches: Sequence[MicroBatch],
        head: _Head,
        *,
        forward_only: bool,
    ) -> list[Tensor]:
        """Let Megatron's pipeline schedule run; return the third of head's results per micro-batch (last stage)."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        def forward_step(data: Iterator[tuple[int, MicroBatch]], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
            index, batch = next(data)
            ACTIVITY.moved()
            positions = torch.arange(batch.token_ids.shape[1], device=self.layout.device).expand_as(batch.token_ids)
            hidden = model(batch.token_ids, positions, None)
            return hidden, lambda final: head(index, batch, final)

        if self.model.config.sequence_parallel:
            micro_batches = [batch.widened(self.layout.tp_size) for batch in micro_batches]
        on_device: Iterable[MicroBatch] = (batch.to(self.layout.device) for batch in micro_batches)
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(enumerate(on_device)),
            model=[self.model.ddp],
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].token_ids.shape[1],
            micro_batch_size=micro_batches[0].token_ids.shape[0],
            forward_only=forward_only,
        )

    def _logprob(
        self, precision: Precision, *, with_entropy: bool = False
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The output layer for one pass over the weights as they are now: (hidden, rows, targets) to log-probs [K].

        `with_entropy`: [2, K], entropies below them.
        """
        cache = HeadCache()

        def logprob(hidden: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
            found = linear_logprob(
                _select(hidden, rows),
                self.model.module.head_weight(),
                targets,
                tp_group=self.layout.tp_group,
                vocab_size=self.model.vocab_size,
                precision=precision,
                with_entropy=with_entropy,
                cache=cache,
            )
            return found if isinstance(found, Tensor) else torch.stack(found)

        return logprob

    def _full_logits(self, batch: MicroBatch, hidden: Tensor) -> Tensor:
        local = _select(hidden, batch.rows).float() @ self.model.module.head_weight().float().T
        parts = [torch.empty_like(local) for _ in range(self.layout.tp_size)]
        torch.distributed.all_gather(parts, local, group=self.layout.tp_group)
        return torch.cat(parts, dim=1)[:, : self.model.vocab_size].contiguous()

    def _from_last_stage(self, outputs: list[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        if not self.layout.is_last_stage:
            outputs = [torch.empty(shape, device=self.layout.device) for shape in shapes]
        return [self.layout.broadcast_from_last_stage(output) for output in outputs]

    def _padded(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Append micro-batches without targets until every replica has as many as the busiest one, at least one."""
        counts = torch.zeros(self.layout.dp_size, device=self.layout.device)
        counts[self.layout.dp_rank] = len(micro_batches)
        most = max(int(self.layout.sum_over_dp(counts).max()), 1)
        nothing = torch.zeros(0, dtype=torch.int64)
        empty = MicroBatch(torch.zeros(1, 1, dtype=torch.int64), nothing, nothing)
        return [*micro_batches, *[empty] * (most - len(micro_batches))]


def _as_result(loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), loss.detach().clone()


def _select(hidden: Tensor, rows: Tensor) -> Tensor:
    """Pick rows [K] of hidden [s, b, H] in batch-major order."""
    return hidden.transpose(0, 1).flatten(0, 1).index_select(0, rows)
