"""Metrics: one JSON line and one aligned text line per step, a progress bar on a terminal, wandb when asked.

Means are formed from global sums and counts, never from means of means, so a metric does not depend on how the
batch was split. The file can be cut back to a checkpoint, so a resumed run leaves no step twice.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from megatron_ra3.report.signatures import Detector
from megatron_ra3.report.summary import read_metrics

if TYPE_CHECKING:
    from megatron_ra3.model.parallel import ParallelLayout

SHOWN = {
    "loss": "9.4f",
    "reward": "8.4f",
    "pass_rate": "6.4f",
    "zero_advantage_groups": "4.0f",
    "truncated": "6.4f",
    "entropy": "6.4f",
    "kl": "8.1e",
    "nats_per_code_token": "7.4f",
    "think_rate": "6.3f",
    "rationale_tokens": "5.1f",
    "mismatch": "8.1e",
    "effective_samples": "5.3f",
    "grad_norm": "8.3f",
    "tokens": "8.0f",
    "seconds": "6.2f",
}
"""Metrics of the text line, in order, with their formats."""


def global_means(layout: ParallelLayout, sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Reduce {name: (sum, count)} over data-parallel replicas to {name: sum/count}; a zero count gives 0."""
    import torch

    names = sorted(sums)
    local = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=layout.device)
    total = layout.sum_over_dp(local).tolist()
    return {name: value / count if count else 0.0 for name, (value, count) in zip(names, total, strict=True)}


def durable_bytes(file: TextIO) -> int:
    """Flush an appended file to disk and return its bytes, which a checkpoint then counts on."""
    file.flush()
    os.fsync(file.fileno())
    return os.fstat(file.fileno()).st_size


def cut_back(file: TextIO, size_bytes: int) -> None:
    """Cut an appended file to the bytes that a checkpoint counts; ValueError when it holds fewer."""
    found = os.fstat(file.fileno()).st_size
    if found < size_bytes:
        raise ValueError(
            f"{file.name}: holds {found} bytes but the checkpoint counts {size_bytes}; the file was cut or replaced: "
            "restore it, or resume from an older checkpoint"
        )
    file.truncate(size_bytes)
    file.seek(0, os.SEEK_END)


class MetricsLog:
    """Writer of `metrics.jsonl`; ranks other than the first write nothing.

    Args:
        folder: the run folder.
        total_steps: steps of the whole run, for the progress bar.
        writes: this process writes (global rank 0).
        wandb: a run of wandb to log to besides, which ends with this; None: none.
        detector: looks for failure signatures in what is written; None: nothing does.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        writes: bool,
        wandb: Any = None,
        detector: Detector | None,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self._writes = writes
        self._detector = detector
        self._wandb = wandb
        self._bar: tqdm[Any] | None = None
        if not writes:
            return
        self._file = self.path.open("a", encoding="utf-8")
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, unit="step", dynamic_ncols=True)

    @property
    def offset(self) -> int:
        """Bytes written so far, durable once this returns."""
        return durable_bytes(self._file) if self._writes else 0

    def rewind(self, offset: int, step: int) -> None:
        """Cut the file back to `offset` bytes, as it stood after `step` steps; ValueError: it holds fewer.

        The detector then stands where it stood, too.
        """
        if self._writes:
            cut_back(self._file, offset)
            if self._detector is not None:
                self._detector.replay(read_metrics(self.path.parent))
            if self._bar is not None:
                self._bar.initial = self._bar.n = step
                self._bar.refresh()

    def shorten(self, steps: int) -> None:
        """Expect `steps` fewer steps in all, as when a phase ends early."""
        if self._bar is not None:
            self._bar.total = (self._bar.total or 0) - steps
            self._bar.refresh()

    def write(self, label: str, record: Mapping[str, Any]) -> None:
        """Append one step's metrics and print its line, which `label` opens, and one per failure signature it shows."""
        if not self._writes:
            return
        signatures = self._detector.observe(record) if self._detector is not None else {}
        if signatures:
            record = {**record, "signatures": signatures}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        shown = [f"{name} {record[name]:{form}}" for name, form in SHOWN.items() if name in record]
        lines = [f"{label:<22} " + "  ".join(shown)]
        lines += [f"{label:<22} signature {name}: {message}" for name, message in signatures.items()]
        self._print([f"{time.strftime('%H:%M:%S')} {line}" for line in lines])
        if self._wandb is not None:
            numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
            self._wandb.log(numbers | {f"signatures/{name}": 1 for name in signatures}, step=record["step"])

    def _print(self, lines: Sequence[str]) -> None:
        if self._bar is None:
            print(*lines, sep="\n", flush=True)
        else:
            self._bar.write("\n".join(lines))
            self._bar.update()

    def close(self) -> None:
        """Flush and close everything."""
        if self._writes:
            self._file.close()
            if self._bar is not None:
                self._bar.close()
            if self._wandb is not None:
                self._wandb.finish()
