"""Who computes what: tensor, pipeline and data parallel ranks over torch.distributed and Megatron's parallel state.

A replica is the tp·pp ranks that hold one copy of the model. All of them must see the same micro-batches, otherwise
collectives mix unrelated data; only the replica's leader reads data and talks to engines, the others receive from it.
"""

import dataclasses
import datetime as dt
import os
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ra3.model import cpu
from megatron_ra3.stall import ACTIVITY


@dataclasses.dataclass(frozen=True)
class ParallelLayout:
    """The place of one rank. `rank` counts all processes; the others count within their group."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    tp_group: ProcessGroup
    pp_group: ProcessGroup
    dp_group: ProcessGroup
    replica_group: ProcessGroup
    control_group: ProcessGroup
    timeout_s: float

    @property
    def is_replica_leader(self) -> bool:
        """The one rank of a replica that reads data and talks to engines."""
        return self.tp_rank == 0 and self.pp_rank == 0

    @property
    def is_first_stage(self) -> bool:
        """True where the embedding is."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True where the output layer is."""
        return self.pp_rank == self.pp_size - 1

    @property
    def replicas(self) -> str:
        """Name of the group of ranks that hold the same part of the model."""
        return f"replicas {self.pp_rank}.{self.tp_rank}"

    @property
    def device(self) -> torch.device:
        """Where this rank's model lives."""
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def broadcast_in_replica(self, value: Any) -> Any:
        """Return the leader's picklable `value` on every rank of its replica; the others' argument is ignored."""
        if self.tp_size * self.pp_size == 1:
            return value
        box = [value if self.is_replica_leader else None]
        leader = dist.get_process_group_ranks(self.replica_group)[0]
        with ACTIVITY.waiting("what the replica's leader sends", f"replica {self.dp_rank}", leader):
            dist.broadcast_object_list(box, src=leader, group=self.replica_group)
        return box[0]

    def broadcast_from_last_stage(self, value: Tensor) -> Tensor:
        """Overwrite `value` [same shape and type on all stages] with the last stage's and return it."""
        if self.pp_size > 1:
            last = dist.get_process_group_ranks(self.pp_group)[-1]
            group = f"pipeline {self.dp_rank}.{self.tp_rank}"
            with ACTIVITY.waiting("what the last pipeline stage sends", group, last):
                dist.broadcast(value, src=last, group=self.pp_group)
        return value

    def sum_over_dp(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over the replicas; every rank must call. The argument is not changed."""
        total = value.detach().clone()
        if self.dp_size > 1:
            with ACTIVITY.waiting("sum over the replicas", self.replicas):
                dist.all_reduce(total, group=self.dp_group)
        return total

    def sum_number_over_dp(self, value: float) -> float:
        """Return the sum of one number (fp64) over the replicas; every rank must call."""
        return float(self.sum_over_dp(torch.tensor(value, dtype=torch.float64, device=self.device)).item())

    def gather_from_leaders(self, value: Any) -> list[Any]:
        """Return the picklable `value` of every replica's leader, in data-parallel order, on every rank."""
        gathered = self.gather_from_ranks((self.dp_rank, self.is_replica_leader, value))
        return [item for _, leads, item in sorted(gathered, key=lambda entry: entry[0]) if leads]

    def gather_from_ranks(self, value: Any) -> list[Any]:
        """Return the picklable `value` of every rank, in rank order, on every rank."""
        gathered: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            with ACTIVITY.waiting("gathering from all ranks"):
                dist.all_gather_object(gathered, value, group=self.control_group)
        return gathered

    def raise_on_all(self, problem: Exception | None) -> None:
        """Raise the first problem of any rank on all ranks, so that none waits for one that has left."""
        for found in self.gather_from_ranks(problem):
            if found is not None:
                raise found

    def any_rank(self, flag: bool) -> bool:
        """Return whether `flag` is set on any rank; every rank must call."""
        total = torch.tensor(int(flag))
        if self.world_size > 1:
            with ACTIVITY.waiting("asking all ranks"):
                dist.all_reduce(total, group=self.control_group)
        return bool(total)

    def barrier(self, name: str) -> None:
        """Wait for all ranks. RuntimeError after `timeout_s`, naming `name` and the first rank that is missing."""
        if self.world_size == 1:
            return
        try:
            with ACTIVITY.waiting(f"barrier {name}"):
                dist.monitored_barrier(self.control_group, timeout=dt.timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            raise RuntimeError(f"barrier {name!r} failed after at most {self.timeout_s} s: {error}") from error


def initialize(tp: int, pp: int, *, seed: int, timeout_s: float) -> ParallelLayout:
    """Join the process group, split it into tp x pp x dp ranks, and seed every generator with `seed`, the same on all.

    Under torchrun or srun the rendezvous comes from RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; without RANK this is a
    single process. Backend: nccl with CUDA, gloo without. Called again, it re-splits the same world. `timeout_s` bounds
    every collective. ValueError: tp·pp does not divide the number of processes.
    """
    cpu.enable()
    from megatron.core import parallel_state

    timeout = dt.timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        _join(timeout)
    world_size = dist.get_world_size()
    if tp < 1 or pp < 1 or world_size % (tp * pp):
        raise ValueError(
            f"{world_size} processes cannot be split into replicas of tp={tp} x pp={pp}: "
            f"start a multiple of {max(tp * pp, 1)} processes or lower tp or pp"
        )
    if parallel_state.model_parallel_is_initialized():
        _leave_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_s / 60,
    )
    seed_generators(seed)
    on_gloo = dist.get_backend() == "gloo"
    return ParallelLayout(
        rank=dist.get_rank(),
        world_size=world_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=pp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=world_size // (tp * pp),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        replica_group=parallel_state.get_model_parallel_group(),
        control_group=dist.group.WORLD if on_gloo else dist.new_group(backend="gloo", timeout=timeout),
        timeout_s=timeout_s,
    )


def destroy() -> None:
    """Leave all process groups."""
    _leave_groups()
    if dist.is_initialized():
        dist.destroy_process_group()


def _leave_groups() -> None:
    """Leave all groups but the world. Megatron only forgets its own, whose threads would wake up for ever."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    world = dist.distributed_c10d._world  # noqa: SLF001 - torch keeps no public list of its groups
    for group in list(world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _join(timeout: dt.timedelta) -> None:
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ:
        dist.init_process_group(backend, init_method="env://", timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def seed_generators(seed: int) -> None:
    """Seed python, numpy, torch and Megatron's tracker. Without CUDA the tracker is inert: nothing drops out."""
    from megatron.core import tensor_parallel

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    else:
        tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
