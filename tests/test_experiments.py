"""Experiments: figures of hand-made runs, means and intervals over seeds, tables and plots, and one real experiment."""

import csv
import importlib.util
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_ra3.config import load_config
from megatron_ra3.em import midtrain
from megatron_ra3.report.experiments import (
    Column,
    Estimate,
    Row,
    markdown,
    over_seeds,
    round_figures,
    run_figures,
    step_figures,
    write_results,
)
from megatron_ra3.report.plots import Panel, _draw_panel, draw
from tests.small import MODEL

EXAMPLES = Path(__file__).parents[1] / "examples"


def _load(name: str) -> ModuleType:
    """An example's script, as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name.replace('/', '_')}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _evaluation(*, code: int, act_extra: int, thinks: int, length: int, opening: int, actions: int) -> dict[str, Any]:
    """An evaluation of `code` tokens at 2 nats each acting, and 200 nats in all, 150 on lines, with latents."""
    scored = code + act_extra + thinks * (opening + length)
    return {
        "act_nats_per_code_token": 2.0 + act_extra / code,
        "act_nats_per_token": (2.0 * code + act_extra) / (code + act_extra),
        "act_nats_code_only": 2.0,
        "nats_per_code_token": 200 / code,
        "nats_per_token": 200 / scored,
        "nats_code_only": 150 / code,
        "think_rate": thinks / actions,
        "rationale_tokens": float(length),
        "elbo": -9.0,
        "objective": -2.5,
    }


NEWLINE = _evaluation(code=100, act_extra=0, thinks=2, length=5, opening=1, actions=20)
SPECIAL = _evaluation(code=100, act_extra=20, thinks=2, length=5, opening=0, actions=20)


def _write_run(folder: Path, steps: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"seconds": 1.5, **step}) + "\n" for step in steps))
    return folder


def _two_rounds(folder: Path) -> Path:
    steps: list[dict[str, Any]] = []
    for number in (1, 2):
        for reward, think_rate in ((-3.0 + number, 0.5), (-1.0 + number, 0.0)):
            step = {"phase": "estep", "round": number, "reward": reward, "think_rate": think_rate}
            steps.append({**step, "reward_think": -9.0 * (think_rate > 0), "rationale_tokens": 4.0 * (think_rate > 0)})
            steps[-1] |= {"requests_per_rollout": 2.0 * number, "reward_act": reward + 0.25}
        steps.append({"phase": "bootstrap", "round": number, "think_rate": 0.25})
        steps += [{"phase": "mstep", "round": number, "loss": 3.0 - number / 4, "tokens": 70}] * 2
        evaluation = {
            **NEWLINE,
            "nats_per_code_token": 2.0 / number,
            "nats_per_token": NEWLINE["nats_per_token"] / number,
        }
        steps.append({"phase": "evaluate", "round": number, **evaluation})
    return _write_run(folder, steps)


def test_intervals_are_students():
    assert Estimate.of([4.0]) == Estimate(4.0, None, 1)
    three = Estimate.of([1.0, 2.0, 3.0])
    assert (three.mean, three.seeds) == (2.0, 3)
    assert three.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


@pytest.mark.parametrize(("evaluation", "latent_tokens"), [(NEWLINE, 0.12), (SPECIAL, 0.10)])
def test_thinks_are_counted_per_code_token_in_both_surface_forms(tmp_path, evaluation, latent_tokens):
    figures = run_figures(_write_run(tmp_path / "run", [{"phase": "evaluate", "round": 1, **evaluation}]))
    assert figures["thinks_per_code_token"] == pytest.approx(0.02)
    assert figures["latent_tokens_per_code_token"] == pytest.approx(latent_tokens)
    assert (figures["nats"], figures["nats_code_only"], figures["act_nats_code_only"]) == (2.0, 1.5, 2.0)
    assert (figures["rationale_tokens"], figures["elbo"], figures["objective"]) == (5.0, -9.0, -2.5)


def test_a_runs_cost_and_last_evaluation(tmp_path):
    figures = run_figures(_two_rounds(tmp_path / "run"))
    assert figures["tokens"] == 4 * 70
    assert figures["seconds"] == 12 * 1.5
    assert (figures["estep_seconds"], figures["mstep_seconds"], figures["bootstrap_seconds"]) == (6.0, 6.0, 3.0)
    assert figures["requests_per_rollout"] == 3.0
    assert figures["nats"] == 1.0


def test_a_run_that_only_acts_thinks_at_rate_0(tmp_path):
    acting = {name: value for name, value in SPECIAL.items() if name.startswith("act_")}
    steps = [{"phase": "evaluate", "round": 0, **acting, "nats_per_code_token": acting["act_nats_per_code_token"]}]
    figures = run_figures(_write_run(tmp_path / "ntp", steps))
    assert figures["nats"] == figures["act_nats"] == 2.2
    assert figures["nats_code_only"] == 2.0
    assert figures["think_rate"] == figures["thinks_per_code_token"] == figures["latent_tokens_per_code_token"] == 0.0
    assert not {"rationale_tokens", "requests_per_rollout", "estep_seconds"} & figures.keys()


def test_an_unfinished_run_is_named(tmp_path):
    run = _write_run(tmp_path / "run", [{"phase": "estep", "round": 1, "reward": -1.0}])
    with pytest.raises(ValueError, match=r"run: the run has not reached its evaluation yet; start it again"):
        run_figures(run)


def test_rounds_average_their_own_steps(tmp_path):
    first, second = round_figures(_two_rounds(tmp_path / "run"))
    assert (first["round"], first["reward"], second["reward"]) == (1, -1.0, 0.0)
    assert (first["reward_think"], first["reward_act"]) == (-9.0, -0.75)  # the step without thinks has no reward_think
    assert (first["estep_think_rate"], first["bootstrap_think_rate"]) == (0.25, 0.25)
    assert (first["mstep_nats"], second["mstep_nats"]) == (2.75, 2.5)
    assert (first["nats"], second["nats"]) == (2.0, 1.0)


def test_steps_are_numbered_over_rounds_without_means_over_nothing(tmp_path):
    steps = step_figures(_two_rounds(tmp_path / "run"), "estep", ["reward", "rationale_tokens", "unheard_of"])
    assert steps == [
        {"phase_step": 1, "reward": -2.0, "rationale_tokens": 4.0},
        {"phase_step": 2, "reward": 0.0},
        {"phase_step": 3, "reward": -1.0, "rationale_tokens": 4.0},
        {"phase_step": 4, "reward": 1.0},
    ]


RECORDS = [
    {"c": 0.1, "seed": 0, "gain": 1.0, "rate": 0.5},
    {"c": 0.2, "seed": 0, "gain": 5.0},
    {"c": 0.1, "seed": 1, "gain": 3.0},
]


def test_seeds_are_averaged_per_setting():
    first, second = over_seeds(RECORDS, ["c"])
    assert (first.setting, second.setting) == ({"c": 0.1}, {"c": 0.2})
    assert first.figures["gain"] == Estimate(2.0, pytest.approx(12.7062, rel=1e-5), 2)
    assert first.figures["rate"] == Estimate(0.5, None, 1)
    assert second.figures == {"gain": Estimate(5.0, None, 1)}


def test_the_table_shows_what_was_measured():
    columns = [Column("gain", "gain, nats", 2), Column("rate", "rate, %", 1, 100), Column("never", "never")]
    assert markdown(over_seeds(RECORDS, ["c"]), {"c": "c"}, columns).splitlines() == [
        "| c | gain, nats | rate, % |",
        "| --- | --- | --- |",
        "| 0.1 | 2.00 ± 12.71 | 50.0 |",
        "| 0.2 | 5.00 | - |",
    ]


def test_results_hold_every_record(tmp_path):
    write_results(tmp_path / "out", {"corpus": "x"}, RECORDS, over_seeds(RECORDS, ["c"]), "| c |")
    with (tmp_path / "out" / "data.csv").open() as file:
        assert list(csv.reader(file)) == [
            ["c", "seed", "gain", "rate"],
            ["0.1", "0", "1.0", "0.5"],
            ["0.2", "0", "5.0", ""],
            ["0.1", "1", "3.0", ""],
        ]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["corpus"] == "x"
    assert results["records"] == RECORDS
    assert results["rows"][1] == {
        "setting": {"c": 0.2},
        "figures": {"gain": {"mean": 5.0, "half_width": None, "seeds": 1}},
    }
    assert (tmp_path / "out" / "table.md").read_text() == "| c |\n"


def _png_pixels(path: Path) -> tuple[int, int]:
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", raw[16:24])


def test_a_plot_has_one_panel_per_measured_group(tmp_path):
    pytest.importorskip("matplotlib")
    panels = [Panel("gain", {"gain": "RA3"}), Panel("never", {"never": "x"}), Panel("rate", {"rate": "RA3"}, 100)]
    draw(tmp_path / "p.png", over_seeds(RECORDS, ["c"]), panels, x="c", xlabel="c", title="t", log_x=True)
    assert _png_pixels(tmp_path / "p.png") == (1260, 525)
    with pytest.raises(ValueError, match=r"q\.png: none of the figures to draw was measured"):
        draw(tmp_path / "q.png", over_seeds(RECORDS, ["c"]), panels[1:2], x="c", xlabel="c", title="t")


def test_a_panel_draws_means_intervals_and_the_reference():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    rows = over_seeds(RECORDS, ["c"])
    panel = Panel("gain, cents", {"gain": "RA3"}, 100, {"gain": "NTP"}, bounds=(0.0, 1000.0))
    axes = Figure().add_subplot()
    _draw_panel(axes, rows, panel, "c", Row({"c": "NTP"}, {"gain": Estimate(1.5, None, 1)}))
    (bars,) = axes.containers
    line, _, (segments,) = bars.lines
    assert line.get_xydata().tolist() == [[0.1, 200.0], [0.2, 500.0]]
    assert segments.get_segments()[0].tolist() == [[0.1, pytest.approx(-1070.62)], [0.1, pytest.approx(1470.62)]]
    assert axes.lines[-1].get_ydata() == [150.0, 150.0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["NTP", "RA3"]
    assert axes.get_ylim() == (-30.0, 1030.0)


def test_gains_are_against_the_base_model_acting():
    start = {"act_nats": 3.0, "act_nats_code_only": 2.5}
    run = {"nats": 2.75, "nats_code_only": 2.0, "act_nats_code_only": 2.25}
    found = _load("penalty_sweep/run").with_gains(run, start)
    assert (found["gain"], found["gain_code_only"], found["thinking_adds"]) == (0.25, 0.5, 0.25)
    ntp = {"nats": 2.5, "nats_code_only": 2.4, "act_nats_code_only": 2.4}
    beside = _load("penalty_sweep/run").with_gains(run, start, ntp)
    assert beside == {**found, "over_ntp": pytest.approx(0.4)}


def test_granularities_are_compared_with_their_own_ntp():
    found = _load("granularity/run").against(
        {"nats_code_only": 2.0, "seconds": 9.0}, {"nats_code_only": 2.5, "seconds": 4.0}
    )
    assert found == {"nats_code_only": 2.0, "seconds": 9.0, "ntp_nats_code_only": 2.5, "ntp_seconds": 4.0, "gain": 0.5}


def test_asynchronous_esteps_are_compared_with_synchronous_ones_for_real(small_corpus, tmp_path, monkeypatch):
    """In this process, where nothing can overlap, with a tiny model: staleness in lock-step."""
    script, tiny = _load("asynchronous/run"), tmp_path / "tiny"
    tiny.mkdir()
    (tiny / "config.json").write_text(json.dumps(MODEL))

    def midtrain_here(_shared: Any, folder: Path, corpus: Path, model: Path, *settings: str) -> None:
        start = model if model.is_relative_to(tmp_path) else tiny
        places = [f"run_folder={folder}", f"corpus.folder={corpus}", f"model.folder={start}"]
        if not (folder / "summary.json").is_file():
            midtrain(load_config(EXAMPLES / "quickstart" / "run.yaml", [*places, *settings]))

    monkeypatch.setattr(script.Experiment, "midtrain", midtrain_here)
    bases, out = tmp_path / "bases", tmp_path / "out"
    bases.mkdir()
    (bases / "stdlib-small-corpus").symlink_to(small_corpus)
    base = ["--base-set=evaluate.snippets=3", "--base-set=corpus.max_snippet_tokens=80"]
    settings = [*base, "--set=estep.steps=4", "--set=em.rounds=1", "--set=mstep.steps=1"]
    command = ["run.py", "--corpus", "stdlib", "--small", "--out", str(out), "--bases", str(bases), "--seeds", "4"]
    monkeypatch.setattr(sys, "argv", [*command, "--staleness", "2", *settings])
    script.main()
    synchronous, stale = json.loads((out / "results.json").read_text())["records"]
    assert (synchronous["staleness"], synchronous["max_staleness"]) == (0.0, 0)
    assert (stale["staleness"], stale["max_staleness"]) == ((0 + 1 + 2 + 2) / 4, 2)
    assert synchronous["mismatch"] < 1e-5 < stale["mismatch"]
    assert stale["nats_code_only_minus"] == stale["nats_code_only"] - synchronous["nats_code_only"] != 0
    assert stale["speedup"] == synchronous["estep_seconds_each"] / stale["estep_seconds_each"]
    assert _png_pixels(out / "esteps.png")[0] > 600


def test_ntp_gets_the_updates_of_the_m_steps(tmp_path):
    shared = _load("experiments")
    base = shared.Base(tmp_path / "corpus", tmp_path / "model", 3, ("seed=3",))
    settings = ("em.rounds=3", "mstep.steps=7", "mstep.learning_rate=2e-4")
    experiment = shared.Experiment("stdlib", tmp_path, tmp_path, [3], False, None, ("parallel.tensor=1",), settings)
    ntp = experiment.resolved(base, *experiment.ntp_settings(base))
    assert (ntp.em.rounds, ntp.warmup.steps, ntp.warmup.snippets_per_step, ntp.warmup.learning_rate) == (
        0,
        21,
        32,
        2e-4,
    )
    assert (ntp.latents.comments, ntp.seed, ntp.warmup.max_tokens) == ("strip", 3, 0)


def test_a_failing_run_shows_the_end_of_its_log(tmp_path):
    command = [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"]
    with pytest.raises(SystemExit, match=r"the reason\nx ended with status 3; all of it is in .*x\.log"):
        _load("commands").call(command, tmp_path / "x.log", "x")


WRITE = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.parent.mkdir(exist_ok=True); p.open('a').write('made ')"


def test_what_is_made_is_kept_until_its_command_or_inputs_change(tmp_path):
    call_once = _load("commands").call_once
    weights, result, log = tmp_path / "base", tmp_path / "run" / "summary.json", tmp_path / "run.log"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"one")
    command = [sys.executable, "-c", WRITE, result]
    for _ in range(2):
        call_once(command, result, log, "run", inputs=[weights])
    assert result.read_text() == "made "
    (weights / "notes.txt").write_text("not an input")
    call_once(command, result, log, "run", inputs=[weights])
    with pytest.raises(SystemExit, match="made with other settings"):
        call_once([*command, "more"], result, log, "run", inputs=[weights])
    (weights / "model.safetensors").write_bytes(b"two")
    with pytest.raises(SystemExit, match=r"from other inputs .*run\.command\.json"):
        call_once(command, result, log, "run", inputs=[weights])
    assert result.read_text() == "made "


def test_a_command_that_was_refused_leaves_no_claim_behind(tmp_path):
    call_once = _load("commands").call_once
    result, log = tmp_path / "run" / "summary.json", tmp_path / "run.log"
    with pytest.raises(SystemExit):
        call_once([sys.executable, "-c", "raise SystemExit(2)"], result, log, "run")
    command = [sys.executable, "-c", WRITE, result]
    call_once(command, result, log, "run")
    result.unlink()  # interrupted: its folder is there, its result is not
    call_once(command, result, log, "run")
    assert result.read_text() == "made "


def _em_monitoring(folder: Path, bases: Path) -> str:
    command = [sys.executable, str(EXAMPLES / "em_monitoring" / "run.py"), "--corpus", "stdlib", "--small"]
    latents = ["--base-set=latents.surface=special", "--base-set=latents.max_rationale_tokens=2"]
    settings = [
        *latents,
        "--base-set=warmup.learning_rate=1e-5",
        "--set=mstep.steps=1",
        "--base-set=evaluate.snippets=3",
    ]
    done = subprocess.run(
        [*command, "--out", str(folder), "--bases", str(bases), "--seeds", "4", *settings],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_em_is_monitored_for_real_and_finished_runs_are_kept(small_corpus, tmp_path):
    bases, out = tmp_path / "bases", tmp_path / "out"
    bases.mkdir()
    (bases / "stdlib-small-corpus").symlink_to(small_corpus)
    assert _em_monitoring(out, bases).count(" done in ") == 3  # base model, round 0, RA3
    results = json.loads((out / "results.json").read_text())
    assert [record["round"] for record in results["records"]] == [0, 1, 2, 3]
    metrics = [json.loads(line) for line in (out / "runs" / "ra3-seed4" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [step for step in metrics if step["phase"] == "evaluate"]
    assert len(evaluations) == 3
    for record, step in zip(results["records"][1:], evaluations, strict=True):
        assert (record["elbo"], record["objective"]) == (step["elbo"], step["objective"])
        assert (record["nats"], record["act_nats"]) == (step["nats_per_code_token"], step["act_nats_per_code_token"])
        # In the special form acting everywhere writes one gate per action.
        actions_per_code_token = step["act_nats_per_code_token"] / step["act_nats_per_token"] - 1
        thinks_per_code_token = step["think_rate"] * actions_per_code_token
        assert record["thinks_per_code_token"] == pytest.approx(thinks_per_code_token, rel=1e-9)
    assert results["records"][0]["thinks_per_code_token"] > 0
    base = json.loads((bases / "stdlib-small-line-seed4" / "metrics.jsonl").read_text().splitlines()[-1])
    assert results["records"][0]["act_nats"] == pytest.approx(base["act_nats_per_code_token"])  # nothing learnt
    assert all(_png_pixels(out / name)[0] > 600 for name in ("rounds.png", "esteps.png", "msteps.png"))
    table = (out / "table.md").read_text()
    again = _em_monitoring(out, bases)
    assert " done in " not in again
    assert (out / "table.md").read_text() == table
    assert table in again
