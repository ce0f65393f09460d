"""Puts a finished corpus in its place, and never over another one or over a foreign file.

Many files cannot change places at once, and a kill half-way would leave shards of two corpora beside each other. So
what is to be done is written down first, in one small file. From then on it will be done: by this process, or by the
next one that claims the folder.
"""

import fcntl
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ra3 import durable
from megatron_ra3.corpus.manifest import MANIFEST, Manifest
from megatron_ra3.corpus.tokenizer import FOLDER

REPORT, PAGE = "report.json", "report.html"
_STAGING = ".preparing"
_JOURNAL = ".publishing.json"
_DATA = re.compile(r"(train|heldout)-\d{5}\.(tar|npy)")


@contextmanager
def claim(out: Path) -> Iterator[Path]:
    """A folder in `out` for a corpus on its way, in `corpus` below it; removed when the block ends well.

    After a kill or an error it stays, for the next one who claims it.

    Raises:
        FileExistsError: another process holds it.
    """
    folder = out / _STAGING
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"another process is preparing a corpus in {out}; wait for it, or choose another --out"
            ) from None
        yield folder
        shutil.rmtree(folder)


def refuse_existing(out: Path, fix: str) -> None:
    """FileExistsError, with the `fix`, if `out` holds a finished corpus."""
    if (out / MANIFEST).exists():
        raise FileExistsError(f"{out} already holds a corpus; {fix}")


def publish(out: Path, manifest: Manifest) -> Manifest:
    """Moves the finished files of the claimed folder to `out`, in place of the corpus there; the manifest comes last.

    Raises:
        FileExistsError: a file that belongs to no corpus is in the way; nothing was changed.
    """
    staging = out / _STAGING / "corpus"
    old = _files_of_corpus(out)
    new = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
    for name in new:
        if name not in old and (out / name).exists():
            raise FileExistsError(f"{out / name} is in the way and belongs to no corpus; choose another --out")
        durable.sync(staging / name)
    manifest.save(staging)
    durable.sync(staging)
    journal = out / _STAGING / "journal"
    durable.write(journal, json.dumps({"old": sorted(old - set(new)), "new": new}).encode())
    journal.rename(out / _JOURNAL)
    durable.sync(out)
    return finish_publication(out)


def is_publishing(out: Path) -> bool:
    """Whether a corpus was about to take its place in `out` when its process ended."""
    return (out / _JOURNAL).exists()


def finish_publication(out: Path) -> Manifest:
    """Does what `publish` wrote down, however much of it is done already; for whoever has claimed `out`."""
    journal = json.loads((out / _JOURNAL).read_bytes())
    staging = out / _STAGING / "corpus"
    if (staging / MANIFEST).exists():
        (out / MANIFEST).unlink(missing_ok=True)
        for name in journal["old"]:
            (out / name).unlink(missing_ok=True)
        for name in journal["new"]:
            if (staging / name).exists():
                (out / name).parent.mkdir(exist_ok=True)
                (staging / name).replace(out / name)
        for folder in {(out / name).parent for name in journal["new"]}:
            durable.sync(folder)
        (staging / MANIFEST).replace(out / MANIFEST)
        durable.sync(out)
    clear(out / _STAGING)
    (out / _JOURNAL).unlink()
    return Manifest.load(out)


def clear(claimed: Path) -> None:
    """Removes what an earlier process left in a claimed folder."""
    for path in claimed.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _files_of_corpus(out: Path) -> set[str]:
    """The files that belong to the corpus in `out` besides the manifest; by their names where that is unreadable."""
    if not (out / MANIFEST).exists():
        return set()
    others = {path.relative_to(out).as_posix() for path in (out / FOLDER).glob("*") if path.is_file()} | {REPORT, PAGE}
    try:
        splits = Manifest.load(out).splits.values()
    except ValueError:
        return others | {path.name for path in out.iterdir() if _DATA.fullmatch(path.name)}
    return others | {file.name for split in splits for shard in split.shards for file in (shard.tar, shard.index)}
