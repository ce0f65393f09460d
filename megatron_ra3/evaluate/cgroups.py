"""A memory and task limit over everything a worker starts, where this process may create control groups.

Address-space limits bound one process; only a control group bounds many together, and counts files in /tmp as memory.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "ra3-jail-"
_ROOT = Path("/sys/fs/cgroup")
_REMOVAL_ATTEMPTS, _REMOVAL_PAUSE_S = 20, 0.05


@dataclass(frozen=True)
class Cgroup:
    """The folders of one group: one in a unified hierarchy, one per controller in the older layout."""

    folders: tuple[Path, ...]

    def command(self, command: list[str]) -> list[str]:
        """`command`, entering the group before anything of it runs."""
        enter = 'until [ "$1" = -- ]; do echo $$ > "$1/cgroup.procs" || exit 1; shift; done; shift; exec "$@"'
        return ["/bin/sh", "-c", enter, "sh", *map(str, self.folders), "--", *command]

    def remove(self) -> None:
        """Remove the group, waiting a moment for its processes to die; one that stays is left to `sweep`."""
        for folder in self.folders:
            for _ in range(_REMOVAL_ATTEMPTS):
                try:
                    folder.rmdir()
                    break
                except OSError:
                    time.sleep(_REMOVAL_PAUSE_S)


def create_cgroup(name: str, *, memory_bytes: int, max_tasks: int) -> Cgroup | None:
    """A new group below this process's own, or None where the system does not allow one."""
    folders: list[Path] = []
    try:
        for parent, limits in _parents(memory_bytes, max_tasks):
            folder = parent / f"{_PREFIX}{os.getpid()}-{name}"
            folder.mkdir()
            folders.append(folder)
            for file, value in limits.items():
                (folder / file).write_text(str(value), encoding="ascii")
    except OSError:
        Cgroup(tuple(folders)).remove()
        return None
    return Cgroup(tuple(folders)) if folders else None


def sweep() -> int:
    """Remove the groups of processes that no longer exist; returns how many."""
    removed = 0
    for parent, _ in _parents(0, 0):
        for folder in parent.glob(f"{_PREFIX}*"):
            owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
            if owner.isdigit() and not Path("/proc", owner).exists():
                with contextlib.suppress(OSError):
                    folder.rmdir()
                    removed += 1
    return removed


def _parents(memory_bytes: int, max_tasks: int) -> Iterator[tuple[Path, dict[str, int]]]:
    """Where groups go, with the files that carry the limits there."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        below = path.lstrip("/")
        if "memory" in controllers.split(","):
            yield _ROOT / "memory" / below, {"memory.limit_in_bytes": memory_bytes}
        elif "pids" in controllers.split(","):
            yield _ROOT / "pids" / below, {"pids.max": max_tasks}
        elif not controllers and (_ROOT / "cgroup.controllers").exists():
            yield _ROOT / below, {"memory.max": memory_bytes, "memory.oom.group": 0, "pids.max": max_tasks}
