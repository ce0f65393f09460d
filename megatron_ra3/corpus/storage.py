"""Where the bytes of a corpus come from: a local folder, a URL of fsspec, or a command that writes a file to stdout.

The stream asks for ranges of shards and knows nothing else. What each kind of storage does when it fails is decided
here, once: a read either gives the bytes, or an OSError that names the file, after as many attempts as are set. Bytes
that are too few are given as they are: what is torn is for the reader to say.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from megatron_ra3.config import StreamConfig
from megatron_ra3.corpus.manifest import DataFile
from megatron_ra3.validation import is_local

_T = TypeVar("_T")
_FIX = "restore it or run `ra3 prepare --overwrite` again"


class Storage(Protocol):
    """Read access to the files of one corpus folder, from any thread."""

    def place(self, name: str) -> str:
        """The file's path or URL, for messages."""

    def fetch(self, name: str) -> bytes:
        """A whole file. OSError: it is missing or out of reach."""

    def read(self, file: DataFile, start: int, num_bytes: int) -> bytes:
        """Bytes of a file from `start` on, fewer where it ends early. OSError: it is missing or out of reach."""

    def check(self, file: DataFile, *, verify: bool) -> None:
        """Compares a file with what the manifest says, as far as that is cheap, or further with `verify`.

        Raises:
            OSError: it is missing. ValueError: it is torn or has changed.
        """

    def warm(self, file: DataFile) -> None:
        """Says that reads of this file will come; returns at once."""

    def close(self) -> None:
        """Ends what runs in the background and removes temporary files."""


def open_storage(folder: str | Path, config: StreamConfig) -> Storage:
    """The storage of a corpus folder: a path, a URL, or `pipe:COMMAND`.

    Raises:
        ValueError: a malformed address, an unknown protocol, or one whose package is not installed.
    """
    if isinstance(folder, Path) or is_local(folder):
        return LocalStorage(Path(folder))
    if folder.startswith("pipe:"):
        from megatron_ra3.corpus.pipe import PipeStorage

        return PipeStorage(folder, config)
    return UrlStorage(folder, config)


class LocalStorage:
    """A folder of this machine. Files are opened for each read: however many shards, none stays open."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def place(self, name: str) -> str:
        """The file's path."""
        return str(self._folder / name)

    def fetch(self, name: str) -> bytes:
        """A whole file."""
        return (self._folder / name).read_bytes()

    def read(self, file: DataFile, start: int, num_bytes: int) -> bytes:
        """Bytes of a file from `start` on."""
        with (self._folder / file.name).open("rb") as opened:
            opened.seek(start)
            return opened.read(num_bytes)

    def check(self, file: DataFile, *, verify: bool) -> None:
        """Compares the size, with `verify` also the sha256."""
        path = self._folder / file.name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing although the manifest lists it; {_FIX}")
        check_size(str(path), path.stat().st_size, file)
        if verify and DataFile.of(path) != file:
            raise ValueError(f"{path} has changed: its sha256 is not the one in the manifest; {_FIX}")

    def warm(self, file: DataFile) -> None:
        """Nothing: any byte is one seek away."""

    def close(self) -> None:
        """Nothing stays open."""


class UrlStorage:
    """A folder behind an fsspec URL; a read is one range request, tried again before it counts as failed."""

    def __init__(self, url: str, config: StreamConfig) -> None:
        self._url = url.rstrip("/")
        self._config = config
        self._filesystem = _filesystem(url)

    def place(self, name: str) -> str:
        """The file's URL."""
        return f"{self._url}/{name}"

    def fetch(self, name: str) -> bytes:
        """A whole file."""
        return bytes(self._call(name, "cat_file"))

    def read(self, file: DataFile, start: int, num_bytes: int) -> bytes:
        """Bytes of a file from `start` on."""
        data: bytes = self._call(file.name, "cat_file", start=start, end=start + num_bytes)
        if len(data) > num_bytes:
            raise OSError(
                f"{self.place(file.name)}: the server sent {len(data)} bytes where {num_bytes} were asked for, so it "
                f"knows no range requests; fetch whole shards with corpus.folder='pipe:curl -fsS {self._url}/{{name}}'"
            )
        return data

    def check(self, file: DataFile, *, verify: bool) -> None:
        """With `verify` compares the size; without, asks nothing."""
        if verify:
            found = self._call(file.name, "info")["size"]
            if found is not None:  # a server may not tell
                check_size(self.place(file.name), found, file)

    def warm(self, file: DataFile) -> None:
        """Nothing: any byte is one request away."""

    def close(self) -> None:
        """Nothing: fsspec keeps its connections for the next reader."""

    def _call(self, name: str, method: str, **arguments: Any) -> Any:
        """Calls a method of the filesystem on a file; its silence ends after `read_timeout_s` where it is async."""
        filesystem, url = self._filesystem, self.place(name)
        if not filesystem.async_impl:
            return attempt(url, self._config, lambda: getattr(filesystem, method)(url, **arguments))
        from fsspec.asyn import sync

        function, timeout_s = getattr(filesystem, f"_{method}"), self._config.read_timeout_s
        return attempt(url, self._config, lambda: sync(filesystem.loop, function, url, timeout=timeout_s, **arguments))


def attempt(place: str, config: StreamConfig, read: Callable[[], _T], stop: threading.Event | None = None) -> _T:
    """What `read` returns, after up to `read_attempts` tries with pauses of 0.5 s, 1 s, 2 s, ... between them.

    Raises:
        OSError: the last try failed too, `stop` was set, or at once: the file is missing or access is denied.
    """
    for number in range(1, config.read_attempts + 1):
        started_s = time.monotonic()
        try:
            return read()
        except (FileNotFoundError, PermissionError) as error:
            raise type(error)(f"{place} is missing or not ours to read ({type(error).__name__}: {error})") from error
        except Exception as error:  # noqa: BLE001 - every backend of fsspec has its own kinds
            seconds = time.monotonic() - started_s
            reason = " ".join(f"{type(error).__name__} {error}".split())
            failure = OSError(
                f"{place}: attempt {number} of {config.read_attempts} failed after {seconds:.1f} s ({reason})"
            )
            failure.__cause__ = error
        if number < config.read_attempts and (stop or threading.Event()).wait(0.5 * 2 ** (number - 1)):
            break
    raise failure


def check_size(place: str, found_bytes: int, expected: DataFile) -> None:
    """ValueError: a file has not the size that the manifest says."""
    if found_bytes != expected.bytes:
        raise ValueError(f"{place} is torn: {found_bytes} bytes, the manifest says {expected.bytes}; {_FIX}")


def _filesystem(url: str) -> Any:
    protocol = url.partition("://")[0]
    try:
        import fsspec

        return fsspec.filesystem(protocol)
    except ImportError as error:
        extra = {"s3": "s3", "s3a": "s3", "http": "data", "https": "data"}.get(protocol)
        fix = f"pip install 'megatron-ra3[{extra}]'" if extra else "install that package"
        raise ValueError(f"corpus.folder={url}: {error}; {fix}") from error
    except ValueError as error:
        raise ValueError(f"corpus.folder={url}: {error}") from error
