"""Checkpoints: one folder per step, one manifest in it, written last and made visible by one rename.

Saving takes a copy while training waits; a thread per rank writes it and computes checksums, and at a later step, when
all ranks have written, the manifest is added and the folder gets its name. A run that dies before that leaves a
`.saving-` folder that nobody reads and the next save removes; what was saved before is never touched. A damaged
checkpoint is set aside for the newest whole one. The loader fails closed: another format version, model, corpus,
tokenizer or configuration is an error that names the difference, because a run resumed on something else goes on
silently wrong.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_ra3.config import RunConfig, TrainerConfig
from megatron_ra3.durable import sync
from megatron_ra3.manifest import (
    FORMAT_VERSION,
    DamagedError,
    altered,
    damage,
    finished,
    read_manifest,
    remove,
    rename_damaged,
    set_aside,
    sha256,
    superseded,
    write_manifest,
)
from megatron_ra3.model.parallel import ParallelLayout
from megatron_ra3.observe.spans import TIMELINE
from megatron_ra3.settings import to_dict

FREE_TO_CHANGE = (
    "engine.",
    "checkpoint.",
    "logging.",
    "profile.",
    "signatures.",
    "run_folder",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.micro_batch_tokens",
    "parallel.timeout_s",
    "stall_timeout_s",
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
    "tasks.file",
    "heldout.file",
    "jail.",
    "em.rounds",
    "rlvr.steps",
)
"""Settings (prefixes) that a resumed run may change: they alter neither data nor state, beyond the order of rounding.

Of folders and task files, the content is compared instead, and `model.folder` itself where its weights are read again
(`em.restart_from_base`, the reference policy). What is in `MAY_GROW` may only grow, see `check_compatible`.
The layout and `parallel.micro_batch_tokens` change the order of sums, hence the last bits.
"""


MAY_GROW = ("em.rounds", "rlvr.steps")
"""Settings that say how long a run is: a resumed one may be made longer."""


class StagedState(Protocol):
    """One rank's share of a training state, copied away from training."""

    @property
    def files(self) -> Sequence[Path]:
        """What `write` has written."""

    def write(self) -> None:
        """Write this rank's share, durably. Runs in a thread, so without collectives. OSError: the disk refuses."""

    def commit(self) -> None:
        """Complete what all ranks have written; collective, on the thread that trains."""


@dataclass
class _Save:
    """A save on its way: where to, what its manifest will say, and what its thread has found."""

    step: int
    partial: Path
    final: Path
    contents: dict[str, Any]
    started: float
    staged: StagedState | None = None
    failure: Exception | None = None
    digests: dict[str, str] = field(default_factory=dict)

    def begin(self) -> None:
        self.thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self.thread.start()

    def _write(self) -> None:
        assert self.staged is not None
        try:
            with TIMELINE.span("checkpoint, writing"):
                self.staged.write()
                self.digests = {path.relative_to(self.partial).as_posix(): sha256(path) for path in self.staged.files}
        except Exception as error:  # noqa: BLE001 - whatever stops a save is reported with the folder and the fix
            self.failure = error

    def checked(self) -> None:
        """Wait for this rank's writing and raise what stopped it."""
        self.thread.join()
        if self.failure is not None:
            raise self.failure


class Checkpoints:
    """The checkpoints of one run, oldest first on disk as `step-00000042`. All methods are collective but `abandon`.

    Args:
        folder: their parent folder.
        keep_last: older ones are removed after a save.
        keep_every_steps: except those of a step that this divides; 0: none.
        layout: this rank's place.

    `longest_save_s` is the longest a save took so far, from the copy to the manifest.
    """

    def __init__(self, folder: Path, *, keep_last: int, keep_every_steps: int = 0, layout: ParallelLayout) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.keep_every_steps = keep_every_steps
        self.layout = layout
        self.longest_save_s = 0.0
        self._save: _Save | None = None

    @property
    def saving(self) -> bool:
        """A save is on its way; the same on every rank."""
        return self._save is not None

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / f"step-{step:08d}"

    def start(self, step: int, manifest: Callable[[], Mapping[str, Any]], stage: Callable[[Path], StagedState]) -> None:
        """Copy the state of all ranks and begin to write it; nothing where `step` is saved, or being saved, already.

        `stage` gets a folder to create, `manifest` is called once on every rank. A save still on its way is completed
        first. OSError, on every rank: saving failed on one of them; earlier checkpoints are whole.
        """
        if self._save is not None and self._save.step == step:
            return
        self.wait()
        started = time.monotonic()
        final = self.path(step)
        if self.layout.gather_from_ranks(self.layout.rank == 0 and _is_whole(final))[0]:
            return
        contents: dict[str, Any] = {"format_version": FORMAT_VERSION, "step": step}
        save = _Save(step, self.folder / f".saving-{final.name}", final, contents, started)

        def prepare() -> None:
            save.contents.update(manifest())
            if self.layout.rank == 0:
                for leftover in self.folder.glob(".*-step-*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                save.partial.mkdir(parents=True)

        def copy() -> None:
            save.staged = stage(save.partial / "state")

        with TIMELINE.span("checkpoint"):
            for work in (prepare, copy):
                self._together(work, save)
        save.begin()
        self._save = save

    def poll(self) -> None:
        """Complete the save on its way if all ranks have written their share; errors as `start`."""
        if self._save is not None and not self.layout.any_rank(self._save.thread.is_alive()):
            self.wait()

    def wait(self) -> None:
        """Complete the save on its way, if any, however long it takes; errors as `start`."""
        save, self._save = self._save, None
        if save is not None:
            with TIMELINE.span("checkpoint"):
                self._complete(save)

    def _complete(self, save: _Save) -> None:
        assert save.staged is not None
        self._together(save.checked, save)
        self._together(save.staged.commit, save)
        digests = {
            name: value for share in self.layout.gather_from_ranks(save.digests) for name, value in share.items()
        }
        self._together(lambda: self._publish(save, digests), save)
        self.longest_save_s = max(self.longest_save_s, time.monotonic() - save.started)

    def abandon(self) -> None:
        """Let this rank's writing end and forget the save: the others are not there to complete it."""
        if self._save is not None:
            self._save.thread.join()
            self._save = None

    def newest_whole(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint without damage and its manifest, the same on every rank; None: there is no checkpoint.

        All its content is compared with its checksums, every rank reading its share. Damaged ones that are newer are
        renamed, and said so in one line. ValueError: none is whole, or one has another format version.
        """
        found: dict[Path, list[str]] = {}
        for checkpoint in reversed(self._from_first(finished(self.folder))):
            manifest, problems = self._read(checkpoint)
            if manifest is not None and not problems:
                self._set_aside(found, checkpoint)
                return checkpoint, manifest
            found[checkpoint] = problems
        kept = self._from_first(set_aside(self.folder))
        if found or kept:
            raise ValueError(
                f"{self.folder} holds no whole checkpoint to go on from: "
                + "; ".join([problem for problems in found.values() for problem in problems] + [str(p) for p in kept])
                + "; restore one from a copy, or give the run another run_folder to begin anew"
            )
        return None

    def _read(self, checkpoint: Path) -> tuple[dict[str, Any] | None, list[str]]:
        """Let the first rank read the manifest, and every rank compare its share of the files with it."""
        manifest: dict[str, Any] | None = None
        problems: list[str] = []
        failure: ValueError | OSError | None = None
        try:
            manifest = read_manifest(checkpoint) if self.layout.rank == 0 else None
        except DamagedError as error:
            problems = [str(error)]
        except (ValueError, OSError) as error:
            failure = error
        manifest, problems, failure = self.layout.gather_from_ranks((manifest, problems, failure))[0]
        if failure is None and manifest is not None:
            share = list(manifest["files"])[self.layout.rank :: self.layout.world_size]
            try:
                problems = altered(checkpoint, manifest, share)
            except OSError as error:
                failure = error
        answers = self.layout.gather_from_ranks((problems, failure))
        for _, refusal in answers:
            if refusal is not None:
                raise refusal
        return manifest, list(dict.fromkeys(problem for found, _ in answers for problem in found))

    def _set_aside(self, found: Mapping[Path, Sequence[str]], whole: Path) -> None:
        if self.layout.rank == 0:
            for checkpoint, problems in found.items():
                kept = rename_damaged(checkpoint)
                print(f"WARNING: {'; '.join(problems)}: kept as {kept.name}, going on from {whole.name}", flush=True)
        self.layout.barrier("damaged checkpoints set aside")

    def _from_first(self, paths: list[Path]) -> list[Path]:
        """What the first rank sees: a shared file system may show the others something older."""
        return self.layout.gather_from_ranks(paths if self.layout.rank == 0 else [])[0]

    def _publish(self, save: _Save, digests: Mapping[str, str]) -> None:
        if self.layout.rank != 0:
            return
        write_manifest(save.partial, save.contents, digests)
        if save.final.exists():  # damaged, or it would not be written again
            rename_damaged(save.final)
        save.partial.rename(save.final)
        sync(self.folder)
        for old in superseded(finished(self.folder), keep_last=self.keep_last, keep_every_steps=self.keep_every_steps):
            remove(old)

    def _together(self, work: Callable[[], None], save: _Save) -> None:
        """Do `work` on every rank; where it failed on one, OSError on all at once instead of a timeout."""
        failure: Exception | None = None
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever stops a save is reported with the folder and the fix
            failure = error
        problems = self.layout.gather_from_ranks(f"{type(failure).__name__}: {failure}" if failure else "")
        if any(problems):
            if self.layout.rank == 0:
                shutil.rmtree(save.partial, ignore_errors=True)
            raise OSError(
                f"cannot save checkpoint {save.final}: {'; '.join(dict.fromkeys(filter(None, problems)))} "
                f"({_free_bytes(self.folder)} bytes free); earlier checkpoints are untouched: free space or set "
                "run_folder to another disk, then start again"
            ) from failure


def check_compatible(
    checkpoint: Path,
    manifest: Mapping[str, Any],
    expected: Mapping[str, Any],
    kind: type[TrainerConfig] = RunConfig,
) -> None:
    """Refuse a checkpoint whose model, corpus, tokenizer or settings differ; ValueError lists every difference.

    `MAY_GROW` may grow, which adds phases at the end; from 0, or back, it changes those that are done. A setting of
    `kind` that is younger than the checkpoint counts as its default, which must leave things as they were without it.
    """
    differences = [
        f"{key}: {manifest.get(key)} in the checkpoint, {expected[key]} now"
        for key in ("model", "corpus", "tokenizer")
        if manifest.get(key) != expected[key]
    ]
    saved = _flat(to_dict(kind())) | _flat(manifest["config"])
    current = _flat(expected["config"])
    rereads = any(_reads_initial_weights(settings) for settings in (saved, current))
    compared = {"model.folder"} if rereads else set()
    differences += [
        f"{key}: {saved.get(key)!r} in the checkpoint, {current.get(key)!r} now"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key) and (key in compared or not key.startswith(FREE_TO_CHANGE))
    ]
    for key in MAY_GROW:
        before, now = saved.get(key, 0), current.get(key, 0)
        if now < before:
            differences.append(f"{key}: {before} in the checkpoint, {now} now; a resumed run may only be made longer")
        elif now > before == 0:
            differences.append(
                f"{key} 0 -> {now} changes the phases: give the new run a run_folder of its own and start it from this "
                "run's export"
            )
    if differences:
        raise ValueError(
            f"checkpoint {checkpoint} belongs to another run:\n  "
            + "\n  ".join(differences)
            + "\nset these back, or give the new run a run_folder of its own (ra3 export carries weights over)"
        )


def identity(
    config: TrainerConfig, layout: ParallelLayout, *, model: str, corpus: str, tokenizer: str
) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes it, and the layout it was saved by.

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
        return not damage(checkpoint)
    except (ValueError, OSError):  # whatever it is, saving again is right, or reports it
        return False


def _reads_initial_weights(settings: Mapping[str, Any]) -> bool:
    weights = ("em.restart_from_base", "objective.reference_kl", "rlvr.reference_kl")
    return any(settings.get(key) for key in weights) or settings.get("objective.latent_cost") == "sticky_kl"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
