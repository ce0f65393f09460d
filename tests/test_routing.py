"""Decisions about engines as pure functions: where a query goes, what is overdue, who serves, when to start again."""

import pytest

from megatron_ra3.rollout.health import Restarts, Roster, overdue
from megatron_ra3.rollout.routing import Router, is_far_behind

A, B, C = "http://a", "http://b", "http://c"


def routed(router: Router, *queries: tuple[str, int]) -> list[str | None]:
    urls = []
    for group, tokens in queries:
        urls.append(router.choose(group, tokens))
        if urls[-1] is not None:
            router.sent(urls[-1], group, tokens)
    return urls


def router_of(*urls: str, slots: int = 64) -> Router:
    router = Router(slots)
    router.serve(urls)
    return router


def test_a_new_group_goes_where_the_fewest_tokens_are_outstanding():
    router = router_of(A, B, C)
    assert routed(router, ("g", 100), ("h", 40), ("i", 30), ("j", 20), ("k", 20)) == [A, B, C, C, B]
    router.done(A, 100)
    assert routed(router, ("l", 1)) == [A]


def test_a_group_stays_at_home_while_that_is_not_far_behind():
    router = router_of(A, B)
    assert routed(router, *[("g", 100)] * 16) == [A] * 16
    assert routed(router, ("g", 100)) == [B]  # 1600 tokens wait at home, none elsewhere: 16 queries of its size
    assert routed(router, ("g", 100)) == [B]  # the new home
    assert router.moves == 1


@pytest.mark.parametrize(
    ("home", "other", "query", "slots", "expected"),
    [
        (1600, 0, 100, 64, True),
        (1599, 0, 100, 64, False),
        (30_000, 20_000, 100, 64, False),  # half as much again is no reason to lose the cache
        (40_000, 20_000, 100, 64, True),
        (200, 0, 100, 4, True),  # few slots: what is outstanding is soon all that fits
        (100, 0, 100, 1, True),
    ],
)
def test_how_far_is_far_behind(home, other, query, slots, expected):
    assert is_far_behind(home, other, query, slots=slots) is expected


def test_a_query_waits_for_a_full_home_and_moves_when_another_is_idle_enough():
    router = router_of(A, B, slots=2)
    assert routed(router, ("g", 100), ("h", 90), ("g", 10), ("h", 10)) == [A, B, A, B]
    assert not router.has_room()
    assert routed(router, ("g", 10), ("new", 1)) == [None, None]
    router.done(B, 90)
    assert routed(router, ("g", 200), ("g", 40)) == [None, B]  # 110 outstanding at home, 10 there
    router.done(A, 10)
    assert router.choose("other", 5) == A


def test_a_lost_engine_gets_nothing_and_is_no_home_any_more():
    router = router_of(A, B)
    assert routed(router, ("g", 100), ("h", 100), ("g", 1)) == [A, B, A]
    router.serve([B])
    assert routed(router, ("g", 1)) == [B]
    router.done(A, 100)  # its queries are counted no more
    router.serve([A, B])
    assert routed(router, ("g", 20), ("i", 5)) == [B, A]


def test_an_engine_that_failed_over_a_query_gets_it_again_only_if_there_is_no_other():
    router = router_of(A, B)
    router.sent(A, "g", 10)
    assert router.choose("g", 10, avoid=[A]) == B
    assert router.choose("g", 10, avoid=[A, B]) == A


def test_an_engine_that_answers_nothing_is_stuck_and_one_that_answers_others_is_slow():
    assert overdue(open_s=9.0, silent_s=9.0, timeout_s=10.0) == ""
    assert overdue(open_s=11.0, silent_s=30.0, timeout_s=10.0) == "stuck"
    assert overdue(open_s=11.0, silent_s=2.0, timeout_s=10.0) == "slow"


def test_pauses_double_up_to_a_minute_and_end_after_the_limit_unless_it_served_meanwhile():
    restarts = Restarts(8, 2.0, settled_s=300.0)
    assert [restarts.next_pause_s(served_s=1.0) for _ in range(9)] == [2, 4, 8, 16, 32, 60, 60, 60, None]
    assert restarts.next_pause_s(served_s=301.0) == 2
    assert Restarts(0, 2.0, settled_s=300.0).next_pause_s(0.0) is None


def test_an_engine_comes_back_only_through_a_sync(capsys):
    roster = Roster()
    for url in (A, B):
        roster.add(url, "ready")
    assert roster.serving() == {}
    assert roster.present() == {A: None, B: None}
    for url in (A, B):
        roster.admit(url, 7)
    assert roster.serving() == {A: 7, B: 7}
    assert roster.lose(A, "it died")
    assert not roster.lose(A, "seen by another thread, too")
    roster.admit(A, 8)  # lost while weights were sent to it
    assert roster.serving() == {B: 7}
    assert roster.described() == "http://a lost (it died)"
    roster.replace(A, C)
    assert (roster.standing(C), list(roster.present())) == ("starting", [B])
    roster.ready(C)
    assert roster.serving() == {B: 7}
    roster.admit(C, 8)
    assert roster.serving() == {C: 8, B: 7}
    roster.give_up(B, "no more")
    assert not roster.is_hopeless
    roster.give_up(C, "no more")
    assert roster.is_hopeless
    assert roster.take_counts() == {"engines_lost": 1, "engines_returned": 1}
    assert roster.take_counts() == {}
    assert "engine http://a is out: it died; engines that serve on: 1" in capsys.readouterr().out


def test_the_clock_of_deadlines_stands_still_while_weights_move():
    now = [100.0]
    roster = Roster(clock=lambda: now[0])
    start = roster.at_work_s()
    now[0] += 5.0
    with roster.moving_weights():
        now[0] += 60.0
        assert roster.at_work_s() - start == 5.0
    now[0] += 1.0
    assert roster.at_work_s() - start == 6.0
