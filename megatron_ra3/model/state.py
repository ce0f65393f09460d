"""Save and load everything that the next optimizer step depends on: weights, optimizer, and random generators.

Goes through Megatron's dist_checkpointing (torch_dist format): every rank writes its own shard. A run that saves,
dies and loads continues bit for bit. The optimizer is stored per parameter and unsharded ("fully reshardable").
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_ra3.model.build import RA3Model
from megatron_ra3.model.parallel import ParallelLayout

_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}


def save_state(folder: str | Path, model: RA3Model, optimizer: Any) -> None:
    """Write the training state into `folder`, which is created and must be empty; collective over all ranks.

    The folder is complete only when all ranks have returned: the caller marks it valid afterwards.
    FileExistsError: the folder holds something. OSError: it cannot be written, by this rank or another.
    """
    from megatron.core import dist_checkpointing

    target = Path(folder)
    problem: OSError | None = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        if any(target.iterdir()):
            problem = FileExistsError(f"checkpoint folder {target} is not empty: remove it or choose another")
    except OSError as error:
        problem = error
    if model.layout.any_rank(problem is not None):
        raise problem or OSError(f"another rank cannot use the checkpoint folder {target}")
    state = _sharded_state(model, optimizer, is_loading=False)
    try:
        dist_checkpointing.save(state, str(target), content_metadata=dict(_METADATA))
    except CheckpointException as failure:
        raise OSError(f"the training state could not be written to {target}: {_reasons(failure)}") from failure


def load_state(folder: str | Path, model: RA3Model, optimizer: Any) -> None:
    """Restore what `save_state` wrote into a model and optimizer of the same config; collective over all ranks.

    The parallel layout must be the one that saved (the generators of every rank are restored).
    FileNotFoundError: no complete checkpoint in `folder`. ValueError: it does not fit the model or the layout.
    """
    state = _load(folder, _sharded_state(model, optimizer, is_loading=True))
    model.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    _set_generators(state["generators"])


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
            f"the training state in {folder} cannot be loaded: {_reasons(failure)}; it was written by another model "
            "or another number of ranks, or is damaged: set these back, or remove this checkpoint to fall back to an "
            "older one (ra3 export reads the weights of any layout)"
        ) from failure


def _reasons(failure: BaseException) -> str:
    """The first rank's reason. CheckpointException is not even an Exception: nobody above would catch it."""
    if not isinstance(failure, CheckpointException):
        return str(failure)
    rank, (error, _) = next(iter(failure.failures.items()))
    return f"rank {rank} of {len(failure.failures)} that failed: {error}"


def _sharded_state(model: RA3Model, optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    metadata = dict(_METADATA)
    weights = model.module.sharded_state_dict(metadata=metadata)
    return {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata),
        "generators": _per_rank("generators", _generators(), model.layout, ShardedObject),
    }


def _per_rank(key: str, value: Any, layout: ParallelLayout, sharded_object: Any) -> Any:
    return sharded_object(key, value, (layout.world_size,), (layout.rank,), replica_id=0)


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
