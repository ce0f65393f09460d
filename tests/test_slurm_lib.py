"""slurm/lib.sh without SLURM: how a container is named, what a start tells, and what follows its end."""

import json
import subprocess
from pathlib import Path

import pytest

LIB = Path(__file__).parents[1] / "slurm" / "lib.sh"


def shell(code: str, folder: Path, **environment: str) -> str:
    """Run `code` in bash after the library, in `folder`; what it prints."""
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "test", "PATH": "/usr/bin:/bin"} | environment
    command = ["bash", "-c", f"source {LIB}\nlogs={folder}\n{code}"]
    return subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


PRINT = 'printf \'%s|\' use "${srun_container[@]}" run "${python[@]}"'


MOUNTED = "--container-mounts={cwd}:{cwd}|--container-workdir={cwd}"


@pytest.mark.parametrize(
    ("container", "words"),
    [
        ("", "use|run|python|"),
        ("image.sif", "use|run|apptainer|exec|--nv|--bind|{cwd}|image.sif|python|"),
        ("apptainer exec --nv a.sif", "use|run|apptainer|exec|--nv|a.sif|python|"),
        ("nvcr.io#nvidia/pytorch:25.06", f"use|--container-image=nvcr.io#nvidia/pytorch:25.06|{MOUNTED}|run|python|"),
        ("--container-image=a --container-mounts=b:c", "use|--container-image=a|--container-mounts=b:c|run|python|"),
    ],
)
def test_one_variable_names_the_container(container, words, tmp_path):
    assert shell(f"use_environment; {PRINT}", tmp_path, RA3_CONTAINER=container) == words.format(cwd=tmp_path)


def test_the_interpreter_is_the_checkouts_unless_it_is_named(tmp_path):
    own = tmp_path / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch(mode=0o755)
    (tmp_path / "modules").write_text("RA3_PYTHON=special")
    assert shell(f"use_environment; {PRINT}", tmp_path) == f"use|run|{own}|"
    assert shell(f"use_environment; {PRINT}", tmp_path, RA3_CONTAINER="env A=1") == "use|run|env|A=1|python|"
    assert shell(f"use_environment; {PRINT}", tmp_path, RA3_ENV="modules") == "use|run|special|"


@pytest.mark.parametrize(
    ("status", "fruitless", "near_limit", "follows"),
    [
        (0, 3, "1", "finish"),
        (75, 0, "", "requeue"),
        (75, 3, "", "give_up"),
        (137, 0, "", "again"),
        (137, 1, "", "again"),
        (137, 2, "", "requeue"),
        (137, 3, "", "give_up"),
        (137, 0, "1", "requeue"),
        (76, 0, "", "again"),
        (2, 0, "", "again"),
        (2, 1, "", "again"),
        (2, 2, "", "give_up"),
    ],
)
def test_what_follows_the_end_of_a_start(status, fruitless, near_limit, follows, tmp_path):
    assert shell(f"verdict {status} {fruitless} '{near_limit}'", tmp_path) == follows


def test_the_number_of_starts_that_may_be_in_vain_is_a_setting(tmp_path):
    assert shell("verdict 137 3 ''", tmp_path, RA3_MAX_STARTS="5") == "again"
    assert shell("verdict 75 5 ''", tmp_path, RA3_MAX_STARTS="5") == "give_up"


# Per start what its file `saved` holds: the newest checkpoint's step when it began and when it ended; None: no file.
@pytest.mark.parametrize(
    ("starts", "fruitless"),
    [
        ([], 0),
        ([[0, 5]], 0),
        ([[0, 0]], 1),
        ([[0]], 1),
        ([None], 1),
        ([[0, 5], [5, 5]], 1),
        ([[0, 5], [5], [5, 5]], 2),
        ([[0], [5]], 1),  # the first was cut off after it had saved
        ([[0], [5, 6]], 0),
        ([[0, 5], [5], None, [5, 5]], 3),
        ([[0, 5], [3, 3]], 1),  # the newest was damaged and set aside
    ],
)
def test_starts_that_saved_nothing_new_are_counted(starts, fruitless, tmp_path):
    for number, saved in enumerate(starts, 1):
        folder = tmp_path / f"start-{number}"
        folder.mkdir()
        if saved is not None:
            (folder / "saved").write_text("".join(f"{step}\n" for step in saved))
    assert shell("starts; fruitless", tmp_path).split() == [str(len(starts)), str(fruitless)], json.dumps(starts)


@pytest.mark.parametrize(
    ("codes", "told"),
    [([137, 75], "75"), ([2, 137, 76], "2"), ([1, 143], "1"), ([], "143"), ([0, 137, 1], "137"), ([0, 143], "143")],
)
def test_what_a_rank_says_counts_more_than_the_highest_code(codes, told, tmp_path):
    (tmp_path / "start-1").mkdir()
    for rank, code in enumerate(codes):
        (tmp_path / "start-1" / f"exit-{rank}").write_text(f"{code}\n")
    assert shell("telling 143", tmp_path, RA3_START=str(tmp_path / "start-1")) == told
    assert shell("telling 0", tmp_path, RA3_START=str(tmp_path / "start-1")) == "0"
