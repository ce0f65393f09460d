"""An engine that dies ends the run; the same command goes on, and every sample is used once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ra3.em import midtrain
from megatron_ra3.settings import to_dict
from tests.small import make_config

pytestmark = pytest.mark.vllm
SETTINGS = ("checkpoint.every_steps=1", "objective.gate_exploration=0")


def _samples(run: Path) -> list[tuple[Any, ...]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(item["step"], item["phase"], item["samples"], item["samples_digest"]) for item in records]


def _engine_processes(run: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(run) in text and "vllm" in text and "watchdog" not in text:
            found.append(int(entry.parent.name))
    return found


def test_a_killed_engine_loses_no_sample(small_corpus, tmp_path):
    midtrain(make_config(small_corpus, tmp_path / "whole", *SETTINGS))
    folder = tmp_path / "broken"
    config = make_config(small_corpus, folder, *SETTINGS, "engine.kind=vllm", "engine.cpu_kv_cache_bytes=67108864")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    command = [sys.executable, "-m", "megatron_ra3", "midtrain", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    killed: list[int] = []
    for line in process.stdout:
        if "estep r1 1/3" in line and not killed:
            killed = _engine_processes(folder / "run")
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
    assert killed
    assert process.wait() == 2
    assert len(_samples(folder / "run")) < 10
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert _samples(folder / "run") == _samples(tmp_path / "whole" / "run")
