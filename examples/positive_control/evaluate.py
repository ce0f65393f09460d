"""Measures a run of the positive control on held-out programs: where it thinks, what it thinks, what that is good for.

`ra3 midtrain` reports averages over all lines. Here hard and easy lines are told apart, a rationale is compared with
the chain that the line needs, and the digit of a hard line is right or wrong. Latents are sampled from the model's own
law, without exploration; `*_act` figures have `<act>` everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from programs import hops, is_hard, questions

from megatron_ra3.batching import pack, pad
from megatron_ra3.config import RunConfig, load_config
from megatron_ra3.latents import Kind, LatentFormat, Trajectory
from megatron_ra3.manifest import read_manifest

if TYPE_CHECKING:
    from megatron_ra3.corpus.tokenizer import CodeTokenizer
    from megatron_ra3.model.trainer import Trainer


@dataclass(frozen=True, slots=True)
class HardLine:
    """One hard line of a trajectory."""

    chain: str
    """The chain of names it needs, with the digit."""
    position: int
    """Where in the trajectory its digit is."""
    rationales: tuple[str, ...]
    """What was thought before it or inside it."""
    rationale_tokens: int
    """Tokens of these rationales, closing ones included."""


def hard_lines(trajectory: Trajectory, latent_format: LatentFormat, tokenizer: CodeTokenizer) -> list[HardLine]:
    """The hard lines of a trajectory, at any granularity of its actions."""
    code, latent_of = _code_lines(trajectory, latent_format, tokenizer)
    needed = dict(questions([text for text, _, _ in code]))
    found = []
    for number, (_, positions, actions) in enumerate(code):
        if number not in needed:
            continue
        latents = [latent_of[action] for action in sorted(actions) if latent_of[action]]
        texts = tuple(tokenizer.decode([i for i in ids if i not in latent_format.close_ids]) for ids in latents)
        digits = [place for place in positions if tokenizer.decode([trajectory.token_ids[place]]).isdigit()]
        found.append(HardLine(needed[number].chain, digits[-1], texts, sum(map(len, latents))))
    return found


def easy_thinks(trajectory: Trajectory, latent_format: LatentFormat, tokenizer: CodeTokenizer) -> tuple[int, int]:
    """Of the actions that have no part in a hard line: how many think, and how many there are."""
    code, _ = _code_lines(trajectory, latent_format, tokenizer)
    hard = {action for text, _, actions in code if is_hard(text) for action in actions}
    thinks = [thought for action, thought in enumerate(trajectory.thought) if action not in hard]
    return sum(thinks), len(thinks)


def measure(
    trajectories: Sequence[Trajectory],
    predicted: Sequence[Sequence[int]],
    latent_format: LatentFormat,
    tokenizer: CodeTokenizer,
) -> dict[str, Any]:
    """All figures of a set of trajectories; those of rationales only where a hard line has one.

    Args:
        trajectories: whole programs with their latents.
        predicted: per trajectory and hard line the likeliest token in the digit's place.
        latent_format: surface form of the latents.
        tokenizer: what the ids mean.
    """
    lines = [hard_lines(item, latent_format, tokenizer) for item in trajectories]
    right = [
        ids[line.position] == token
        for ids, found, tokens in zip((item.token_ids for item in trajectories), lines, predicted, strict=True)
        for line, token in zip(found, tokens, strict=True)
    ]
    hard = [line for found in lines for line in found]
    thinking = [line for line in hard if line.rationales]
    easy = [easy_thinks(item, latent_format, tokenizer) for item in trajectories]
    by_hops = {
        str(count): _mean([ok for ok, line in zip(right, hard, strict=True) if hops(line.chain) == count])
        for count in sorted({hops(line.chain) for line in hard})
    }
    figures: dict[str, Any] = {
        "programs": len(trajectories),
        "hard_lines": len(hard),
        "accuracy_hard": _mean(right),
        "accuracy_hard_by_hops": by_hops,
        "think_rate_hard": _mean([bool(line.rationales) for line in hard]),
        "think_rate_easy": sum(count for count, _ in easy) / max(1, sum(total for _, total in easy)),
    }
    if thinking:
        figures |= {
            "rationale_tokens": _mean([line.rationale_tokens for line in thinking]),
            "needed_tokens": _mean([len(line.chain) + len(latent_format.close) for line in thinking]),
            "rationale_correct": _mean([line.rationales[-1] == line.chain for line in thinking]),
            "rationale_ends_right": _mean([line.rationales[-1].endswith(line.chain[-1]) for line in thinking]),
        }
    return figures


def evaluate_run(run_folder: Path, programs: int) -> dict[str, Any]:
    """The figures of a finished run on its first `programs` held-out programs; `examples` shows three of them."""
    from megatron_ra3.run import Run

    with Run(run_config(run_folder)) as run:
        count = min(programs, len(run.heldout))
        snippets = run.snippet_tokenizer.snippets(run.heldout.take(count))
        tokenizer, trainer = run.assembly.tokenizer, run.assembly.trainer
        run.sync_engine()
        sampled = [group[0] for group in run.sample(snippets, 1)]
        acting = [run.format.render(item, observe=False) for item in snippets]
        figures = {}
        for name, items in (("", sampled), ("_act", acting)):
            predicted = predict_digits(trainer, items, run.format, tokenizer)
            found = run.next_token.evaluate(items) | measure(items, predicted, run.format, tokenizer)
            figures |= {f"{key}{name}": value for key, value in found.items()}
        return figures | {"examples": [tokenizer.decode(item.token_ids) for item in sampled[:3]]}


def predict_digits(
    trainer: Trainer, trajectories: Sequence[Trajectory], latent_format: LatentFormat, tokenizer: CodeTokenizer
) -> list[list[int]]:
    """Per trajectory and hard line the likeliest of all tokens in the digit's place."""
    import torch

    places = [[line.position for line in hard_lines(item, latent_format, tokenizer)] for item in trajectories]
    predicted: list[list[int]] = [[] for _ in trajectories]
    for batch in pack([len(item.token_ids) for item in trajectories], 8192):
        tokens = pad([trajectories[i] for i in batch])
        rows = [row * tokens.shape[1] + place - 1 for row, i in enumerate(batch) for place in places[i]]
        best = iter(trainer.logits(tokens, torch.tensor(rows)).argmax(dim=1).tolist())
        for i in batch:
            predicted[i] = [next(best) for _ in places[i]]
    return predicted


def run_config(run_folder: Path) -> RunConfig:
    """The settings a run was made with, from its newest checkpoint.

    Raises:
        ValueError: the folder holds no checkpoint.
    """
    checkpoints = sorted((run_folder / "checkpoints").glob("[!.]*/manifest.json"))
    if not checkpoints:
        raise ValueError(f"{run_folder} holds no checkpoint: give the folder of a finished run")
    saved = read_manifest(checkpoints[-1].parent)["config"]
    saved["run_folder"] = str(run_folder)
    return load_config(None, [f"{key}={json.dumps(value)}" for key, value in saved.items()])


def _code_lines(
    trajectory: Trajectory, latent_format: LatentFormat, tokenizer: CodeTokenizer
) -> tuple[list[tuple[str, list[int], set[int]]], list[list[int]]]:
    """Physical lines of code as (text, positions of their tokens, actions they belong to), and each action's rationale.

    In the newline form the newline that ends a line is part of the next gate.
    """
    lines: list[tuple[str, list[int], set[int]]] = []
    latent_of: list[list[int]] = [[] for _ in range(trajectory.num_lines)]
    ended = True
    for place, (kind, action) in enumerate(zip(trajectory.kinds, trajectory.line_index, strict=True)):
        if kind == Kind.RATIONALE:
            latent_of[action].append(trajectory.token_ids[place])
        elif kind == Kind.LINE:
            text = tokenizer.decode([trajectory.token_ids[place]])
            if ended:
                lines.append(("", [], set()))
            before, positions, actions = lines[-1]
            lines[-1] = (before + text.rstrip("\n"), [*positions, place], actions | {action})
            ended = "\n" in text
        else:
            ended = ended or bool(latent_format.gate_prefix)
    return lines, latent_of


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
