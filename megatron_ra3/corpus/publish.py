"""Puts a finished corpus in its place: all of it or nothing, and never over another one unasked."""

from pathlib import Path

from megatron_ra3.corpus.manifest import MANIFEST, SPLITS, Manifest


def refuse_existing(folder: Path) -> None:
    """FileExistsError if `folder` holds a finished corpus."""
    if (folder / MANIFEST).exists():
        raise FileExistsError(f"{folder} already holds a corpus; choose another --out or pass --overwrite")


def publish(staging: Path, folder: Path, manifest: Manifest) -> None:
    """Moves the finished files in `staging` to `folder`, in place of the corpus there; foreign files stay."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for split in SPLITS:
        for old in [*folder.glob(f"{split}-*.tar"), *folder.glob(f"{split}-*.npy")]:
            old.unlink()
    for new in sorted(path for path in staging.rglob("*") if path.is_file()):
        target = folder / new.relative_to(staging)
        target.parent.mkdir(exist_ok=True)
        new.replace(target)
    manifest.save(folder)
