"""Rollouts of a step, each different one once, and the credit of each line's latent (algorithm.md 3).

At low think rates most rollouts of a group are the same: scoring them once saves most of an E-step, and keeps equal
rollouts exactly equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ra3 import objective
from megatron_ra3.latents import LatentFormat, Trajectory
from megatron_ra3.presets import ObjectiveConfig


@dataclass(frozen=True, slots=True)
class Rollouts:
    """`items` without repetition, how often each was drawn (`counts`), and which items a group's rollouts are.

    Equal rollouts whose latents were sampled with other weights are items of their own: their importance weights
    differ. `alike` says which item of the group was the first with the same tokens: rewards are taken from there.
    """

    items: list[Trajectory]
    counts: list[int]
    groups: list[list[int]]
    alike: list[int]

    @classmethod
    def of(cls, groups: Sequence[Sequence[Trajectory]]) -> Rollouts:
        """From every snippet's G rollouts."""
        rollouts = cls([], [], [], [])
        for group in groups:
            index_of: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
            first_of: dict[tuple[int, ...], int] = {}
            members = []
            for item in group:
                tokens = tuple(item.token_ids)
                index = index_of.setdefault((tokens, tuple(item.weight_versions)), len(rollouts.items))
                if index == len(rollouts.items):
                    rollouts.items.append(item)
                    rollouts.counts.append(0)
                    rollouts.alike.append(first_of.setdefault(tokens, index))
                rollouts.counts[index] += 1
                members.append(index)
            rollouts.groups.append(members)
        return rollouts

    def advantages(
        self, rewards: Sequence[Tensor], without_rationale: Sequence[Tensor] | None, settings: ObjectiveConfig
    ) -> list[Tensor]:
        """Per item [T] the advantage of each line's latent, from its rewards [T] (see `objective.advantages`)."""
        advantages = [torch.zeros_like(item) for item in rewards]
        for members in self.groups:
            alike = [self.alike[index] for index in members]
            stacked = torch.stack([rewards[index] for index in alike])
            without = None
            if without_rationale is not None:
                without = torch.stack([without_rationale[index] for index in alike])
            for index, advantage in zip(members, objective.advantages(stacked, without, settings), strict=True):
                advantages[index] = advantage
        return advantages

    def sampled(self) -> tuple[int, int]:
        """Sampled decisions (gate choices and rationale tokens), and sampled gates, over all rollouts."""
        decisions = sum(count * sum(item.sampled) for count, item in zip(self.counts, self.items, strict=True))
        gates = sum(count * item.sampled_gates for count, item in zip(self.counts, self.items, strict=True))
        return decisions, gates

    def per_line(self, values: Sequence[float], indices: Sequence[int]) -> Tensor:
        """Repeat one value per item over the lines of the items at `indices`."""
        lengths = torch.tensor([self.items[index].num_lines for index in indices])
        return torch.tensor([values[index] for index in indices], dtype=torch.float64).repeat_interleave(lengths)


def per_item(values: Sequence[Tensor], packing: Sequence[Sequence[int]], items: Sequence[Trajectory]) -> list[Tensor]:
    """Cut per-line values of micro-batches into those of each item."""
    found: dict[int, Tensor] = {}
    for indices, batch in zip(packing, values, strict=True):
        found.update(zip(indices, batch.split([items[index].num_lines for index in indices]), strict=True))
    return [found[index] for index in range(len(items))]


@dataclass(frozen=True, slots=True)
class Counterfactuals:
    """For every line that follows a rationale, the trajectory up to it with `<act>` in the rationale's place.

    `owners` says, per line of all items in order, which of `variants` is its own; -1 where no rationale stands.
    """

    variants: list[Trajectory]
    owners: list[int]

    @classmethod
    def of(cls, items: Sequence[Trajectory], latent_format: LatentFormat) -> Counterfactuals:
        """One variant per rationale; rollouts that agree so far share it."""
        found = cls([], [])
        index_of: dict[tuple[int, ...], int] = {}
        for item in items:
            for line, thought in enumerate(item.thought):
                if not thought:
                    found.owners.append(-1)
                    continue
                variant = item.before(line)
                latent_format.append_act(variant, item.line_tokens(line))
                index = index_of.setdefault(tuple(variant.token_ids), len(found.variants))
                if index == len(found.variants):
                    found.variants.append(variant)
                found.owners.append(index)
        return found
