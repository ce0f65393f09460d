"""The timeline: what is noted reaches the disk or is counted, waits go to whom they were for, seconds count once."""

import json
import shutil
import threading
from pathlib import Path

import pytest

from megatron_ra3.bench.timeline import measure
from megatron_ra3.config import ProfileConfig
from megatron_ra3.observe import spans
from megatron_ra3.observe.engine_times import alone, busy_intervals, out_intervals
from megatron_ra3.observe.journal import Journal, recorded
from megatron_ra3.observe.profiling import StepProfiler
from megatron_ra3.observe.reading import EngineNote, Span, Timeline
from megatron_ra3.observe.shares import OUTSIDE, UNNAMED, awaited, by_phase, percentile, self_us, shares
from megatron_ra3.observe.spans import TIMELINE, Meter, Recorder
from megatron_ra3.observe.timeline import align, attribute, cut, host_offsets_us, read_timeline
from megatron_ra3.observe.timeline_command import tables
from megatron_ra3.observe.trace import trace_events


def _recorder(**header) -> Recorder:
    recorder = Recorder()
    recorder.start(**{"rank": 0, "ranks": 1, "host": "a", "pid": 1, **header})
    recorder.join(7)
    return recorder


def _records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


# Noting and writing


def test_what_is_noted_is_on_disk_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(spans, "LONG_US", 0)
    recorder = _recorder()
    journal = Journal(tmp_path / "timeline", 0, 1_000_000, recorder)
    with recorder.span("step", step=1, phase="estep", round=1):
        with recorder.span("requests", awaits="engines"):
            pass
        with recorder.meeting("sum", "all"), recorder.meeting("other", "replica 0", root=0):
            pass
        thread = threading.Thread(target=lambda: recorder.span("writing").__enter__(), name="checkpoint")
        thread.start()
        thread.join()
        recorder.engine("http://a", standing="serving", version=3)
        journal.flush()
    with recorder.meeting("sum", "all"):
        pass
    journal.flush()
    timeline = read_timeline(tmp_path)
    found = {span.what: span for span in timeline.spans}
    assert sorted(span.what for span in timeline.spans) == ["other", "requests", "step", "sum", "sum", "writing"]
    assert found["writing"].is_open
    assert (found["writing"].thread, found["step"].thread) == ("checkpoint", "MainThread")
    assert not found["step"].is_open  # told before its end, and again with it
    assert found["step"].details == {"step": 1, "phase": "estep", "round": 1}
    assert found["requests"].details == {"for": "engines"}
    assert [span.details["n"] for span in timeline.spans if span.what == "sum"] == [0, 1]
    assert found["other"].details == {"meet": "replica 0", "n": 0, "root": 0}
    assert {span.start for span in timeline.spans} == {7}
    assert found["step"].begin_us <= found["requests"].begin_us <= found["requests"].end_us <= found["step"].end_us
    assert [dict(note.values) for note in timeline.engines] == [{"standing": "serving", "version": 3}] * 2


def test_off_nothing_is_noted_and_nothing_made(tmp_path):
    with recorded(str(tmp_path), 0):
        assert TIMELINE.span("scoring") is spans.NOTHING
        assert TIMELINE.meeting("sum", "all") is spans.NOTHING
        TIMELINE.engine("u", standing="lost")
        TIMELINE.open_queries("u", 1)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match=r"logging\.timeline_megabytes=0"):
        read_timeline(tmp_path)


def test_a_run_goes_on_in_its_file_behind_a_torn_line(tmp_path):
    for start, torn in ((1, '{"span":"ha'), (2, "")):
        with recorded(str(tmp_path), 1):
            TIMELINE.join(start)
            with TIMELINE.meeting("sum", "all"):
                pass
        with (tmp_path / "timeline" / "rank-00000.jsonl").open("a") as file:
            file.write(torn)
    timeline = read_timeline(tmp_path)
    assert [(span.start, span.details["n"]) for span in timeline.spans] == [(1, 0), (2, 0)]
    assert timeline.unreadable_lines == 1


def test_files_stay_below_their_bound_and_keep_the_newest(tmp_path):
    recorder = _recorder()
    recorder.engine("http://a", standing="serving")
    journal = Journal(tmp_path / "timeline", 0, 4000, recorder)
    for number in range(200):
        with recorder.span(f"work {number}"):
            pass
        if number % 5 == 4:
            journal.flush()
    sizes = [path.stat().st_size for path in (journal.path, journal.older)]
    assert max(sizes) <= 2000
    assert min(sizes) > 0
    assert {"process", "at"} == _records(journal.path)[0].keys()
    timeline = read_timeline(tmp_path)
    numbers = [int(span.what.split()[1]) for span in timeline.spans]
    assert numbers == list(range(numbers[0], 200))
    assert len(numbers) > 20
    assert {note.url for note in timeline.engines} == {"http://a"}  # said again at the head of each file


def test_a_disk_that_refuses_costs_records_which_are_counted_and_said_once(tmp_path, capsys):
    (tmp_path / "timeline").write_text("in the way")
    recorder = _recorder()
    journal = Journal(tmp_path / "timeline", 0, 1_000_000, recorder)
    for _ in range(2):
        with recorder.span("work"):
            pass
        journal.flush()
    (tmp_path / "timeline").unlink()
    with recorder.span("late"):
        pass
    journal.flush()
    assert recorder.take_dropped() == 4  # the start of all ranks, two spans, and the note of the first loss
    assert recorder.take_dropped() == 0
    assert capsys.readouterr().out.count("the run goes on, and counts what is lost (timeline_dropped)") == 1
    timeline = read_timeline(tmp_path)
    assert [span.what for span in timeline.spans] == ["late"]
    assert timeline.spans[0].start == 7


def test_a_disk_that_hangs_costs_no_memory_without_end(monkeypatch):
    monkeypatch.setattr(spans, "MAX_BUFFERED", 3)
    recorder = _recorder()
    for _ in range(5):
        with recorder.span("work"):
            pass
    assert recorder.take_dropped() == 3
    assert [next(iter(record)) for record in recorder.collect()] == ["dropped", "start", "span", "span"]


def test_open_queries_are_thinned_out_but_idle_stays_true():
    meter = Meter()
    told = []
    for at_us, count in [(0, 1), (10, 2), (20, 1), (30, 0), (40, 1), (500_000, 0), (550_000, 1), (2_600_000, 9)]:
        told += meter.change(at_us, count)
    assert told == [(0, 1), (500_000, 0), (550_000, 1), (2_600_000, 9)]
    assert meter.change(2_600_010, 0) == []
    assert meter.settle(2_600_020) == []
    assert meter.change(5_000_000, 3) == [(2_600_010, 0), (5_000_000, 3)]  # idle for long: noted when it is over


def test_a_span_is_cheap():
    found = measure(2000, 3)
    assert found["off_us"] < 5
    assert found["noted_us"] < 50
    assert 40 < found["bytes"] < 100


# For whom


def _meet(rank: int, begin: int, end: int, n: int = 0, group: str = "all", **details) -> Span:
    return Span(rank, "sum", begin, end, details={"meet": group, "n": n, **details}, start=1, host=f"h{rank % 2}")


def test_the_rank_that_arrives_last_is_the_one_waited_for():
    found = [_meet(0, 100, 530), _meet(1, 500, 530), _meet(2, 300, 540)]
    attribute(found)
    assert [(span.awaited, span.waited_us) for span in found] == [("rank 1", 400), ("", 0), ("rank 1", 200)]
    other_start = [_meet(0, 100, 530), _meet(1, 500, 530)]
    other_start[1].start = 2
    attribute(other_start)
    assert [span.waited_us for span in other_start] == [0, 0]


def test_of_a_broadcast_only_the_root_is_waited_for():
    found = [_meet(0, 300, 320, root=0), _meet(1, 100, 310, root=0), _meet(2, 900, 910, root=0)]
    attribute(found)
    assert [(span.awaited, span.waited_us) for span in found] == [("", 0), ("rank 0", 200), ("", 0)]


def test_hosts_are_put_on_one_clock_by_the_ends_of_collectives():
    ahead = 7_000_000
    spans = []
    for n in range(5):
        spans += [_meet(0, 1000 * n, 1000 * n + 500, n), _meet(1, 1000 * n + 400 + ahead, 1000 * n + 502 + ahead, n)]
    spans.append(_meet(1, 0, 99, n=0, group="replicas 0.0"))
    timeline = Timeline(spans=spans, hosts={0: "h0", 1: "h1"}, engines=[EngineNote("u", ahead + 10, {}, rank=1)])
    assert host_offsets_us(spans, {0: "h0", 1: "h0"}) == {}
    align(timeline)
    assert timeline.clock_us == {"h1": ahead + 2}
    assert (spans[1].begin_us, timeline.engines[0].at_us) == (398, 8)
    attribute(spans)
    assert (spans[0].awaited, spans[0].waited_us) == ("rank 1", 398)


def test_engines_are_busy_out_and_alone_at_work():
    def note(url, at_us, **values):
        return EngineNote(url, at_us, values, rank=0)

    notes = [
        note("a", 0, standing="serving"), note("a", 10, open=3), note("b", 20, open=1), note("a", 50, open=0),
        note("b", 80, open=0), note("a", 90, open=1), note("a", 95, standing="lost"), note("a", 120, standing="ready"),
        note("a", 130, standing="serving"), note("b", 200, open=2), note("b", 250, open=3),
    ]  # fmt: skip
    assert busy_intervals(notes) == {"a": [(10, 50), (90, 95)], "b": [(20, 80), (200, 250)]}
    assert out_intervals(notes) == {"a": [(95, 130)]}
    assert alone(busy_intervals(notes)) == [(10, 20, "a"), (50, 80, "b"), (90, 95, "a"), (200, 250, "b")]
    assert alone({"a": [(10, 50)]}) == []


# Where the time went


def test_a_second_counts_once_with_the_innermost_span():
    outer, inner, innermost = Span(0, "step", 0, 100), Span(0, "sync", 10, 60), Span(0, "wait", 20, 50)
    later = Span(0, "work", 60, 90)
    found = self_us([innermost, later, outer, inner])
    assert [(span.what, us) for span, us in found] == [("step", 20), ("sync", 20), ("wait", 30), ("work", 30)]


def test_percentiles_are_values_that_occur():
    assert [percentile([5, 1, 9, 3], fraction) for fraction in (0.0, 0.5, 0.51, 0.95, 1.0)] == [1, 3, 5, 9, 9]
    assert percentile([4], 0.95) == 4


def _made_up() -> Timeline:
    """Two ranks, two steps: rank 1 is late to the first collective; rank 0 samples with two engines in the second."""
    second = 1_000_000
    spans = []
    for rank in (0, 1):
        late = 2 * second if rank else 0
        spans += [
            Span(rank, "step", 0, 5 * second, details={"step": 1, "phase": "mstep"}),
            Span(rank, "backward", 0, second + late),
            Span(rank, "sum", second + late, 4 * second, details={"meet": "all", "n": 0}),
            Span(rank, "step", 6 * second, 10 * second, details={"step": 2, "phase": "estep"}),
        ]
    spans.append(Span(0, "requests", 6 * second, 9 * second, details={"for": "engines"}))
    spans.append(Span(0, "writing", 0, 10 * second, thread="checkpoint"))
    for span in spans:
        span.start, span.host = 1, "a"
    attribute(spans)
    engines = [
        EngineNote(url, at_us, values, rank=0)
        for url, at_us, values in (
            ("x", 6 * second, {"open": 2, "standing": "serving"}), ("y", 6 * second, {"open": 2}),
            ("x", 7 * second, {"open": 0}), ("y", 9 * second, {"open": 0}),
        )
    ]  # fmt: skip
    return Timeline(spans=spans, engines=engines, hosts={0: "a", 1: "a"})


def test_time_goes_to_work_waits_and_exchange():
    found = {(share.phase, share.rank): share for share in shares(_made_up())}
    assert list(found) == [(OUTSIDE, 0), (OUTSIDE, 1), ("mstep", 0), ("mstep", 1), ("estep", 0), ("estep", 1)]
    fast, slow = found["mstep", 0], found["mstep", 1]
    assert (fast.work_us, fast.waiting_us, fast.exchange_us) == (
        {"backward": 1_000_000, UNNAMED: 1_000_000},
        {"rank 1": 2_000_000},
        1_000_000,
    )
    assert (slow.work_us["backward"], slow.waited_us, slow.exchange_us) == (3_000_000, 0, 1_000_000)
    assert found["estep", 0].waiting_us == {"engine y": 2_000_000, "engines": 1_000_000}
    assert found[OUTSIDE, 0].work_us == {UNNAMED: 1_000_000}
    assert all(share.us == 5_000_000 for share in (fast, slow))
    assert awaited(found.values()) == {"rank 1": 2_000_000, "engine y": 2_000_000, "engines": 1_000_000}
    assert by_phase(found.values())["mstep"].parts_us["backward"] == [1_000_000, 3_000_000]


def test_the_tables_name_the_straggler_and_the_trace_is_one():
    timeline = _made_up()
    text = "\n".join(tables(timeline, most_ranks=1))
    assert "mstep              1       5.0   80.0%     0.0%     20.0%" in text
    assert "(1 other ranks, which were waited for less: --ranks 2)" in text
    assert "  rank 1                                         2.0   10.0%" in text
    assert "x                                            0       1.0   33.3%" in text
    assert "writing (checkpoint)" in text
    events = list(trace_events(timeline))
    waited = next(event for event in events if event["name"] == "sum" and event["pid"] == 0)
    assert (waited["ts"], waited["dur"], waited["cat"]) == (1_000_000, 3_000_000, "waiting")
    assert waited["args"] == {"meet": "all", "waited for": "rank 1", "waited ms": 2000.0}
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    on_rank_0 = [event for event in events if event["pid"] == 0 and event["tid"] == 0]
    assert [event["name"] for event in on_rank_0] == [
        "process_name", "process_sort_index", "thread_name", "mstep 1", "backward", "sum", "estep 2", "requests",
    ]  # fmt: skip
    cut(timeline, 2, 2)
    assert {span.what for span in timeline.spans} == {"step", "requests"}
    with pytest.raises(ValueError, match="steps 9 to 9: the timeline has none"):
        cut(timeline, 9, 9)


def test_some_steps_of_a_long_run_are_read_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_ra3.observe.timeline.CLOCKS_US", 0)
    with recorded(str(tmp_path), 1):
        for number in range(1, 6):
            with TIMELINE.span("step", step=number, phase="estep"), TIMELINE.span(f"work {number}"):
                TIMELINE.engine("u", standing=f"version {number}")
    timeline = read_timeline(tmp_path, (2, 3))
    assert [span.what for span in timeline.spans] == ["work 2", "step", "work 3", "step"]
    assert [note.values["standing"] for note in timeline.engines] == ["version 1", "version 2", "version 3"]
    with pytest.raises(ValueError, match="steps 9 to 9: the timeline has none of them"):
        read_timeline(tmp_path, (9, 9))


def test_a_rank_whose_file_is_lost_is_only_missing(tmp_path):
    with recorded(str(tmp_path), 1), TIMELINE.span("step", step=1, phase="estep"):
        pass
    folder = tmp_path / "timeline"
    shutil.copy(folder / "rank-00000.jsonl", folder / "rank-00003.jsonl")
    assert {span.rank for span in read_timeline(tmp_path).spans} == {0, 3}


# Profiles


def test_a_profile_of_a_rank_that_does_not_exist_is_refused_and_others_profile_nothing(tmp_path):
    config = ProfileConfig(steps=(3, 4), ranks=(2,))
    with pytest.raises(ValueError, match=r"profile\.ranks=\[2\]: this run has ranks 0 to 1"):
        StepProfiler(config, tmp_path, rank=0, world_size=2)
    assert StepProfiler(config, tmp_path, rank=0, world_size=3).step(3) is spans.NOTHING
    there = StepProfiler(config, tmp_path, rank=2, world_size=3)
    assert [there.step(number) is spans.NOTHING for number in (2, 3, 4, 5)] == [True, False, False, True]
    assert StepProfiler(ProfileConfig(), tmp_path, rank=0, world_size=1).step(1) is spans.NOTHING


def test_a_profile_that_cannot_be_written_is_said_and_no_more(tmp_path, capsys):
    (tmp_path / "profile").write_text("in the way")
    with StepProfiler(ProfileConfig(steps=(1, 1)), tmp_path / "profile", rank=0, world_size=1).step(1):
        pass
    assert "step-00000001-rank-00000.json.gz cannot be written" in capsys.readouterr().out
