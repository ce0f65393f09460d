"""The sampling engine: can vLLM be imported, is our plugin known to it, and do a run's servers serve its model."""

from __future__ import annotations

import importlib.util
import json
import sys
import urllib.request
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

from megatron_ra3.config import TrainerConfig
from megatron_ra3.doctor.findings import Finding
from megatron_ra3.doctor.machine import run
from megatron_ra3.rollout.server import served_model_name

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN = "megatron_ra3.rollout.vllm_plugin:register"
IMPORT_TIMEOUT_S = 120.0
URL_TIMEOUT_S = 10.0


def engine(config: TrainerConfig | None) -> Iterator[Finding]:
    """VLLM here, its plugin, and the servers of `engine.urls`."""
    if config is not None and config.engine.kind == "inprocess":
        yield Finding("engine", "kind", "ok", "engine.kind=inprocess: no server is needed")
        return
    yield from _vllm(wanted=config is not None and config.engine.kind == "vllm")
    for url in config.engine.urls if config else ():
        assert config is not None
        yield _server(url, Path(config.engine.model_folder or config.model.folder))


def _vllm(*, wanted: bool) -> Iterator[Finding]:
    if importlib.util.find_spec("vllm") is None:
        text = "not installed" + ("" if wanted else ": engine.kind=auto would sample with the trainer's own weights")
        fix = "pip install 'megatron-ra3[gpu]'" if wanted else ""
        yield Finding("engine", "vllm", "failed" if wanted else "ok", text, fix)
        return
    status, output = run([sys.executable, "-c", "import vllm; print(vllm.__version__)"], IMPORT_TIMEOUT_S)
    told = output.splitlines()[-1] if output else "no output"
    if status:
        fix = "python -c 'import vllm' shows all of it; versions that belong together are in requirements/"
        yield Finding("engine", "vllm", "failed", f"cannot be imported: {told}", fix)
        return
    yield Finding("engine", "vllm", "ok", f"{told} can be imported")
    plugins = {point.value for point in entry_points(group=PLUGIN_GROUP)}
    if PLUGIN in plugins:
        yield Finding("engine", "plugin", "ok", f"registered in {PLUGIN_GROUP}")
    else:
        text = f"{PLUGIN} is not among the entry points of {PLUGIN_GROUP}: servers cannot score gates on a CPU"
        yield Finding("engine", "plugin", "failed", text, "pip install this package (pip install -e . in a checkout)")


def _server(url: str, model_folder: Path) -> Finding:
    """Whether `url` answers and serves the model of `model_folder`."""
    try:
        _get(f"{url.rstrip('/')}/health")
        served = [item["id"] for item in json.loads(_get(f"{url.rstrip('/')}/v1/models"))["data"]]
    except (OSError, ValueError, KeyError) as error:
        return Finding("engine", url, "failed", f"{error}", "start it (ra3 serve CONFIG), or correct engine.urls")
    if (model_folder / "config.json").is_file() and served_model_name(model_folder) not in served:
        text = f"serves {', '.join(served)}, this run's model is {served_model_name(model_folder)}"
        return Finding("engine", url, "failed", text, "serve the folder that the trainer starts from")
    return Finding("engine", url, "ok", f"healthy, serves {', '.join(served)}")


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=URL_TIMEOUT_S) as answer:  # noqa: S310 - the user's own servers
        content: bytes = answer.read()
        return content
