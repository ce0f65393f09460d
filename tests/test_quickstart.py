"""The README's main command, with fewer steps: every stage runs and the table holds what the runs measured."""

import json
import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[1]
FEWER = (
    "warmup.snippets_per_step=4",
    "estep.steps=2",
    "estep.snippets_per_step=2",
    "estep.rollouts_per_snippet=2",
    "mstep.steps=2",
    "mstep.snippets_per_step=4",
    "em.rounds=1",
    "evaluate.snippets=4",
    "engine.cpu_kv_cache_bytes=67108864",
)


def test_quickstart_ends_in_a_table_of_what_was_measured(tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "quickstart.sh"), *FEWER],
        env=os.environ | {"RA3_QUICKSTART": str(tmp_path / "out"), "RA3_BASE_STEPS": "3"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["nats_per_code_token"].keys() == summary["act_only"].keys() == {"base", "ntp", "ra3"}
    for name, nats in summary["act_only"].items():
        last = json.loads((tmp_path / "out" / name / "metrics.jsonl").read_text().splitlines()[-1])
        assert nats == last["act_nats_per_code_token"]
        assert 5 < nats < 9
        assert f"{nats:.4f}" in done.stdout
    assert summary["tokens"]["ntp"] >= summary["tokens"]["ra3"] > 0
    assert summary["tokens"]["ntp"] < 3 * summary["tokens"]["ra3"]
    assert {"reward_first", "reward_last", "think_rate", "rationale_tokens"} <= summary.keys()
    assert summary["reward_last"] < 0
    assert {"base.warmup", "ra3.estep", "ra3.bootstrap", "ra3.mstep", "ntp.warmup"} <= summary["seconds"].keys()
