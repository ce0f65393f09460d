"""`ra3 bench stream` measures what it says, on a small corpus."""

import json

import pytest

from megatron_ra3.bench.stream import write_corpus
from megatron_ra3.cli import main


def test_the_command_prints_one_json_object_last(capsys, tmp_path):
    out = tmp_path / "result.json"
    arguments = ["bench", "stream", "--samples", "300", "--shards", "3", "--repeats", "3"]
    assert main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    assert result == json.loads(out.read_text())
    assert (result["samples"], result["shards"], len(result["runs_s"])) == (300, 3, 3)
    ratios = sorted(run["webdataset"] / run["ours"] for run in result["runs_s"])
    assert result["ratio"] == pytest.approx(ratios[1])
    resumed = [sorted(run[name] for run in result["runs_s"])[1] for name in ("resume_99", "resume_1")]
    assert result["resume_ratio"] == pytest.approx(resumed[0] / resumed[1])
    for rates in (result["samples_per_s"], result["mb_per_s"]):
        assert rates.keys() == {"tar_bytes", "webdataset", "ours"}
    assert result["mb_per_s"]["ours"] == pytest.approx(result["samples_per_s"]["ours"] * result["bytes"] / 300 / 1e6)
    assert any(line.startswith("ours / webdataset") for line in printed)


def test_a_corpus_may_be_given(capsys, tmp_path):
    write_corpus(tmp_path, 40, 2)
    assert main(["bench", "stream", "--corpus", str(tmp_path), "--repeats", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["samples"] == 40
    assert main(["bench", "stream", "--repeats", "0"]) == 2
    assert "--repeats 0: must be at least 1" in capsys.readouterr().err
