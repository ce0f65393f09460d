"""Shows how far the reading of the inputs is: bytes, rate and time left, on a terminal and in a job's log."""

import sys
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from megatron_ra3.corpus.documents import Document, Progress, Unreadable
from megatron_ra3.corpus.inputs import Input, read_documents

_LOG_INTERVAL_S = 60.0


def read_with_progress(
    inputs: Sequence[Input], *, suffixes: frozenset[str], exclude: Sequence[str], max_file_bytes: int
) -> Iterator[Document | Unreadable]:
    """All documents of all inputs, in order."""
    terminal = sys.stderr.isatty()
    with tqdm(
        total=sum(source.bytes for source in inputs),
        desc="prepare",
        unit="B",
        unit_scale=True,
        mininterval=0.5 if terminal else _LOG_INTERVAL_S,
        delay=0.0 if terminal else _LOG_INTERVAL_S,
    ) as bar:
        before = 0
        for source in inputs:
            progress = Progress()
            for document in read_documents(
                source, suffixes=suffixes, exclude=exclude, max_file_bytes=max_file_bytes, progress=progress
            ):
                bar.update(before + progress.bytes - bar.n)
                yield document
            before += source.bytes
