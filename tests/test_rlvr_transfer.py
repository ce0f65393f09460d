"""The transfer experiment: its tasks have one right answer, its splits share no structure, and it runs and resumes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_ra3.chaos.world import MODEL
from megatron_ra3.model import names
from tests.support import open_jail

EXAMPLE = Path(__file__).parents[1] / "examples" / "rlvr_transfer"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"rlvr_transfer_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


TASKS = _load("tasks")


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("tasks")
    TASKS.write_tasks(folder, TASKS.TaskConfig(), train=300, heldout=60, seed=1)
    return {name: _records(folder / f"{name}.jsonl") for name in ("train", "heldout")}


def _structure(record: dict[str, Any]) -> str:
    return "".join("0" if letter.isdigit() else letter for letter in record["prompt"])


def test_splits_share_no_structure(splits):
    train, heldout = ({_structure(record) for record in records} for records in splits.values())
    assert (len(train), len(heldout), len(train & heldout)) == (300, 60, 0)
    assert {record["hops"] for record in splits["train"]} == {2, 3, 4, 5, 6, 7}


def _accepted(record: dict[str, Any], answer: str) -> list[bool]:
    namespace: dict[str, Any] = {}
    exec(record["head"] + answer, namespace)
    return [namespace["accepts"](*given) == right for given, right in record["tests"]]


def test_only_the_digit_that_the_chain_leads_to_passes(splits):
    for record in splits["heldout"]:
        values: dict[str, Any] = {}
        exec(record["prompt"], {}, values)
        right = values["q"]
        assert all(_accepted(record, f"assert q=={right}\n"))
        assert not all(_accepted(record, f"assert q=={(right + 1) % 10}\n"))
        assert not all(_accepted(record, "assert q==q\n"))
        with pytest.raises(NameError):
            _accepted(record, "assert q==A\n")


def test_too_many_tasks_are_refused(tmp_path):
    config = TASKS.TaskConfig(assignments=6, min_hops=2)
    with pytest.raises(ValueError, match="not that many structures"):
        TASKS.write_tasks(tmp_path, config, train=60, heldout=5, seed=0)


def test_figures_of_a_run(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    run = _load("run")
    rates = [0.5, 0.6, 0.96, 0.9, 0.98, 1.0]
    evaluations = run.evaluations_of(
        [
            record
            for rate in rates
            for record in ({"phase": "evaluate", "pass_rate": rate, "answer_tokens": 7.0}, {"phase": "rlvr"})
        ]
    )
    assert [record["rlvr_step"] for record in evaluations] == list(range(6))
    assert run.asymptote(evaluations) == pytest.approx((0.96 + 0.9 + 0.98 + 1.0) / 4)
    found = run.figures(evaluations, target=0.55)
    assert (found["first"], found["to_ntp"], found["to_high"], found["reached_high"]) == (0.5, 1, 2, 1.0)
    never = run.figures(evaluations[:2], target=0.7)
    assert never["reached_high"] == 0.0
    assert not {"to_ntp", "to_high"} & never.keys()


def _run(out: Path, mid: Path) -> str:
    command = [sys.executable, str(EXAMPLE / "run.py"), "--small", "--starts", "ntp", "--seeds", "3"]
    done = subprocess.run(
        [*command, "--out", str(out), "--mid", str(mid)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_the_experiment_runs_and_finished_runs_are_kept(small_corpus, tmp_path):
    open_jail(1).close()  # skips where there is none
    out, mid = tmp_path / "out", tmp_path / "mid"
    for name in ("base", "ntp"):
        names.init_hf(mid / "seed3" / name / "export", {**MODEL, "vocab_size": 400}, 0, small_corpus / "tokenizer")
        (mid / "seed3" / name / "summary.json").write_text("{}")
    assert _run(out, mid).count(" done in ") == 1
    results = json.loads((out / "results.json").read_text())
    (record,) = results["records"]
    metrics = [json.loads(line) for line in (out / "runs" / "ntp-seed3" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [step for step in metrics if step["phase"] == "evaluate"]
    assert len(evaluations) == 3
    assert all(step["infrastructure_errors"] == 0 for step in metrics)
    assert (record["start"], record["first"]) == ("NTP", evaluations[0]["pass_rate"])
    curves = json.loads((out / "curves.json").read_text())
    assert [point["ntp_tokens"] for point in curves] == [step["answer_tokens"] for step in evaluations]
    assert (out / "rlvr_transfer.png").read_bytes()[:4] == b"\x89PNG"
    table = (out / "table.md").read_text()
    again = _run(out, mid)
    assert " done in " not in again
    assert table in again
