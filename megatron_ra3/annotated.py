"""Annotated snippets between bootstrapping and the M-step, one append-only file per replica.

The latents of an M-step come from the E-step's last weights, so they are sampled before those weights change, and
must survive a restart. A checkpoint records byte offsets: what was written beyond them is cut on resume. Nothing before
them is ever changed, so older checkpoints stay good. Another number of replicas deals out anew what was not taken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

from megatron_ra3.latents import Trajectory


class AnnotatedStore:
    """A queue of trajectories on disk; `written` and `read` are its byte offsets. What was taken stays in the file.

    `batches` counts, append by append since the last `clear`, what was not taken yet.

    Args:
        folder: of the files of all replicas.
        replica: this one's data-parallel rank.
    """

    def __init__(self, folder: Path, replica: int) -> None:
        self.folder = folder
        self.replica = replica
        self.path = _file(folder, replica)
        self.written = 0
        self.read = 0
        self.batches: list[int] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.path.touch()

    @property
    def waiting(self) -> int:
        """How many trajectories were not taken yet."""
        return sum(self.batches)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"written": self.written, "read": self.read, "batches": list(self.batches)}

    def load_state_dicts(self, states: Sequence[dict[str, Any]], replicas: int) -> None:
        """Go on from a checkpoint's states, one per replica that saved, as one of `replicas`.

        Where their number has changed, what waits is dealt out in the order of the steps that wrote it, and copied to
        the end of this replica's file. ValueError: a file is shorter than its state says.
        """
        states = [state if "batches" in state else state | {"batches": [state["waiting"]]} for state in states]
        dealt = None if len(states) == replicas else self._deal(states, replicas)
        own = states[self.replica] if self.replica < len(states) else None
        if own is not None:
            _check_size(self.path, own["written"])
            os.truncate(self.path, own["written"])
        self.written = self.path.stat().st_size
        if dealt is None:
            assert own is not None
            self.read, self.batches = own["read"], list(own["batches"])
            return
        self.read, self.batches = self.written, []
        for batch in dealt:
            self._append(batch)

    def clear(self) -> None:
        """Leave out what was not taken."""
        self.read, self.batches = self.written, []

    def append(self, trajectories: Sequence[Trajectory]) -> None:
        """Append and make durable; OSError naming the file when the disk refuses."""
        self._append([json.dumps(trajectory.to_json()).encode() + b"\n" for trajectory in trajectories])

    def take(self, steps_left: int) -> list[Trajectory]:
        """The next trajectories, spread evenly over this and the `steps_left - 1` steps to come."""
        count = left = -(-self.waiting // steps_left)
        with self.path.open("rb") as file:
            file.seek(self.read)
            lines = [file.readline() for _ in range(count)]
            self.read = file.tell()
        for index, waits in enumerate(self.batches):
            taken = min(left, waits)
            self.batches[index] -= taken
            left -= taken
        return [Trajectory.from_json(json.loads(line)) for line in lines]

    def _append(self, lines: Sequence[bytes]) -> None:
        try:
            with self.path.open("r+b") as file:
                file.truncate(self.written)
                file.seek(self.written)
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
                written = file.tell()
        except OSError as error:
            raise OSError(f"{self.path}: {error}; make it writable or free space, then start again") from error
        self.written = written
        self.batches.append(len(lines))

    def _deal(self, states: Sequence[dict[str, Any]], replicas: int) -> list[list[bytes]]:
        """Lines of this replica, batch by batch, as if `replicas` had written them."""
        shares = [self._waiting_lines(replica, state) for replica, state in enumerate(states)]
        batches = [
            [line for turn in zip_longest(*parts) for line in turn if line is not None]
            for parts in zip_longest(*shares, fillvalue=())
        ]
        return [batch[self.replica :: replicas] for batch in batches]

    def _waiting_lines(self, replica: int, state: dict[str, Any]) -> list[list[bytes]]:
        path = _file(self.folder, replica)
        _check_size(path, state["written"])
        with path.open("rb") as file:
            file.seek(state["read"])
            return [_lines(file, count) for count in state["batches"]]


def _lines(file: BinaryIO, count: int) -> list[bytes]:
    return [file.readline() for _ in range(count)]


def _file(folder: Path, replica: int) -> Path:
    return folder / f"replica-{replica:05d}.jsonl"


def _check_size(path: Path, written: int) -> None:
    size = path.stat().st_size if path.is_file() else 0
    if size < written:
        raise ValueError(
            f"{path}: holds {size} bytes but the checkpoint counts {written}; the file was cut or replaced: "
            "restore it, or resume from an older checkpoint"
        )
