"""Which rank and which engine sits on which node, and where such a layout is slow or impossible.

Megatron numbers ranks with tensor parallelism fastest, then data, then pipeline; `slurm/ra3_midtrain.sbatch` fills
trainer nodes first and engine nodes after them. A tensor-parallel group that leaves its node trains fifteen times
slower over the network than over NVLink, and nothing but the layout shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


class DoesNotFitError(ValueError):
    """A layout that cannot run, with what is missing and what to change."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """GPUs of trainers and engines on equal nodes; `trainer_gpus` come first."""

    gpus_per_node: int
    trainer_gpus: int
    engine_gpus: int
    tp_size: int = 1
    pp_size: int = 1
    engine_tp_size: int = 1

    @property
    def replica_gpus(self) -> int:
        """GPUs that hold one copy of the model."""
        return self.tp_size * self.pp_size

    @property
    def dp_size(self) -> int:
        """Replicas of the model."""
        return self.trainer_gpus // self.replica_gpus

    @property
    def engines(self) -> int:
        """Servers (`ra3 serve`)."""
        return self.engine_gpus // self.engine_tp_size

    @property
    def engines_per_node(self) -> int:
        """Servers on a node that only serves."""
        return self.gpus_per_node // self.engine_tp_size

    @property
    def trainer_nodes(self) -> int:
        """Nodes with a trainer rank."""
        return -(-self.trainer_gpus // self.gpus_per_node)

    @property
    def nodes(self) -> int:
        """Nodes in use."""
        return -(-(self.trainer_gpus + self.engine_gpus) // self.gpus_per_node)

    @property
    def engine_nodes(self) -> int:
        """Nodes that only serve."""
        return self.nodes - self.trainer_nodes

    def node_of_rank(self, rank: int) -> int:
        """Node of a trainer rank."""
        return rank // self.gpus_per_node

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """Tensor-, data- and pipeline-parallel rank of a trainer rank."""
        rest, tp_rank = divmod(rank, self.tp_size)
        pp_rank, dp_rank = divmod(rest, self.dp_size)
        return tp_rank, dp_rank, pp_rank

    def tensor_group_nodes(self) -> int:
        """Most nodes that a tensor-parallel group spans."""
        return max(
            len({self.node_of_rank(rank) for rank in range(first, first + self.tp_size)})
            for first in range(0, self.trainer_gpus, self.tp_size)
        )

    def data_group_ranks_per_node(self) -> int:
        """Ranks of one data-parallel group on its first node: so many network adapters carry its gradients."""
        group = range(0, self.dp_size * self.tp_size, self.tp_size)
        return sum(1 for rank in group if self.node_of_rank(rank) == 0)

    def data_group_nodes(self) -> int:
        """Nodes that a data-parallel group spans."""
        return len({self.node_of_rank(rank) for rank in range(0, self.dp_size * self.tp_size, self.tp_size)})

    def check(self) -> None:
        """DoesNotFitError where ranks or engines do not come out even."""
        if self.engine_tp_size > self.gpus_per_node or self.gpus_per_node % self.engine_tp_size:
            raise DoesNotFitError(
                f"engine.tensor_parallel={self.engine_tp_size} does not divide the {self.gpus_per_node} GPUs of a "
                "node, and an engine lives on one: set it to a divisor"
            )
        if not self.trainer_gpus or self.trainer_gpus % self.replica_gpus:
            raise DoesNotFitError(
                f"{self.trainer_gpus} trainer GPUs cannot be split into replicas of parallel.tensor={self.tp_size} x "
                f"parallel.pipeline={self.pp_size}: use a multiple of {self.replica_gpus} GPUs or lower one of the two"
            )
        if self.engine_gpus > 0 and self.engines < self.dp_size:
            raise DoesNotFitError(
                f"{self.engines} engines for {self.dp_size} data-parallel replicas, and each needs one: give "
                f"{-(-self.dp_size * self.engine_tp_size // self.gpus_per_node)} engine nodes, raise parallel.tensor "
                "or parallel.pipeline, or lower engine.tensor_parallel"
            )

    def warnings(self) -> Iterator[str]:
        """What runs, but slowly, and the remedy."""
        if self.tensor_group_nodes() > 1:
            yield (
                f"parallel.tensor={self.tp_size} leaves its node of {self.gpus_per_node} GPUs: every layer then waits "
                "for the network; use a divisor of that, and parallel.pipeline for the rest"
            )
        if self.dp_size > 1 and self.pp_size > 1 and self.replica_gpus <= self.gpus_per_node:
            yield (
                f"parallel.pipeline={self.pp_size}: its stages are {self.dp_size * self.tp_size} ranks apart, so that "
                f"a replica of {self.replica_gpus} GPUs is spread over nodes though one node would hold it; "
                f"parallel.tensor={self.replica_gpus} keeps it together where the model's heads allow"
            )

    def describe(self) -> Iterator[str]:
        """A line per node."""
        for node in range(self.nodes):
            first, end = node * self.gpus_per_node, (node + 1) * self.gpus_per_node
            parts = []
            if first < self.trainer_gpus:
                parts.append(self._ranks(first, min(end, self.trainer_gpus)))
            served = range(max(first, self.trainer_gpus), min(end, self.trainer_gpus + self.engine_gpus))
            if served:
                engine = (served.start - self.trainer_gpus) // self.engine_tp_size
                last = (served.stop - 1 - self.trainer_gpus) // self.engine_tp_size
                parts.append(f"engines {_span(engine, last)} (TP{self.engine_tp_size})")
            yield f"node {node}: " + "; ".join(parts)

    def _ranks(self, first: int, end: int) -> str:
        places = [self.coordinates(rank) for rank in range(first, end)]
        axes = zip(("tp", "dp", "pp"), zip(*places, strict=True), strict=True)
        return f"ranks {_span(first, end - 1)}: " + " ".join(
            f"{axis} {_span(min(values), max(values))}" for axis, values in axes
        )


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
