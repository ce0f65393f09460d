"""`ra3 bench plan`: the memory that `ra3 plan` forecasts is that of real tensors, to the byte."""

import importlib
import json
from itertools import product

import pytest

from megatron_ra3.bench import plan
from megatron_ra3.cli import main
from megatron_ra3.launch import memory


@pytest.fixture
def tiny_cases(monkeypatch):
    sizes = {"hidden": 128, "layers": 2, "tokens": 48, "vocabulary": 130}
    cases = tuple(
        plan.Case(**sizes, sequences=sequences, micro_batches=batches, dtype=dtype)
        for dtype, (sequences, batches) in product(("fp32", "bf16"), ((3, 2), (1, 1)))
    )
    monkeypatch.setattr(plan, "CASES", cases)


@pytest.mark.usefixtures("tiny_cases")
def test_memory_is_forecast_to_the_byte(tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert main(["bench", "plan", "--repeats", "1", "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert result["memory_error_max"] == 0.0
    parts = [(case["bytes"], case["parameters"]) for case in result["cases"]]
    assert [part["optimizer"]["measured"] / count for part, count in parts] == [8.0, 8.0, 12.0, 12.0]
    assert all(part["activations"]["measured"] > 0 for part, _ in parts)
    timed = [case for case in result["cases"] if "step_s" in case]
    assert len(timed) == 2
    for case in timed:
        assert case["step_s"]["error"] == case["step_s"]["forecast"] / case["step_s"]["measured"] - 1.0


def test_the_block_of_logits_is_the_kernels():
    kernel = importlib.import_module("megatron_ra3.kernels.linear_cross_entropy")  # its function has the same name
    assert memory.HEAD_BLOCK_ELEMENTS == kernel.BLOCK_ELEMENTS


def test_no_repeat_is_an_error(capsys):
    assert main(["bench", "plan", "--repeats", "0"]) == 2
    assert "--repeats 0: must be at least 1" in capsys.readouterr().err
