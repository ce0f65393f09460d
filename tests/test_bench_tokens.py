"""`ra3 bench tokens` reads the same snippets both ways."""

import json

from megatron_ra3.cli import main


def test_the_last_line_compares_text_with_stored_ids(capsys, tmp_path):
    out = tmp_path / "result.json"
    arguments = ["--files", "12", "--vocabulary", "300", "--repeats", "3", "--out", str(out)]
    assert main(["bench", "tokens", *arguments]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert result["samples"] > 10
    assert 10 < result["bytes"]["text"] < result["bytes"]["stored"]
    assert 0 < result["cpu_ms"]["stored"] < result["cpu_ms"]["text"]
    for name, value in result["cpu_ms"].items():
        assert value == sorted(run[name] for run in result["cpu_s"])[1] * 1e3 / result["samples"]
    assert main(["bench", "tokens", "--files", "0"]) == 2
    assert "--files 0: must be at least 1" in capsys.readouterr().err
