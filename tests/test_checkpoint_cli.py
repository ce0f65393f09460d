"""`ra3 checkpoint`: what is listed, found damaged and removed."""

import json
import os
import time
from pathlib import Path

import pytest

from megatron_ra3.cli import main
from megatron_ra3.manifest import FORMAT_VERSION, write_manifest

CONTENTS = {
    "format_version": FORMAT_VERSION,
    "at": "estep r1 2/3",
    "layout": {"tensor": 2, "pipeline": 1, "data": 4},
    "config": {"checkpoint": {"keep_every_steps": 20}},
}


@pytest.fixture
def run(tmp_path) -> Path:
    for step in (10, 20, 30, 40):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        (folder / "state").mkdir(parents=True)
        (folder / "state" / "weights").write_text("w" * 1000)
        write_manifest(folder, CONTENTS, {})
    return tmp_path


def _kept(run: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in (run / "checkpoints").iterdir())


def test_checkpoints_are_listed_with_what_is_wrong_with_them(run, capsys):
    (run / "checkpoints" / "step-00000020" / "state" / "weights").write_text("cut")
    (run / "checkpoints" / "step-00000010").rename(run / "checkpoints" / "damaged-step-00000010")
    three_hours_ago = time.time() - 3 * 3600
    os.utime(run / "checkpoints" / "step-00000030" / "manifest.json", (three_hours_ago, three_hours_ago))
    assert main(["checkpoint", "list", str(run)]) == 0
    _, damaged, whole, _, aside = capsys.readouterr().out.splitlines()
    assert "state/weights has 3 bytes instead of 1000" in damaged
    assert whole.split()[:7] == ["step-00000030", "estep", "r1", "2/3", "0.0", "3.0", "h"]
    assert whole.split()[7:] == ["2x1x4", "sizes", "are", "right"]
    assert aside.startswith("damaged-step-00000010")


def test_verify_reads_everything(run, capsys):
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count(": whole") == 4
    weights = run / "checkpoints" / "step-00000030" / "state" / "weights"
    weights.write_text("w" * 999 + "x")
    assert main(["checkpoint", "verify", str(run)]) == 1
    assert "step-00000030: state/weights has another sha256" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(weights.parents[1])]) == 1
    assert main(["checkpoint", "verify", str(run / "checkpoints" / "step-00000020")]) == 0


def test_prune_keeps_the_newest_whole_ones_and_the_archive(run, capsys):
    (run / "checkpoints" / "step-00000040" / "manifest.json").write_text('{"form')
    assert main(["checkpoint", "prune", str(run), "--keep", "1", "--dry-run"]) == 0
    assert _kept(run) == [10, 20, 30, 40]
    assert "would remove" in capsys.readouterr().out
    assert main(["checkpoint", "prune", str(run), "--keep", "1"]) == 0
    assert _kept(run) == [20, 30, 40]
    assert main(["checkpoint", "prune", str(run), "--keep", "1", "--keep-every", "0"]) == 0
    assert _kept(run) == [30, 40]


def test_prune_removes_nothing_where_nothing_is_whole(run, capsys):
    for path in (run / "checkpoints").glob("*/manifest.json"):
        path.write_text(json.dumps({"format_version": FORMAT_VERSION, "files": {"state/weights": 1}}))
    assert main(["checkpoint", "prune", str(run), "--keep", "1"]) == 2
    assert "no checkpoint is whole" in capsys.readouterr().err
    assert _kept(run) == [10, 20, 30, 40]
    assert main(["checkpoint", "prune", str(run), "--keep", "0"]) == 2
    assert main(["checkpoint", "list", str(run / "nowhere")]) == 2
