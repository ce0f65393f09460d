"""Ends a run in which nothing moves any more, and says where every rank was and who waited for whom.

One rank that hangs (a dead disk, a lost message, a node that thrashes) holds all others in a collective. Without this
they hold the nodes until the scheduler takes them back, and leave nothing to learn from. Every rank has a thread that
publishes how far it has come in one small file of the run folder; when no rank has moved for the timeout, all of
them write their stacks and end with `STALLED`, which a launcher answers by starting the same command again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ra3.observe.spans import TIMELINE

STALLED = 76
"""Exit status of a run in which nothing moved: start it again."""
RECORD_BYTES = 256
LONGEST_POLL_S = 30.0
GRACE_S = 5.0
"""How long a rank that has written its stacks waits for the others to have done so, before it ends."""


class Activity:
    """What this process is doing; written by its threads, read by its watchdog.

    `moves` counts every sign of progress. `doing` is the last thing begun. `waits` counts the named waits for other
    ranks; `waits_for` is the one this rank is in, or empty.
    """

    def __init__(self) -> None:
        self.moves = 0
        self.doing = "start"
        self.waits = 0
        self.waits_for = ""

    def moved(self, doing: str = "") -> None:
        """Note progress, and what it is now about."""
        self.moves += 1
        if doing:
            self.doing = doing

    @contextlib.contextmanager
    def waiting(self, name: str, group: str = "all", root: int | None = None) -> Iterator[None]:
        """A named wait in which ranks meet: those of `group` for one another, or for `root` (global rank) alone."""
        self.waits += 1
        self.waits_for = name
        self.moves += 1
        try:
            with TIMELINE.meeting(name, group, root):
                yield
        finally:
            self.waits_for = ""
            self.moves += 1


ACTIVITY = Activity()
"""The activity of this process."""


@dataclass(frozen=True)
class Sign:
    """What one rank has published last."""

    moves: int
    doing: str
    waits: int
    waits_for: str
    stacks_written: bool = False

    def to_bytes(self) -> bytes:
        """A line of `RECORD_BYTES`."""
        fields = asdict(self) | {"doing": self.doing[:80], "waits_for": self.waits_for[:60]}
        return json.dumps(fields).encode()[: RECORD_BYTES - 1].ljust(RECORD_BYTES - 1) + b"\n"

    @classmethod
    def from_bytes(cls, record: bytes) -> Sign | None:
        """Inverse of `to_bytes`; None for what is not, or only half, written."""
        try:
            return cls(**json.loads(record))
        except (ValueError, TypeError):
            return None


class Board:
    """One file with a record per rank; every rank writes its own and reads all of them."""

    def __init__(self, path: Path, rank: int, world_size: int) -> None:
        self.path = path
        self.rank = rank
        self.world_size = world_size

    def publish(self, sign: Sign) -> None:
        """Write this rank's record; OSError: the disk refuses."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, sign.to_bytes(), self.rank * RECORD_BYTES)
        finally:
            os.close(descriptor)

    def read(self) -> list[Sign | None]:
        """What every rank has published last; None: nothing."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        return [
            Sign.from_bytes(content[rank * RECORD_BYTES : (rank + 1) * RECORD_BYTES]) for rank in range(self.world_size)
        ]


class Watchdog:
    """A thread that ends this process when no rank has moved for `timeout_s`.

    Args:
        folder: where the board and the stacks go, `stalls` in the run folder.
        rank: this one.
        world_size: how many there are.
        timeout_s: on the monotonic clock.
        leave: ends the process.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        timeout_s: float,
        *,
        activity: Activity = ACTIVITY,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        self.folder = folder
        self.rank = rank
        self.timeout_s = timeout_s
        self._activity = activity
        self._leave = leave
        self._poll_s = min(timeout_s / 10, LONGEST_POLL_S)
        self._board = Board(folder / "board", rank, world_size)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall-watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch; the folder is created."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._exchange(stacks_written=False)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        seen: list[Sign | None] = []
        moved_at = time.monotonic()
        while not self._closed.wait(self._poll_s):
            signs = self._exchange(stacks_written=False)
            if signs != seen:
                seen, moved_at = signs, time.monotonic()
            elif time.monotonic() - moved_at >= self.timeout_s:
                self._end(signs)
                return

    def _exchange(self, *, stacks_written: bool) -> list[Sign | None]:
        """Publish and read; a disk that refuses hides the others, so that this rank judges by itself alone."""
        now = self._activity
        own = Sign(now.moves, now.doing, now.waits, now.waits_for, stacks_written)
        try:
            self._board.publish(own)
            signs = self._board.read()
        except OSError:
            signs = [None] * self._board.world_size
        signs[self.rank] = own
        return signs

    def _end(self, signs: Sequence[Sign | None]) -> None:
        verdict = who_waits_for_whom(signs)
        head = f"nothing has moved for stall_timeout_s={self.timeout_s:g}\n{verdict}\n"
        path = self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-rank-{self.rank:05d}.txt"
        try:
            with path.open("w", encoding="utf-8") as file:
                file.write(head + "\nstacks of this rank:\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            where = f"stacks: {path}"
        except OSError as error:
            where = f"stacks cannot be written ({error}) and follow"
            faulthandler.dump_traceback(2, all_threads=True)
        print(f"rank {self.rank}: {head}{where}; ending with status {STALLED}", file=sys.__stderr__, flush=True)
        self._await_the_others()
        self._leave(STALLED)

    def _await_the_others(self) -> None:
        """A launcher ends all ranks when the first one leaves: let them write first."""
        deadline = time.monotonic() + GRACE_S + 2 * self._poll_s
        while time.monotonic() < deadline:
            signs = self._exchange(stacks_written=True)
            if all(sign is not None and sign.stacks_written for sign in signs):
                return
            time.sleep(min(self._poll_s, 0.5))


@contextlib.contextmanager
def watched(folder: Path, timeout_s: float) -> Iterator[None]:
    """Watch this process, a rank by the launcher's variables; 0: do not.

    Begins before the rendezvous: there, too, a rank may wait for one that never comes.
    """
    if not timeout_s:
        yield
        return
    launched = "RANK" in os.environ
    rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if launched else (0, 1)
    watchdog = Watchdog(folder, rank, world_size, timeout_s)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.close()


def who_waits_for_whom(signs: Sequence[Sign | None]) -> str:
    """One line per rank, and one that names the ranks that have not arrived where the others wait.

    Ranks pass the named waits in the same order, so the rank with fewer of them behind it is the one that is awaited.
    """
    arrived = max((sign.waits for sign in signs if sign is not None and sign.waits_for), default=0)
    waiting = [rank for rank, sign in enumerate(signs) if sign is not None and sign.waits_for and sign.waits == arrived]
    missing = [rank for rank, sign in enumerate(signs) if rank not in waiting]
    lines = [f"  rank {rank}: {_described(sign)}" for rank, sign in enumerate(signs)]
    if not waiting:
        return "\n".join(["no rank is in a named wait: compare the stacks", *lines])
    sign = signs[waiting[0]]
    assert sign is not None
    awaited = f"for rank {_list(missing)}" if missing else "though all have arrived: the network or a library hangs"
    return "\n".join([f"rank {_list(waiting)} waits in {sign.waits_for!r} (wait {arrived}) {awaited}", *lines])


def _described(sign: Sign | None) -> str:
    if sign is None:
        return "has published nothing: it is gone, or sees another run folder"
    place = f"waits in {sign.waits_for!r}" if sign.waits_for else "is in no named wait"
    return f"{place} after {sign.waits} waits, last began {sign.doing!r}"


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
