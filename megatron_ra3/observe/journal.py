"""Takes the recorder's spans to disk: one JSONL file per rank, appended by a thread, bounded, never in the run's way.

A run must not end, or wait, because of what only describes it: a disk that is full, gone or slow costs records, which
are counted and said once. When the file has half the allowed size it becomes `rank-00000.1.jsonl`, in place of the one
before; so a run of weeks keeps its newest part. A resumed run appends: the timeline tells what happened, steps that are
done again included.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from megatron_ra3.observe.spans import TIMELINE, Recorder

FOLDER = "timeline"
FLUSH_S = 5.0
CLOSE_S = 10.0
"""How long the end of a process waits for a disk that does not answer."""


class Journal:
    """The file of one process.

    Args:
        folder: created when needed.
        rank: names the file.
        max_bytes: of this rank's files together.
        recorder: what is written.
    """

    def __init__(self, folder: Path, rank: int, max_bytes: int, recorder: Recorder = TIMELINE) -> None:
        self.path = folder / f"rank-{rank:05d}.jsonl"
        self.older = folder / f"rank-{rank:05d}.1.jsonl"
        self._most_bytes = max_bytes // 2
        self._recorder = recorder
        self._file: int | None = None
        self._size_bytes = 0
        self._has_warned = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="timeline", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def close(self) -> None:
        """Write what is left."""
        self._closed.set()
        self._thread.join(CLOSE_S)

    def flush(self) -> None:
        """Write what was recorded since the last call; what cannot be written is counted as dropped."""
        records = list(self._recorder.collect())
        if not records:
            return
        try:
            self._append(_lines(records))
        except OSError as error:
            self._recorder.count_dropped(len(records))
            self._leave()
            if not self._has_warned:
                self._has_warned = True
                print(f"timeline: {error}; the run goes on, and counts what is lost (timeline_dropped)", flush=True)

    def _run(self) -> None:
        while not self._closed.wait(FLUSH_S):
            self.flush()
        self.flush()
        self._leave()

    def _append(self, data: bytes) -> None:
        if self._file is not None and self._size_bytes + len(data) > self._most_bytes:
            self._leave()
            self.path.replace(self.older)
        if self._file is None:
            self._open()
        self._write(data)

    def _open(self) -> None:
        """Go on in the file, behind a line that a kill may have torn."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._size_bytes = os.fstat(self._file).st_size
        is_torn = self._size_bytes and os.pread(self._file, 1, self._size_bytes - 1) != b"\n"
        self._write((b"\n" if is_torn else b"") + _lines(self._recorder.header()))

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        while data:
            written = os.write(self._file, data)
            self._size_bytes += written
            data = data[written:]

    def _leave(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None


@contextlib.contextmanager
def recorded(run_folder: str, megabytes: int) -> Iterator[None]:
    """Record this process, a rank by the launcher's variables, into the run folder; 0 megabytes: do not.

    Begins before the rendezvous, which is a wait as any other.
    """
    if not megabytes:
        yield
        return
    launched = "RANK" in os.environ
    rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if launched else (0, 1)
    TIMELINE.start(rank=rank, ranks=world_size, host=socket.gethostname(), pid=os.getpid())
    journal = Journal(Path(run_folder) / FOLDER, rank, megabytes * 1_000_000)
    journal.start()
    try:
        yield
    finally:
        journal.close()
        TIMELINE.stop()


def _lines(records: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in records).encode()
