"""The table of tiles: written, read back, used, and refused when it is broken."""

import json

import pytest
from triton.runtime.errors import OutOfResources

from megatron_ra3.bench.tune import search
from megatron_ra3.cli import main
from megatron_ra3.kernels import tuning
from megatron_ra3.kernels.tuning import CANDIDATES, Tiles, Tuning, load, save, use


def test_the_fastest_candidate_of_every_kernel_is_kept():
    slow = {name: candidates[0] for name, candidates in CANDIDATES.items()}

    def milliseconds(kernel: str, choice: Tuning) -> float:
        tiles = getattr(choice, kernel)
        if tiles == CANDIDATES[kernel][1]:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 2.0 if tiles == slow[kernel] else 1.0 + tiles.stages / 100

    found = search(milliseconds)
    assert found["best"].bf16 == Tiles(128, 128, 64, 4, 3)
    assert found["best"].fp8 == CANDIDATES["fp8"][2]
    assert [len(times) for times in found["milliseconds"].values()] == [len(item) - 1 for item in CANDIDATES.values()]


def test_a_table_holds_several_gpus_and_only_theirs(tmp_path):
    path = tmp_path / "deeper" / "table.json"
    one, other = Tuning(bf16=Tiles(64, 256, 64, 4, 4)), Tuning(gradient_columns=4096)
    save(path, "one", one)
    save(path, "other", other)
    assert (load(path, "one"), load(path, "other"), load(path, "third")) == (one, other, Tuning())
    assert [item.name for item in path.parent.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"bf17": 1}, "unknown fields bf17"),
        ({"bf16": {"rows": 1}}, "missing 4 required"),
        ({"fp8": {"rows": 128, "columns": 128, "hidden": 128, "warps": 8, "stages": 3}}, "must be 256 columns wide"),
        ({"bf16": 5}, "must be a mapping"),
        ({"gradient_columns": -1}, "positive integer"),
        ([], "delete it"),
    ],
)
def test_a_broken_table_is_named(tmp_path, record, text):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"gpu": record}))
    with pytest.raises(ValueError, match=f"{path}: .*{text}"):
        load(path, "gpu")


def test_the_table_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("RA3_TUNING", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.table_path() == tmp_path / "megatron_ra3" / "tuning.json"
    monkeypatch.setenv("RA3_TUNING", str(tmp_path / "mine.json"))
    assert tuning.table_path() == tmp_path / "mine.json"


def test_another_choice_holds_for_a_while():
    with use(Tuning(gradient_columns=1)):
        assert tuning.tuning().gradient_columns == 1
    assert tuning.tuning().gradient_columns == 8192


def test_tuning_without_a_gpu_is_refused(capsys):
    assert main(["bench", "tune"]) == 2
    assert "needs a GPU" in capsys.readouterr().err
