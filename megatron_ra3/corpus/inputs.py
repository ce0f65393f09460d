"""Where a corpus comes from: folders, git repositories, archives and tables, found by looking and read as streams.

One bad document must not end a run of hours, and none may disappear uncounted: whatever cannot be used is yielded as
`Unreadable`. A wrong argument is refused before anything is read.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_ra3.corpus.archives import git_tree, read_git, read_tar
from megatron_ra3.corpus.documents import Document, Progress, Selection, Unreadable, clean_path, split_repo
from megatron_ra3.corpus.tables import check_parquet, read_jsonl, read_parquet

Kind = Literal["folder", "git", "tar", "jsonl", "parquet"]

_KIND_OF_SUFFIX: dict[str, Kind] = {
    ".tar": "tar",
    ".tar.gz": "tar",
    ".tgz": "tar",
    ".tar.zst": "tar",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".json.gz": "jsonl",
    ".json.zst": "jsonl",
    ".parquet": "parquet",
}


@dataclass(frozen=True, slots=True)
class Input:
    """Something that documents are read from.

    `bytes` is what `Progress.bytes` comes to at its end: the size of a file as it lies there, and the sum of the
    sizes of the wanted files of a folder or a git repository.
    """

    kind: Kind
    path: Path
    bytes: int


def find_inputs(arguments: Sequence[str], *, suffixes: frozenset[str], exclude: Sequence[str]) -> list[Input]:
    """Decides by looking what each argument is.

    A folder with a `.git` and a bare repository are read by git. A folder that holds archives or tables and no file
    with one of the `suffixes` stands for these, in sorted order; any other folder is searched for files.

    Raises:
        ValueError: an argument is missing or of no known kind, git cannot read a repository, or a Parquet file has no
            column for the content. OSError: git is not installed.
    """
    selection = Selection(suffixes, exclude, max_file_bytes=0)
    return [found for argument in arguments for found in _find(Path(argument), selection)]


def read_documents(
    source: Input,
    *,
    suffixes: frozenset[str],
    exclude: Sequence[str],
    max_file_bytes: int,
    progress: Progress | None = None,
) -> Iterator[Document | Unreadable]:
    """Streams the documents of an input in an order that depends on the input alone.

    Args:
        source: one of what `find_inputs` found.
        suffixes: ends of the names of wanted files, as ".py".
        exclude: globs; a file or folder whose name, or path relative to the input, matches one is left out whole.
        max_file_bytes: larger documents are counted as too large, and not read where the input allows.
        progress: counts up by `source.bytes` while the input is read.

    """
    selection = Selection(suffixes, exclude, max_file_bytes)
    read = {"folder": _read_folder, "git": read_git, "tar": read_tar, "jsonl": read_jsonl, "parquet": read_parquet}
    return read[source.kind](source.path, selection, progress or Progress())


def walk(folder: Path, selection: Selection) -> Iterator[tuple[Path, str] | Unreadable]:
    """All files below `folder` that are not excluded, with their relative paths, in the same order on every machine.

    Links to folders are not followed.
    """
    ahead = [(folder, "")]
    while ahead:
        parent, prefix = ahead.pop()
        try:
            with os.scandir(parent) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError:
            yield Unreadable(prefix or str(folder), "unreadable")
            continue
        kept = [(entry, path) for entry in entries if selection.keeps(path := clean_path(f"{prefix}/{entry.name}"))]
        for entry, path in kept:
            if not (Path(entry).is_dir() if entry.is_symlink() else entry.is_dir()):
                yield Path(entry), path
        ahead += [(Path(entry), path) for entry, path in reversed(kept) if entry.is_dir(follow_symlinks=False)]


def _find(path: Path, selection: Selection) -> list[Input]:
    kind = _kind_of_file(path)
    if path.is_file() and kind:
        if kind == "parquet":
            check_parquet(path)
        return [Input(kind, path, path.stat().st_size)]
    if _is_git(path):
        return [Input("git", path, sum(size_bytes for _, _, size_bytes, _ in git_tree(path, selection)))]
    if path.is_dir():
        return _look_into(path, selection)
    problem = "is of no known kind" if path.exists() else "does not exist"
    raise ValueError(
        f"input {path} {problem}; known are folders, git repositories and files ending in {', '.join(_KIND_OF_SUFFIX)}"
    )


def _look_into(folder: Path, selection: Selection) -> list[Input]:
    """The archives and tables in a folder, or the folder itself if it holds wanted files or nothing of either."""
    packed: list[Path] = []
    wanted_bytes = num_wanted = 0
    for found in walk(folder, selection):
        if isinstance(found, Unreadable):
            continue
        path, relative = found
        if selection.wants(relative):
            num_wanted += 1
            wanted_bytes += _size_bytes(path)
        elif _kind_of_file(path) and path.is_file():
            packed.append(path)
    if packed and not num_wanted:
        return [found for path in sorted(packed) for found in _find(path, selection)]
    return [Input("folder", folder, wanted_bytes)]


def _read_folder(folder: Path, selection: Selection, progress: Progress) -> Iterator[Document | Unreadable]:
    for found in walk(folder, selection):
        if isinstance(found, Unreadable):
            yield found
            continue
        path, relative = found
        if selection.wants(relative):
            size_bytes = _size_bytes(path)
            progress.bytes += size_bytes
            yield _read_file(path, relative, size_bytes, selection.max_file_bytes)


def _read_file(path: Path, relative: str, size_bytes: int, max_file_bytes: int) -> Document | Unreadable:
    if size_bytes > max_file_bytes:
        return Unreadable(relative, "too_large")
    try:
        if not path.is_file():  # a pipe would wait for ever
            return Unreadable(relative, "unreadable")
        data = path.read_bytes()
    except OSError:
        return Unreadable(relative, "unreadable")
    repo, inside = split_repo(relative)
    return Document(repo, inside, "", data)


def _size_bytes(path: Path) -> int:
    """Zero for what cannot be looked at, as a link to nowhere."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _kind_of_file(path: Path) -> Kind | None:
    return next((kind for suffix, kind in _KIND_OF_SUFFIX.items() if path.name.endswith(suffix)), None)


def _is_git(path: Path) -> bool:
    bare = (path / "HEAD").is_file() and (path / "objects").is_dir() and (path / "refs").is_dir()
    return bare or (path / ".git").exists()
