"""Engines that die do not end the run: it goes on with the others, waits for one to come back, and loses no sample."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ra3.em import midtrain
from megatron_ra3.settings import to_dict
from tests.small import make_config

pytestmark = [pytest.mark.vllm, pytest.mark.long]
# Half the gates think, so that a step has hundreds of requests to die under.
SETTINGS = ("checkpoint.every_steps=1", "objective.gate_exploration=0.5", "estep.snippets_per_step=24")


def _samples(run: Path) -> list[tuple[Any, ...]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(item["step"], item["phase"], item["samples"], item["samples_digest"]) for item in records]


def _engine_processes(run: Path) -> dict[int, str]:
    """Process ids and addresses of this run's API servers; their watchdogs end what else belongs to them."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = entry.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        ports = [item.partition("=")[2] for item in arguments if item.startswith("--port=")]
        if ports and str(run) in " ".join(arguments) and "megatron_ra3.rollout.watchdog" not in arguments:
            found[int(entry.parent.name)] = f"http://127.0.0.1:{ports[0]}"
    return found


def _kill_at_work(pid: int, url: str) -> None:
    """SIGKILL a server while it has requests."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
            if re.search(r"^vllm:num_requests_running\{.*\} [1-9]", answer.read().decode(), re.MULTILINE):
                break
    os.kill(pid, signal.SIGSTOP)  # it answers nothing more, whatever the trainer still sends
    time.sleep(0.5)
    os.kill(pid, signal.SIGKILL)


def test_a_run_outlives_its_engines_and_samples_with_current_weights_only(small_corpus, tmp_path):
    midtrain(make_config(small_corpus, tmp_path / "whole", *SETTINGS))
    folder = tmp_path / "broken"
    config = make_config(
        small_corpus,
        folder,
        *SETTINGS,
        "engine.kind=vllm",
        "engine.per_replica=2",
        "engine.cpu_kv_cache_bytes=67108864",
    )
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    command = [sys.executable, "-m", "megatron_ra3", "midtrain", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    run, output = folder / "run", []
    for line in process.stdout:
        output.append(line)
        if "estep r1 1/3" in line:
            first, second = _engine_processes(run).items()
            _kill_at_work(*first)
        elif "estep r1 2/3" in line:
            _kill_at_work(*second)
    assert process.wait() == 0
    text = "".join(output)
    assert "waiting for engines, for 900 s at most: replica 0 has no engine: http://127.0.0.1:" in text
    assert text.count("restart 1 of 5 in 2 s") == 2
    assert _samples(run) == _samples(tmp_path / "whole" / "run")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    served = [record for record in records if "engines_alive" in record]
    assert sum(record["engines_lost"] for record in served) == 2
    assert sum(record["engines_returned"] for record in served) >= 1
    assert sum(record["requests_reissued"] for record in served) > 0
    assert served[-1]["engines_alive"] >= 1
    assert all(record["mismatch"] < 1e-4 for record in records if record["phase"] == "estep")
    assert sum(record.get("engine_wait_seconds", 0.0) for record in served) > 1
    annotated = [json.loads(line) for line in (run / "annotated" / "replica-00000.jsonl").read_text().splitlines()]
    versions = {
        v for item in annotated for v, drawn in zip(item["weight_versions"], item["sampled"], strict=True) if drawn
    }
    assert versions == {5}
    assert not _engine_processes(run)
