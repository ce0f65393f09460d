"""The watchdog: it lets a run alone that moves, ends one that does not, and names the rank that is awaited."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_ra3.model import parallel
from megatron_ra3.settings import to_dict
from megatron_ra3.stall import ACTIVITY, RECORD_BYTES, STALLED, Activity, Board, Sign, Watchdog, who_waits_for_whom
from tests.distributed import run_ranks
from tests.small import make_config


def _until(condition, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_rank_that_moves_is_left_alone_and_one_that_does_not_is_ended(tmp_path):
    activity, left = Activity(), []
    watchdog = Watchdog(tmp_path, 0, 1, 0.5, activity=activity, leave=left.append)
    watchdog.start()
    for _ in range(20):
        activity.moved("estep r1 2/3")
        time.sleep(0.05)
    assert not left
    _until(lambda: left)
    watchdog.close()
    assert left == [STALLED] == [76]
    (stacks,) = tmp_path.glob("*-rank-00000.txt")
    text = stacks.read_text()
    assert "nothing has moved for stall_timeout_s=0.5" in text
    assert "last began 'estep r1 2/3'" in text
    assert "test_a_rank_that_moves" in text  # where the main thread was


def test_a_rank_waits_as_long_as_another_one_moves(tmp_path):
    waiting, moving, left = Activity(), Activity(), []
    dogs = [
        Watchdog(tmp_path, rank, 2, 0.5, activity=activity, leave=left.append)
        for rank, activity in enumerate((waiting, moving))
    ]
    for dog in dogs:
        dog.start()
    with waiting.waiting("sum over the replicas"):
        for _ in range(20):
            moving.moved()
            time.sleep(0.05)
        assert not left
        _until(lambda: len(left) == 2)
    for dog in dogs:
        dog.close()
    texts = [path.read_text() for path in sorted(tmp_path.glob("*-rank-*.txt"))]
    assert len(texts) == 2
    assert all("rank 0 waits in 'sum over the replicas' (wait 1) for rank 1\n" in text for text in texts)


def test_a_wall_clock_that_jumps_stalls_nothing(tmp_path, monkeypatch):
    true_time, left = time.time, []
    monkeypatch.setattr(time, "time", lambda: true_time() + 7200 * (-1) ** int(true_time() * 10))
    activity = Activity()
    watchdog = Watchdog(tmp_path, 0, 1, 0.5, activity=activity, leave=left.append)
    watchdog.start()
    for _ in range(20):
        activity.moved()
        time.sleep(0.05)
    watchdog.close()
    assert not left


def test_the_rank_with_fewer_waits_behind_it_is_the_awaited_one():
    signs = [Sign(9, "a", 5, "barrier x"), Sign(8, "b", 4, ""), None, Sign(9, "d", 5, "barrier x")]
    first, *rest = who_waits_for_whom(signs).splitlines()
    assert first == "rank 0, 3 waits in 'barrier x' (wait 5) for rank 1, 2"
    assert rest[1] == "  rank 1: is in no named wait after 4 waits, last began 'b'"
    assert rest[2] == "  rank 2: has published nothing: it is gone, or sees another run folder"
    earlier = [Sign(9, "a", 5, "sum"), Sign(8, "b", 4, "gathering")]
    assert who_waits_for_whom(earlier).startswith("rank 0 waits in 'sum' (wait 5) for rank 1\n")
    arrived = [Sign(1, "a", 3, "sum")] * 2
    assert "though all have arrived" in who_waits_for_whom(arrived)
    assert who_waits_for_whom([Sign(1, "a", 3, "")]).startswith("no rank is in a named wait")


def test_a_half_written_record_is_no_sign(tmp_path):
    boards = [Board(tmp_path / "board", rank, 3) for rank in range(3)]
    boards[2].publish(Sign(1, "x" * 500, 2, "y" * 500))
    boards[0].publish(Sign(1, "\n\u2028", 2, ""))
    with (tmp_path / "board").open("r+b") as file:
        file.seek(RECORD_BYTES)
        file.write(b'{"moves": 1')
    first, second, third = boards[1].read()
    assert first == Sign(1, "\n\u2028", 2, "")
    assert second is None
    assert third == Sign(1, "x" * 80, 2, "y" * 60)


def test_a_disk_that_refuses_does_not_stop_the_watch(tmp_path):
    activity, left = Activity(), []
    watchdog = Watchdog(tmp_path / "stalls", 0, 1, 0.3, activity=activity, leave=left.append)
    watchdog.start()
    (tmp_path / "stalls" / "board").unlink()
    (tmp_path / "stalls").rmdir()
    _until(lambda: left)
    watchdog.close()
    assert left == [STALLED]


def _hang(folder: Path) -> None:
    layout = parallel.initialize(1, 1, seed=0, timeout_s=60)
    ACTIVITY.moved("estep r1 2/3")
    Watchdog(folder, layout.rank, layout.world_size, 1.0).start()
    layout.gather_from_ranks("both are here")
    if layout.rank == 1:
        time.sleep(0.5)  # publish where it is
        os.kill(os.getpid(), signal.SIGSTOP)
    layout.gather_from_ranks("one is missing")


def test_a_frozen_rank_is_named_by_the_one_that_waits(tmp_path):
    with pytest.raises(RuntimeError, match="rank 0 died without a traceback"):
        run_ranks(_hang, 2, tmp_path, timeout_s=60)
    (stacks,) = tmp_path.glob("*-rank-*.txt")
    text = stacks.read_text()
    assert "rank 0 waits in 'gathering from all ranks' (wait 2) for rank 1" in text
    assert "rank 1: is in no named wait after 1 waits, last began 'estep r1 2/3'" in text
    assert "gather_from_ranks" in text


def test_a_rank_whose_fellow_never_comes_does_not_wait_for_ever(small_corpus, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(to_dict(make_config(small_corpus, tmp_path, "stall_timeout_s=4"))))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "megatron_ra3", "midtrain", str(path)]
    ended = subprocess.run(command, env=os.environ | launched, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == STALLED
    assert "rank 1: has published nothing: it is gone, or sees another run folder" in ended.stderr
    (stacks,) = (tmp_path / "run" / "stalls").glob("*-rank-00000.txt")
    assert "init_process_group" in stacks.read_text()
