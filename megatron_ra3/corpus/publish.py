"""Puts a finished corpus in its place, and never over another one or over a foreign file."""

import shutil
from pathlib import Path

from megatron_ra3.corpus.manifest import MANIFEST, Manifest
from megatron_ra3.corpus.tokenizer import FOLDER
from megatron_ra3.durable import sync


def refuse_existing(folder: Path, fix: str) -> None:
    """FileExistsError, with the `fix`, if `folder` holds a finished corpus."""
    if (folder / MANIFEST).exists():
        raise FileExistsError(f"{folder} already holds a corpus; {fix}")


def publish(staging: Path, folder: Path, manifest: Manifest) -> None:
    """Moves the finished files in `staging` to `folder`, in place of the corpus there; the manifest comes last.

    Raises:
        FileExistsError: a file that belongs to no corpus is in the way; nothing was changed.
    """
    old = _old_files(folder)
    new = sorted(path for path in staging.rglob("*") if path.is_file())
    for path in new:
        target = folder / path.relative_to(staging)
        if target.exists() and target.name.endswith((".tar", ".npy")) and target not in old:
            raise FileExistsError(f"{target} is in the way and belongs to no corpus; choose another --out")
        sync(path)
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in old:
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    for path in new:
        target = folder / path.relative_to(staging)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
    sync(folder)
    manifest.save(folder)
    sync(folder)


def _old_files(folder: Path) -> set[Path]:
    """The shards and indexes that the manifest in `folder` lists; none where there is no readable one."""
    try:
        splits = Manifest.load(folder).splits.values()
    except (FileNotFoundError, ValueError):
        return set()
    return {folder / file.name for split in splits for shard in split.shards for file in (shard.tar, shard.index)}
