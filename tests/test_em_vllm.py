"""The whole loop against a real vLLM server: two tensor-parallel ranks, live weight sync, resume, a dead address."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_ra3.observe.engine_times import busy_intervals
from megatron_ra3.observe.shares import awaited, shares
from megatron_ra3.observe.timeline import read_timeline
from megatron_ra3.settings import to_dict
from tests.small import make_config

pytestmark = pytest.mark.vllm
SETTINGS = (
    "engine.kind=vllm",
    "parallel.tensor=2",
    "engine.cpu_kv_cache_bytes=67108864",
    "objective.gate_exploration=0",
)


def _midtrain(folder: Path, corpus: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    config = make_config(corpus, folder, *SETTINGS, *overrides)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--local-addr=127.0.0.1"]
    command += [f"--master-port={20000 + os.getpid() % 10000}", "-m", "megatron_ra3", "midtrain", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)


def test_a_run_against_vllm_keeps_parity_over_every_sync_and_resumes(small_corpus, tmp_path):
    settings = ("warmup.steps=20", "objective.gate_exploration=0.5")  # or so small a model hardly ever thinks
    stopped = _midtrain(tmp_path, small_corpus, "checkpoint.stop_after_steps=21", *settings)
    assert "stopped after step 21" in stopped.stdout, stopped.stderr
    done = _midtrain(tmp_path, small_corpus, *settings)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics] == list(range(1, 29))
    esteps = [record for record in metrics if record["phase"] == "estep"]
    assert len(esteps) == 3
    assert all(record["mismatch"] < 1e-4 for record in esteps)
    assert all(record["think_rate"] > 0.1 and record["grad_norm"] > 0 for record in esteps)
    annotated = [json.loads(line) for line in (run / "annotated" / "replica-00000.jsonl").read_text().splitlines()]
    versions = {
        v for item in annotated for v, drawn in zip(item["weight_versions"], item["sampled"], strict=True) if drawn
    }
    assert versions == {23}
    assert not _servers(run)


def test_two_replicas_sample_ahead_with_a_server_each(small_corpus, tmp_path):
    settings = ("parallel.tensor=1", "estep.steps=4", "estep.max_staleness_steps=1", "objective.gate_exploration=0.5")
    done = _midtrain(tmp_path, small_corpus, *settings)
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, *others = [record for record in metrics if record["phase"] == "estep"]
    assert (first["max_staleness"], len(others)) == (0, 3)
    assert first["mismatch"] < 1e-4
    assert any(record["staleness"] > 0 for record in others)
    for record in others:
        assert record["max_staleness"] <= 1
        # Of a fresh decision rounding is left, of a stale one what an update has moved.
        assert record["mismatch"] < (0.1 if record["staleness"] else 1e-4)
    assert [record["samples"] for record in metrics] == [4] * 2 + [2] * 4 + [3] * 5
    assert [record["stream_position"] for record in metrics][:8] == [4, 8, 10, 12, 14, 16, 19, 22]
    stores = [tmp_path / "run" / "annotated" / f"replica-0000{rank}.jsonl" for rank in (0, 1)]
    ids = [[json.loads(line)["snippet_id"] for line in store.read_text().splitlines()] for store in stores]
    assert [len(each) for each in ids] == [4, 2]
    assert not set(ids[0]) & set(ids[1])
    assert any(record.get("engine_tokens_per_second", 0) > 0 for record in metrics)
    assert any(0 <= record.get("engine_kv_cache_usage", -1) <= 1 for record in metrics)
    timeline = read_timeline(tmp_path / "run")
    served = {(note.rank, note.url) for note in timeline.engines if note.values.get("standing") == "serving"}
    assert sorted(rank for rank, _ in served) == [0, 1]
    assert {url for _, url in served} == busy_intervals(timeline.engines).keys()
    targets = [json.loads(path.read_text()) for path in sorted((tmp_path / "run" / "prometheus").iterdir())]
    assert [[f"http://{target}" for target in found[0]["targets"]] for found in targets] == [
        [url] for _, url in sorted(served)
    ]
    assert awaited(shares(timeline))["engines"] > 1_000_000  # their start at least
    assert {"engine-00000.log", "engine-00001.log"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert not _servers(tmp_path / "run")


def test_an_address_nobody_answers_is_named(small_corpus, tmp_path):
    failed = _midtrain(
        tmp_path, small_corpus, "engine.urls=[http://127.0.0.1:9]", "warmup.steps=0", "engine.start_timeout_s=3"
    )
    assert failed.returncode != 0
    assert "ra3 midtrain: engine http://127.0.0.1:9" in failed.stderr
    assert "start_timeout_s=3" in failed.stderr


def _servers(run: Path) -> list[str]:
    """Command lines of processes that still serve this run's model."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(run) in text and "vllm" in text:
            lines.append(text)
    return lines
