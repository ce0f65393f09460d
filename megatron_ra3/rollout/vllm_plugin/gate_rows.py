"""Log-probs of a few tokens at a few prompt rows, for vLLM's V1 model runner.

vLLM's own `prompt_logprobs` runs the output layer and a full-vocabulary log-softmax over every prompt row: ten times
the cost of the forward pass at a vocabulary of 150k. A gate needs one or two tokens at a handful of rows. A request
asks with `extra_args={"gate_rows": [...], "gate_ids": [...]}` and `prompt_logprobs=len(gate_ids) - 1`; the answer's
`prompt_logprobs` then hold one entry per gate row instead of one per prompt token. All other requests are served by
vLLM's own method.

A row whose hidden state was not computed, because the prefix cache already covered it, comes back as `NOT_COMPUTED`.
vLLM leaves such rows uninitialised, which reads as a plausible log-prob; NaN would be refused by the JSON encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NOT_COMPUTED = -1e30
# Bounds the logits held at once: 256 rows of a 150k vocabulary are 0.15 GB in fp32.
ROWS_PER_CHUNK = 256


def install() -> None:
    """Make V1's `GPUModelRunner` (which the CPU runner inherits from) answer gate requests; idempotent."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner._get_prompt_logprobs_dict  # noqa: SLF001
    if original.__module__ == __name__:
        return

    def _get_prompt_logprobs_dict(
        self: Any, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, Any]:
        pending: dict[str, int] = self.num_prompt_logprobs
        gates = {name: count for name, count in pending.items() if _wants_gates(self.requests[name])}
        if not gates:
            return original(self, hidden_states, num_scheduled_tokens)
        self.num_prompt_logprobs = {name: count for name, count in pending.items() if name not in gates}
        answers = original(self, hidden_states, num_scheduled_tokens)
        finished = _score(self, gates, hidden_states, num_scheduled_tokens)
        gates = {name: count for name, count in gates.items() if name not in finished}
        self.num_prompt_logprobs = {**self.num_prompt_logprobs, **gates}
        return {**answers, **finished}

    GPUModelRunner._get_prompt_logprobs_dict = _get_prompt_logprobs_dict  # noqa: SLF001


def _wants_gates(request: Any) -> bool:
    extra_args = request.sampling_params.extra_args
    return bool(extra_args) and "gate_rows" in extra_args


def _score(
    runner: Any, gates: dict[str, int], hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
) -> dict[str, Any]:
    """Fill the rows this step computed; return the answers of the requests whose prompt is now complete."""
    finished: dict[str, Any] = {}
    wanted: list[tuple[int, torch.Tensor, list[int]]] = []
    for name in gates:
        scheduled = num_scheduled_tokens.get(name)
        if scheduled is None:  # preempted
            continue
        request = runner.requests[name]
        answer = request.in_progress_prompt_logprobs_cpu
        if answer is None:
            answer = request.in_progress_prompt_logprobs_cpu = _empty_answer(request.sampling_params.extra_args)
        first = request.num_computed_tokens
        offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[name]])
        ids = request.sampling_params.extra_args["gate_ids"]
        for place, row in enumerate(request.sampling_params.extra_args["gate_rows"]):
            if first <= row < first + scheduled:
                wanted.append((offset + row - first, answer.logprobs[place], ids))
        if first + scheduled >= len(request.prompt_token_ids):
            finished[name] = answer
            request.in_progress_prompt_logprobs_cpu = None
    for chunk in _chunks(wanted):
        logits = runner.model.compute_logits(hidden_states[[index for index, _, _ in chunk]])
        logprobs = runner.sampler.compute_logprobs(logits).cpu()
        for values, (_, target, ids) in zip(logprobs, chunk, strict=True):
            target.copy_(values[ids])
    return finished


def _empty_answer(extra_args: dict[str, list[int]]) -> Any:
    import torch
    from vllm.v1.outputs import LogprobsTensors

    rows, ids = extra_args["gate_rows"], extra_args["gate_ids"]
    return LogprobsTensors(
        logprob_token_ids=torch.tensor([ids] * len(rows), dtype=torch.int32),
        logprobs=torch.full((len(rows), len(ids)), NOT_COMPUTED),
        selected_token_ranks=torch.zeros(len(rows), dtype=torch.int32),
    )


def _chunks(wanted: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(wanted), ROWS_PER_CHUNK):
        yield wanted[start : start + ROWS_PER_CHUNK]
