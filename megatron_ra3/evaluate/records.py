"""Completions and verdicts on disk: JSON Lines, one whole line per record, so that a kill costs only what ran.

Every record has a task id and a sample number, and the last one of a key counts. A line torn by a kill is cut off when
the file is opened again; any other line that is no record is an error, because a lost verdict would change a score.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Key = tuple[str, int]


class RecordFile:
    """Records by (task id, sample), read on opening and appended to; used by several threads. A context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[Key, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._lock = threading.Lock()
        try:
            self._read()
        except BaseException:
            os.close(self._descriptor)
            raise

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record by one call of the system, so that a kill of this process leaves it there or not."""
        line = (json.dumps(record) + "\n").encode()
        with self._lock:
            written = os.write(self._descriptor, line)
            if written != len(line):
                raise OSError(f"{self.path}: {written} of {len(line)} bytes could be written; is the disk full?")
            self.records[key_of(record)] = dict(record)

    def close(self) -> None:
        """Make everything durable and close."""
        os.fsync(self._descriptor)
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self._descriptor, whole)
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                record = json.loads(line)
                self.records[key_of(record)] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number}: is no record ({error}); restore or remove it") from error


def read_records(path: Path) -> dict[Key, dict[str, Any]]:
    """The records of a file that nobody may be writing; none where there is no file."""
    if not path.is_file():
        return {}
    with RecordFile(path) as file:
        return file.records


def key_of(record: Mapping[str, Any]) -> Key:
    """Task id and sample number."""
    return str(record["task_id"]), int(record["sample"])
