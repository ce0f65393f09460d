"""The wandb run of a run folder: one, whatever restarts, and in one group with what it goes back to.

Its id and group lie in the run folder. So a requeued or chained job goes on in the same wandb run, also where the
folder has moved, and RLVR that starts from the export of a mid-training joins the group of that.
"""

from __future__ import annotations

import importlib.util
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

NOTE = "wandb.json"
JobType = Literal["midtrain", "rlvr", "eval"]


class WandbSettings(Protocol):
    """`wandb_project`: empty, or where to log; `wandb_group`: empty, or the group to be in."""

    @property
    def wandb_project(self) -> str: ...  # noqa: D102
    @property
    def wandb_group(self) -> str: ...  # noqa: D102


def open_wandb(
    folder: Path,
    logging: WandbSettings,
    *,
    job_type: JobType,
    settings: Mapping[str, Any],
    start: Path | None = None,
    writes: bool = True,
) -> Any:
    """The wandb run of `folder`, begun or resumed; None without a project, or where this process does not write.

    `start` is a run folder, or its export, with the weights that this begins with; `settings` are shown in wandb.
    ValueError, on every rank: wandb is asked for but not installed.
    """
    project = logging.wandb_project
    if project and not _is_installed("wandb"):
        raise ValueError(
            f"logging.wandb_project={project!r}: wandb is not installed: pip install wandb, or leave it empty"
        )
    if not project or not writes:
        return None
    import wandb

    noted = _note(folder, group=logging.wandb_group, start=start)
    return wandb.init(
        project=project,
        dir=str(folder),
        id=noted["id"],
        name=folder.resolve().name,
        group=noted["group"],
        job_type=job_type,
        resume="allow",
        config=dict(settings),
    )


def _note(folder: Path, *, group: str, start: Path | None) -> dict[str, str]:
    """Id and group, as they were written down first; a group that is given wins."""
    own = _read(folder)
    if own is not None and group in ("", own["group"]):
        return own
    origin = (_read(start) or _read(start.resolve().parent)) if start is not None else None
    noted = {
        "id": uuid.uuid4().hex[:12] if own is None else own["id"],
        "group": group or (origin or {}).get("group", folder.resolve().name),
    }
    (folder / NOTE).write_text(json.dumps(noted) + "\n", encoding="utf-8")
    return noted


def _read(folder: Path) -> dict[str, str] | None:
    path = folder / NOTE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _is_installed(package: str) -> bool:
    """Without importing it; a mere folder of that name, such as wandb's own logs, has no origin."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
