"""Examined documents on their way into a corpus, batch by batch, so that a killed `ra3 prepare` does no work twice.

A batch is named after its number and a digest of its documents and the settings. Whoever starts again reads the inputs
again, which is cheap, and examines only the batches whose names are not there.
"""

import hashlib
import json
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from megatron_ra3 import durable
from megatron_ra3.corpus.documents import Document, Unreadable
from megatron_ra3.corpus.examine import Dropped, Kept, Rules, StagedFile, examine
from megatron_ra3.corpus.pool import worker_pool

BATCH_BYTES = 8 << 20
BATCH_DOCUMENTS = 2048
EXAMPLES_PER_REASON = 3

Read = Document | Unreadable


@dataclass(frozen=True, slots=True)
class Batch:
    """What became of the documents of one batch; `examples` holds (path, detail) of some that were dropped."""

    documents: int
    bytes: int
    dropped: dict[str, int]
    cut_dropped: dict[str, int]
    scrubbed: dict[str, int]
    examples: dict[str, list[list[str]]]
    files: tuple[StagedFile, ...]


def examine_all(
    documents: Iterable[Read], rules: Rules, fingerprint: str, folder: Path, workers: int
) -> Iterator[Path]:
    """Examines documents in `workers` processes and yields the finished batches in order, for the `load_` functions.

    `fingerprint` stands for all that decides the result besides the documents.

    Raises:
        ChildProcessError: a process died, most likely for lack of memory; the batches that were finished stay.
    """
    todo = (
        (folder / f"{number:08d}-{_digest(fingerprint, batch)}.json", batch)
        for number, batch in enumerate(_batches(documents))
    )
    if workers == 1:
        for path, batch in todo:
            yield path if path.exists() else _examine_batch(path, batch, rules)
        return
    waiting: deque[Path | Future[Path]] = deque()
    with worker_pool(workers) as pool:
        for path, batch in todo:
            waiting.append(path if path.exists() else pool.submit(_examine_batch, path, batch, rules))
            if len(waiting) > 3 * workers:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())


def load_batch(path: Path) -> Batch:
    """Reads what `examine_all` wrote, without snippets and signatures."""
    content = json.loads(path.read_text(encoding="utf-8"))
    files = tuple(StagedFile(**file | {"snippets": tuple(file["snippets"])}) for file in content.pop("files"))
    return Batch(files=files, **content)


def load_signatures(path: Path) -> np.ndarray:
    """MinHash signatures of the kept documents of a batch, [files, permutations]; permutations may be 0."""
    signatures: np.ndarray = np.load(path.with_suffix(".npy"))
    return signatures


def load_snippets(path: Path) -> bytes:
    """All encoded snippets of a batch, one after the other."""
    return zlib.decompress(path.with_suffix(".bin").read_bytes())


def _batches(documents: Iterable[Read]) -> Iterator[list[Read]]:
    batch: list[Read] = []
    num_bytes = 0
    for document in documents:
        batch.append(document)
        num_bytes += len(document.data) if isinstance(document, Document) else 0
        if num_bytes >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _digest(fingerprint: str, batch: list[Read]) -> str:
    digest = hashlib.blake2b(fingerprint.encode(), digest_size=12)
    for item in batch:
        described: tuple[str, ...] = (
            (item.path, item.reason)
            if isinstance(item, Unreadable)
            else (
                item.repo,
                item.path,
                item.licence,
                str(item.is_text),
                str(len(item.data)),
                str(zlib.crc32(item.data)),
            )
        )
        digest.update("\0".join(described).encode("utf-8", "surrogateescape") + b"\1")
    return digest.hexdigest()


def _examine_batch(path: Path, batch: list[Read], rules: Rules) -> Path:
    """Writes the snippets, then the signatures, then what makes the batch count as finished."""
    kept: list[Kept] = []
    dropped: Counter[str] = Counter()
    examples: dict[str, list[list[str]]] = {}
    for item in batch:
        try:
            found = examine(item, rules) if isinstance(item, Document) else item
        except Exception as error:
            error.add_note(f"while examining {item.path}")
            raise
        if isinstance(found, Kept):
            kept.append(found)
            continue
        dropped[found.reason] += 1
        shown = examples.setdefault(found.reason, [])
        if len(shown) < EXAMPLES_PER_REASON:
            shown.append([found.path, found.detail if isinstance(found, Dropped) else ""])
    data = b"".join(snippet for document in kept for snippet in document.snippets)
    signatures = BytesIO()
    np.save(signatures, np.stack([document.signature for document in kept]) if kept else np.zeros((0, 0)))
    durable.write(path.with_suffix(".bin"), zlib.compress(data, level=1))
    durable.write(path.with_suffix(".npy"), signatures.getvalue())
    content = Batch(
        documents=len(batch),
        bytes=sum(len(item.data) for item in batch if isinstance(item, Document)),
        dropped=dict(dropped),
        cut_dropped=dict(sum((document.cut_dropped for document in kept), Counter[str]())),
        scrubbed=dict(sum((document.scrubbed for document in kept), Counter[str]())),
        examples=examples,
        files=tuple(document.file for document in kept),
    )
    durable.write(path, json.dumps(asdict(content)).encode())
    return path


def _result(item: Path | Future[Path]) -> Path:
    return item if isinstance(item, Path) else item.result()
