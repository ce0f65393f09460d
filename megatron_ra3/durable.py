"""Makes files and names outlive a power cut: what was only in memory is on the disk when these return."""

import os
import threading
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file's content, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, content: bytes) -> None:
    """Write a whole file, which then is there completely or as it was before, whoever else writes it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
