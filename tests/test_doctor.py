"""`ra3 doctor` tells which kernels a run would use, why not, and by its exit status whether that is what was asked."""

import pytest
import yaml

from megatron_ra3.cli import main
from megatron_ra3.doctor import kernels
from megatron_ra3.settings import to_dict
from tests.small import make_config


def test_a_machine_without_a_gpu_is_told_why_it_falls_back(capsys):
    assert main(["doctor"]) == 0
    found = {tuple(line.split()[:2]): line for line in capsys.readouterr().out.splitlines()}
    assert "torch, exact" in found["kernels", "fp32"]
    assert "torch: no CUDA device, at hidden size 4096" in found["kernels", "fp8_rescored"]
    assert "0.16.1" in found["package", "megatron-core"]
    assert ("command", "sbatch") in found


@pytest.mark.parametrize(
    ("override", "amiss"),
    [("model.dtype=fp32", set()), ("model.loss_precision=bf16", {"bf16"}), ("model.reward_precision=fp8", {"fp8"})],
)
def test_a_run_that_would_fall_back_fails(small_corpus, tmp_path, capsys, override, amiss):
    config = make_config(small_corpus, tmp_path, override)
    assert {finding.name for finding in kernels(config) if finding.amiss} == amiss
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    assert main(["doctor", str(path)]) == bool(amiss)
    shown = capsys.readouterr().out
    assert ("NOT AS ASKED: torch: " in shown) == bool(amiss)
    assert "this run's " in shown
