"""Engines that die, hang, are late or forget their weights while they sample: every query is answered, and the same.

Fake engines that sample a function of prefix and seed: whichever answers, there is one right answer to a query.
"""

import threading
import time
from collections.abc import Iterator

import pytest

from megatron_ra3.rollout.engine import EngineError, EnginesLostError, GateQuery, GenerateQuery, StopRule
from megatron_ra3.rollout.health import Roster
from megatron_ra3.rollout.vllm_engine import VllmEngine
from megatron_ra3.stall import ACTIVITY
from tests.fake_engine import GATES, Fakes, fakes, gate_logprob, sampled

STOP = StopRule(frozenset({3, 4}), max_tokens=40)
QUERIES = [GenerateQuery((5, number % 7, number), seed=number, group=f"g{number % 7}") for number in range(60)]


@pytest.fixture(scope="module")
def started() -> Iterator[Fakes]:
    with fakes() as made:
        yield made


class Fleet:
    """`count` fake engines that serve version 7, and their client."""

    def __init__(self, made: Fakes, count: int, **limits) -> None:
        self.made = made
        self.urls = [made.start() for _ in range(count)]
        self.roster = Roster()
        for url in self.urls:
            self.roster.add(url, "ready")
            made.engines[url].version = "7"
            self.roster.admit(url, 7)
        limits = {"timeout_s": 30.0, "silence_s": 30.0, "beat_timeout_s": 1.0, "max_in_flight": 8} | limits
        self.engine = VllmEngine(self.roster, GATES, **limits)

    def __getitem__(self, number: int):
        return self.made.engines[self.urls[number]]

    def kill_when(self, number: int, ready) -> threading.Thread:
        return self.made.kill_when(self.urls[number], ready)

    def generate(self, queries=QUERIES) -> None:
        """Ask, and compare with the one right answer."""
        answers = self.engine.generate(queries, STOP)
        expected = [sampled(query.token_ids, query.seed, STOP.stop_ids, STOP.max_tokens) for query in queries]
        assert [list(answer.token_ids) for answer in answers] == expected
        assert {answer.weight_version for answer in answers} == {7}


@pytest.fixture
def fleet(started) -> Iterator[object]:
    opened: list[Fleet] = []

    def open_fleet(count: int, **limits) -> Fleet:
        opened.append(Fleet(started, count, **limits))
        return opened[-1]

    yield open_fleet
    for each in opened:
        each.engine.close()


def test_work_is_shared_groups_stay_together_and_no_engine_gets_more_than_it_may(fleet):
    three = fleet(3, max_in_flight=4)
    for number in range(3):
        three[number].delay_s = 0.01
    three.generate()
    answered = [three[number].answered - 1 for number in range(3)]  # one for the plugin's check
    assert sum(answered) == 60
    assert min(answered) >= 8  # whole groups of 8 or 9 queries
    assert max(three[number].most_open for number in range(3)) == 4
    gates = three.engine.gate_logprobs([GateQuery((5, 6, 7), (0, 2))])
    assert gates[0].logprobs == tuple(tuple(gate_logprob((5, 6, 7), row, gate) for gate in GATES) for row in (0, 2))
    assert three.roster.take_counts() == {"groups_moved": three.engine._router.moves}


def test_queries_that_begin_alike_are_a_group(fleet):
    two = fleet(2, max_in_flight=64)
    two.generate([GenerateQuery((*range(64), number), seed=number) for number in range(12)])
    assert sorted(two[number].answered - 1 for number in range(2)) == [0, 12]


def test_queries_of_an_engine_that_dies_are_answered_by_the_others(fleet):
    two = fleet(2)
    for number in range(2):
        two[number].delay_s = 0.05
    killer = two.kill_when(0, lambda engine: engine.open == 8 and engine.answered > 4)
    two.generate()
    killer.join()
    counts = two.roster.take_counts()
    assert counts["engines_lost"] == 1
    assert counts["requests_reissued"] >= 8
    assert list(two.roster.serving()) == [two.urls[1]]
    two.generate()  # nobody asks the dead one again
    assert two.roster.take_counts()["requests_reissued"] == 0


def test_long_answers_are_as_frequent_when_engines_die_under_them(fleet):
    """The time to an answer grows with its length, so the answers that are lost are the long ones."""
    four = fleet(4, max_in_flight=30)
    for number in range(4):
        four[number].token_s = 0.004
    killers = [four.kill_when(n, lambda engine, least=8 * n + 4: engine.answered > least) for n in range(3)]
    four.generate([GenerateQuery((9, number), seed=number) for number in range(120)])
    for killer in killers:
        killer.join()
    assert four.roster.take_counts()["engines_lost"] == 3


def test_a_silent_engine_is_lost_at_its_health_check(fleet):
    two = fleet(2, silence_s=0.2, beat_timeout_s=2.0)
    two[1].mute = True
    began = time.monotonic()
    two.generate()
    assert time.monotonic() - began < 25  # of a query's 30
    assert two.roster.standing(two.urls[1]) == "lost"
    assert f"engine {two.urls[1]}: no answer to /health within 2 s" in two.roster.described()
    two[1].mute = False


def test_an_engine_that_answers_health_checks_alone_is_stuck(fleet):
    two = fleet(2, timeout_s=3.0, silence_s=0.2, beat_timeout_s=5.0)
    two[0].hangs = True
    moves = ACTIVITY.moves
    two.generate()
    assert ACTIVITY.moves > moves + 60  # signs of life for the watchdog
    assert f"{two.urls[0]} lost (no answer to any query within timeout_s=3)" in two.roster.described()
    assert two.roster.take_counts()["engines_lost"] == 1
    two[0].hangs = False


def test_an_engine_that_is_late_with_one_query_stays_and_the_query_is_asked_elsewhere(fleet):
    two = fleet(2, timeout_s=4.0)
    two[0].late_for = [8, 8]
    two.generate([GenerateQuery((8, 8), seed=1), *QUERIES])
    counts = two.roster.take_counts()
    two[0].late_for = []
    assert (counts["deadlines_missed"], counts["requests_reissued"]) == (1, 1)
    assert set(two.roster.serving()) == set(two.urls)


def test_an_engine_that_forgets_its_weights_is_lost_and_its_answer_dropped(fleet):
    two = fleet(2)
    two[0].forgets = 5
    two.generate()  # every answer is of version 7
    assert "answers with weights version -1 though it was sent 7: it was restarted" in two.roster.described()
    assert two.roster.standing(two.urls[0]) == "lost"


def test_an_aborted_or_failed_query_is_asked_again_and_the_engine_stays(fleet):
    two = fleet(2)
    two[0].aborts, two[1].errors = 3, 2
    two.generate()
    assert two.roster.take_counts()["requests_reissued"] == 5
    assert set(two.roster.serving()) == set(two.urls)


def test_a_query_over_which_every_engine_fails_ends_the_run(fleet):
    two = fleet(2)
    two[0].errors = two[1].errors = 100
    with pytest.raises(EngineError, match=r"did not answer a query of 3 tokens, the last one: engine http.* HTTP 500"):
        two.engine.generate(QUERIES[:1], STOP)
    two[0].errors = two[1].errors = 0
    two.generate()


def test_without_any_engine_left_all_are_named_and_the_work_can_begin_anew(fleet):
    two = fleet(2)
    for number in range(2):
        two[number].delay_s = 0.02
    killers = [two.kill_when(number, lambda engine: engine.answered > 5) for number in range(2)]
    with pytest.raises(EnginesLostError, match=rf"{two.urls[0]} lost .*{two.urls[1]} lost"):
        two.generate()
    for killer in killers:
        killer.join()
    with pytest.raises(EnginesLostError, match="no engine is left to sample with"):
        two.generate()
    restarted = two.made.start()
    two.made.engines[restarted].version = "7"
    two.roster.replace(two.urls[1], restarted)
    two.roster.ready(restarted)
    with pytest.raises(EnginesLostError, match="no engine is left"):  # it answers, but with which weights?
        two.generate()
    two.roster.admit(restarted, 7)
    two.generate()


def test_an_engine_admitted_by_another_thread_takes_part_at_once(fleet):
    one = fleet(1, max_in_flight=2)
    one[0].delay_s = 0.03
    joined = one.made.start()
    one.made.engines[joined].version = "7"
    one.roster.add(joined, "ready")

    def admit() -> None:
        time.sleep(0.2)
        with one.roster.moving_weights():
            one.roster.admit(joined, 7)

    thread = threading.Thread(target=admit)
    thread.start()
    one.generate()
    thread.join()
    assert one.made.engines[joined].answered > 10


def test_no_deadline_passes_while_weights_are_sent(fleet):
    one = fleet(1, timeout_s=2.0, silence_s=1.0)
    one[0].paused = True

    def send() -> None:
        with one.roster.moving_weights():
            time.sleep(3.0)
            one[0].paused = False

    thread = threading.Thread(target=send)
    thread.start()
    one.generate(QUERIES[:5])
    thread.join()
    assert one.roster.take_counts()["engines_lost"] == 0
