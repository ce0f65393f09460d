"""The faults: what happens to a run, when, and what an operator would find afterwards."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ra3.chaos.launch import Handicap, Ranks
from megatron_ra3.manifest import finished

POLL_S = 0.001


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    during: strikes a start of the run, given its ranks, its run folder, a generator and the seconds a whole run takes.
    after: what else has happened by the next start. handicap: what the struck start suffers all along. most_strikes: a
    trial strikes between one and so many starts. least_ranks: of the run.
    """

    name: str
    during: Callable[[Ranks, Path, random.Random, float], None]
    after: Callable[[Path, random.Random], None] = lambda _folder, _draw: None
    handicap: Callable[[random.Random], Handicap] = lambda _draw: Handicap()
    most_strikes: int = 1
    least_ranks: int = 1


def _any_rank(ranks: Ranks, draw: random.Random) -> list[int]:
    return [draw.randrange(len(ranks.processes))]


def _pass(ranks: Ranks, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while ranks.running and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _kill(ranks: Ranks, _folder: Path, draw: random.Random, run_s: float) -> None:
    """SIGKILL one rank at any moment of the run, start and end included."""
    _pass(ranks, draw.uniform(0.0, run_s))
    ranks.send(signal.SIGKILL, _any_rank(ranks, draw))


def _kill_saving(ranks: Ranks, folder: Path, draw: random.Random, run_s: float) -> None:
    """SIGKILL one rank while a checkpoint is being written, published, or an old one removed."""
    skip = draw.randrange(5)
    while ranks.running and skip >= 0:
        before = _hidden(folder)
        while ranks.running and not _hidden(folder) - before:
            time.sleep(POLL_S)
        skip -= 1
    _pass(ranks, draw.uniform(0.0, 0.03 * run_s))
    ranks.send(signal.SIGKILL, _any_rank(ranks, draw))


def _hidden(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoints/.*")}


def _ask_to_stop(ranks: Ranks, _folder: Path, draw: random.Random, run_s: float) -> None:
    """What a scheduler sends to all ranks before it takes the machine back."""
    _pass(ranks, draw.uniform(0.0, run_s))
    number = draw.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
    ranks.send(number, range(len(ranks.processes)))


def _freeze(ranks: Ranks, _folder: Path, draw: random.Random, run_s: float) -> None:
    """SIGSTOP one rank: it neither works nor dies, as on a node that hangs; the watchdogs of the others must end it."""
    _pass(ranks, draw.uniform(0.0, run_s))
    ranks.send(signal.SIGSTOP, _any_rank(ranks, draw))


def _refuse_writes(ranks: Ranks, folder: Path, draw: random.Random, run_s: float) -> None:
    """Take write permission from every folder of the run, from a random moment until the run has ended."""
    _pass(ranks, draw.uniform(0.0, run_s))
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        if path.exists():
            path.chmod(0o555)


def _allow_writes(folder: Path, _draw: random.Random) -> None:
    folder.chmod(0o755)
    for root, _, _ in os.walk(folder):
        Path(root).chmod(0o755)
        for path in _folders(Path(root)):
            path.chmod(0o755)


def _folders(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.is_dir())


def _tear_manifest(folder: Path, draw: random.Random) -> None:
    """Cut the newest manifest at any byte; an older checkpoint is left as it is."""
    saved = finished(folder / "checkpoints")
    if len(saved) > 1:
        manifest = saved[-1] / "manifest.json"
        os.truncate(manifest, draw.randrange(manifest.stat().st_size))


def _lose_file(folder: Path, draw: random.Random) -> None:
    """Remove one file of the newest checkpoint's state."""
    saved = finished(folder / "checkpoints")
    if len(saved) > 1:
        draw.choice(sorted(path for path in (saved[-1] / "state").iterdir())).unlink()


def _flip_bit(folder: Path, draw: random.Random) -> None:
    """Change one bit in one file of the newest checkpoint's state."""
    saved = finished(folder / "checkpoints")
    if len(saved) > 1:
        path = draw.choice(sorted(path for path in (saved[-1] / "state").iterdir()))
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


def _nothing(_ranks: Ranks, _folder: Path, _draw: random.Random, _run_s: float) -> None:
    """The handicap is fault enough."""


FAULTS = (
    Fault("kill_rank", _kill, most_strikes=3),
    Fault("kill_saving", _kill_saving, most_strikes=3),
    Fault("stop_signal", _ask_to_stop, most_strikes=3),
    Fault("frozen_rank", _freeze, least_ranks=2),
    Fault("full_disk", _nothing, handicap=lambda draw: Handicap(max_file_bytes=int(10 ** draw.uniform(3.0, 6.0)))),
    Fault("read_only_disk", _refuse_writes, after=_allow_writes, handicap=lambda _: Handicap(obeys_modes=True)),
    Fault("torn_manifest", _kill, after=_tear_manifest, most_strikes=2),
    Fault("missing_file", _kill, after=_lose_file, most_strikes=2),
    Fault("flipped_bit", _kill, after=_flip_bit, most_strikes=2),
    Fault("clock_jump", _kill, handicap=lambda draw: Handicap(clock_seed=draw.randrange(1, 1 << 30)), most_strikes=2),
)
