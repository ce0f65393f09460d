"""slurm/ra3_prepare.sbatch under a real Slurm: every source in one part, one corpus of all parts, and a second go."""

import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from megatron_ra3.corpus.manifest import Manifest

pytestmark = pytest.mark.slurm
SCRIPT = Path(__file__).parents[2] / "slurm" / "ra3_prepare.sbatch"
MODULES = ("bisect", "heapq", "queue", "sched", "colorsys")


@pytest.fixture
def prepare(slurm, tmp_path):
    """Submits an array and waits for its end; returns its id and the exit code of its last task."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in MODULES:
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_bytes((library / f"{name}.py").read_bytes())

    def submit(array, *arguments):
        submitted = slurm.run(
            "sbatch", "--parsable", f"--array={array}", f"--chdir={tmp_path}", str(SCRIPT), *arguments,
            timeout_s=20, RA3_PYTHON=sys.executable, RA3_LOG_DIR="logs", PYTHONPATH=str(SCRIPT.parents[1]),
        )  # fmt: skip
        assert submitted.returncode == 0, submitted.stderr
        job_id = int(submitted.stdout)
        return job_id, slurm.exit_code(job_id, timeout_s=200)

    return submit


def test_parts_are_merged_and_whole_ones_are_kept(slurm, prepare, tmp_path):
    arguments = ("corpus", *MODULES, "--", "--min-lines=2", "--heldout-fraction=0.3", "--samples-per-shard", "7")
    job_id, _ = prepare("0-1", *arguments)
    logs = tmp_path / "logs" / f"ra3-prepare-{job_id}"
    code = slurm.exit_code(int((logs / "merge").read_text()), timeout_s=200)
    said = {log.name: log.read_text() for log in logs.glob("*.log")}
    assert code == 0, said
    assert said.keys() == {"task-0.log", "task-1.log", "merge.log"}
    parts = [Manifest.load(tmp_path / "corpus.parts" / f"0000{number}-of-00002") for number in range(2)]
    assert [part.files_seen for part in parts] == [3, 2]
    merged = Manifest.load(tmp_path / "corpus")
    assert merged.files_seen == len(MODULES)
    assert merged.settings["samples_per_shard"] == 7
    snippets = [sum(split.snippets for split in part.splits.values()) for part in parts]
    assert sum(split.snippets for split in merged.splits.values()) == sum(snippets)

    shutil.rmtree(tmp_path / "corpus")
    job_id, _ = prepare("0-1", *arguments)
    logs = tmp_path / "logs" / f"ra3-prepare-{job_id}"
    assert "corpus.parts/00001-of-00002 is whole" in (logs / "task-1.log").read_text()
    assert slurm.exit_code(int((logs / "merge").read_text()), timeout_s=200) == 0
    assert Manifest.load(tmp_path / "corpus") == merged


@pytest.mark.parametrize(
    ("array", "arguments", "message"),
    [
        ("0-1", ("corpus", "bisect"), "2 tasks for 1 sources"),
        ("0", ("corpus", "bisect"), "one task makes no parts to merge"),
        ("1-2", ("corpus", "bisect", "heapq"), "the array must be 0-N"),
    ],
)
def test_mistakes_are_named(prepare, tmp_path, array, arguments, message):
    job_id, code = prepare(array, *arguments)
    assert code == 2
    assert message in (tmp_path / f"ra3-prepare-{job_id}.out").read_text()
