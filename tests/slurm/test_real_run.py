"""The main job under a real Slurm: a trainer node with two tensor-parallel ranks, an engine node with vLLM."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from megatron_ra3.settings import to_dict
from tests.small import make_config

pytestmark = [pytest.mark.slurm, pytest.mark.vllm]
ROOT = Path(__file__).parents[2]


def test_sbatch_trains_on_one_node_and_samples_on_another(slurm, small_corpus, tmp_path):
    settings = ("engine.kind=vllm", "parallel.tensor=2", "engine.cpu_kv_cache_bytes=67108864", "warmup.steps=1")
    config = to_dict(make_config(small_corpus, tmp_path, *settings))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    submitted = slurm.run(
        "sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", "--signal=B:USR1@1", f"--chdir={tmp_path}",
        str(ROOT / "slurm" / "ra3_midtrain.sbatch"), "run.yaml", "estep.steps=2",
        timeout_s=20, RA3_PYTHON=sys.executable, RA3_TASKS_PER_NODE="2", RA3_LOG_DIR=str(tmp_path / "logs"),
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    job_id = int(submitted.stdout)
    code = slurm.exit_code(job_id, timeout_s=600)
    logs = tmp_path / "logs" / f"ra3-midtrain-{job_id}"
    said = {path.name: path.read_text() for path in logs.glob("*.log")}
    assert code == 0, said
    assert {"batch.log", "trainer-0.log", "trainer-1.log", "engine-0.log"} <= said.keys()
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["phase"] for record in metrics] == [
        "warmup", "estep", "estep", "bootstrap", "bootstrap", "mstep", "mstep", "evaluate",
    ]  # fmt: skip
    assert "serving" in said["engine-0.log"]
    assert "export" in {path.name for path in (tmp_path / "run").iterdir()}
