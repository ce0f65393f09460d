"""`ra3 bench sandbox` for a moment."""

import json
import statistics

import pytest

from megatron_ra3.bench.sandbox import cpu_ms_per_program, measure
from megatron_ra3.cli import main
from tests.support import open_jail


def test_the_last_line_holds_rates_of_all_ways(capsys, tmp_path):
    open_jail(1).close()
    out = tmp_path / "new" / "result.json"
    options = ["--workers", "1", "--turns", "2", "--turn-s", "0.2", "--out", str(out)]
    assert main(["bench", "sandbox", *options]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    rates = {name: statistics.median(values) for name, values in result["rates"].items()}
    assert result["programs_per_s"] == rates["jail"] > 0
    assert result["ratio"] == rates["jail"] / rates["bubblewrap_each"]
    assert [len(values) for values in result["rates"].values()] == [2, 2, 2]
    assert result["infrastructure_errors"] == 0
    cpu_ms = result["cpu_ms_per_program"]
    assert cpu_ms["all"] == pytest.approx(cpu_ms["outside"] + cpu_ms["server"] + cpu_ms["program"])
    assert min(cpu_ms.values()) > 0


def test_processor_time_of_programs_is_theirs():
    with open_jail(1) as sandbox:
        run, busy = sandbox.run_script, "import time\nwhile time.process_time() < 0.1: pass\n"
        sandbox.run_script = lambda code: run(busy + code)
        busy_ms = cpu_ms_per_program(sandbox, 4)
    assert 100 < busy_ms["program"] < 200
    assert busy_ms["outside"] + busy_ms["server"] < 50


def test_no_turns_is_an_error():
    with pytest.raises(ValueError, match="turns=0"):
        measure(1, 0, 1.0)
