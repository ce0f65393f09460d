"""Sampling ahead: what may begin when, what is refused, and whole runs whose engine works while the trainer does."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ra3 import lifecycle
from megatron_ra3.config import RunConfig
from megatron_ra3.em import midtrain
from megatron_ra3.estep import EStep
from megatron_ra3.latents import Kind, LatentFormat, Trajectory
from megatron_ra3.lifecycle import StopRequestedError
from megatron_ra3.model.parallel import ParallelLayout
from megatron_ra3.report.consumed import Consumed
from megatron_ra3.rollout.ahead import THREAD_NAME, Ahead, Taken, longest_wait_s
from megatron_ra3.rollout.dispatch import UnansweredError
from megatron_ra3.rollout.engine import EngineError
from megatron_ra3.rollout.sampler import Sampler, SamplerStats, SamplingStoppedError
from megatron_ra3.rollout.staleness import Staleness, staleness, steps_to_begin
from megatron_ra3.rollout.vllm_engine import _weight_version
from tests.distributed import run_ranks
from tests.fake_fleet import FakeFleet, T
from tests.small import make_config

SHORT = ("engine.kind=vllm", "warmup.steps=1", "estep.steps=5", "mstep.steps=1", "evaluate.snippets=2")
FIRST_ESTEP_VERSION = 1


# --- decisions


def test_only_steps_whose_bound_the_live_weights_keep_may_begin():
    def schedule(steps: int, bound: int) -> list[int]:
        """How many begin at each step of a phase."""
        begun, found = 0, []
        for step in range(steps):
            found.append(steps_to_begin(begun, steps_left=steps - step, max_staleness_steps=bound))
            begun += found[-1] - 1
        return found

    assert schedule(4, 0) == [1, 1, 1, 1]
    assert schedule(4, 1) == [2, 1, 1, 0]
    assert schedule(4, 2) == [3, 1, 0, 0]
    assert schedule(2, 9) == [2, 0]
    assert steps_to_begin(3, steps_left=9, max_staleness_steps=1) == 0


def _rollout(*versions: int) -> Trajectory:
    item = Trajectory("s")
    for line, version in enumerate(versions):
        item.append(Kind.GATE, line, [1], logprobs=[-1.0], weight_version=version)
        item.append(Kind.LINE, line, [7])  # not sampled: version 0 means nothing
    return item


def test_staleness_is_counted_over_decisions_and_its_bound_is_hard():
    groups = [[_rollout(5, 6), _rollout(7)], [_rollout(7, 7)]]
    assert staleness(groups, 7, max_staleness_steps=2) == Staleness(decisions=5, total_steps=3, most_steps=2)
    with pytest.raises(
        EngineError, match=r"weight versions \[5, 6, 7\], the trainer is at 7 and .*max_staleness_steps=1"
    ):
        staleness(groups, 7, max_staleness_steps=1)
    with pytest.raises(EngineError, match=r"trainer is at 6 and"):  # of weights that are still to come
        staleness(groups, 6, max_staleness_steps=9)
    assert staleness([[]], 3, max_staleness_steps=0) == Staleness(0, 0, 0)


def test_a_leader_gives_up_before_the_ranks_that_wait_for_it():
    assert [longest_wait_s(limit) for limit in (4.0, 240.0, 1800.0)] == [3.0, 180.0, 1740.0]


def test_an_answer_whose_weights_changed_on_the_way_is_asked_anew():
    spans = [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 5}]
    assert _weight_version("http://e", {"weight_versions": spans[:1]}) == 3
    with pytest.raises(UnansweredError, match=r"http://e: weights changed from version 3 to 4 within one answer"):
        _weight_version("http://e", {"weight_versions": spans})


# --- the thread


class SlowSampler:
    """Stands for a Sampler whose engine answers when told to."""

    def __init__(self) -> None:
        self.answers = threading.Semaphore(0)
        self.stats = SamplerStats()
        self.stopped = False
        self.sampled: list[int] = []

    def sample(self, _snippets: Any, *, seed: int) -> list[list[Trajectory]]:
        while not self.answers.acquire(timeout=0.01):
            if self.stopped:
                raise SamplingStoppedError
        if seed < 0:
            raise EngineError("engine http://e is gone")
        self.sampled.append(seed)
        return [[_rollout(seed)]]

    def stop(self) -> None:
        self.stopped = True


def _ahead(sampler: SlowSampler, **options: Any) -> Ahead:
    return Ahead(lambda work: work(), lambda: sampler, **{"overlaps": True, "timeout_s": 20.0, **options})  # type: ignore[arg-type, return-value]


def _taken(position: int) -> Taken:
    return Taken([], Consumed(), 0, {"position": position})


def test_steps_are_used_in_the_order_they_began_and_errors_come_where_they_would_have():
    sampler = SlowSampler()
    ahead = _ahead(sampler)
    for seed in (1, -2, 3):
        ahead.begin(_taken(seed), seed=seed)
    assert (ahead.begun, ahead.stream_before) == (3, {"position": 1})
    assert sampler.sampled == []  # nothing waits yet
    sampler.answers.release(3)
    taken, sampled = ahead.use()
    assert (taken.stream_before, sampled.groups[0][0].weight_versions[0]) == ({"position": 1}, 1)
    assert ahead.stream_before == {"position": -2}
    with pytest.raises(EngineError, match="http://e is gone"):
        ahead.use()
    assert (ahead.begun, ahead.stream_before) == (2, {"position": -2})
    ahead.close()


def test_a_leader_that_has_its_engines_back_asks_again():
    """What failed is sampled anew, in its place; nothing is skipped."""
    sampler = SlowSampler()
    sampler.answers.release(9)
    failures = iter([EngineError("engine http://e is gone")] * 2)

    def lead_on(work: Any) -> Any:
        while True:
            try:
                return work()
            except EngineError:
                continue

    def sampler_of_lost_engines(_snippets: Any, *, seed: int) -> Any:
        for failure in failures:
            raise failure
        return SlowSampler.sample(sampler, _snippets, seed=seed)

    sampler.sample = sampler_of_lost_engines  # type: ignore[method-assign]
    ahead = Ahead(lead_on, lambda: sampler, overlaps=True, timeout_s=20.0)  # type: ignore[arg-type, return-value]
    for seed in (1, 2):
        ahead.begin(_taken(seed), seed=seed)
    for seed in (1, 2):
        taken, sampled = ahead.use()
        assert (taken.stream_before, sampled.groups[0][0].weight_versions[0]) == ({"position": seed}, seed)
    ahead.close()


def test_a_wait_has_a_limit_and_closing_ends_the_thread():
    ahead = _ahead(SlowSampler(), timeout_s=0.05)
    ahead.begin(_taken(0), seed=0)
    ahead.begin(_taken(1), seed=1)
    with pytest.raises(EngineError, match=r"replica 0 did not .* within 0\.0375 s; parallel\.timeout_s=0\.05 would"):
        ahead.use()
    ahead.close()
    assert not _threads()


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


# --- whole runs


def _config(corpus: Path, folder: Path, *overrides: str) -> RunConfig:
    return make_config(corpus, folder, *SHORT, *overrides)


def _metrics(config: RunConfig) -> list[dict[str, Any]]:
    """Without what differs by design."""
    ours = ("staleness", "max_staleness", "signatures")  # advice names the setting
    lines = Path(config.run_folder, "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.endswith("seconds") and k not in ours} for line in lines
    ]


def _esteps(config: RunConfig) -> list[dict[str, Any]]:
    lines = Path(config.run_folder, "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["phase"] == "estep"]


@pytest.fixture
def fleets(monkeypatch: pytest.MonkeyPatch) -> list[FakeFleet]:
    """Every engine that runs open from here on, in order."""
    opened: list[FakeFleet] = []

    def open_engine(_config: Any, _trainer: Any, latent_format: Any, _folder: Any, **_options: Any) -> FakeFleet:
        opened.append(FakeFleet(latent_format))
        return opened[-1]

    monkeypatch.setattr(lifecycle, "open_engine", open_engine)
    return opened


@pytest.fixture(scope="module")
def synchronous(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run that samples nothing ahead."""
    config = _config(small_corpus, tmp_path_factory.mktemp("synchronous"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lifecycle, "open_engine", lambda _c, _t, latent_format, _f, **_o: FakeFleet(latent_format))
        midtrain(config)
    assert {record["max_staleness"] for record in _esteps(config)} == {0}
    return config


def _assert_same(config: RunConfig, other: RunConfig) -> None:
    """Same samples in the same steps, same figures, same weights: the law is fixed, so staleness changes nothing."""
    assert _metrics(config) == _metrics(other)
    exports = [Path(item.run_folder, "export", "model.safetensors").read_bytes() for item in (config, other)]
    assert exports[0] == exports[1]


def test_the_next_step_is_sampled_while_this_one_is_updated(synchronous, small_corpus, tmp_path, fleets, monkeypatch):
    """Sampling of each step begins within the update before it, and ends before that does: else both wait in vain."""
    begun, ended = threading.Semaphore(1), threading.Semaphore(0)
    sample, update = Sampler.sample, EStep.update
    left = iter(range(4, -1, -1))

    def sample_within_update(sampler: Sampler, snippets: Any, *, seed: int) -> Any:
        ahead = threading.current_thread().name.startswith(THREAD_NAME)
        assert not ahead or begun.acquire(timeout=20.0), "no update began"
        groups = sample(sampler, snippets, seed=seed)
        ended.release()
        return groups

    def update_around_sampling(estep: EStep, groups: Any) -> dict[str, float]:
        assert ended.acquire(timeout=20.0)
        begun.release()
        assert not next(left) or ended.acquire(timeout=20.0), "nothing was sampled meanwhile"
        ended.release()
        return update(estep, groups)

    monkeypatch.setattr(Sampler, "sample", sample_within_update)
    monkeypatch.setattr(EStep, "update", update_around_sampling)
    config = _config(small_corpus, tmp_path, "estep.max_staleness_steps=1")
    midtrain(config)
    _assert_same(config, synchronous)
    assert [(record["staleness"], record["max_staleness"]) for record in _esteps(config)] == [(0, 0)] + [(1, 1)] * 4
    (fleet,) = fleets
    assert fleet.closed
    assert {name.startswith(THREAD_NAME) for name in fleet.asked_by} == {True, False}  # bootstrap, evaluate: not ahead
    assert not _threads()


@pytest.mark.parametrize(("stops", "bound"), [((2, 2, 2), 1), ((1, 1, 1, 1, 1, 1, 1), 2)])
def test_stopping_and_resuming_uses_every_sample_once(synchronous, small_corpus, tmp_path, fleets, stops, bound):
    overrides = [f"estep.max_staleness_steps={bound}"]
    for steps in stops:
        with pytest.raises(StopRequestedError):
            midtrain(_config(small_corpus, tmp_path, *overrides, f"checkpoint.stop_after_steps={steps}"))
        assert not _threads()
    config = _config(small_corpus, tmp_path, *overrides)
    midtrain(config)
    _assert_same(config, synchronous)
    assert len(fleets) >= 3


def test_a_failing_update_ends_the_run_at_once_and_loses_nothing(
    synchronous, small_corpus, tmp_path, fleets, monkeypatch
):
    """The newest checkpoint is of a step before; what was sampled ahead since is sampled anew."""
    updates = iter([False, False, True])
    update = EStep.update

    def failing_update(estep: EStep, groups: Any) -> dict[str, float]:
        if next(updates, False):
            raise MemoryError("no memory for the third update")
        return update(estep, groups)

    monkeypatch.setattr(EStep, "update", failing_update)
    config = _config(small_corpus, tmp_path, "estep.max_staleness_steps=2", "checkpoint.every_steps=2")
    with pytest.raises(MemoryError, match="third update"):
        midtrain(config)
    assert not _threads()
    midtrain(config)
    _assert_same(config, synchronous)


def test_an_engine_of_old_weights_is_found_out(small_corpus, tmp_path, monkeypatch):
    """The bound allows them once."""

    def open_engine(_config: Any, _trainer: Any, latent_format: Any, _folder: Any, **_options: Any) -> FakeFleet:
        return FakeFleet(latent_format, lambda fleet: setattr(fleet, "version", FIRST_ESTEP_VERSION - 1))

    monkeypatch.setattr(lifecycle, "open_engine", open_engine)
    config = _config(small_corpus, tmp_path, "estep.max_staleness_steps=1")
    with pytest.raises(EngineError, match=r"versions \[0\], the trainer is at 2 and estep\.max_staleness_steps=1"):
        midtrain(config)
    assert [record["staleness"] for record in _esteps(config)] == [1]
    assert not _threads()


def test_an_engine_that_fails_ahead_ends_the_run_where_its_rollouts_are_due(
    small_corpus, tmp_path, fleets, monkeypatch
):
    sample = Sampler.sample

    def failing_sample(sampler: Sampler, snippets: Any, *, seed: int) -> Any:
        if seed == 4:  # the step after three E-steps and one of warm-up
            raise EngineError("engine http://e: no answer")
        return sample(sampler, snippets, seed=seed)

    monkeypatch.setattr(Sampler, "sample", failing_sample)
    config = _config(small_corpus, tmp_path, "estep.max_staleness_steps=2")
    with pytest.raises(EngineError, match="http://e: no answer"):
        midtrain(config)
    assert len(_esteps(config)) == 3
    assert [fleet.closed for fleet in fleets] == [True]
    assert not _threads()


class FleetOfALeader(FakeFleet):
    """As `Servers`: one rank of a replica asks, the others are told."""

    def __init__(self, layout: ParallelLayout, latent_format: LatentFormat) -> None:
        super().__init__(latent_format)
        self.layout = layout
        self.told = ""

    def close(self) -> None:
        self.told = _told_of_silence(self.layout)
        super().close()

    def lead(self, work: Callable[[], T]) -> T:
        result: T = self.layout.broadcast_in_replica(work() if self.layout.is_replica_leader else None)
        return result


def _run_on_a_leaders_fleet(config: RunConfig) -> tuple[list[str], str]:
    """Which threads of this rank have asked, and what it is told of an engine that never answers."""
    opened: list[FleetOfALeader] = []

    def open_engine(_config: Any, trainer: Any, latent_format: Any, _folder: Any, **_options: Any) -> FleetOfALeader:
        opened.append(FleetOfALeader(trainer.layout, latent_format))
        return opened[-1]

    lifecycle.open_engine = open_engine  # type: ignore[assignment]  # this process runs nothing else
    midtrain(config)
    return opened[0].asked_by, opened[0].told


def _told_of_silence(layout: ParallelLayout) -> str:
    """The error on this rank where the leader's engine never answers."""

    def lead(work: Callable[[], T]) -> T:
        """As `Servers.lead`: an error of the leader reaches the rank that waits for it in a collective."""
        outcome: tuple[T | None, Exception | None] = (None, None)
        if layout.is_replica_leader:
            try:
                outcome = (work(), None)
            except EngineError as error:
                outcome = (None, error)
        result, problem = layout.broadcast_in_replica(outcome)
        if problem is not None:
            raise problem
        return result

    ahead = Ahead(lead, SlowSampler, overlaps=True, timeout_s=2.0)  # type: ignore[arg-type]
    ahead.begin(_taken(0), seed=0)
    try:
        ahead.use()
    except EngineError as error:
        return str(error)
    finally:
        ahead.close()
    return "sampled"


def test_the_ranks_of_a_replica_share_what_its_leader_samples_ahead(synchronous, small_corpus, tmp_path):
    config = _config(small_corpus, tmp_path, "estep.max_staleness_steps=1", "parallel.tensor=2")
    (leader, leader_told), (other, other_told) = run_ranks(_run_on_a_leaders_fleet, 2, config, timeout_s=300)
    assert any(name.startswith(THREAD_NAME) for name in leader)
    assert other == []
    assert "replica 0 did not sample the rollouts of a step within 1.5 s" in leader_told
    assert other_told == leader_told
    for ours, theirs in zip(_metrics(config), _metrics(synchronous), strict=True):
        exact = ("phase", "samples_digest", "stream_position", "think_rate", "rationale_tokens")
        assert [ours.get(name) for name in exact] == [theirs.get(name) for name in exact]
        if "reward" in ours:
            assert ours["reward"] == pytest.approx(theirs["reward"], abs=1e-4)
    assert max(record["max_staleness"] for record in _esteps(config)) <= 1
