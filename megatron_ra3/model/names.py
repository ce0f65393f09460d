"""Weights between Hugging Face folders and the Megatron model, in both directions, bit for bit.

Our own map because `mbridge` 0.15.1 knows only Transformer Engine's fused layer names (no local spec) and moves every
exported tensor to a CUDA device, so it cannot serve a CPU.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_ra3.model.build import RA3Model
from megatron_ra3.model.geometry import Geometry
from megatron_ra3.model.weight_map import Slot, shard, slots, unshard
from megatron_ra3.stall import ACTIVITY

MAX_FILE_BYTES = 4 * 2**30
"""Weights are split into several files beyond this size."""

_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


def metadata(hf_config: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Return (Hugging Face name, shape) of every tensor in export order, without touching weights."""
    every = slots(Geometry.of(hf_config), pp_size=1)
    return [pair for slot in every for pair in zip(slot.hf_names, slot.hf_shapes, strict=True)]


def import_hf(model: RA3Model, folder: str | Path) -> None:
    """Fill this rank's part of `model` from the safetensors in `folder`; call before the optimizer is built.

    ValueError: a tensor is missing, not part of the model, or of another shape; OSError: the folder has no weights.
    """
    layout, geometry = model.layout, Geometry.of(model.hf_config)
    files = check_hf(Path(folder), model.hf_config)
    parameters = dict(model.module.named_parameters())
    filled = set()
    for slot in _local_slots(model, geometry):
        name = _parameter_name(slot, parameters)
        tensors = [_read(files[hf_name], hf_name) for hf_name in slot.hf_names]
        parameter = parameters[name]
        piece = shard(slot, tensors, geometry, layout.tp_rank, layout.tp_size, parameter.shape[0])
        parameter.data.copy_(piece)
        filled.add(name)
        ACTIVITY.moved()
    assert filled == set(parameters), f"parameters without a Hugging Face name: {sorted(set(parameters) - filled)}"


def check_hf(folder: Path, hf_config: Mapping[str, Any]) -> dict[str, Path]:
    """The file of every tensor in a folder of weights, whose names and shapes must be those of the config.

    ValueError: a tensor is missing, unknown or of another shape, or a file is damaged; OSError: there are none.
    """
    files = _tensor_files(folder)
    expected = dict(metadata(hf_config))
    ignored = {"lm_head.weight"} if hf_config.get("tie_word_embeddings") else set()
    missing = sorted(set(expected) - set(files))
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} tensors of the model in its config, first {missing[0]!r}")
    unexpected = sorted(set(files) - set(expected) - ignored)
    if unexpected:
        raise ValueError(f"{folder} holds {len(unexpected)} tensors unknown to its config, first {unexpected[0]!r}")
    for name, shape in expected.items():
        with _opened(files[name]) as handle:
            found = tuple(handle.get_slice(name).get_shape())
        if found != shape:
            raise ValueError(f"{folder}: {name} has shape {found}, its config asks for {shape}")
    return files


def export_hf(model: RA3Model) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full unpadded tensor) in the order of `metadata`, on every rank.

    Collective over the replica: all its ranks must iterate to the end in lockstep. Replicas are independent. A tensor
    may be the live weight itself: copy what must survive the next step.
    """
    layout, geometry = model.layout, Geometry.of(model.hf_config)
    parameters = dict(model.module.named_parameters())
    for slot in slots(geometry, layout.pp_size):
        ACTIVITY.moved()
        if slot.stage == layout.pp_rank:
            local = parameters[_parameter_name(slot, parameters)].data
            full = unshard(slot, _gather(local, model), geometry)
        else:
            full = tuple(_empty(shape, model) for shape in slot.hf_shapes)
        for hf_name, tensor in zip(slot.hf_names, full, strict=True):
            yield hf_name, _broadcast_from_stage(tensor.contiguous(), slot.stage, model)


def save_hf(
    model: RA3Model, folder: str | Path, hf_config: Mapping[str, Any], tokenizer_folder: str | Path | None
) -> None:
    """Write a Hugging Face folder (safetensors, config.json, tokenizer files); collective over all ranks.

    Global rank 0 writes into a temporary folder and renames it, so a folder of that name is always complete.
    On every rank, FileExistsError: `folder` exists; OSError: the disk is full or not writable, nothing is left behind.
    """
    dtype = next(model.module.parameters()).dtype
    config = {**hf_config, "dtype": str(dtype).removeprefix("torch.")}
    failure: OSError | None = None
    if model.layout.rank == 0:
        tensors = export_hf(model)
        try:
            _write_folder(Path(folder), tensors, config, tokenizer_folder)
        except OSError as error:
            failure = error
        for _ in tensors:  # after a failure the other ranks still wait for rank 0 in every exchange
            pass
    else:
        for _ in export_hf(model):
            pass
    failure = model.layout.gather_from_leaders(failure)[0]
    if failure is not None:
        raise failure


def init_hf(
    folder: str | Path, hf_config: Mapping[str, Any], seed: int, tokenizer_folder: str | Path | None = None
) -> None:
    """Write a randomly initialised fp32 model as an ordinary Hugging Face folder; call on one rank only.

    Normal with standard deviation `initializer_range` (0.02), ones for norms, zeros for biases. The weights depend on
    `seed` alone, not on how the model is later split.
    """
    generator = torch.Generator().manual_seed(seed)
    std = float(hf_config.get("initializer_range", 0.02))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in metadata(hf_config):
            ACTIVITY.moved()
            if name.endswith("norm.weight"):
                yield name, torch.ones(shape)
            elif name.endswith(".bias"):
                yield name, torch.zeros(shape)
            else:
                yield name, torch.empty(shape).normal_(0.0, std, generator=generator)

    _write_folder(Path(folder), tensors(), {**hf_config, "dtype": "float32"}, tokenizer_folder)


def _local_slots(model: RA3Model, geometry: Geometry) -> Iterator[Slot]:
    """Yield this stage's parameters, and the last stage's own copy of a tied embedding."""
    every = slots(geometry, model.layout.pp_size)
    yield from (slot for slot in every if slot.stage == model.layout.pp_rank)
    if model.tied and model.layout.is_last_stage and not model.layout.is_first_stage:
        embedding = every[0]
        yield Slot(("output_layer.weight",), model.layout.pp_rank, embedding.hf_names, embedding.hf_shapes, "vocab")


def _parameter_name(slot: Slot, parameters: Mapping[str, Tensor]) -> str:
    present = [name for name in slot.megatron_names if name in parameters]
    assert len(present) == 1, f"{slot.megatron_names}: {len(present)} of these parameters exist, expected one"
    return present[0]


def _gather(local: Tensor, model: RA3Model) -> list[Tensor]:
    if model.layout.tp_size == 1:
        return [local]
    parts = [torch.empty_like(local) for _ in range(model.layout.tp_size)]
    dist.all_gather(parts, local.contiguous(), group=model.layout.tp_group)
    return parts


def _empty(shape: tuple[int, ...], model: RA3Model) -> Tensor:
    return torch.empty(shape, dtype=model.config.params_dtype, device=model.layout.device)


def _broadcast_from_stage(tensor: Tensor, stage: int, model: RA3Model) -> Tensor:
    if model.layout.pp_size > 1:
        group = model.layout.pp_group
        dist.broadcast(tensor, src=dist.get_process_group_ranks(group)[stage], group=group)
    return tensor


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Map every tensor in the folder to its file."""
    if (folder / _INDEX).is_file():
        weight_map = json.loads((folder / _INDEX).read_text())["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise FileNotFoundError(f"{folder} has neither {_INDEX} nor model.safetensors: is it a Hugging Face model?")
    with _opened(single) as handle:
        return dict.fromkeys(handle.keys(), single)


def _read(file: Path, name: str) -> Tensor:
    with _opened(file) as handle:
        return handle.get_tensor(name)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file; a torn one is a ValueError that names it."""
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or incomplete: {error}") from error


def _write_folder(
    target: Path,
    tensors: Iterable[tuple[str, Tensor]],
    hf_config: Mapping[str, Any],
    tokenizer_folder: str | Path | None,
) -> None:
    if target.exists():
        raise FileExistsError(f"folder {target} exists: remove it or choose another name")
    staging = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        _write_weights(staging, tensors, hf_config)
        (staging / "config.json").write_text(json.dumps(dict(hf_config), indent=2) + "\n")
        if tokenizer_folder is not None:
            for name in _TOKENIZER_FILES:
                if (Path(tokenizer_folder) / name).is_file():
                    shutil.copy2(Path(tokenizer_folder) / name, staging / name)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], hf_config: Mapping[str, Any]) -> None:
    """Write the tensors in files of at most MAX_FILE_BYTES (or one tensor), with an index if there are several."""
    itemsize = getattr(torch, hf_config["dtype"]).itemsize
    files: list[list[str]] = [[]]
    size = 0
    for name, shape in metadata(hf_config):
        size += torch.Size(shape).numel() * itemsize
        if size > MAX_FILE_BYTES and files[-1]:
            files.append([])
            size = torch.Size(shape).numel() * itemsize
        files[-1].append(name)
    source = iter(tensors)
    weight_map = {}
    for number, names in enumerate(files, start=1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        block = {}
        for expected in names:
            name, tensor = next(source)
            assert name == expected, f"exported {name} where {expected} was due"
            block[name] = tensor.detach().cpu().clone()
        try:
            save_file(block, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {folder / file}: {error}") from error
        weight_map.update(dict.fromkeys(names, file))
    if len(files) > 1:
        (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n")
