"""In which order RLVR takes its tasks: all of them once per epoch, shuffled anew for each. Pure Python.

Two numbers say where a run stands, whatever the number of replicas, so that a resumed run leaves no task out and takes
none twice.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Turn:
    """A task whose turn it is: its index, and a number that no other turn of the run has."""

    index: int
    serial: int


class TaskOrder:
    """Turns of `tasks` tasks, endlessly; `epoch` counts passes over them, `position` those taken of this one."""

    def __init__(self, tasks: int, seed: int) -> None:
        assert tasks > 0
        self.epoch = 0
        self.position = 0
        self._tasks = tasks
        self._seed = seed
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def take(self, count: int) -> list[Turn]:
        """The next `count` turns; a task can come twice where an epoch ends among them."""
        taken: list[Turn] = []
        while len(taken) < count:
            if self.position == self._tasks:
                self.epoch, self.position = self.epoch + 1, 0
            order = self._of_epoch()
            first = self.epoch * self._tasks
            end = min(self.position + count - len(taken), self._tasks)
            taken += [Turn(order[place], first + place) for place in range(self.position, end)]
            self.position = end
        return taken

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.epoch, self.position = state["epoch"], state["position"]

    def _of_epoch(self) -> list[int]:
        if self._shuffled[0] != self.epoch:
            order = list(range(self._tasks))
            random.Random(f"{self._seed} {self.epoch}").shuffle(order)
            self._shuffled = (self.epoch, order)
        return self._shuffled[1]
