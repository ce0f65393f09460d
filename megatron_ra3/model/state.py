"""Save and load everything that the next optimizer step depends on: weights, optimizer, and random generators.

Goes through Megatron's dist_checkpointing (torch_dist format): every rank writes its own shard. A run that saves,
dies and loads continues bit for bit. The optimizer is stored per parameter and unsharded ("fully reshardable"), so
that another layout may load it.

Megatron's own callers for asynchronous saves fork, or spawn, a writer process per rank. A fork beside the threads of
gloo, NCCL and the engine's client may deadlock in the child, a spawned one imports torch anew, and either outlives a
killed rank and writes on into a folder that the next run has begun to clean. Here a thread of the rank writes a copy:
it dies with the rank, and what stops it is an exception and not an exit code. File writes and checksums leave the
interpreter to the training thread.
"""

import contextlib
import hashlib
import os
import queue
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ra3.model import parallel
from megatron_ra3.model.build import RA3Model
from megatron_ra3.model.parallel import ParallelLayout
from megatron_ra3.stall import ACTIVITY

PROBE_BYTES = 1 << 20
"""What must fit before a save begins: rank 0 writes a small file in the middle of Megatron's collectives, and were it
to fail there, the other ranks would wait for it until a timeout."""
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}


class StagedState:
    """A copy of one rank's share of the training state, which `write` writes while training goes on.

    Args:
        request: Megatron's asynchronous save, planned over all ranks.
        buckets: what goes into each of this rank's files, on the CPU and shared with nobody.
    """

    def __init__(self, request: Any, buckets: list[Any]) -> None:
        self._request = request
        self._buckets = buckets

    @property
    def files(self) -> Sequence[Path]:
        """Files of this rank's share."""
        return [Path(path) for path, _, _ in self._buckets]

    def write(self) -> None:
        """Write this rank's share, durably. OSError: it cannot be written."""
        if not self._buckets:
            return
        from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

        transforms = self._request.async_fn.args[0]
        results: dict[int, Any] = {}
        for index, bucket in enumerate(self._buckets):
            ACTIVITY.moved()
            done, outcome = queue.Queue[int](), queue.Queue[Any]()
            done.put(index)
            FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, outcome, done, use_fsync=True)
            _, results[index] = outcome.get()
            if isinstance(results[index], Exception):
                raise OSError(f"{bucket[0]}: {results[index]}") from results[index]
        collected = self._request.async_fn_args[2]
        while not collected.empty():  # of a save that was given up
            collected.get()
        collected.put(results)
        self._buckets = [(path, key, None) for path, key, _ in self._buckets]

    def commit(self) -> None:
        """Write what describes all ranks' shares; collective over all ranks. OSError: it cannot be written."""
        try:
            for complete in self._request.finalize_fns:
                complete()
        except CheckpointException as failure:
            raise OSError(f"the training state could not be completed: {_reasons(failure)}") from failure


def stage_state(folder: str | Path, model: RA3Model, optimizer: Any) -> StagedState:
    """Copy the training state and plan its files in `folder`, created and required empty; collective over all ranks.

    The folder is complete when all ranks have returned from `write` and then from `commit`: the caller marks it valid
    afterwards. FileExistsError: the folder holds something. OSError: this rank or another cannot use it.
    """
    from megatron.core import dist_checkpointing

    target = Path(folder)
    problem: OSError | None = None
    if model.layout.rank == 0:
        try:
            _claim(target)
        except OSError as error:
            problem = error
    if model.layout.any_rank(problem is not None):
        raise problem or OSError(f"another rank cannot use the checkpoint folder {target}")
    state = _sharded_state(model, optimizer, is_loading=False) | {"generators": _own_generators(model.layout)}
    try:
        request = dist_checkpointing.save(state, str(target), content_metadata=dict(_METADATA), async_sharded_save=True)
    except CheckpointException as failure:
        raise OSError(f"the training state could not be written to {target}: {_reasons(failure)}") from failure
    return StagedState(request, _copied(request))


def load_state(folder: str | Path, model: RA3Model, optimizer: Any, *, generators: bool = True) -> None:
    """Restore what was saved into a model and optimizer of the same config, by any layout; collective over all ranks.

    `generators`: those of every rank too, which needs the layout that saved; else see `seed_generators`.
    FileNotFoundError: no complete checkpoint in `folder`. ValueError: it does not fit the model or the layout.
    """
    wanted = _sharded_state(model, optimizer, is_loading=True)
    if generators:
        wanted["generators"] = _own_generators(model.layout)
    state = _load(folder, wanted)
    model.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if generators:
        _set_generators(state["generators"])


def seed_generators(seed: int, step: int) -> None:
    """Seed all generators of this rank anew, the same on all ranks: they continue those of no other layout."""
    parallel.seed_generators(int.from_bytes(hashlib.sha256(f"{seed}:{step}".encode()).digest()[:4]))


def load_weights(folder: str | Path, model: RA3Model) -> None:
    """Restore only the weights of what `save_state` wrote, by any layout into any; collective over all ranks.

    Rows of the vocabulary that exist only as padding, here or there, are left out or zero.
    FileNotFoundError: no complete checkpoint in `folder`. ValueError: it does not fit the model.
    """
    state = _load(folder, {"model": model.module.sharded_state_dict(metadata=dict(_METADATA))})
    model.module.load_state_dict(state["model"])


def _load(folder: str | Path, wanted: dict[str, Any]) -> dict[str, Any]:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    if not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
        raise FileNotFoundError(f"{folder} holds no complete training state: its metadata.json is missing")
    try:
        return dist_checkpointing.load(wanted, str(folder))
    except (CheckpointException, CheckpointingException) as failure:
        raise ValueError(
            f"the training state in {folder} cannot be loaded: {_reasons(failure)}; it was written by another model, "
            "or is damaged: set the model back, or remove this checkpoint to fall back to an older one"
        ) from failure


def _reasons(failure: BaseException) -> str:
    """The first rank's reason. CheckpointException is not even an Exception: nobody above would catch it."""
    if not isinstance(failure, CheckpointException):
        return str(failure)
    if not failure.failures:
        return "another rank failed"
    rank, (error, _) = next(iter(failure.failures.items()))
    return f"rank {rank} of {len(failure.failures)} that failed: {error}"


def _sharded_state(model: RA3Model, optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    metadata = dict(_METADATA)
    weights = model.module.sharded_state_dict(metadata=metadata)
    with _padding_counted(optimizer):
        sharded = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    return {"model": weights, "optimizer": sharded}


@contextlib.contextmanager
def _padding_counted(optimizer: Any) -> Iterator[None]:
    """Let Megatron find parameters behind a padded bucket.

    Its distributed optimizer gathers buckets without the padding at their ends but looks parameters up by offsets that
    count it (0.16.1, its issue 504): what follows such a bucket is saved shifted. Tied embeddings on the last of
    several pipeline stages have a bucket of their own. Here the gathered buckets keep their padding.
    """
    buffers = [buffer for part in optimizer.chained_optimizers for buffer in getattr(part, "buffers", [])]
    sized = [(item, item.numel_unpadded) for buffer in buffers for item in (buffer, *buffer.buckets)]
    try:
        for buffer in buffers:
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()
        yield
    finally:
        for item, numel in sized:
            item.numel_unpadded = numel


def _claim(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"checkpoint folder {folder} is not empty: remove it or choose another")
    path = folder / "probe"
    try:
        with path.open("wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)


def _copied(request: Any) -> list[Any]:
    """What this rank writes, apart from the tensors that training is about to change."""
    if not request.async_fn_args:
        return []
    if torch.cuda.is_available():
        return request.preload_fn()
    return [
        (path, key, (objects, [(item, tensor.clone()) for item, tensor in tensors]))
        for path, key, (objects, tensors) in request.async_fn_args[1]
    ]


def _own_generators(layout: ParallelLayout) -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return ShardedObject("generators", _generators(), (layout.world_size,), (layout.rank,), replica_id=0)


def _generators() -> dict[str, Any]:
    """States of all generators of this rank: python, numpy, torch, and on a GPU CUDA's and Megatron's tracker."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),  # noqa: NPY002 - libraries draw from the global generator
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
        states["tracker"] = get_cuda_rng_tracker().get_states()
    return states


def _set_generators(states: dict[str, Any]) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
        get_cuda_rng_tracker().set_states(states["tracker"])
