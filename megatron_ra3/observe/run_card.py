"""`run.json`: what a run folder holds and how far it goes, for those who only see the folder, as `ra3 watch` does."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ra3.schedule import Phase

if TYPE_CHECKING:
    from megatron_ra3.model.parallel import ParallelLayout

CARD = "run.json"


def write_run_card(folder: Path, kind: str, layout: ParallelLayout, phases: Sequence[Phase]) -> None:
    """Say what runs here from now on; a disk that refuses is none of the run's concern here."""
    card = {
        "kind": kind,
        "ranks": layout.world_size,
        "layout": {"tensor": layout.tp_size, "pipeline": layout.pp_size, "data": layout.dp_size},
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.time(),
        "phases": [asdict(phase) for phase in phases],
    }
    try:
        (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"{folder / CARD} cannot be written: {error}", flush=True)


def read_run_card(folder: Path) -> dict[str, Any] | None:
    """What was said; None: nothing, or half of it."""
    try:
        card: dict[str, Any] = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return card
