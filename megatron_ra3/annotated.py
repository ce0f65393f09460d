"""Annotated snippets between bootstrapping and the M-step, one append-only file per replica.

The latents of an M-step come from the E-step's last weights, so they are sampled before those weights change, and
must survive a restart. A checkpoint records only two byte offsets: what was written beyond them is cut on resume.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from megatron_ra3.latents import Trajectory


class AnnotatedStore:
    """A queue of trajectories on disk; `written` and `read` are its byte offsets. What was taken stays in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written = 0
        self.read = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def restore(self, written: int, read: int) -> None:
        """Cut the file to a checkpoint's offsets; ValueError when it is shorter than they say."""
        size = self.path.stat().st_size
        if size < written:
            raise ValueError(
                f"{self.path}: holds {size} bytes but the checkpoint counts {written}; the file was cut or replaced: "
                "restore it, or resume from an older checkpoint"
            )
        os.truncate(self.path, written)
        self.written, self.read = written, read

    def clear(self) -> None:
        """Leave out what was not taken."""
        self.read = self.written

    def append(self, trajectories: Iterable[Trajectory]) -> None:
        """Append and make durable."""
        with self.path.open("r+b") as file:
            file.truncate(self.written)
            file.seek(self.written)
            for trajectory in trajectories:
                file.write(json.dumps(trajectory.to_json()).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self.written = file.tell()

    def take(self, count: int) -> list[Trajectory]:
        """The next `count` trajectories, fewer at the end."""
        with self.path.open("rb") as file:
            file.seek(self.read)
            lines = [line for line in (file.readline() for _ in range(count)) if line]
            self.read = file.tell()
        return [Trajectory.from_json(json.loads(line)) for line in lines]
