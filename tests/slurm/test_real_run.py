"""The main job under a real Slurm with real ranks: to the end undisturbed with vLLM, and although a rank is killed."""

import pytest

from tests.slurm.real import RealJob, consumed

pytestmark = [pytest.mark.slurm, pytest.mark.vllm]


@pytest.fixture(scope="module")
def whole(slurm, small_corpus, tmp_path_factory) -> RealJob:
    """A job that nothing disturbs, at its end."""
    job = RealJob(slurm, small_corpus, tmp_path_factory.mktemp("whole"))
    job.ends()
    return job


def test_sbatch_trains_on_two_nodes_and_samples_on_another(whole):
    assert [phase for _, phase, *_ in consumed(whole.run)] == [
        "warmup", "estep", "estep", "estep", "bootstrap", "bootstrap", "mstep", "mstep", "evaluate",
    ]  # fmt: skip
    said = {path.name for path in whole.logs.glob("*.log")}
    assert said == {"batch.log", "trainer-0.log", "trainer-1.log", "engine-0.log", "engine-1.log"}
    assert all("serving" in whole.log(f"engine-{index}") for index in range(2))
    assert "start 1 ended with exit code 0" in whole.log("batch")


def test_a_killed_rank_costs_no_sample(slurm, small_corpus, tmp_path, whole):
    job = RealJob(slurm, small_corpus, tmp_path, engine_nodes=0)
    job.await_steps(3)
    job.kill("n2", "-m megatron_ra3 midtrain")
    job.ends()
    assert consumed(job.run) == consumed(whole.run)
    assert "start 2 ended with exit code 0" in job.log("batch")
    assert "resumed from" in job.log("trainer-0")
