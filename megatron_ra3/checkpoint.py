"""Checkpoints: one folder per step, one manifest in it, written last and made visible by one rename.

A run that dies while saving leaves a `.saving-` folder that nobody reads and the next save removes; what was saved
before is never touched. The loader fails closed: another format version, parallel layout, model, corpus, tokenizer or
configuration is an error that names the difference, because a run resumed on something else goes on silently wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_ra3.config import RunConfig, to_dict
from megatron_ra3.model.parallel import ParallelLayout

FORMAT_VERSION = 1
FREE_TO_CHANGE = (
    "engine.",
    "checkpoint.",
    "logging.",
    "signatures.",
    "run_folder",
    "parallel.micro_batch_tokens",
    "parallel.timeout_s",
    "corpus.folder",
    "corpus.tokenizer",
    "corpus.verify_checksums",
    "corpus.max_bad_samples",
    "corpus.prefetch_samples",
    "corpus.read_",
    "corpus.stall_s",
    "corpus.cache_folder",
    "model.folder",
    "evaluate.samples_shown",
    "em.rounds",
)
"""Settings (prefixes) that a resumed run may change: they alter neither data nor state, beyond the order of rounding.

Of the folders, the content is compared instead, and `model.folder` itself where its weights are read again
(`em.restart_from_base`, the reference policy). `em.rounds` may only grow, see `check_compatible`.
`parallel.micro_batch_tokens` changes the order of sums, hence the last bits.
"""
_FINISHED = "step-" + "[0-9]" * 8


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

    def save(self, step: int, manifest: Callable[[], Mapping[str, Any]], write_state: Callable[[Path], None]) -> Path:
        """Write the state of all ranks, then the manifest, then rename; nothing where `step` is saved already.

        `write_state` gets a folder to create, `manifest` is called once on every rank. OSError, on every rank: saving
        failed on one of them; earlier checkpoints are whole.
        """
        final = self.folder / f"step-{step:08d}"
        if self.layout.gather_from_ranks(self.layout.rank == 0 and _is_whole(final))[0]:
            return final
        partial = self.folder / f".saving-{final.name}"
        contents: dict[str, Any] = {"format_version": FORMAT_VERSION, "step": step}

        def prepare() -> None:
            contents.update(manifest())
            if self.layout.rank == 0:
                for leftover in self.folder.glob(".*-step-*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                partial.mkdir(parents=True)

        def finish() -> None:
            if self.layout.rank == 0:
                _finish(partial, final, contents)
                for old in self.finished()[: -self.keep_last]:
                    _remove(old)

        for work in (prepare, lambda: write_state(partial / "state"), finish):
            self._together(work, partial, final)
        return final

    def finished(self) -> list[Path]:
        """Folders of complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob(_FINISHED) if (path / "manifest.json").is_file())

    def latest(self) -> Path | None:
        """The newest complete checkpoint, the same on every rank."""
        newest = self.finished()[-1:] if self.layout.rank == 0 else []
        return next(iter(self.layout.gather_from_ranks(newest)[0]), None)

    def _together(self, work: Callable[[], None], partial: Path, final: Path) -> None:
        """Do `work` on every rank; where it failed on one, OSError on all at once instead of a timeout."""
        failure: Exception | None = None
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever stops a save is reported with the folder and the fix
            failure = error
        problems = self.layout.gather_from_ranks(f"{type(failure).__name__}: {failure}" if failure else "")
        if any(problems):
            if self.layout.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"cannot save checkpoint {final}: {'; '.join(dict.fromkeys(filter(None, problems)))} "
                f"({_free_bytes(self.folder)} bytes free); earlier checkpoints are untouched: free space or set "
                "run_folder to another disk, then start again"
            ) from failure


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read a manifest and check that every file it lists is there whole.

    ValueError: torn manifest, other format version, missing or cut file; the message names the checkpoint to fall
    back to, or that there is none.
    """
    older = sorted(path.name for path in checkpoint.parent.glob(_FINISHED) if path.name < checkpoint.name)
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
    """Refuse a checkpoint whose layout, model, corpus, tokenizer or settings differ; ValueError lists every difference.

    `em.rounds` may grow, which adds phases at the end; from 0, or back, it changes those that are done. A setting that
    is younger than the checkpoint counts as its default, which must leave things as they were without it.
    """
    differences = [
        f"{key}: {manifest.get(key)} in the checkpoint, {expected[key]} now"
        for key in ("layout", "model", "corpus", "tokenizer")
        if manifest.get(key) != expected[key]
    ]
    saved = _flat(to_dict(RunConfig())) | _flat(manifest["config"])
    current = _flat(expected["config"])
    rereads = any(_reads_initial_weights(settings) for settings in (saved, current))
    compared = {"model.folder"} if rereads else set()
    differences += [
        f"{key}: {saved.get(key)!r} in the checkpoint, {current.get(key)!r} now"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key) and (key in compared or not key.startswith(FREE_TO_CHANGE))
    ]
    before, now = saved["em.rounds"], current["em.rounds"]
    if now < before:
        differences.append(f"em.rounds: {before} in the checkpoint, {now} now; a resumed run may only add rounds")
    elif now > before == 0:
        differences.append(
            f"em.rounds 0 -> {now} changes the phases: give the new run a run_folder of its own and start it from this "
            "run's export"
        )
    if differences:
        raise ValueError(
            f"checkpoint {checkpoint} belongs to another run:\n  "
            + "\n  ".join(differences)
            + "\nset these back, or give the new run a run_folder of its own (ra3 export carries weights over)"
        )


def identity(config: RunConfig, layout: ParallelLayout, *, model: str, corpus: str, tokenizer: str) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes it.

    `model` comes from `model_digest`; `corpus` and `tokenizer` are fingerprints of their content.
    """
    sizes = {"tensor": layout.tp_size, "pipeline": layout.pp_size, "data": layout.dp_size}
    return {"layout": sizes, "model": model, "corpus": corpus, "tokenizer": tokenizer, "config": to_dict(config)}


def model_digest(hf_config: Mapping[str, Any]) -> str:
    """sha256 of a Hugging Face config; without its dtype, which `model.dtype` decides."""
    kept = {key: value for key, value in hf_config.items() if key not in ("dtype", "torch_dtype")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _is_whole(checkpoint: Path) -> bool:
    try:
        read_manifest(checkpoint)
    except ValueError:
        return False
    return True


def _remove(checkpoint: Path) -> None:
    """Hide, then delete: a kill in between leaves no half checkpoint to fall back to, and the next save goes on."""
    hidden = checkpoint.with_name(f".removing-{checkpoint.name}")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _finish(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest["files"] = {path.relative_to(partial).as_posix(): path.stat().st_size for path in files}
    with (partial / "manifest.json").open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():  # damaged, or it would not be written again
        _remove(final)
    partial.rename(final)
    folder = os.open(final.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _reads_initial_weights(settings: Mapping[str, Any]) -> bool:
    return bool(
        settings["em.restart_from_base"]
        or settings["objective.reference_kl"]
        or settings["objective.latent_cost"] == "sticky_kl"
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
