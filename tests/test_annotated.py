"""Annotated snippets on disk: evenly spread over the steps that are left, cut back on resume, durable or named."""

import errno
import os

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
    store = AnnotatedStore(tmp_path / "store.jsonl")
    store.append(_trajectories("a", "b", "c"))
    store.append(_trajectories("d", "e"))
    assert [_names(store.take(steps_left)) for steps_left in (4, 3, 2, 1)] == ["ab", "c", "d", "e"]
    assert _names(store.take(1)) == ""


def test_a_restored_store_goes_on_where_the_checkpoint_was(tmp_path):
    store = AnnotatedStore(tmp_path / "store.jsonl")
    store.append(_trajectories("a", "b", "c", "d"))
    store.take(2)
    state = store.state_dict()
    store.append(_trajectories("x"))
    store.take(1)
    resumed = AnnotatedStore(tmp_path / "store.jsonl")
    resumed.load_state_dict(state)
    resumed.append(_trajectories("e"))
    assert _names(resumed.take(1)) == "cde"


def test_clearing_leaves_out_what_was_not_taken(tmp_path):
    store = AnnotatedStore(tmp_path / "store.jsonl")
    store.append(_trajectories("a", "b"))
    store.clear()
    store.append(_trajectories("c"))
    assert _names(store.take(1)) == "c"


def test_a_disk_that_refuses_is_named(tmp_path, monkeypatch):
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = AnnotatedStore(tmp_path / "store.jsonl")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"store\.jsonl.*No space left.*free space"):
        store.append(_trajectories("a"))
    assert store.waiting == 0
