"""Streams documents out of tar archives and git repositories, and says where a damaged one breaks.

Both `tarfile` and `zstandard` take an archive that was cut off for one that ends there; a corpus would silently lose
whatever came after.
"""

import io
import os
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from megatron_ra3.corpus.documents import Document, Progress, Selection, Unreadable, clean_path, split_repo

# What a damaged archive raises while it is read.
DAMAGE = (OSError, EOFError, ValueError, zlib.error, tarfile.TarError)
_TAR_READ_BYTES = 1 << 17
_ZSTD_READ_BYTES = 512  # a byte may stand for 32 KiB, and what one read returns is decompressed at once
_LINK_MODE = b"120000"


@contextmanager
def open_decompressed(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Opens a file that is compressed as its name says: (the file itself, what it holds).

    Reading raises EOFError, OSError or zlib.error where the compressed data are cut off or damaged.
    """
    with path.open("rb") as file:
        match path.suffix:
            case ".gz" | ".tgz":
                import gzip

                yield file, cast("IO[bytes]", gzip.GzipFile(fileobj=file))
            case ".zst":
                yield file, io.BufferedReader(_ZstdFrames(file), 1 << 16)
            case _:
                yield file, file


def read_tar(path: Path, selection: Selection, progress: Progress) -> Iterator[Document | Unreadable]:
    """Documents of a tar archive in its order; the repository is the first folder, as in archives from GitHub.

    Links are counted as unreadable: a stream cannot go back to what they point to.
    """
    start_bytes, last = progress.bytes, "its start"
    try:
        with open_decompressed(path) as (file, content), _open_tar(content) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would remember every member
                progress.bytes = start_bytes + file.tell()
                last = clean_path(member.name)
                if not member.isdir() and selection.wants(last):
                    yield _read_member(tar, member, last, selection.max_file_bytes)
            _check_end(tar)
    except DAMAGE as error:
        yield Unreadable(f"{path}: broken after {last} ({error})", "unreadable")


def git_tree(repository: Path, selection: Selection) -> Iterator[tuple[bytes, bytes, int, str]]:
    """(mode, object id, size in bytes, path) of the wanted files in the tree of HEAD, in the order of git.

    Raises:
        OSError: git is not installed. ValueError: git cannot read the repository.
    """
    process = _git(repository, "ls-tree", "-r", "-z", "-l", "--full-tree", "HEAD", stderr=subprocess.PIPE)
    with process:
        for entry in _entries(cast("io.BufferedReader", process.stdout)):
            attributes, _, name = entry.partition(b"\t")
            mode, kind, object_id, size = attributes.split()
            path = clean_path(name.decode("utf-8", "replace"))
            if kind == b"blob" and selection.wants(path):
                yield mode, object_id, int(size) if size.isdigit() else 0, path  # "BAD" for a lost object
        message = cast("IO[bytes]", process.stderr).read().decode("utf-8", "replace").strip()
    if process.returncode:
        raise ValueError(f"git cannot read HEAD of {repository}: {message}; check out a commit or leave it out")


def read_git(repository: Path, selection: Selection, progress: Progress) -> Iterator[Document | Unreadable]:
    """Documents in the tree of HEAD, as they are stored; the working tree does not matter.

    Asks for the objects one by one: `git archive` would leave out what .gitattributes says not to export, convert
    newlines and read the files of all other languages too.
    """
    repo = repository.resolve().name.removesuffix(".git")
    with _git(repository, "cat-file", "--batch", stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as objects:
        for mode, object_id, size_bytes, path in git_tree(repository, selection):
            progress.bytes += size_bytes
            if size_bytes > selection.max_file_bytes:
                yield Unreadable(path, "too_large")
                continue
            data = None if mode == _LINK_MODE else _read_object(objects, object_id)
            yield Unreadable(path, "unreadable") if data is None else Document(repo, path, "", data)


class _Member(tarfile.TarInfo):
    """Raises where `tarfile` would end quietly: at a header that is missing, cut off or damaged."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # the mark at the end of a whole archive
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no end mark, {error}") from error


class _ZstdFrames(io.RawIOBase):
    """Decompresses zstd frames that follow one another; a cut off frame is an EOFError, a damaged one an OSError."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._frame: Any = None
        self._compressed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content and self._decompress_more():
            pass
        size = min(len(buffer), len(self._content))
        buffer[:size] = self._content[:size]
        self._content = self._content[size:]
        return size

    def _decompress_more(self) -> bool:
        """False at the end of the last frame."""
        import zstandard

        compressed = self._compressed or self._file.read(_ZSTD_READ_BYTES)
        if not compressed:
            if self._frame is not None:
                raise EOFError("the last zstd frame is cut off")
            return False
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            self._content = memoryview(self._frame.decompress(compressed))
        except zstandard.ZstdError as error:
            raise OSError(f"damaged zstd frame: {error}") from error
        self._compressed = b""
        if self._frame.eof:
            self._compressed, self._frame = self._frame.unused_data, None
        return True


def _open_tar(content: IO[bytes]) -> tarfile.TarFile:
    return tarfile.open(
        fileobj=content, mode="r|", bufsize=_TAR_READ_BYTES, tarinfo=_Member, encoding="utf-8", errors="replace"
    )


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str, max_bytes: int) -> Document | Unreadable:
    if member.size > max_bytes:
        return Unreadable(path, "too_large")
    file = tar.extractfile(member) if member.isreg() else None
    if file is None:
        return Unreadable(path, "unreadable")
    repo, inside = split_repo(path)
    return Document(repo, inside, "", file.read())


def _check_end(tar: tarfile.TarFile) -> None:
    """Reads what follows the end mark, which also makes gzip compare its checksum."""
    while rest := cast("IO[bytes]", tar.fileobj).read(_TAR_READ_BYTES):
        if rest.strip(b"\0"):
            raise tarfile.ReadError("data after the end mark, perhaps of a second archive")


def _git(repository: Path, *arguments: str, **pipes: Any) -> "subprocess.Popen[bytes]":
    try:
        return subprocess.Popen(["git", "-C", repository, *arguments], stdout=subprocess.PIPE, **pipes)
    except FileNotFoundError as error:
        raise OSError(f"git is not installed, but {repository} is a git repository; install git") from error


def _entries(pipe: io.BufferedReader) -> Iterator[bytes]:
    """What stands before each null byte."""
    rest = b""
    while chunk := pipe.read1(1 << 16):
        *entries, rest = (rest + chunk).split(b"\0")
        yield from entries


def _read_object(objects: "subprocess.Popen[bytes]", object_id: bytes) -> bytes | None:
    """One object from `git cat-file --batch`; None if it is missing or damaged, also for all after git gave up."""
    requests, answers = cast("IO[bytes]", objects.stdin), cast("IO[bytes]", objects.stdout)
    try:
        os.write(requests.fileno(), object_id + b"\n")
    except BrokenPipeError:
        return None
    header = answers.readline().split()
    if len(header) != 3:  # "<object> missing", or nothing
        return None
    size_bytes = int(header[2])
    data = answers.read(size_bytes + 1)[:size_bytes]
    return data if len(data) == size_bytes else None
