"""Annotated snippets between bootstrapping and the M-step, one append-only file per replica.

The latents of an M-step come from the E-step's last weights, so they are sampled before those weights change, and
must survive a restart. A checkpoint records only two byte offsets: what was written beyond them is cut on resume.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_ra3.latents import Trajectory


class AnnotatedStore:
    """A queue of trajectories on disk; `written` and `read` are its byte offsets, `waiting` counts what was not taken.

    What was taken stays in the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written = 0
        self.read = 0
        self.waiting = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"written": self.written, "read": self.read, "waiting": self.waiting}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Cut the file to a checkpoint's offsets; ValueError when it is shorter than they say."""
        written = state["written"]
        size = self.path.stat().st_size
        if size < written:
            raise ValueError(
                f"{self.path}: holds {size} bytes but the checkpoint counts {written}; the file was cut or replaced: "
                "restore it, or resume from an older checkpoint"
            )
        os.truncate(self.path, written)
        self.written, self.read, self.waiting = written, state["read"], state["waiting"]

    def clear(self) -> None:
        """Leave out what was not taken."""
        self.read, self.waiting = self.written, 0

    def append(self, trajectories: Sequence[Trajectory]) -> None:
        """Append and make durable; OSError naming the file when the disk refuses."""
        try:
            with self.path.open("r+b") as file:
                file.truncate(self.written)
                file.seek(self.written)
                for trajectory in trajectories:
                    file.write(json.dumps(trajectory.to_json()).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                self.written = file.tell()
        except OSError as error:
            raise OSError(f"{self.path}: {error}; make it writable or free space, then start again") from error
        self.waiting += len(trajectories)

    def take(self, steps_left: int) -> list[Trajectory]:
        """The next trajectories, spread evenly over this and the `steps_left - 1` steps to come."""
        count = -(-self.waiting // steps_left)
        with self.path.open("rb") as file:
            file.seek(self.read)
            lines = [file.readline() for _ in range(count)]
            self.read = file.tell()
        self.waiting -= count
        return [Trajectory.from_json(json.loads(line)) for line in lines]
