"""How the kernels cut their work: the shipped choice, and what `ra3 bench tune` found best on this kind of GPU.

A choice moves a log-prob by fp32 rounding, so runs that must agree to the bit must share it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from megatron_ra3 import durable
from megatron_ra3.kernels import fp8


@dataclass(frozen=True, slots=True)
class Tiles:
    """One way to cut the work: rows x columns x hidden of a tile, warps and pipeline stages of a program."""

    rows: int
    columns: int
    hidden: int
    warps: int
    stages: int

    def blocks(self) -> dict[str, int]:
        """As the kernels name them."""
        return {"BLOCK_ROWS": self.rows, "BLOCK_COLUMNS": self.columns, "BLOCK_HIDDEN": self.hidden}


CANDIDATES: dict[str, tuple[Tiles, ...]] = {
    "bf16": (
        Tiles(128, 256, 64, 8, 4), Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 64, 4, 3), Tiles(128, 128, 64, 8, 4),
        Tiles(64, 256, 64, 4, 4),
    ),
    "fp8": (Tiles(128, fp8.TILE, 128, 8, 4), Tiles(128, fp8.TILE, 128, 8, 3), Tiles(128, fp8.TILE, 64, 8, 4)),
    "gradient": (Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 64, 4, 3), Tiles(128, 128, 64, 8, 4)),
    "gradient_with_entropy": (Tiles(128, 128, 64, 8, 4), Tiles(128, 128, 64, 4, 3)),
}  # fmt: skip
"""What is tried, none of which spills a register on sm_90; the first is the shipped choice."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """The tiles in use. In FP8 `fp8.TILE` columns wide: a scale, and a column's place in a logit, are per tile."""

    bf16: Tiles = CANDIDATES["bf16"][0]
    fp8: Tiles = CANDIDATES["fp8"][0]
    gradient: Tiles = CANDIDATES["gradient"][0]
    gradient_with_entropy: Tiles = CANDIDATES["gradient_with_entropy"][0]
    gradient_columns: int = 8192
    """Columns of the gradient of the logits that are alive at a time."""


_USED: list[Tuning] = []


@contextlib.contextmanager
def use(choice: Tuning) -> Iterator[None]:
    """Let `tuning` say something else for a while."""
    _USED.append(choice)
    try:
        yield
    finally:
        _USED.pop()


def tuning() -> Tuning:
    """The choice for the current GPU: what `ra3 bench tune` wrote, else the shipped one; ValueError as `load`."""
    if _USED:
        return _USED[-1]
    return _of(torch.cuda.get_device_name() if torch.cuda.is_available() else "")


@functools.cache
def _of(gpu: str) -> Tuning:
    return load(table_path(), gpu) if gpu else Tuning()


def table_path() -> Path:
    """`$RA3_TUNING`, else `megatron_ra3/tuning.json` in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("RA3_TUNING") or cache / "megatron_ra3" / "tuning.json")


def load(path: Path, gpu: str) -> Tuning:
    """What the table says of a GPU; the shipped choice where it says nothing or is not there.

    Raises:
        ValueError: the table is broken.
    """
    if not path.is_file():
        return Tuning()
    try:
        return from_record(json.loads(path.read_text(encoding="utf-8")).get(gpu, {}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; delete it, or make it anew with `ra3 bench tune`") from error


def save(path: Path, gpu: str, found: Tuning) -> None:
    """Put a choice into the table, beside those of other GPUs."""
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write(path, f"{json.dumps(table | {gpu: asdict(found)}, indent=1)}\n".encode())
    _of.cache_clear()


def from_record(record: dict[str, Any]) -> Tuning:
    """The reverse of `asdict`; fields that are missing are as shipped."""
    known = {item.name for item in fields(Tuning)}
    if unknown := sorted(set(record) - known):
        raise ValueError(f"unknown fields {', '.join(unknown)}")
    tiles: dict[str, Any] = {name: Tiles(**value) if name in CANDIDATES else value for name, value in record.items()}
    found = Tuning(**tiles)
    numbers = [*(value for name in CANDIDATES for value in asdict(getattr(found, name)).values())]
    if any(not isinstance(value, int) or value < 1 for value in [*numbers, found.gradient_columns]):
        raise ValueError(f"every number must be a positive integer: {record}")
    if found.fp8.columns != fp8.TILE:
        raise ValueError(f"fp8 tiles must be {fp8.TILE} columns wide, not {found.fp8.columns}")
    return found
