"""Leaving in time: by a limit of one's own or SLURM's, whatever the wall clock does meanwhile."""

import pytest

from megatron_ra3.deadline import Deadline


class _Clocks:
    def __init__(self) -> None:
        self.monotonic_s, self.wall_s = 1000.0, 1_700_000_000.0

    def deadline(self, environment: dict[str, str], limit_s: float = 0.0) -> Deadline:
        return Deadline(
            limit_s=limit_s,
            margin_s=10.0,
            environment=environment,
            clock=lambda: self.monotonic_s,
            wall_clock=lambda: self.wall_s,
        )


def test_a_step_and_a_save_must_fit_before_the_end():
    clocks = _Clocks()
    deadline = clocks.deadline({}, limit_s=100.0)
    clocks.monotonic_s += 40
    assert not deadline.is_near(step_s=20.0, longest_save_s=5.0)
    clocks.monotonic_s += 25  # 35 s left = 20 + 5 + 10
    reason = deadline.is_near(step_s=1.0, longest_save_s=5.0)
    assert reason == (
        "checkpoint.wall_clock_limit_s=100: 35 s are left, a step takes up to 20 s, a save 5 s, and "
        "checkpoint.stop_before_s=10"
    )


@pytest.mark.parametrize("jump_s", [-7200.0, 7200.0])
def test_slurms_end_is_read_once_so_that_a_clock_that_jumps_changes_nothing(jump_s):
    clocks = _Clocks()
    deadline = clocks.deadline({"SLURM_JOB_END_TIME": str(int(clocks.wall_s) + 60)}, limit_s=500.0)
    clocks.wall_s += jump_s
    clocks.monotonic_s += 30
    assert not deadline.is_near(step_s=1.0, longest_save_s=1.0)
    clocks.monotonic_s += 18
    assert deadline.is_near(step_s=1.0, longest_save_s=1.0).startswith("SLURM_JOB_END_TIME: 12 s are left")


def test_without_a_limit_there_is_no_end():
    assert not _Clocks().deadline({"SLURM_JOB_END_TIME": "0"}).is_near(step_s=1e9, longest_save_s=1e9)
    assert not _Clocks().deadline({}).is_near(step_s=1e9, longest_save_s=1e9)


def test_a_broken_variable_is_named():
    with pytest.raises(ValueError, match="SLURM_JOB_END_TIME='soon'"):
        _Clocks().deadline({"SLURM_JOB_END_TIME": "soon"})
