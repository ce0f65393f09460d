"""Finds source files and reads them as Python would; a file that cannot be used is given a reason, never an exception.

A corpus always holds some broken files. One of them must not end a run of hours, and none may disappear uncounted.
"""

import ast
import hashlib
import io
import os
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from megatron_ra3.corpus.lines import CodeLine, split_lines

DropReason = Literal["unreadable", "too_large", "duplicate", "undecodable", "unparsable", "empty"]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A parsed source file: the sha256 of its bytes and its logical lines."""

    sha256: str
    lines: list[CodeLine]


def find_files(folder: Path, exclude: Sequence[str]) -> Iterator[Path]:
    """Paths of the `.py` files below `folder`, in the same order on every machine.

    `exclude` holds globs; a file or folder whose name, or path relative to `folder`, matches one is left out whole.
    """
    for root, folders, files in os.walk(folder):
        base = Path(root)

        def kept(name: str, base: Path = base) -> bool:
            relative = (base / name).relative_to(folder).as_posix()
            return not any(fnmatchcase(name, glob) or fnmatchcase(relative, glob) for glob in exclude)

        folders[:] = sorted(filter(kept, folders))
        yield from (base / name for name in sorted(files) if name.endswith(".py") and kept(name))


def read_source(path: Path, max_file_bytes: int, seen_sha256: set[str]) -> SourceFile | DropReason:
    """Reads one file, or says why not; its sha256 goes into `seen_sha256`, which tells duplicates."""
    try:
        if not path.is_file():
            return "unreadable"
        if path.stat().st_size > max_file_bytes:
            return "too_large"
        data = path.read_bytes()
    except OSError:
        return "unreadable"
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 in seen_sha256:
        return "duplicate"
    seen_sha256.add(sha256)
    try:
        text = decode(data)
    except (UnicodeDecodeError, SyntaxError, LookupError):
        return "undecodable"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like are the author's business
            tree = ast.parse(text)
        lines = split_lines(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
        return "unparsable"
    return SourceFile(sha256, lines) if tree.body else "empty"


def decode(data: bytes) -> str:
    """Source bytes as text, as the interpreter reads them: by byte-order mark or coding cookie, every newline as one.

    Raises:
        SyntaxError, LookupError: the cookie names no text encoding. UnicodeDecodeError: the bytes do not fit it.
    """
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    with io.TextIOWrapper(io.BytesIO(data), encoding) as file:
        return file.read()
