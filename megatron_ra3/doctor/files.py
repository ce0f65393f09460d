"""What the run folder's file system does, on one node and between nodes: a run is only as durable as these calls.

Checkpoints are made whole by a rename, caches are guarded by flock, and every rank reads what another has written. Each
is tried here the way a run uses it; network file systems differ in all of them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_ra3 import durable
from megatron_ra3.doctor.findings import Finding, Status
from megatron_ra3.doctor.world import World

TMPFS = ("tmpfs", "ramfs")
LOW_SPACE_BYTES = 10 * 2**30


def files(run_folder: Path, world: World | None) -> Iterator[Finding]:
    """Try the file system of `run_folder` (its nearest existing parent); leaves nothing behind."""
    parent = run_folder
    while not parent.exists():
        parent = parent.parent
    token = world.agree("folder", uuid.uuid4().hex[:12]) if world else uuid.uuid4().hex[:12]
    scratch = parent / f".doctor-{token}"
    try:
        scratch.mkdir(exist_ok=True)
    except OSError as error:
        yield Finding("files", "write", "failed", f"{parent}: {error}", "choose a run_folder that this user may write")
        return
    try:
        if world is None or world.rank == world.first:
            yield _space(parent)
            yield from _alone(scratch)
        if world is not None and world.size > 1:
            yield _visibility(scratch, world)
            yield _lock_between_ranks(scratch, world)
            world.meet("files done")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _space(parent: Path) -> Finding:
    free, kind = shutil.disk_usage(parent).free, file_system_of(parent)
    text = f"{free / 2**30:,.0f} GiB free on {kind}"
    if kind in TMPFS:
        return Finding("files", "folder", "warning", f"{parent}: {text}, which is memory", "choose a disk's folder")
    if free < LOW_SPACE_BYTES:
        return Finding("files", "folder", "warning", f"{parent}: {text}", "free space; see `ra3 checkpoint prune`")
    return Finding("files", "folder", "ok", f"{parent}: {text}")


def file_system_of(path: Path) -> str:
    """Type of the mount that holds `path`, as Linux names it."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    place = path.resolve()
    holding = [(len(point), kind) for point, kind in mounts if place.is_relative_to(point.replace("\\040", " "))]
    return max(holding)[1] if holding else "unknown"


def _alone(scratch: Path) -> Iterator[Finding]:
    """What one process can see of it."""
    checks: dict[str, tuple[Callable[[Path], str], Status, str]] = {
        "rename": (_rename, "failed", "checkpoints need a rename that replaces: use another file system"),
        "O_EXCL": (_exclusive, "failed", "two runs could start in one folder: use another file system"),
        "flock": (
            _flock,
            "warning",
            "mount with flock (Lustre: -o flock); until then prepare and cache on a local disk",
        ),
    }
    for name, (check, severity, fix) in checks.items():
        try:
            yield Finding("files", name, "ok", check(scratch))
        except (OSError, ValueError) as error:
            yield Finding("files", name, severity, str(error), fix)


def _rename(scratch: Path) -> str:
    old = scratch / "renamed"
    old.write_bytes(b"old")
    started_s = time.perf_counter()
    durable.write(old, b"new")
    taken_s = time.perf_counter() - started_s
    if old.read_bytes() != b"new":
        raise ValueError("a file that was replaced by a rename still reads as before")
    return f"replaces an existing file, flushed to disk in {taken_s * 1e3:.0f} ms"


def _exclusive(scratch: Path) -> str:
    path, flags = scratch / "exclusive", os.O_CREAT | os.O_EXCL | os.O_WRONLY
    os.close(os.open(path, flags))
    try:
        os.close(os.open(path, flags))
    except FileExistsError:
        return "refuses to create what exists"
    raise ValueError("created a file that existed")


def _flock(scratch: Path) -> str:
    with (scratch / "lock").open("wb") as holder, (scratch / "lock").open("wb") as other:
        fcntl.flock(holder, fcntl.LOCK_EX)
        if _acquires(other.fileno()):
            raise ValueError("a lock was given twice")
    return "excludes"


def _acquires(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _visibility(scratch: Path, world: World) -> Finding:
    """How long until this rank sees the file of every other one."""
    durable.write(scratch / f"rank-{world.rank}", world.host.encode())
    world.meet("files written")
    started_s = time.monotonic()
    waiting = {rank: host for rank, host in world.hosts.items() if rank != world.rank}
    while waiting and time.monotonic() - started_s < world.timeout_s:
        for rank in list(waiting):
            path = scratch / f"rank-{rank}"
            if path.is_file() and path.read_bytes() == waiting[rank].encode():
                del waiting[rank]
        time.sleep(0.01 if waiting else 0.0)
    taken_s = time.monotonic() - started_s
    if waiting:
        missing = ", ".join(f"rank {rank} ({host})" for rank, host in waiting.items())
        return Finding(
            "files",
            "between ranks",
            "failed",
            f"rank {world.rank} ({world.host}) does not see within {taken_s:.1f} s what was written by {missing}",
            "choose a run_folder on a file system that all nodes share",
        )
    return Finding("files", "between ranks", "ok", f"files of all {world.size} ranks seen after {taken_s:.2f} s")


def _lock_between_ranks(scratch: Path, world: World) -> Finding:
    """While the first rank holds a lock, nobody else may get it."""
    path = scratch / "shared-lock"
    name = "flock, ranks"
    if world.rank == world.first:
        with path.open("wb") as holder:
            try:
                fcntl.flock(holder, fcntl.LOCK_EX)
            except OSError as error:
                return Finding("files", name, "warning", str(error), "see flock above")
            finally:
                world.meet("lock held")
            world.meet("lock tried")
        return Finding("files", name, "ok", "held by the first rank")
    world.meet("lock held")
    try:
        with path.open("ab") as file:
            taken = _acquires(file.fileno())
    except OSError as error:
        return Finding("files", name, "warning", str(error), "see flock above")
    finally:
        world.meet("lock tried")
    if taken:
        text = f"rank {world.rank} ({world.host}) got a lock that rank {world.first} holds: locks end at the node"
        return Finding("files", name, "warning", text, "mount with flock, or prepare corpora on one node only")
    return Finding("files", name, "ok", "excludes other ranks")
