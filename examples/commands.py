"""Runs the commands of the examples: each into a log of its own, and only where its result is not there yet."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

RA3 = [sys.executable, "-m", "megatron_ra3"]
CONTROL_EM = ("objective.line_gradient=1",)
"""RA3's settings on the positive control beside its run.yaml: a model this small unlearns its lines without."""
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
    **os.environ,
}
"""One thread, and memory that is given back late: with models this small, page faults would cost a fifth."""
_CONTENT = ("*.json", "*.safetensors")


def call(command: Sequence[object], log: Path, label: str) -> None:
    """Run a command into its log, saying when it starts and ends; SystemExit with the log's end when it fails.

    Ctrl-C reaches the command too, which is given time to save.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    _say(f"{label:<44} started")
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=output, stderr=subprocess.STDOUT, env=_ENVIRONMENT
        )
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
    _say(f"{label:<44} {'done' if status == 0 else f'status {status}'} in {time.monotonic() - started:.0f} s")
    if status:
        tail = log.read_text(encoding="utf-8").splitlines()[-15:]
        raise SystemExit("\n".join([*tail, f"{label} ended with status {status}; all of it is in {log}"]))


def call_once(command: Sequence[object], result: Path, log: Path, label: str, *, inputs: Sequence[Path] = ()) -> None:
    """`call` unless this very command has made `result` from the same inputs; an unfinished one goes on.

    What made it, and at which commit, stands beside the log as `<log>.command.json`. A folder of inputs counts by its
    weights and JSON files.

    Raises:
        SystemExit: another command, or the same from other inputs, was here before.
    """
    record = log.with_suffix(".command.json")
    made = {"command": [str(part) for part in command], "inputs": {str(path): _digest(path) for path in inputs}}
    if record.is_file():
        before = json.loads(record.read_text(encoding="utf-8"))
        if any(before.get(key) != value for key, value in made.items()):
            raise SystemExit(
                f"{result.parent} was made with other settings or from other inputs ({record}): choose another folder, "
                f"or delete both to make it anew"
            )
        if result.is_file():
            return
    started_before = result.parent.exists()
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(made | {"commit": _commit()}, indent=1) + "\n", encoding="utf-8")
    try:
        call(command, log, label)
    except SystemExit:
        if not started_before and not any(result.parent.glob("checkpoints/*")):
            record.unlink()
        raise


def commit_of(log: Path) -> str:
    """At which commit `call_once` made what this log is about."""
    made: str = json.loads(log.with_suffix(".command.json").read_text(encoding="utf-8"))["commit"]
    return made


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _commit() -> str:
    """Of this checkout, with a plus sign where it holds changes; empty without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changes = subprocess.run([*git, "status", "--short", "-uno"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _digest(path: Path) -> str:
    files = sorted(file for pattern in _CONTENT for file in path.glob(pattern)) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
