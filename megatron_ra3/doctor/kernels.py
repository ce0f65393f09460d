"""Which likelihood kernels a run would use, and why a fallback would be taken: it is right, but many times slower."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from megatron_ra3.config import TrainerConfig
from megatron_ra3.doctor.findings import Finding

DEFAULT_WIDTH = 4096
"""Hidden size that kernels are asked about without a configuration that names one."""


def kernels(config: TrainerConfig | None = None) -> Iterator[Finding]:
    """Which backend takes each precision of the output layer, and what it is for in the run."""
    import torch

    from megatron_ra3.assembly import precision_of
    from megatron_ra3.kernels import Precision, backends
    from megatron_ra3.kernels.tuning import table_path, tuning

    tuning()
    tuned = table_path().is_file()
    untuned_fix = "ra3 bench tune" if torch.cuda.is_available() and not tuned else ""
    yield Finding("kernels", "tiles", "ok", f"{table_path()}" if tuned else "as shipped", untuned_fix)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width = _hidden_size(config) if config else DEFAULT_WIDTH
    uses: dict[Precision, list[str]] = {}
    if config:
        uses.setdefault(precision_of(config, config.model.reward_precision), []).append("rewards")
        uses.setdefault(precision_of(config, config.model.loss_precision), []).append("losses and all else")
    for precision in get_args(Precision):
        backend = backends.in_use(width, precision, device)
        wanted = uses.get(precision, [])
        text = f"{backend}, at hidden size {width}" + (f"; this run's {' and '.join(wanted)}" if wanted else "")
        amiss = bool(wanted) and precision != "fp32" and backend != "Triton"
        fix = "run on a GPU that the kernels take, or set model.dtype and its precisions to fp32" if amiss else ""
        yield Finding("kernels", precision, "failed" if amiss else "ok", text, fix)


def _hidden_size(config: TrainerConfig) -> int:
    path = Path(config.model.folder) / "config.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["hidden_size"])
    except (OSError, ValueError, KeyError):  # told by `model`
        return DEFAULT_WIDTH
