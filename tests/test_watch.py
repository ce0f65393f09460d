"""`ra3 watch` on a made-up run folder: how far, what engines do, who waits for whom, what went wrong."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from megatron_ra3.cli import main
from megatron_ra3.observe.run_view import Follower, left, warnings_of
from megatron_ra3.observe.watch import duration, render, sparkline

NOW_S = 1_800_000_000.0
NOW_US = int(NOW_S * 1e6)


def _write(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _step(number: int, phase: str, **metrics) -> dict:
    return {"step": number, "phase": phase, "round": 1, "seconds": 10.0, **metrics}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three ranks in its second phase: rank 0 waits for rank 2, one of two engines is lost."""
    folder = tmp_path / "my-run"
    phases = [{"name": "estep", "round": 1, "steps": 4}, {"name": "mstep", "round": 1, "steps": 6}]
    card = {"kind": "midtrain", "ranks": 3, "phases": phases}
    steps = [_step(n, "estep", reward=-5.0 + n, think_rate=0.25) for n in range(1, 4)]
    steps[1] |= {"engines_lost": 1, "signatures": {"gate_closed": "the gate has closed"}}
    _write(folder / "metrics.jsonl", [*steps, _step(4, "mstep", loss=2.5, seconds=4.0)])
    (folder / "run.json").write_text(json.dumps(card))
    for rank, records in enumerate(
        (
            [
                {"open": "sum", "at": NOW_US - 60_000_000, "meet": "replicas", "n": 5},
                {"engine": "http://n1:1", "at": NOW_US - 90_000_000, "standing": "serving", "version": 3},
                {"engine": "http://n1:1", "at": NOW_US - 1_000_000, "open": 12, "tokens_per_second": 1234.5},
                {"engine": "http://n2:2", "at": NOW_US - 30_000_000, "standing": "lost", "reason": "it died"},
                {"engine": "http://n3:3", "at": NOW_US - 30_000_000, "standing": "replaced"},
            ],
            [{"open": "requests", "at": NOW_US - 42_000_000, "for": "engines"}],
            [
                {"span": "sum", "at": NOW_US - 99_000_000, "us": 5, "meet": "replicas", "n": 4},
                {"open": "step", "at": NOW_US - 98_000_000, "phase": "mstep", "step": 5},
                {"open": "backward", "at": NOW_US - 61_000_000},
            ],
        )
    ):
        process = {"rank": rank, "ranks": 3, "host": "n1", "pid": 1, "began": 1, "start": 9}
        _write(folder / "timeline" / f"rank-{rank:05d}.jsonl", [{"process": process, "at": 1}, *records])
    return folder


def _text(folder: Path) -> str:
    console = Console(width=160, record=True, file=(folder.parent / "screen").open("w"))
    console.print(render(Follower(folder).look(NOW_S)))
    return console.export_text()


def test_a_run_is_told_on_one_screen(run):
    lines = [line.rstrip() for line in _text(run).splitlines()]
    assert lines[0] == "my-run  midtrain on 3 ranks"
    assert lines[1] == "step 4 of 9, mstep of round 1, 4.0 s"  # the E-step ended a step early
    assert lines[2] == "20 s left at this pace"
    assert "last sign of life" in lines[3]
    loss = next(line.split() for line in lines if line.startswith(" loss"))
    assert loss == ["loss", "2.5", "2.5", "2.5", "\u2581"]
    engines = [line.split() for line in lines if line.startswith(" http")]
    assert engines == [
        ["http://n1:1", "serving", "1", "min", "30", "s", "12", "1234", "3"],
        ["http://n2:2", "lost", "(it", "died)", "30", "s"],
    ]
    waits = lines[lines.index("who waits for whom, longer than seconds:") + 1 :]
    assert waits[:3] == [
        "  rank 1 waits for engines in 'requests', since 42 s",
        "  rank 0 waits in 'sum' for rank 2, since 60 s",
        "      rank 2 is in 'backward', since 61 s",
    ]
    assert lines[-3:] == [
        "last warnings:",
        "  step 2: gate_closed: the gate has closed",
        "  step 2: engines_lost 1",
    ]


def test_a_follower_reads_what_is_new_and_begins_anew_after_a_resume(run):
    follower, path = Follower(run), run / "metrics.jsonl"
    assert follower.look(NOW_S).last["step"] == 4
    with path.open("a") as file:
        file.write(json.dumps(_step(5, "mstep", loss=2.0)) + '\n{"step": 6, "pha')
    view = follower.look(NOW_S)
    assert (view.last["step"], view.steps_left, [record["loss"] for record in view.by_phase["mstep"]]) == (
        5,
        4,
        [2.5, 2.0],
    )
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))
    view = follower.look(NOW_S)
    assert (view.last["step"], view.steps_left, list(view.by_phase)) == (3, 7, ["estep"])
    path.write_text(
        "".join(lines[:2]) + json.dumps(_step(3, "estep", reward=-2.0, longer="than before")) + "\n" + lines[3]
    )
    view = follower.look(NOW_S)
    assert (view.last["step"], view.by_phase["estep"][-1]["longer"]) == (4, "than before")
    assert view.warnings == ["step 2: gate_closed: the gate has closed", "step 2: engines_lost 1"]


def test_a_finished_run_and_an_empty_one(run, tmp_path, capsys):
    (run / "summary.json").write_text("{}")
    assert "finished" in _text(run)
    (tmp_path / "new").mkdir()
    assert main(["watch", "--once", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.splitlines()[0].rstrip() == "new  run on ? ranks"
    assert main(["watch", "--once", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such run folder" in capsys.readouterr().err
    assert main(["watch", "--every", "0", str(run)]) == 2


def test_only_the_end_of_a_long_file_is_read(run, monkeypatch):
    monkeypatch.setattr("megatron_ra3.observe.run_view.TAIL_BYTES", 300)
    path = run / "timeline" / "rank-00000.jsonl"
    header, *records = path.read_text().splitlines(keepends=True)
    old = json.dumps({"span": "old", "at": 5, "us": 1}) + "\n"
    path.write_text(header + old * 50 + records[0])
    assert "rank 0 waits in 'sum' for rank 2, since 60 s" in _text(run)


def test_the_time_left_is_that_of_each_phase():
    phases = [{"name": name, "round": n, "steps": 10} for n in (1, 2) for name in ("estep", "mstep")]
    done = {("estep", 1): 10, ("mstep", 1): 3}
    assert left(phases, done, {"phase": "mstep", "round": 1}, {"estep": 5.0, "mstep": 2.0}) == (
        27,
        7 * 2 + 10 * 5 + 10 * 2,
    )
    assert left(phases, {}, {"phase": "mstep", "round": 2}, {"estep": 5.0}) == (10, 50.0)
    assert left((), done, {}, {"estep": 5.0}) == (None, None)


def test_warnings_are_what_went_wrong_in_a_step():
    record = {"step": 3, "bad_samples": 2, "engines_lost": 0, "kernel_fallbacks": {"fp8": 1}, "engines_alive": 2}
    assert warnings_of(record, {"bad_samples": 1}) == [
        "step 3: kernel_fallbacks {'fp8': 1}",
        "step 3: bad_samples 1 -> 2",
    ]
    assert warnings_of({"step": 3, "bad_samples": 2}, {"bad_samples": 2}) == []


def test_sparklines_and_durations():
    assert sparkline([0, 1, 2, 7], "01234567") == "0127"
    assert sparkline([1, 1], "ab") == "aa"
    assert sparkline([0, float("nan"), 1], "ab") == "a b"
    assert sparkline([0, 0, 8, 8], "012345678", width=2) == "08"
    assert sparkline([], "ab") == sparkline([float("inf")], "ab") == ""
    assert [duration(s) for s in (5, 65, 3700, 90_000)] == ["5 s", "1 min 5 s", "1 h 1 min", "1 d 1 h"]
