"""What makes a folder a whole checkpoint: its name, its manifest, and a checksum for every file.

A disk that loses a byte, a copy that stops half-way or a manifest torn by a power cut must be seen before a run goes on
from it, and told apart from a checkpoint of another program version. Standard library only, so that an operator can
check a run folder on a login node in no time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ra3.durable import sync
from megatron_ra3.stall import ACTIVITY

FORMAT_VERSION = 2
_FINISHED = "step-" + "[0-9]" * 8
_DAMAGED = "damaged-"


class DamagedError(ValueError):
    """A checkpoint that was whole when it was saved and is not any more."""


def finished(folder: Path) -> list[Path]:
    """Folders of saved checkpoints, oldest first, whole or damaged."""
    return sorted(path for path in folder.glob(_FINISHED) if path.is_dir())


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(checkpoint.name.rpartition("-")[2])


def set_aside(folder: Path) -> list[Path]:
    """Damaged checkpoints that a resumed run has renamed."""
    return sorted(folder.glob(f"{_DAMAGED}*"))


def rename_damaged(checkpoint: Path) -> Path:
    """Take a damaged checkpoint out of the run's sight but keep it: what broke is evidence."""
    name = f"{_DAMAGED}{checkpoint.name}"
    taken = sum(path.name.startswith(name) for path in set_aside(checkpoint.parent))
    return checkpoint.rename(checkpoint.with_name(f"{name}.{taken}" if taken else name))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read a manifest and check that every file it lists is there in full size.

    DamagedError: missing or torn manifest, missing or cut file. ValueError: another format version. OSError: the disk
    refuses to read, which says nothing about the checkpoint.
    """
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise DamagedError(f"checkpoint {checkpoint}: manifest.json cannot be read ({error})") from error
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"checkpoint {checkpoint}: format version {version}, but this program reads {FORMAT_VERSION}; use the "
            "program version that wrote it, or export it to Hugging Face there"
        )
    for name, size_bytes in manifest["files"].items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found != size_bytes:
            raise DamagedError(f"checkpoint {checkpoint}: {name} has {found} bytes instead of {size_bytes}")
    return manifest


def altered(checkpoint: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """What is wrong with the content of the files `names`."""
    return [
        f"checkpoint {checkpoint}: {name} has another sha256 than when it was saved"
        for name in names
        if sha256(checkpoint / name) != manifest["sha256"][name]
    ]


def damage(checkpoint: Path) -> list[str]:
    """Everything that is wrong with a checkpoint, after reading all of it; ValueError: another format version."""
    try:
        manifest = read_manifest(checkpoint)
    except DamagedError as error:
        return [str(error)]
    return altered(checkpoint, manifest, manifest["files"])


def sha256(path: Path) -> str:
    """Checksum of a file's content."""
    ACTIVITY.moved()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, contents: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Write the manifest of everything in `folder`, durably; files that `digests` leaves out are read for theirs."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes, checksums = {}, {}
    for path in files:
        name = path.relative_to(folder).as_posix()
        sizes[name] = path.stat().st_size
        checksums[name] = digests.get(name) or _made_durable(path)
    with (folder / "manifest.json").open("w", encoding="utf-8") as file:
        json.dump({**contents, "files": sizes, "sha256": checksums}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for path in (*{path.parent for path in files}, folder):
        sync(path)


def remove(checkpoint: Path) -> None:
    """Hide, then delete: a kill in between leaves no half checkpoint to fall back to, and the next save goes on."""
    hidden = checkpoint.with_name(f".removing-{checkpoint.name}")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def superseded(checkpoints: Sequence[Path], *, keep_last: int, keep_every_steps: int) -> list[Path]:
    """Which of `checkpoints`, oldest first, may go: all but the last ones and every `keep_every_steps`-th step."""
    return [path for path in checkpoints[:-keep_last] if not keep_every_steps or step_of(path) % keep_every_steps]


def _made_durable(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
