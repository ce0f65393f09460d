"""Small corpora for tests of what reads them, and servers to read them from."""

import contextlib
import hashlib
import http.server
import threading
from pathlib import Path

from megatron_ra3.corpus.manifest import Manifest
from megatron_ra3.corpus.prepare import PrepareConfig, prepare

SAMPLES = 23


def split_of(repo: str, heldout_fraction: float) -> str:
    """The split of a repository as documented: decided by its name alone, so that later corpora agree on it."""
    drawn = int.from_bytes(hashlib.sha256(repo.encode()).digest()[:8], "big")
    return "heldout" if drawn < heldout_fraction * 2**64 else "train"


def make_corpus(folder: Path, **settings) -> Manifest:
    """`folder`/out: 23 snippets from m00.py to m22.py, five per shard if `settings` say nothing else."""
    sources = folder / "src"
    sources.mkdir()
    for number in range(SAMPLES):
        (sources / f"m{number:02d}.py").write_text(f"a = {number}\nb = a\nc = '{'x' * number}'\n")
    return prepare(
        PrepareConfig(
            **{
                "sources": (str(sources),), "out": str(folder / "out"), "heldout_fraction": 0.0, "samples_per_shard": 5,
                "without": ("near_duplicates",),
            } | settings
        )
    )  # fmt: skip


@contextlib.contextmanager
def serve(folder: Path, *, knows_ranges: bool = True, fail_first: int = 0):
    """An HTTP server for `folder`; yields its URL and the list of (method, path, Range) it was asked.

    The first `fail_first` requests for each tar get status 503.
    """
    asked: list[tuple[str, str, str | None]] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def do_GET(self):
            wanted = self.headers["Range"] if knows_ranges else None
            asked.append(("GET", self.path, wanted))
            if self.path.endswith(".tar") and [path for _, path, _ in asked].count(self.path) <= fail_first:
                self.send_error(503)
                return
            if wanted is None:
                super().do_GET()
                return
            data = Path(self.translate_path(self.path))
            if not data.is_file():
                self.send_error(404)
                return
            start, end = map(int, wanted.removeprefix("bytes=").split("-"))
            part = data.read_bytes()[start : end + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

        def do_HEAD(self):
            asked.append(("HEAD", self.path, None))
            super().do_HEAD()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()
