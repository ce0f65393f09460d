"""A vLLM server as a child process: start, wait until it serves, stop without leaving a process behind.

Prevents the usual silent failures: a server that dies while loading (the tail of its log is in the error), one that
outlives its trainer (`watchdog`), replicas that all sample with vLLM's default seed 0, sampling defaults taken from a
model's generation_config.json, and trainer and server fighting for the same cores.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_ra3.rollout import ports
from megatron_ra3.rollout.engine import EngineError
from megatron_ra3.rollout.vllm_plugin.forked_core import FORKED_CORE
from megatron_ra3.rollout.vllm_plugin.plain_weights import PLAIN_LINEAR
from megatron_ra3.stall import ACTIVITY

DEFAULT_CPU_KV_CACHE_BYTES = 1 << 30
# Tokens of one engine step; without chunked prefill every prompt must fit.
CPU_BATCHED_TOKENS = 2048
LOG_TAIL_LINES = 30
SEEDS_APART = 100_003
# Longer than the watchdog's own grace.
STOP_TIMEOUT_S = 10.0
BINDINGS_NOISE = re.compile(r"nanobind: | - (leaked|\.\.\. skipped)|See https://nanobind")
# Fields of config.json that say how a model was saved, not what it is.
VOLATILE_CONFIG_FIELDS = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache")
# A server started by a rank of torchrun would take that rank for its own.
TORCHRUN_VARIABLES = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")
# vLLM's own entry, called without the `vllm` command: that one asks for a distribution named "vllm", which its CPU
# build is not. Not `-m` either: spawned engine processes would import the entire module again.
ENTRY = "from vllm.entrypoints.launchers.api_server.entry import main; main()"


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """One vLLM server.

    `port` 0 picks a free one. `kv_cache_bytes` None means `gpu_memory_utilization` of the GPU, or 1 GiB on CPU.
    `block_size` None is vLLM's default (on CPU 128; a multiple of 32 there). `seed` must differ between replicas and
    between restarts. `cpu_threads` only counts on CPU. `extra_args` are passed to `vllm serve` as they are.
    """

    model_folder: Path
    log_file: Path
    host: str = "127.0.0.1"
    port: int = 0
    dtype: str = "bfloat16"
    max_model_len: int = 2048
    gpu_memory_utilization: float = 0.9
    kv_cache_bytes: int | None = None
    block_size: int | None = None
    tensor_parallel_size: int = 1
    max_num_seqs: int = 256
    seed: int = 0
    cpu_threads: int = 1
    start_timeout_s: float = 300.0
    extra_args: tuple[str, ...] = ()


class VllmServer:
    """A running vLLM server; a context manager that starts it, waits until it serves, and stops it.

    `start` and `wait` apart let the caller do its own slow imports meanwhile.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self._reserved = _reserve(config.host, config.port)
        self.port = int(self._reserved.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Base URL; for a server bound to all interfaces, this host's name."""
        host = socket.gethostname() if self.config.host in ("0.0.0.0", "::") else self.config.host  # noqa: S104
        return f"http://{host}:{self.port}"

    @property
    def _own_url(self) -> str:
        """Where this process asks it: the name that `url` has for others need not resolve."""
        return f"http://127.0.0.1:{self.port}" if self.config.host in ("0.0.0.0", "::") else self.url  # noqa: S104

    def start(self) -> None:
        """Launch the processes and return at once; ValueError for a folder without a model."""
        assert self._process is None
        config = self.config
        served_model_name(config.model_folder)
        config.log_file.parent.mkdir(parents=True, exist_ok=True)
        watchdog = [sys.executable, "-m", "megatron_ra3.rollout.watchdog", str(os.getpid())]
        command = [sys.executable, "-c", ENTRY, *_arguments(config, self.port)]
        with config.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                watchdog + command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(config),
                start_new_session=True,
            )

    def wait(self) -> None:
        """Return when the server answers; EngineError with the end of its log if it dies or takes too long."""
        deadline = time.monotonic() + self.config.start_timeout_s
        while not answers(self._own_url):
            if not self.poll():
                raise EngineError(f"vLLM server {self.url} died while starting{self.log_tail()}")
            if time.monotonic() > deadline:
                self.stop()
                raise EngineError(
                    f"vLLM server {self.url} did not answer within start_timeout_s="
                    f"{self.config.start_timeout_s:g}{self.log_tail()}"
                )
            ACTIVITY.moved("start of the vLLM server")
            time.sleep(0.1)

    def poll(self) -> bool:
        """Whether the server's processes are alive."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End every process of the server: politely, after a few seconds by force. Its port is free again."""
        self._reserved.close()
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):  # the watchdog itself was killed or stopped: its group is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def log_tail(self) -> str:
        """The end of the log file, to be appended to an error message."""
        lines = self.config.log_file.read_text(errors="replace").splitlines()
        telling = [line for line in lines if not BINDINGS_NOISE.match(line)]
        return "\n".join([f"; the end of {self.config.log_file}:", *telling[-LOG_TAIL_LINES:]])

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def answers(url: str) -> bool:
    """Whether the server at `url` is up and serves."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):  # noqa: S310
            return True
    except (OSError, http.client.HTTPException):
        return False


def resume(url: str) -> None:
    """Let the server at `url` go on where a trainer that is gone has left it paused."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        urllib.request.urlopen(f"{url}/resume", b"", timeout=5).close()  # noqa: S310


def computes(url: str, timeout_s: float, *, expected_model: str | None = None) -> bool:
    """Whether the server at `url` samples a token in time, and serves `expected_model` if given: more than `answers`.

    A server whose engine process hangs is up all the same. One that is paused does not sample.
    """
    body = json.dumps({"token_ids": [0], "sampling_params": {"max_tokens": 1, "detokenize": False}}).encode()
    ask = urllib.request.Request(f"{url}/inference/v1/generate", body, {"Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=timeout_s) as models:  # noqa: S310
            if expected_model not in (None, json.load(models)["data"][0]["id"]):
                return False
        with urllib.request.urlopen(ask, timeout=timeout_s):  # noqa: S310
            return True
    except (OSError, ValueError, LookupError, http.client.HTTPException):
        return False


def nth_start(config: ServerConfig, number: int) -> ServerConfig:
    """`config` for the `number`-th restart: another seed, or it would repeat its draws, and a log of its own."""
    if not number:
        return config
    log_file = config.log_file.with_suffix(f".{number}{config.log_file.suffix}")
    return replace(config, seed=config.seed + number * SEEDS_APART, log_file=log_file)


def served_model_name(model_folder: Path) -> str:
    """Name a server gives its model: architecture, vocabulary size and a digest of config.json.

    Models of the same name can take each other's weights. ValueError where the folder has no config.json.
    """
    path = model_folder / "config.json"
    if not path.is_file():
        raise ValueError(f"model folder {model_folder} has no config.json; give a Hugging Face model folder")
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in VOLATILE_CONFIG_FIELDS}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
    architecture = (config.get("architectures") or ["unknown"])[0]
    return f"{architecture}-v{config.get('vocab_size')}-{digest}"


def _arguments(config: ServerConfig, port: int) -> list[str]:
    on_cpu = _on_cpu()
    kv_cache_bytes = config.kv_cache_bytes or (DEFAULT_CPU_KV_CACHE_BYTES if on_cpu else None)
    options: dict[str, object] = {
        "model": config.model_folder,
        "served-model-name": served_model_name(config.model_folder),
        "host": config.host,
        "port": port,
        "dtype": config.dtype,
        "max-model-len": config.max_model_len,
        "tensor-parallel-size": config.tensor_parallel_size,
        "max-num-seqs": config.max_num_seqs,
        "seed": config.seed,
        "generation-config": "vllm",
        "logprobs-mode": "processed_logprobs",
        "weight-transfer-config": json.dumps({"backend": "gloo" if on_cpu else "nccl"}),
    }
    if kv_cache_bytes is None:
        options["gpu-memory-utilization"] = config.gpu_memory_utilization
    else:
        options["kv-cache-memory-bytes"] = kv_cache_bytes
    if config.block_size is not None:
        options["block-size"] = config.block_size
    if on_cpu and config.tensor_parallel_size == 1:
        options["distributed-executor-backend"] = "uni"
    flags = ["--enable-scale-out", "--skip-tokenizer-init", "--disable-uvicorn-access-log"]
    if on_cpu:
        # A seeded request whose prompt is computed in chunks kills the CPU engine: V1 then turns the generator back
        # by an offset that torch's CPU generator does not have.
        flags += ["--enforce-eager", "--no-enable-chunked-prefill"]
        options["max-num-batched-tokens"] = max(CPU_BATCHED_TOKENS, config.max_model_len, config.max_num_seqs)
    return [f"--{name}={value}" for name, value in options.items()] + flags + list(config.extra_args)


def _environment(config: ServerConfig) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not TORCHRUN_VARIABLES.fullmatch(name)}
    own = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",
    }
    if _on_cpu():
        own["OMP_NUM_THREADS"] = str(config.cpu_threads)
        own["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        own[PLAIN_LINEAR] = "1"
        own["THP_MEM_ALLOC_ENABLE"] = "1"  # huge pages: loading weights is a third faster for fewer page faults
        # Even in eager mode vLLM compiles its log-prob function, which takes a C++ compiler and seconds.
        own["TORCHDYNAMO_DISABLE"] = "1"
        if config.tensor_parallel_size == 1:
            # The worker then lives in the engine's process: one Python start and one set of imports less.
            own["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            if config.cpu_threads == 1:
                own[FORKED_CORE] = "1"
    return {**inherited, **own}


def _on_cpu() -> bool:
    import torch

    return not torch.cuda.is_available()


def _reserve(host: str, port: int) -> socket.socket:
    """Keep `port`, or a free one for 0. EngineError if it is taken: the other server would be mistaken for ours."""
    try:
        return ports.reserve(host, port)
    except OSError as error:
        raise EngineError(f"vLLM server: cannot listen on {host}:{port} ({error}); choose another port") from error
