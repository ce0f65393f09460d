"""The main job under a real Slurm, broken in every way: it ends as the undisturbed one, and nobody has to do a thing.

`pytest -m faults`; minutes each. One of them, with the in-process engine, is in the default selection
(`test_real_run.py`).
"""

import pytest

from tests.slurm.cluster import NODES
from tests.slurm.real import RealJob

pytestmark = [pytest.mark.faults, pytest.mark.slurm, pytest.mark.vllm]
BREAK_AFTER_STEPS = 3


@pytest.fixture
def job(slurm, small_corpus, tmp_path):
    """A job in the middle of its first E-step; the cluster is whole again afterwards."""
    job = RealJob(slurm, small_corpus, tmp_path)
    job.await_steps(BREAK_AFTER_STEPS)
    yield job
    slurm.run("scancel", str(job.id), timeout_s=20)
    slurm.restore()


def test_a_trainer_rank_is_killed(job, reference):
    job.kill("n2", "-m megatron_ra3 midtrain")
    job.ends_as(reference)
    assert "start 2 ended with exit code 0" in job.log("batch")


@pytest.mark.parametrize("node", ["n1", "n2", "n3"], ids=["first-trainer", "second-trainer", "engines"])
def test_a_node_is_lost(job, reference, node):
    job.slurm.lose_node(node, job.id)
    job.ends_as(reference)
    assert job.nodes() == [name for name in NODES if name != node]


def test_the_time_limit_is_near(job, reference):
    job.slurm.run("scancel", "--batch", "--signal=USR1", str(job.id), timeout_s=20)
    job.ends_as(reference)
    assert "start 1 ended with exit code 75; 0 starts in a row" in job.log("batch")


def test_a_node_is_drained_and_the_job_is_requeued(job, reference):
    job.slurm.scontrol("update", "nodename=n2", "state=drain", "reason=test")
    job.slurm.scontrol("requeue", str(job.id))
    job.ends_as(reference)
    assert job.nodes() == ["n1", "n3", "n4"]


def test_an_engine_is_killed(job, reference):
    job.kill("n3", "vllm.entrypoints")
    job.ends_as(reference)
