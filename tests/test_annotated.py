"""Annotated snippets on disk: evenly spread over the steps that are left, cut back on resume, durable or named."""

import errno
import os
from pathlib import Path

import pytest

from megatron_ra3.annotated import AnnotatedStore
from megatron_ra3.latents import Kind, Trajectory


def _trajectories(*names: str) -> list[Trajectory]:
    found = []
    for name in names:
        trajectory = Trajectory(name)
        trajectory.append(Kind.PROMPT, -1, [0])
        found.append(trajectory)
    return found


def _names(trajectories: list[Trajectory]) -> str:
    return "".join(item.snippet_id for item in trajectories)


def test_what_waits_is_spread_over_the_steps_left(tmp_path):
    store = AnnotatedStore(tmp_path, 0)
    store.append(_trajectories("a", "b", "c"))
    store.append(_trajectories("d", "e"))
    assert [_names(store.take(steps_left)) for steps_left in (4, 3, 2, 1)] == ["ab", "c", "d", "e"]
    assert _names(store.take(1)) == ""


def test_a_restored_store_goes_on_where_the_checkpoint_was(tmp_path):
    store = AnnotatedStore(tmp_path, 0)
    store.append(_trajectories("a", "b", "c", "d"))
    store.take(2)
    state = store.state_dict()
    store.append(_trajectories("x"))
    store.take(1)
    resumed = AnnotatedStore(tmp_path, 0)
    resumed.load_state_dicts([state], 1)
    resumed.append(_trajectories("e"))
    assert _names(resumed.take(1)) == "cde"


def test_clearing_leaves_out_what_was_not_taken(tmp_path):
    store = AnnotatedStore(tmp_path, 0)
    store.append(_trajectories("a", "b"))
    store.clear()
    store.append(_trajectories("c"))
    assert _names(store.take(1)) == "c"


def test_a_disk_that_refuses_is_named(tmp_path, monkeypatch):
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = AnnotatedStore(tmp_path, 0)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"replica-00000\.jsonl.*No space left.*free space"):
        store.append(_trajectories("a"))
    assert store.waiting == 0


def _replicas(folder: Path, count: int) -> list[AnnotatedStore]:
    return [AnnotatedStore(folder, replica) for replica in range(count)]


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_another_number_of_replicas_takes_the_same_in_every_step(tmp_path, replicas):
    two = _replicas(tmp_path, 2)
    for batch in ("abcd", "efgh", "ijkl"):
        for replica, store in enumerate(two):
            store.append(_trajectories(*batch[replica::2]))
    assert [_names(store.take(3)) for store in two] == ["ac", "bd"]
    states = [store.state_dict() for store in two]
    two[0].take(1)  # after the checkpoint
    two[1].append(_trajectories("x"))
    for _ in range(2):  # a resume that dies, and the next one from the same checkpoint
        now = _replicas(tmp_path, replicas)
        for store in now:
            store.load_state_dicts(states, replicas)
        assert sorted("".join(_names(store.take(2)) for store in now)) == list("efgh")
        assert sorted("".join(_names(store.take(1)) for store in now)) == list("ijkl")
    back = _replicas(tmp_path, 2)
    for store in back:
        store.load_state_dicts(states, 2)
    assert [_names(store.take(2)) for store in back] == ["eg", "fh"]


def test_a_state_older_than_batches_counts_as_one(tmp_path):
    store = AnnotatedStore(tmp_path, 0)
    store.append(_trajectories("a", "b"))
    state = store.state_dict()
    old = {"written": state["written"], "read": 0, "waiting": 2}
    resumed = AnnotatedStore(tmp_path, 0)
    resumed.load_state_dicts([old], 1)
    assert _names(resumed.take(1)) == "ab"
