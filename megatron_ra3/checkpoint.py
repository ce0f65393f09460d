"""Checkpoints: one folder per step, one manifest in it, written last and made visible by one rename.

A run that dies while saving leaves a `.saving` folder that nobody reads; what was saved before is never touched. The
loader fails closed: another format version, parallel layout, corpus, tokenizer or configuration is an error that
names the difference, because a run resumed on something else goes on silently wrong.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_ra3.config import RunConfig, to_dict
from megatron_ra3.model.parallel import ParallelLayout

FORMAT_VERSION = 1
FREE_TO_CHANGE = ("engine.", "checkpoint.", "logging.", "run_folder", "em.rounds", "corpus.folder", "model.folder")
"""Settings (prefixes) that a resumed run may change: they alter neither the data nor the state."""


class Checkpoints:
    """The checkpoints of one run, oldest first on disk as `step-00000042`.

    Args:
        folder: their parent folder.
        keep_last: older ones are removed after a save.
        layout: this rank's place; saving and loading are collective.
    """

    def __init__(self, folder: Path, *, keep_last: int, layout: ParallelLayout) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.layout = layout

    def save(self, step: int, manifest: Mapping[str, Any], write_state: Callable[[Path], None]) -> Path:
        """Write the state of all ranks, then the manifest, then rename; OSError leaves earlier checkpoints whole."""
        final = self.folder / f"step-{step:08d}"
        partial = final.with_suffix(".saving")
        if self.layout.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.layout.barrier(f"checkpoint {step}: folder")
        problem = ""
        try:
            write_state(partial / "state")
            self.layout.barrier(f"checkpoint {step}: state written")
            if self.layout.rank == 0:
                _finish(partial, final, {"format_version": FORMAT_VERSION, "step": step, **manifest})
        except Exception as error:  # noqa: BLE001 - whatever stops a save is reported with the folder and the fix
            problem = f"{type(error).__name__}: {error}"
        problems = [text for text in self._all_ranks(problem) if text]
        if problems:
            if self.layout.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"cannot save checkpoint {final}: {problems[0]} ({_free_bytes(self.folder)} bytes free); earlier "
                "checkpoints are untouched: free space or set run_folder to another disk, then start again"
            )
        if self.layout.rank == 0:
            for old in self.finished()[: -self.keep_last]:
                shutil.rmtree(old)
        return final

    def finished(self) -> list[Path]:
        """Folders of complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if (path / "manifest.json").is_file())

    def latest(self) -> Path | None:
        """The newest complete checkpoint, the same on every rank."""
        newest = self.finished()[-1:] if self.layout.rank == 0 else []
        return next(iter(self._all_ranks(newest)[0]), None)

    def _all_ranks(self, value: Any) -> list[Any]:
        if self.layout.world_size == 1:
            return [value]
        import torch.distributed as dist

        gathered = [None] * self.layout.world_size
        dist.all_gather_object(gathered, value, group=self.layout.control_group)
        return gathered


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read a manifest and check that every file it lists is there whole.

    ValueError: torn manifest, other format version, missing or cut file; the message names the checkpoint to fall
    back to, or that there is none.
    """
    older = sorted(path.name for path in checkpoint.parent.glob("step-*") if path.name < checkpoint.name)
    fallback = f"remove it to fall back to {older[-1]}" if older else "there is no older checkpoint to fall back to"
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {checkpoint}: manifest.json cannot be read ({error}); {fallback}") from error
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"checkpoint {checkpoint}: format version {version}, but this program reads {FORMAT_VERSION}; use the "
            "program version that wrote it, or export it to Hugging Face there"
        )
    for name, size in manifest["files"].items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise ValueError(f"checkpoint {checkpoint}: {name} has {found} bytes instead of {size}; {fallback}")
    return manifest


def check_compatible(checkpoint: Path, manifest: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose layout, corpus, tokenizer or settings differ; ValueError lists every difference."""
    differences = [
        f"{key}: {manifest[key]} in the checkpoint, {expected[key]} now"
        for key in ("layout", "corpus", "tokenizer")
        if manifest[key] != expected[key]
    ]
    saved, current = _flat(manifest["config"]), _flat(expected["config"])
    differences += [
        f"{key}: {saved.get(key)!r} in the checkpoint, {current.get(key)!r} now"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key) and not key.startswith(FREE_TO_CHANGE)
    ]
    if differences:
        raise ValueError(
            f"checkpoint {checkpoint} belongs to another run:\n  "
            + "\n  ".join(differences)
            + "\nset these back, or give the new run a run_folder of its own (ra3 export carries weights over)"
        )


def identity(config: RunConfig, layout: ParallelLayout, *, corpus: str, tokenizer: str) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes it; `corpus` and `tokenizer` are fingerprints."""
    sizes = {"tensor": layout.tp_size, "pipeline": layout.pp_size, "data": layout.dp_size}
    return {"layout": sizes, "corpus": corpus, "tokenizer": tokenizer, "config": to_dict(config)}


def _finish(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest["files"] = {path.relative_to(partial).as_posix(): path.stat().st_size for path in files}
    with (partial / "manifest.json").open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    folder = os.open(final.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free
