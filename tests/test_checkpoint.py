"""Checkpoints: visible only when whole, refused when damaged or foreign, untouched when the disk is full."""

import errno
import json
from pathlib import Path

import pytest

from megatron_ra3.checkpoint import Checkpoints, check_compatible, read_manifest
from megatron_ra3.model import parallel


@pytest.fixture(scope="module")
def layout():
    yield parallel.initialize(1, 1, seed=0, timeout_s=30)
    parallel.destroy()


def _write(text: str):
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_text(text)

    return write


@pytest.fixture
def checkpoints(layout, tmp_path):
    folder = Checkpoints(tmp_path / "checkpoints", keep_last=2, layout=layout)
    for step in (10, 20, 30):
        folder.save(step, {"note": step}, _write(f"state {step}"))
    return folder


def test_only_the_newest_are_kept_and_the_latest_is_found(checkpoints):
    assert [path.name for path in checkpoints.finished()] == ["step-00000020", "step-00000030"]
    latest = checkpoints.latest()
    manifest = read_manifest(latest)
    assert (manifest["step"], manifest["note"]) == (30, 30)
    assert manifest["files"] == {"state/weights": len("state 30")}


def test_a_full_disk_leaves_earlier_checkpoints_whole(checkpoints):
    def full(folder: Path) -> None:
        _write("half")(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"step-00000040.*No space left.*earlier checkpoints are untouched.*run_folder"):
        checkpoints.save(40, {}, full)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000020", "step-00000030"]
    assert read_manifest(checkpoints.latest())["step"] == 30


def test_a_crash_while_saving_leaves_nothing_that_counts(checkpoints):
    def killed(folder: Path) -> None:
        _write("half")(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(40, {}, killed)
    assert read_manifest(checkpoints.latest())["step"] == 30
    checkpoints.save(40, {}, _write("whole"))
    assert (checkpoints.latest() / "state" / "weights").read_text() == "whole"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "state" / "weights").write_text("cut"), r"state/weights has 3 bytes instead of 8"),
        (lambda path: (path / "state" / "weights").unlink(), r"state/weights has None bytes instead of 8"),
        (lambda path: (path / "manifest.json").write_text('{"format_ver'), r"manifest\.json cannot be read"),
    ],
)
def test_damage_is_named_with_the_checkpoint_to_fall_back_to(checkpoints, damage, message):
    damage(checkpoints.latest())
    with pytest.raises(ValueError, match=rf"step-00000030: {message}.*fall back to step-00000020"):
        read_manifest(checkpoints.latest())


def test_another_format_version_is_refused(checkpoints):
    path = checkpoints.latest() / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(ValueError, match="format version 99, but this program reads 1"):
        read_manifest(checkpoints.latest())


def test_every_difference_to_the_resuming_run_is_listed():
    saved = {"layout": {"tensor": 2}, "corpus": "a", "tokenizer": "t", "config": {"seed": 1, "engine": {"kind": "x"}}}
    now = {"layout": {"tensor": 1}, "corpus": "b", "tokenizer": "t", "config": {"seed": 2, "engine": {"kind": "y"}}}
    with pytest.raises(ValueError, match="another run") as caught:
        check_compatible(Path("c"), saved, now)
    text = str(caught.value)
    assert "layout: {'tensor': 2} in the checkpoint, {'tensor': 1} now" in text
    assert "corpus: a in the checkpoint, b now" in text
    assert "seed: 1 in the checkpoint, 2 now" in text
    assert "engine.kind" not in text
    assert "tokenizer:" not in text
