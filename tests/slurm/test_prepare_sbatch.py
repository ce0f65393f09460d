"""slurm/ra3_prepare.sbatch under a real Slurm: every source in one part, one corpus of all parts, and a second go.

A shell script stands in for the `ra3` command; what it was given must be what the real one understands.
"""

from pathlib import Path

import pytest

from megatron_ra3.cli import _parser

pytestmark = pytest.mark.slurm
SCRIPT = Path(__file__).parents[2] / "slurm" / "ra3_prepare.sbatch"

# Called as `-m megatron_ra3 ...`: leaves its arguments in calls/, and a corpus at --out.
STAND_IN = """\
#!/usr/bin/env bash
shift 2
printf '%s\\n' "$@" >"calls/$SLURM_JOB_ID"
[[ ! -e broken || $* != *heapq* ]] || exit 3
while [[ $1 != --out ]]; do shift; done
mkdir -p "$2"
touch "$2/manifest.json"
"""


@pytest.fixture
def prepare(slurm, tmp_path):
    """Submits an array, waits for its end and that of the merge; returns what ran, logs, and merge's exit code."""
    stand_in = tmp_path / "stand_in"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    calls = tmp_path / "calls"
    calls.mkdir()

    def submit(array, *arguments):
        submitted = slurm.run(
            "sbatch", "--parsable", f"--array={array}", f"--chdir={tmp_path}", str(SCRIPT), *arguments,
            timeout_s=20, RA3_PYTHON=str(stand_in), RA3_LOG_DIR="logs",
        )  # fmt: skip
        assert submitted.returncode == 0, submitted.stderr
        job_id = int(submitted.stdout)
        code = slurm.exit_code(job_id, timeout_s=60)
        merge = tmp_path / "logs" / f"ra3-prepare-{job_id}" / "merge"
        if merge.exists():
            code = slurm.exit_code(int(merge.read_text()), timeout_s=60)
        ran = [call.read_text().splitlines() for call in sorted(calls.iterdir())]
        for call in calls.iterdir():
            call.unlink()
        logs = [*merge.parent.glob("*.log"), tmp_path / f"ra3-prepare-{job_id}.out"]
        return ran, {log.name: log.read_text() for log in logs}, code

    return submit


def test_parts_are_merged_and_whole_ones_are_kept(prepare, tmp_path):
    arguments = ("a corpus", "bisect", "heapq", "queue.tar", "--", "--min-lines=2", "--samples-per-shard", "7")
    parts = [f"a corpus.parts/0000{number}-of-00002" for number in range(2)]
    options = ["--workers", "1", "--min-lines=2", "--samples-per-shard", "7"]
    first = ["prepare", "bisect", "queue.tar", "--out", parts[0], *options]
    second = ["prepare", "heapq", "--out", parts[1], *options]
    merge = ["corpus", "merge", *parts, "--out", "a corpus", "--samples-per-shard", "7"]

    (tmp_path / "broken").touch()
    ran, logs, _ = prepare("0-1", *arguments)
    assert sorted(ran) == sorted([first, second]), logs  # and no merge
    (tmp_path / "broken").unlink()
    ran, logs, code = prepare("0-1", *arguments)
    assert (sorted(ran), code) == (sorted([second, merge]), 0), logs
    assert f"{parts[0]} is whole" in logs["task-0.log"]
    assert logs.keys() >= {"task-0.log", "task-1.log", "merge.log"}
    for argv in (first, second, merge):
        _parser().parse_args(argv)


@pytest.mark.parametrize(
    ("array", "arguments", "message"),
    [
        ("0-1", ("corpus", "bisect"), "2 tasks for 1 sources"),
        ("0", ("corpus", "bisect"), "one task makes no parts to merge"),
        ("1-2", ("corpus", "bisect", "heapq"), "the array must be 0-N"),
    ],
)
def test_mistakes_are_named(prepare, array, arguments, message):
    ran, logs, code = prepare(array, *arguments)
    assert (ran, code) == ([], 2)
    assert any(message in said for said in logs.values())
