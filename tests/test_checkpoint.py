"""Checkpoints: visible only when whole, refused when damaged or foreign, untouched when the disk is full."""

import errno
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ra3.checkpoint import Checkpoints, check_compatible, identity, model_digest
from megatron_ra3.config import load_config
from megatron_ra3.manifest import damage, finished, read_manifest
from megatron_ra3.model import parallel
from tests.distributed import run_ranks


@pytest.fixture(scope="module")
def layout():
    yield parallel.initialize(1, 1, seed=0, timeout_s=30)
    parallel.destroy()


class _State:
    """What a rank would write: one file, `work` before it."""

    def __init__(self, folder: Path, text: str, work: Callable[[], None]) -> None:
        self.files = [folder / "weights"]
        self._text = text
        self._work = work

    def write(self) -> None:
        self.files[0].write_text(self._text)
        self._work()

    def commit(self) -> None:
        (self.files[0].parent / "common").write_text("all")


def _write(text: str, work: Callable[[], None] = lambda: None) -> Callable[[Path], _State]:
    def stage(folder: Path) -> _State:
        folder.mkdir()
        return _State(folder, text, work)

    return stage


def _save(checkpoints: Checkpoints, step: int, stage: Callable[[Path], Any], **manifest: Any) -> Path:
    checkpoints.start(step, lambda: manifest, stage)
    checkpoints.wait()
    return checkpoints.path(step)


def _names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


@pytest.fixture
def checkpoints(layout, tmp_path):
    folder = Checkpoints(tmp_path / "checkpoints", keep_last=2, layout=layout)
    for step in (10, 20, 30):
        _save(folder, step, _write(f"state {step}"), note=step)
    return folder


def test_only_the_newest_are_kept_and_the_latest_is_found(checkpoints):
    assert _names(checkpoints) == ["step-00000020", "step-00000030"]
    _, manifest = checkpoints.newest_whole()
    assert (manifest["step"], manifest["note"]) == (30, 30)
    assert manifest["files"] == {"state/common": 3, "state/weights": len("state 30")}
    assert manifest["sha256"]["state/weights"] == hashlib.sha256(b"state 30").hexdigest()
    assert manifest["sha256"]["state/common"] == hashlib.sha256(b"all").hexdigest()


def test_steps_for_the_archive_stay(layout, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_every_steps=20, layout=layout)
    for step in (10, 20, 30, 40, 50):
        _save(checkpoints, step, _write("state"))
    assert _names(checkpoints) == ["step-00000020", "step-00000040", "step-00000050"]


def test_training_goes_on_while_a_checkpoint_is_written(checkpoints):
    written = threading.Event()
    checkpoints.start(40, lambda: {"note": 40}, _write("state 40", lambda: written.wait(30)))
    checkpoints.poll()
    assert checkpoints.saving
    assert checkpoints.newest_whole()[1]["note"] == 30
    written.set()
    while checkpoints.saving:
        checkpoints.poll()
    assert checkpoints.newest_whole()[1]["note"] == 40
    assert checkpoints.longest_save_s > 0


def test_the_next_save_completes_the_one_on_its_way(checkpoints):
    checkpoints.start(40, lambda: {"note": 40}, _write("state 40", lambda: time.sleep(0.2)))
    checkpoints.start(40, lambda: pytest.fail("asked again"), _write("not written"))
    _save(checkpoints, 50, _write("state 50"))
    assert _names(checkpoints) == ["step-00000040", "step-00000050"]
    assert not any(damage(path) for path in finished(checkpoints.folder))


def _full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_earlier_checkpoints_whole(checkpoints):
    with pytest.raises(OSError, match=r"step-00000040.*No space left.*earlier checkpoints are untouched.*run_folder"):
        _save(checkpoints, 40, _write("half", _full))
    assert _names(checkpoints) == ["step-00000020", "step-00000030"]
    assert checkpoints.newest_whole()[1]["step"] == 30


def test_a_crash_while_saving_leaves_nothing_that_counts(checkpoints):
    checkpoints.start(40, dict, _write("half"))
    checkpoints.abandon()
    assert checkpoints.newest_whole()[1]["step"] == 30
    partial = checkpoints.folder / ".saving-step-00000040"
    assert (partial / "state" / "weights").read_text() == "half"
    newest = _save(checkpoints, 50, _write("whole"))
    assert (newest / "state" / "weights").read_text() == "whole"
    assert not partial.exists()


def test_a_manifest_torn_by_a_kill_is_not_a_checkpoint(checkpoints):
    for name in (".saving-step-00000040", "step-00000010.saving"):
        partial = checkpoints.folder / name
        partial.mkdir()
        (partial / "manifest.json").write_text('{"format_ver')
    assert checkpoints.newest_whole()[1]["step"] == 30


def test_a_step_that_is_saved_already_is_left_alone(checkpoints):
    newest, _ = checkpoints.newest_whole()
    born = (newest / "manifest.json").stat().st_ino
    assert _save(checkpoints, 30, lambda _: pytest.fail("written again"), note="again") == newest
    assert (newest / "manifest.json").stat().st_ino == born
    (newest / "state" / "weights").write_text("cut")
    _save(checkpoints, 30, _write("mended"), note="again")
    assert read_manifest(newest)["note"] == "again"
    assert _names(checkpoints) == ["damaged-step-00000030", "step-00000020", "step-00000030"]


def test_a_folder_that_cannot_be_made_is_named(layout, tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints", keep_last=1, layout=layout)
    with pytest.raises(OSError, match=r"cannot save checkpoint .*step-00000001: NotADirectoryError.* bytes free"):
        checkpoints.start(1, dict, _write("state"))


def _fail_on_one_rank(folder: Path) -> tuple[str, float]:
    layout = parallel.initialize(1, 1, seed=0, timeout_s=60)
    checkpoints = Checkpoints(folder, keep_last=2, layout=layout)

    start = time.monotonic()
    try:
        checkpoints.start(1, dict, _write_on(layout.rank))
        checkpoints.wait()
    except OSError as error:
        return str(error), time.monotonic() - start
    finally:
        parallel.destroy()
    return "no error", 0.0


def _write_on(rank: int) -> Callable[[Path], _State]:
    def broken() -> None:
        raise OSError(errno.EIO, "broken disk")

    def stage(folder: Path) -> _State:
        own = folder / str(rank)
        own.mkdir(parents=True)
        return _State(own, "state", broken if rank == 1 else lambda: None)

    return stage


def test_one_failing_rank_is_reported_by_all_at_once(tmp_path):
    found = run_ranks(_fail_on_one_rank, 2, tmp_path / "checkpoints", timeout_s=60)
    for message, seconds in found:
        assert "step-00000001: OSError: [Errno 5] broken disk (" in message
        assert seconds < 20
    assert list((tmp_path / "checkpoints").iterdir()) == []


DAMAGE = [
    (lambda path: (path / "state" / "weights").write_text("cut"), r"state/weights has 3 bytes instead of 8"),
    (lambda path: (path / "state" / "weights").unlink(), r"state/weights has None bytes instead of 8"),
    (lambda path: (path / "state" / "weights").write_text("State 30"), r"state/weights has another sha256 than"),
    (lambda path: (path / "manifest.json").write_text('{"format_ver'), r"manifest\.json cannot be read"),
    (lambda path: (path / "manifest.json").unlink(), r"manifest\.json cannot be read"),
]


@pytest.mark.parametrize(("break_it", "message"), DAMAGE)
def test_a_damaged_checkpoint_is_named_kept_and_replaced_by_an_older_one(checkpoints, break_it, message, capsys):
    newest, _ = checkpoints.newest_whole()
    break_it(newest)
    assert re.search(message, "; ".join(damage(newest)))
    assert checkpoints.newest_whole()[0].name == "step-00000020"
    assert _names(checkpoints) == ["damaged-step-00000030", "step-00000020"]
    line = rf"WARNING: checkpoint .*step-00000030: .*{message}.*kept as damaged-step-00000030, going on from step-.*20"
    assert re.match(line, capsys.readouterr().out)


def test_a_run_without_any_whole_checkpoint_does_not_begin_anew(checkpoints):
    for path in finished(checkpoints.folder):
        (path / "state" / "weights").write_text("cut")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no whole checkpoint to go on from: .*step-00000030.*step-00000020"):
            checkpoints.newest_whole()
    assert _names(checkpoints) == ["step-00000020", "step-00000030"]
    for path in finished(checkpoints.folder):
        path.rename(path.with_name(f"damaged-{path.name}"))
    with pytest.raises(ValueError, match=r"no whole checkpoint to go on from: .*damaged-step-00000020"):
        checkpoints.newest_whole()


@pytest.mark.parametrize("version", [1, 99])
def test_another_format_version_is_refused(checkpoints, version):
    path = checkpoints.newest_whole()[0] / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": version}))
    with pytest.raises(
        ValueError, match=f"format version {version}, but this program reads 2; use the program version that wrote it"
    ):
        checkpoints.newest_whole()


def _identity(*overrides: str, model: str = "m", corpus: str = "a", layout: Any) -> dict[str, Any]:
    config = load_config(None, ["run_folder=r", "corpus.folder=c", "model.folder=f", *overrides])
    return identity(config, layout, model=model, corpus=corpus, tokenizer="t")


def test_every_difference_to_the_resuming_run_is_listed(layout):
    saved = _identity("seed=1", "em.rounds=2", "parallel.distributed_optimizer=true", layout=layout)
    now = _identity("seed=2", "em.rounds=1", "objective.penalty=0.1", model="n", corpus="b", layout=layout)
    with pytest.raises(ValueError, match="another run") as caught:
        check_compatible(Path("c"), saved, now)
    differences = [line.strip() for line in str(caught.value).splitlines()[1:-1]]
    assert differences == [
        "model: m in the checkpoint, n now",
        "corpus: a in the checkpoint, b now",
        "objective.penalty: 0.05 in the checkpoint, 0.1 now",
        "parallel.distributed_optimizer: True in the checkpoint, False now",
        "seed: 1 in the checkpoint, 2 now",
        "em.rounds: 2 in the checkpoint, 1 now; a resumed run may only be made longer",
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
        "parallel.tensor=2", "parallel.pipeline=2",
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
        (("em.rounds=2",), ("em.rounds=0",), r"em\.rounds: 2 in the checkpoint, 0 now; a resumed run may only be"),
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
