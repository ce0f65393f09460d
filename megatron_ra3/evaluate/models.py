"""The models of an evaluation: Hugging Face folders, and runs, whose newest checkpoint is exported once.

An evaluation that goes on tomorrow must be of the same weights. So a run's export is kept in the evaluation's folder,
and every model is known by the checksums of its files rather than by its path.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ra3 import durable
from megatron_ra3.corpus.tokenizer import CodeTokenizer
from megatron_ra3.manifest import finished, read_manifest, sha256

_SHOWN_LINES = 20


@dataclass(frozen=True)
class EvaluatedModel:
    """One model by its name in the result. `folder` is a Hugging Face folder; `source` says what it was made from."""

    name: str
    folder: Path
    source: str
    sha256: Mapping[str, str]
    """Of config.json, tokenizer.json and all weights together."""

    def identity(self) -> dict[str, Any]:
        """For the result file; only the checksums count when an evaluation is resumed."""
        return {"source": self.source, "sha256": dict(self.sha256)}


def parse_models(items: Sequence[str]) -> dict[str, Path]:
    """`name=FOLDER` items; ValueError for another form, or for names that are no file names or occur twice."""
    models: dict[str, Path] = {}
    for item in items:
        name, _, folder = item.partition("=")
        if not folder or not all(letter.isalnum() or letter in "-_." for letter in name) or name.startswith("."):
            raise ValueError(f"model {item!r}: write it as name=FOLDER, the name of letters, digits, '-', '_' and '.'")
        if name in models:
            raise ValueError(f"model {item!r}: the name {name!r} occurs twice")
        models[name] = Path(folder)
    return models


def resolve_model(name: str, folder: Path, exports: Path) -> EvaluatedModel:
    """A Hugging Face folder as it is; the newest checkpoint of a run as exported into `exports`, now or before.

    ValueError: the folder is neither, or cannot be exported.
    """
    if (folder / "config.json").is_file():
        return EvaluatedModel(name, folder, str(folder), fingerprint(folder))
    if not (folder / "checkpoints").is_dir():
        raise ValueError(f"model {name}={folder}: is neither a Hugging Face folder (config.json) nor a run folder")
    out = exports / name
    if not (out / "source.json").is_file():
        _export(name, folder, out)
    source = json.loads((out / "source.json").read_text(encoding="utf-8"))
    if Path(source["run"]).resolve() != folder.resolve():
        raise ValueError(f"model {name}={folder}: {out} is an export of {source['run']}; choose another name")
    return EvaluatedModel(name, out, f"{source['run']}, {source['checkpoint']}", fingerprint(out))


def _export(name: str, run: Path, out: Path) -> None:
    """In a process of its own: it would keep memory of the GPU that the server needs."""
    saved = finished(run / "checkpoints")
    if not saved:
        raise ValueError(f"model {name}={run}: the run has no checkpoint yet")
    manifest = read_manifest(saved[-1])
    print(f"exporting {saved[-1]}", flush=True)
    partial = out.with_name(f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = out.with_name(f"{name}.run.json")
    durable.write(settings, json.dumps({**manifest["config"], "run_folder": str(run)}).encode())
    command = [sys.executable, "-m", "megatron_ra3", "export", str(settings), str(partial)]
    finished_process = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished_process.returncode:
        tail = "\n".join(finished_process.stderr.splitlines()[-_SHOWN_LINES:])
        raise ValueError(f"model {name}={run}: cannot be exported:\n{tail}")
    exported = finished_process.stdout.split()[1] if finished_process.stdout.startswith("exported ") else str(saved[-1])
    durable.write(partial / "source.json", json.dumps({"run": str(run), "checkpoint": Path(exported).name}).encode())
    partial.rename(out)


def fingerprint(folder: Path) -> dict[str, str]:
    """Checksums of what a model computes with; ValueError where a part is missing. Reads all weights."""
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    if not weights:
        raise ValueError(f"{folder}: holds no weights (*.safetensors)")
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder}: holds no tokenizer.json; save the tokenizer there with transformers")
    together = hashlib.sha256()
    for path in weights:
        together.update(f"{path.name} {sha256(path)}\n".encode())
    return {
        "config": sha256(folder / "config.json"),
        "tokenizer": sha256(folder / "tokenizer.json"),
        "weights": together.hexdigest(),
    }


def context_tokens(folder: Path) -> int:
    """The longest sequence the model was made for."""
    config = _json(folder / "config.json")
    longest = config.get("max_position_embeddings")
    if not isinstance(longest, int):
        raise ValueError(f"{folder / 'config.json'}: has no max_position_embeddings; set engine.max_model_len")
    return longest


def end_ids(folder: Path, tokenizer: CodeTokenizer) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and those the model's own files name."""
    ids = {tokenizer.eos_id}
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            named = _json(folder / name).get("eos_token_id")
            ids.update([named] if isinstance(named, int) else named or [])
    return frozenset(token for token in ids if token < tokenizer.vocab_size)


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
