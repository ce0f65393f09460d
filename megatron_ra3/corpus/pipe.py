"""A corpus behind a command, `pipe:COMMAND with {name}`: what cannot seek is fetched whole, ahead of time, and once.

The order of the stream makes that cheap: an epoch stays with one group of shards before it goes on to the next, so a
bounded cache on a local disk holds all that is needed, and every shard is fetched once per epoch. A file gets its name
in the cache only after its sha256 was found right.
"""

import fcntl
import os
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

from megatron_ra3.config import StreamConfig
from megatron_ra3.corpus.manifest import DataFile
from megatron_ra3.corpus.storage import attempt, check_size

_COMMANDS_AT_ONCE = 4


class PipeStorage:
    """The output of a shell command per file; shards are spooled into a cache folder before they are read."""

    def __init__(self, address: str, config: StreamConfig) -> None:
        """Takes over what an earlier process left in `config.cache_folder`.

        Raises:
            ValueError: the command has no `{name}`.
        """
        self._command = address.removeprefix("pipe:")
        if "{name}" not in self._command:
            raise ValueError(f"corpus.folder={address}: write {{name}} where the command takes the name of a file")
        self._config = config
        self._capacity = 2 * config.shuffle_shards + config.read_threads
        self._temporary = None if config.cache_folder else tempfile.TemporaryDirectory(prefix="ra3-shards-")
        self._folder = Path(self._temporary.name if self._temporary else config.cache_folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._pool = ThreadPoolExecutor(_COMMANDS_AT_ONCE, thread_name_prefix="spool")
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._spooled: OrderedDict[str, Future[Path]] = OrderedDict()
        for path in sorted(self._folder.glob("*-*.tar"), key=lambda path: path.stat().st_mtime):
            self._spooled[path.name] = Future()
            self._spooled[path.name].set_result(path)

    def place(self, name: str) -> str:
        """The command for a file."""
        return self._command.replace("{name}", shlex.quote(name))

    def fetch(self, name: str) -> bytes:
        """A whole file, past the cache."""

        def run() -> bytes:
            with tempfile.TemporaryFile(dir=self._folder) as output:
                self._run(name, output)
                output.seek(0)
                return output.read()

        return attempt(self.place(name), self._config, run, self._closing)

    def read(self, file: DataFile, start: int, num_bytes: int) -> bytes:
        """Bytes of a file from `start` on; waits until the whole file is spooled."""
        with self._spool(file).result().open("rb") as opened:
            opened.seek(start)
            return opened.read(num_bytes)

    def check(self, file: DataFile, *, verify: bool) -> None:
        """Nothing: the sha256 of every shard is compared as it is spooled."""

    def warm(self, file: DataFile) -> None:
        """Spools a file in the background."""
        self._spool(file)

    def close(self) -> None:
        """Ends running commands and removes a temporary cache."""
        self._closing.set()
        self._pool.shutdown(cancel_futures=True)
        if self._temporary:
            self._temporary.cleanup()

    def _spool(self, file: DataFile) -> Future[Path]:
        name = f"{file.sha256[:16]}-{file.name}"
        with self._lock:
            if name not in self._spooled:
                self._spooled[name] = self._pool.submit(self._fetch_into_cache, file, self._folder / name)
                while len(self._spooled) > self._capacity:
                    self._drop(*self._spooled.popitem(last=False))
            self._spooled.move_to_end(name)
            return self._spooled[name]

    def _drop(self, name: str, spooled: Future[Path]) -> None:
        spooled.cancel()
        spooled.add_done_callback(lambda _: (self._folder / name).unlink(missing_ok=True))

    def _fetch_into_cache(self, file: DataFile, path: Path) -> Path:
        """Runs the command unless another process of this machine has done so; OSError: it failed or sent else."""
        with path.with_suffix(".lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                partial = path.with_suffix(".partial")
                try:
                    attempt(self.place(file.name), self._config, lambda: self._spool_once(file, partial), self._closing)
                    partial.rename(path)
                finally:
                    partial.unlink(missing_ok=True)
        return path

    def _spool_once(self, file: DataFile, partial: Path) -> None:
        with partial.open("wb") as output:
            self._run(file.name, output)
        check_size(self.place(file.name), partial.stat().st_size, file)
        if DataFile.of(partial).sha256 != file.sha256:
            raise ValueError("its sha256 is not the one in the manifest")

    def _run(self, name: str, output: IO[bytes]) -> None:
        """Runs the command for a file; ends it when nothing comes for `read_timeout_s`, or at `close`."""
        with (
            tempfile.TemporaryFile(dir=self._folder) as errors,
            subprocess.Popen(
                ["/bin/sh", "-c", self.place(name)], stdout=output, stderr=errors, start_new_session=True
            ) as process,
        ):
            try:
                self._await(process, output)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            if process.returncode:
                errors.seek(0)
                said = errors.read()[-200:].decode(errors="replace").strip()
                raise OSError(f"exit status {process.returncode}: {said or 'no message'}")

    def _await(self, process: subprocess.Popen[bytes], output: IO[bytes]) -> None:
        size, heard_s = 0, time.monotonic()
        pause_s = 0.001
        while process.poll() is None:
            if self._closing.wait(pause_s):
                raise OSError("the corpus was closed")
            pause_s = min(2 * pause_s, 0.1)
            found = os.fstat(output.fileno()).st_size
            if found != size:
                size, heard_s = found, time.monotonic()
            elif time.monotonic() - heard_s > self._config.read_timeout_s:
                raise TimeoutError(f"nothing came for {self._config.read_timeout_s:g} s after {size} bytes")
