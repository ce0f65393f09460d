"""What every kind of input yields: documents, and a count for each that cannot be used.

The kinds share these types and one rule for what is selected, so that a corpus does not depend on how it was packed.
"""

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Literal


@dataclass(frozen=True, slots=True)
class Document:
    """One source file of an input.

    Attributes:
        repo: the repository it belongs to, "" if the input does not say.
        path: posix path inside the repository.
        licence: SPDX identifier, or several joined by commas, as the input says; "" if it says nothing.
        data: the bytes of the file.
        is_text: the input held text, so `data` is UTF-8 whatever its coding cookie says.
    """

    repo: str
    path: str
    licence: str
    data: bytes
    is_text: bool = False


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A document that cannot be used. `path` names it or, where an archive breaks, the archive and the place."""

    path: str
    reason: Literal["unreadable", "too_large"]


@dataclass(slots=True)
class Progress:
    """How much of an input has been read, in the unit of `Input.bytes`; the reader counts up, the caller looks."""

    bytes: int = 0


class Selection:
    """Which documents of an input are wanted.

    Args:
        suffixes: ends of file names, as ".py".
        exclude: globs; a file or folder whose name, or path relative to the input, matches one is left out whole.
        max_file_bytes: larger documents are counted, not read.

    """

    def __init__(self, suffixes: frozenset[str], exclude: Sequence[str], max_file_bytes: int) -> None:
        self.max_file_bytes = max_file_bytes
        self._suffixes = tuple(sorted(suffixes))
        self.suffix_of_unnamed = ".py" if ".py" in suffixes else min(suffixes, default="")
        self._exclude = tuple(exclude)
        self._keeps_folder = lru_cache(maxsize=4096)(self.keeps)

    def keeps(self, path: str) -> bool:
        """No glob matches the path, nor any folder it lies in."""
        folder, _, name = path.rpartition("/")
        if any(fnmatchcase(name, glob) or fnmatchcase(path, glob) for glob in self._exclude):
            return False
        return not folder or self._keeps_folder(folder)

    def wants(self, path: str) -> bool:
        """The path has one of the suffixes, in upper or lower case, and is not excluded."""
        return path.lower().endswith(self._suffixes) and self.keeps(path)


def clean_path(path: str) -> str:
    """The path in its shortest form, relative and encodable: file systems and archives may hold any bytes."""
    return posixpath.normpath(path.encode("utf-8", "replace").decode()).lstrip("/")


def split_repo(path: str) -> tuple[str, str]:
    """Repository and path inside it: the first folder is the repository, and a file outside any folder is its own."""
    repo, _, inside = path.partition("/")
    return (repo, inside) if inside else (posixpath.splitext(path)[0], path)
