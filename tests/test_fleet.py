"""Engines of a run that are killed as processes: they are started again, get the current weights, and only then serve.

Fake engines stand in for vLLM's, with real processes, ports and signals; ranks are threads that meet at a barrier.
"""

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from megatron_ra3.config import RunConfig
from megatron_ra3.model.parallel import ParallelLayout
from megatron_ra3.rollout import fleet, server, supervise
from megatron_ra3.rollout.engine import EngineError, EnginesLostError, GenerateQuery, StopRule
from megatron_ra3.rollout.health import Restarts
from megatron_ra3.rollout.server import ServerConfig, served_model_name
from tests.fake_engine import ENTRY, GATES, fakes, gate_logprob, sampled
from tests.small import make_config

STOP = StopRule(frozenset({3, 4}), max_tokens=40)
QUERIES = [GenerateQuery((5, number), seed=number) for number in range(20)]
ANSWERS = [sampled(query.token_ids, query.seed, STOP.stop_ids, STOP.max_tokens) for query in QUERIES]


class Ranks:
    """Collectives of ranks that are threads; each is a replica of its own."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.meeting = threading.Barrier(size, timeout=60)
        self.values: list[Any] = [None] * size


class Layout:
    tp_size = pp_size = 1
    is_replica_leader = True

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks = ranks
        self.rank = self.dp_rank = rank
        self.dp_size = self.world_size = ranks.size

    def gather_from_ranks(self, value: Any) -> list[Any]:
        self.ranks.meeting.wait()
        self.ranks.values[self.rank] = value
        self.ranks.meeting.wait()
        return list(self.ranks.values)

    gather_from_leaders = gather_from_ranks
    raise_on_all = ParallelLayout.raise_on_all

    def any_rank(self, flag: bool) -> bool:
        return any(self.gather_from_ranks(flag))

    def broadcast_in_replica(self, value: Any) -> Any:
        return value


class Sync:
    """In the place of `WeightSync`: tells engines their version; `sent` is what went to how many of them."""

    sent: ClassVar[list[tuple[int, int]]] = []

    def __init__(self, urls, *, rank, **_) -> None:
        self.rank = rank
        self.regroup(urls)

    def regroup(self, urls) -> None:
        self.urls, self.dropped = list(urls), {}

    def send(self, source, version) -> None:
        if self.rank:
            return
        Sync.sent.append((version, len(self.urls)))
        for url in self.urls:
            tell(url, version=str(version))

    def check(self, source) -> None:
        pass

    def close(self) -> None:
        pass


def tell(url: str, **faults) -> None:
    urllib.request.urlopen(urllib.request.Request(f"{url}/fake", json.dumps(faults).encode()), timeout=10).close()


def trainer_on(layout: Layout) -> SimpleNamespace:
    """Scores what fake engines score."""

    def score(batches):
        (batch,) = batches
        rows, targets = batch.rows.tolist(), batch.targets.tolist()
        width = batch.token_ids.shape[1]
        return [
            torch.tensor(
                [
                    gate_logprob(batch.token_ids[row // width].tolist(), row % width, gate)
                    for row, gate in zip(rows, targets, strict=True)
                ]
            )
        ]

    return SimpleNamespace(layout=layout, score=score, model=SimpleNamespace(vocab_size=300))


@pytest.fixture(autouse=True)
def processes(monkeypatch) -> None:
    monkeypatch.setattr(server, "ENTRY", ENTRY)
    monkeypatch.setattr(fleet, "WeightSync", Sync)
    monkeypatch.setattr(fleet, "WAIT_POLL_S", 0.1)
    monkeypatch.setattr(supervise, "POLL_S", 0.05)
    monkeypatch.setattr(Sync, "sent", [])


def configured(folder: Path, *settings: str) -> RunConfig:
    return make_config(folder, folder, "engine.kind=vllm", "engine.restart_pause_s=0.05", *settings)


def opened(config: RunConfig, layout: Layout, stop: Callable[[], bool] = lambda: False) -> fleet.Servers:
    latent_format: Any = SimpleNamespace(gate_ids=GATES)
    model = Path(config.model.folder)
    return fleet.Servers(config, trainer_on(layout), latent_format, model, stop)  # type: ignore[arg-type]


def kill(servers: fleet.Servers, number: int) -> None:
    os.killpg(servers._replica._kept[number].server._process.pid, signal.SIGKILL)


def wait_until(condition: Callable[[], Any], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def generated(servers: fleet.Servers) -> list[list[int]]:
    return [list(answer.token_ids) for answer in servers.engine.generate(QUERIES, STOP)]


def gone(groups: list[int]) -> bool:
    def alive(group: int) -> bool:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        return True

    deadline_s = time.monotonic() + 10  # who was killed is gone once its parent has heard of it
    while any(map(alive, groups)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return not any(map(alive, groups))


@pytest.fixture
def two(tmp_path) -> Iterator[fleet.Servers]:
    servers = opened(configured(tmp_path, "engine.per_replica=2"), Layout(Ranks(1), 0))
    yield servers
    groups = [kept.server._process.pid for kept in servers._replica._kept]
    servers.close()
    wait_until(lambda: gone(groups))


def test_killed_engines_are_started_again_and_serve_only_after_a_sync(two, tmp_path, capsys):
    roster = two._replica.roster
    with pytest.raises(EnginesLostError, match="no engine is left"):  # nothing was sent yet
        generated(two)
    two.sync(3)
    assert list(roster.serving().values()) == [3, 3]
    assert two.lead(lambda: generated(two)) == ANSWERS

    kill(two, 0)
    assert two.lead(lambda: generated(two)) == ANSWERS
    wait_until(lambda: len(roster.present()) == 2)
    assert len(roster.serving()) == 1
    assert two.lead(lambda: generated(two)) == ANSWERS
    counts = two.take_counts()
    assert (counts["engines_alive"], counts["engines_lost"], counts["engines_returned"]) == (1, 1, 1)
    two.sync(3)
    assert Sync.sent == [(3, 2), (3, 1)]  # the second time only to the one that has not got them
    assert list(roster.serving().values()) == [3, 3]
    assert json.loads((tmp_path / "run" / "engine-00000.log").read_text()) == {"seed": 1}
    assert json.loads((tmp_path / "run" / "engine-00000.1.log").read_text()) == {"seed": 1 + 100_003}

    calls = []

    def work():
        if not calls:
            for number in range(2):
                kill(two, number)
        calls.append(len(roster.serving()))
        return generated(two)

    assert two.lead(work) == ANSWERS
    assert len(calls) == 2
    assert Sync.sent[2][0] == 3
    counts = two.take_counts()
    assert counts["engines_lost"] == 2
    assert counts["engine_wait_seconds"] > 0.1
    two.sync(4)
    wait_until(lambda: len(roster.present()) == 2)
    two.sync(4)
    assert list(roster.serving().values()) == [4, 4]
    out = capsys.readouterr().out
    assert "restart 1 of 5 in 0.05 s" in out
    assert "waiting for engines, for 900 s at most: replica 0 has no engine: http://127.0.0.1:" in out


def test_replicas_wait_together_for_the_one_that_lost_its_engine_and_keep_what_they_have(tmp_path):
    config, ranks, calls = configured(tmp_path), Ranks(2), {0: 0, 1: 0}
    results: dict[int, Any] = {}

    def run(rank: int) -> None:
        servers = opened(config, Layout(ranks, rank))

        def work() -> list[list[int]]:
            calls[rank] += 1
            if rank == 1 and calls[1] == 1:
                kill(servers, 0)
            return generated(servers)

        try:
            servers.sync(5)
            results[rank] = servers.lead(work), servers.take_counts()["engines_lost"]
        finally:
            servers.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: (ANSWERS, 1), 1: (ANSWERS, 1)}
    assert calls == {0: 1, 1: 2}
    assert Sync.sent == [(5, 2), (5, 1)]
    assert {path.name for path in (tmp_path / "run").glob("*.log")} == {
        "engine-00000.log",
        "engine-00001.log",
        "engine-00001.1.log",
    }


def test_a_frozen_engine_is_ended_and_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "STOP_TIMEOUT_S", 0.3)
    limits = ("engine.health_interval_s=0.1", "engine.health_timeout_s=2")
    servers = opened(configured(tmp_path, *limits), Layout(Ranks(1), 0))
    group = servers._replica._kept[0].server._process.pid

    def work() -> list[list[int]]:
        if servers._replica._kept[0].server._process.pid == group:
            os.killpg(group, signal.SIGSTOP)
        return generated(servers)

    try:
        servers.sync(1)
        assert servers.lead(work) == ANSWERS
        assert gone([group])
    finally:
        servers.close()


@pytest.mark.parametrize(
    ("settings", "stop", "why"),
    [
        (("engine.max_restarts=0",), False, r"given up \(.*max_restarts=0 times in a row\); none will come back"),
        (("engine.restart_pause_s=60",), True, "no longer awaited because the run is to end"),
        (("engine.restart_pause_s=60", "engine.wait_timeout_s=0.3"), False, r"none came within .*wait_timeout_s=0\.3"),
    ],
    ids=["none can come", "told to stop", "too long"],
)
def test_nobody_waits_for_ever(tmp_path, settings, stop, why):
    servers = opened(configured(tmp_path, *settings), Layout(Ranks(1), 0), stop=lambda: stop)

    def work() -> list[list[int]]:
        kill(servers, 0)
        return generated(servers)

    try:
        servers.sync(1)
        with pytest.raises(EnginesLostError, match=rf"replica 0 has no engine: http://127.* {why}"):
            servers.lead(work)
    finally:
        servers.close()


def test_an_engine_of_another_place_joins_again_at_the_next_sync(tmp_path, monkeypatch):
    """Not while its engine process hangs or it serves another model, whatever it says of its health."""
    monkeypatch.setattr(supervise, "PULSE_TIMEOUT_S", 1.0)
    (tmp_path / "model").mkdir()
    with fakes() as made:
        configured(tmp_path)  # writes the model's config
        model = served_model_name(tmp_path / "model")
        urls = [made.start(model=model) for _ in range(2)]
        setting = f"engine.urls=[{','.join(urls)}]"
        servers = opened(configured(tmp_path, setting, "engine.request_timeout_s=2"), Layout(Ranks(1), 0))
        roster = servers._replica.roster
        try:
            servers.sync(1)
            made.engines[urls[0]].hangs = True
            assert servers.lead(lambda: generated(servers)) == ANSWERS
            assert list(roster.serving()) == [urls[1]]
            time.sleep(0.6)
            assert roster.standing(urls[0]) == "lost"
            made.kill(urls[0])
            port = int(urls[0].rpartition(":")[2])
            assert made.start(port=port, model="another") == urls[0]
            time.sleep(0.4)
            assert roster.standing(urls[0]) == "lost"
            made.kill(urls[0])
            made.start(port=port, model=model)
            wait_until(lambda: roster.standing(urls[0]) == "ready")
            servers.sync(2)
            assert roster.serving() == {urls[0]: 2, urls[1]: 2}
            assert servers.lead(lambda: generated(servers)) == ANSWERS
        finally:
            servers.close()


def test_a_served_model_is_started_again_at_its_address_with_an_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(supervise, "PULSE_S", 0.1)
    monkeypatch.setattr(supervise, "PULSE_TIMEOUT_S", 1.0)
    make_config(tmp_path, tmp_path)
    serving: list[server.VllmServer] = []
    until_it_fails = supervise._until_it_fails

    def served(running: server.VllmServer, stuck_after_s: float) -> str:
        serving.append(running)
        return until_it_fails(running, stuck_after_s)

    monkeypatch.setattr(supervise, "_until_it_fails", served)

    def break_it() -> None:
        wait_until(lambda: len(serving) == 1)
        os.killpg(serving[0]._process.pid, signal.SIGKILL)
        wait_until(lambda: len(serving) == 2)
        tell(serving[1].url, hangs=True)
        wait_until(lambda: len(serving) == 3)
        os.killpg(serving[2]._process.pid, signal.SIGKILL)

    breaking = threading.Thread(target=break_it)
    breaking.start()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        config = ServerConfig(tmp_path / "model", tmp_path / "engine.log")
        with pytest.raises(EngineError, match=r"(?s)vLLM server http.* ended; .*given up after .*=2 restarts in a row"):
            supervise.serve_forever(config, Restarts(2, 0.05, settled_s=60.0), stuck_after_s=3.0)
    finally:
        signal.signal(signal.SIGTERM, handler)
        breaking.join()
    assert len({each.port for each in serving}) == 1
    out = capsys.readouterr().out
    assert "restart 1 of 2 in 0.05 s" in out
    assert "is up but has computed nothing for 3 s\nrestart 2 of 2 in 0.1 s" in out
