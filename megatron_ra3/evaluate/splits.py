"""MBPP's splits, and the guard against scoring on what was trained on.

MBPP+ is drawn from all of MBPP: 108 of its 378 tasks are MBPP's training tasks. Training on MBPP-train and then
reporting MBPP+ is reporting memory, and nothing in the files says so.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal

from megatron_ra3 import durable

NOTE = "trained_tasks.txt"
Split = Literal["prompt", "test", "validation", "train"]
_LAST_OF: dict[Split, int] = {"prompt": 10, "test": 510, "validation": 600, "train": 974}


def mbpp_split(task_id: str) -> Split:
    """The split of "Mbpp/<number>"; ValueError for anything else."""
    family, _, number = task_id.partition("/")
    if family != "Mbpp" or not number.isdigit() or not 1 <= int(number) <= _LAST_OF["train"]:
        raise ValueError(f"task id {task_id!r}: must be Mbpp/1 to Mbpp/{_LAST_OF['train']}")
    return next(split for split, last in _LAST_OF.items() if int(number) <= last)


def refuse_leaks(trained: Collection[str], scored: Collection[str], *, allow: bool = False) -> int:
    """How many of the tasks to be scored were trained on; ValueError if there are any and `allow` is not set."""
    leaked = sorted(set(trained) & set(scored))
    if leaked and not allow:
        raise ValueError(
            f"{len(leaked)} of {len(set(scored))} tasks were trained on, for instance {leaked[0]}: "
            "score on the others, or ask for it by name and have the result say so"
        )
    return len(leaked)


def note_training(run_folder: Path, task_ids: Collection[str], *, start: Path) -> None:
    """Write down in a run's folder which tasks it trains on, and what the model in `start` was trained on before."""
    known = sorted({*task_ids, *noted_training(start)})
    durable.write(run_folder / NOTE, "".join(f"{task_id}\n" for task_id in known).encode())


def noted_training(folder: Path) -> frozenset[str]:
    """Tasks that a run trained on, from its folder or that of its export."""
    notes = [place / NOTE for place in (folder, folder.parent) if (place / NOTE).is_file()]
    return frozenset(task_id for note in notes for task_id in note.read_text(encoding="utf-8").split("\n") if task_id)
