"""Checkpoints: visible only when whole, refused when damaged or foreign, untouched when the disk is full."""

import errno
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_ra3.checkpoint import Checkpoints, check_compatible, identity, model_digest, read_manifest
from megatron_ra3.config import load_config
from megatron_ra3.model import parallel
from tests.distributed import run_ranks


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
        folder.save(step, lambda step=step: {"note": step}, _write(f"state {step}"))
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
        checkpoints.save(40, dict, full)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000020", "step-00000030"]
    assert read_manifest(checkpoints.latest())["step"] == 30


def test_a_crash_while_saving_leaves_nothing_that_counts(checkpoints):
    def killed(folder: Path) -> None:
        _write("half")(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(40, dict, killed)
    assert read_manifest(checkpoints.latest())["step"] == 30
    partial = checkpoints.folder / ".saving-step-00000040"
    assert (partial / "state" / "weights").read_text() == "half"
    checkpoints.save(50, dict, _write("whole"))
    assert (checkpoints.latest() / "state" / "weights").read_text() == "whole"
    assert not partial.exists()


def test_a_manifest_torn_by_a_kill_is_not_a_checkpoint(checkpoints):
    for name in (".saving-step-00000040", "step-00000010.saving"):
        partial = checkpoints.folder / name
        partial.mkdir()
        (partial / "manifest.json").write_text('{"format_ver')
    assert read_manifest(checkpoints.latest())["step"] == 30
    shutil.rmtree(checkpoints.folder / "step-00000020")
    (checkpoints.latest() / "state" / "weights").unlink()
    with pytest.raises(ValueError, match="there is no older checkpoint to fall back to"):
        read_manifest(checkpoints.latest())


def test_a_step_that_is_saved_already_is_left_alone(checkpoints):
    newest = checkpoints.latest()
    born = (newest / "manifest.json").stat().st_ino
    assert checkpoints.save(30, lambda: {"note": "again"}, lambda _: pytest.fail("written again")) == newest
    assert (newest / "manifest.json").stat().st_ino == born
    (newest / "state" / "weights").write_text("cut")
    checkpoints.save(30, lambda: {"note": "again"}, _write("mended"))
    assert read_manifest(newest)["note"] == "again"
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000020", "step-00000030"]


def test_a_folder_that_cannot_be_made_is_named(layout, tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints", keep_last=1, layout=layout)
    with pytest.raises(OSError, match=r"cannot save checkpoint .*step-00000001: NotADirectoryError.* bytes free"):
        checkpoints.save(1, dict, _write("state"))


def _fail_on_one_rank(folder: Path) -> tuple[str, float]:
    layout = parallel.initialize(1, 1, seed=0, timeout_s=60)
    checkpoints = Checkpoints(folder, keep_last=2, layout=layout)

    def write(state: Path) -> None:
        if layout.rank == 1:
            raise OSError(errno.EIO, "broken disk")

    start = time.monotonic()
    try:
        checkpoints.save(1, dict, write)
    except OSError as error:
        return str(error), time.monotonic() - start
    finally:
        parallel.destroy()
    return "no error", 0.0


def test_one_failing_rank_is_reported_by_all_at_once(tmp_path):
    found = run_ranks(_fail_on_one_rank, 2, tmp_path / "checkpoints", timeout_s=60)
    for message, seconds in found:
        assert "step-00000001: OSError: [Errno 5] broken disk (" in message
        assert seconds < 20
    assert list((tmp_path / "checkpoints").iterdir()) == []


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


def _identity(*overrides: str, model: str = "m", corpus: str = "a", dp_size: int = 1, layout: Any) -> dict[str, Any]:
    config = load_config(None, ["run_folder=r", "corpus.folder=c", "model.folder=f", *overrides])
    found = identity(config, layout, model=model, corpus=corpus, tokenizer="t")
    return found | {"layout": {"tensor": 1, "pipeline": 1, "data": dp_size}}


def test_every_difference_to_the_resuming_run_is_listed(layout):
    saved = _identity("seed=1", "em.rounds=2", dp_size=2, layout=layout)
    now = _identity("seed=2", "em.rounds=1", "objective.penalty=0.1", model="n", corpus="b", layout=layout)
    with pytest.raises(ValueError, match="another run") as caught:
        check_compatible(Path("c"), saved, now)
    differences = [line.strip() for line in str(caught.value).splitlines()[1:-1]]
    one, two = ({"tensor": 1, "pipeline": 1, "data": size} for size in (1, 2))
    assert differences == [
        f"layout: {two} in the checkpoint, {one} now",
        "model: m in the checkpoint, n now",
        "corpus: a in the checkpoint, b now",
        "objective.penalty: 0.05 in the checkpoint, 0.1 now",
        "seed: 1 in the checkpoint, 2 now",
        "em.rounds: 2 in the checkpoint, 1 now; a resumed run may only add rounds",
    ]


def test_a_setting_younger_than_the_checkpoint_counts_as_its_default(layout):
    saved = _identity(layout=layout)
    del saved["config"]["objective"]["line_gradient"]
    check_compatible(Path("c"), saved, _identity(layout=layout))
    with pytest.raises(ValueError, match=r"objective\.line_gradient: 0\.0 in the checkpoint, 1\.0 now"):
        check_compatible(Path("c"), saved, _identity("objective.line_gradient=1", layout=layout))


def test_settings_that_alter_no_state_may_change(layout):
    changed = (
        "run_folder=other", "corpus.folder=moved", "corpus.tokenizer=moved", "corpus.verify_checksums=false",
        "model.folder=moved", "parallel.micro_batch_tokens=99", "parallel.timeout_s=9", "evaluate.samples_shown=9",
        "engine.kind=vllm", "checkpoint.every_steps=9", "logging.wandb_project=p", "em.rounds=3",
    )  # fmt: skip
    check_compatible(Path("c"), _identity("em.rounds=2", layout=layout), _identity(*changed, layout=layout))


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (
            ("em.rounds=0",),
            ("em.rounds=2",),
            r"em\.rounds 0 -> 2 changes the phases: .* from this run's export",
        ),
        (("em.rounds=2",), ("em.rounds=0",), r"em\.rounds: 2 in the checkpoint, 0 now; a resumed run may only add"),
        (
            ("em.restart_from_base=true",),
            ("em.restart_from_base=true", "model.folder=other"),
            r"model\.folder: 'f' in the checkpoint, 'other' now",
        ),
    ],
)
def test_what_a_resumed_run_cannot_do_is_refused(layout, before, now, message):
    with pytest.raises(ValueError, match=message):
        check_compatible(Path("c"), _identity(*before, layout=layout), _identity(*now, layout=layout))


def test_a_model_is_told_apart_by_everything_but_its_dtype():
    config = {"model_type": "qwen2", "rope_theta": 1e6}
    same = {"rope_theta": 1e6, "dtype": "float32", "model_type": "qwen2"}
    assert model_digest(config) == model_digest(same)
    assert model_digest(config) != model_digest(config | {"rope_theta": 1e4})
