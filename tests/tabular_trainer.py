"""The tabular model behind the trainer's interface, so that the whole E-step can be held against enumeration."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from megatron_ra3.latents import LatentFormat, Snippet, Trajectory
from tests.estimator import flat, gradient
from tests.tabular import Model, Paths, Policy

LAYOUT = SimpleNamespace(device=torch.device("cpu"), sum_over_dp=lambda x: x, sum_number_over_dp=float)
EOS, NEWLINE, HASH, LATENT, LINE = 0, 1, 2, 3, 6
FORMAT = LatentFormat(
    surface="newline",
    start=(EOS,),
    gate_prefix=(NEWLINE,),
    act_suffix=(),
    think_suffix=(HASH,),
    gate_ids=(HASH,),
    close=(NEWLINE,),
    close_ids=frozenset({NEWLINE}),
    stop_ids=frozenset({EOS, NEWLINE}),
    blank_ids=frozenset({NEWLINE}),
)


class TabularTrainer:
    """Scores token pairs with a tabular model; `step` keeps the gradient instead of taking a step.

    A latent is one token and its close; line t repeats its own token t+1 times. The law depends on the prefix alone.
    """

    def __init__(self, model: Model, policy: Policy) -> None:
        self.model, self.policy = model, policy
        self.found = torch.zeros_like(flat((policy.gate, policy.content)))

    def score(self, micro_batches):
        return [self._logprobs(batch).detach() for batch in micro_batches]

    def step(self, micro_batches, loss_fn, lr):
        loss = sum(loss_fn(i, self._logprobs(batch)) for i, batch in enumerate(micro_batches))
        self.found = gradient(loss, self.policy)
        return {"loss": loss.item(), "grad_norm": float(self.found.norm())}

    def _logprobs(self, batch) -> Tensor:
        width = batch.token_ids.shape[1]
        rows = [divmod(row, width) for row in batch.rows.tolist()]
        prefixes = [batch.token_ids[item, : position + 1].tolist() for item, position in rows]
        return torch.stack([self._next(*pair) for pair in zip(prefixes, batch.targets.tolist(), strict=True)])

    def _next(self, prefix: list[int], target: int) -> Tensor:
        """log p(target | prefix); after a close a "#" has probability 0.3, which a line's score must take out."""
        if target in (prefix[-1], NEWLINE):
            return torch.zeros((), dtype=torch.float64)
        t = len({token for token in prefix if token >= LINE})
        current = ([self.model.latents] + [token - LATENT for token in prefix if LATENT <= token < LINE])[-1]
        if prefix[-1] == HASH:
            return torch.log_softmax(self.policy.content[t, current], 0)[target - LATENT]
        after_close = LATENT <= prefix[-2] < LINE
        logit = torch.tensor(math.log(3 / 7), dtype=torch.float64) if after_close else self.policy.gate[t, current]
        if target == HASH:
            return torch.nn.functional.logsigmoid(logit)
        return torch.nn.functional.logsigmoid(-logit) + (t + 1) * self.model.emission[t, current]


def trajectory(model: Model, paths: Paths, behaviour: tuple[Tensor, Tensor], *, weight_version: int = 0) -> Trajectory:
    """One path [T] as tokens, with the behaviour's log-probs of gates and latents, and its version."""
    lines = tuple((LINE + t,) * (t + 1) for t in range(model.lines))
    item = FORMAT.begin(Snippet("s", (EOS,), lines, (None,) * model.lines))
    gates, contents = (values.tolist() for values in behaviour)
    for t, line in enumerate(lines):
        if paths.thought[t]:
            FORMAT.append_think(item, logprob=gates[t], weight_version=weight_version)
            tokens = (LATENT + int(paths.after[t]), NEWLINE)
            FORMAT.append_rationale(item, tokens, line, logprobs=(contents[t], 0.0), weight_version=weight_version)
        else:
            FORMAT.append_act(item, line, logprob=gates[t], weight_version=weight_version)
    return item
