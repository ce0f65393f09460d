"""`ra3 bench sync`: what it costs to make new weights live in running engines, beside two plain ways.

One repeat does all in turn, so that a machine that slows down slows all: our weight sync, a broadcast of the same bytes
between processes over the same backend (as fast as weights can travel), and saving safetensors that every engine then
loads in place. An engine is asked for one token after another meanwhile: the longest wait is what sampling loses, and
every call of a sync waits for the step under way. Sync and broadcast come once more with engines at rest, as they are
between synchronous E-steps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from megatron_ra3.bench.result import publish
from megatron_ra3.rollout import ports

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from megatron_ra3.rollout.server import VllmServer

_TIMEOUT_S = 600.0
_VOCAB_SIZE = 32_000
_HEAD_DIM = 64
_CONTEXT_TOKENS = 128
_KV_CACHE_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class SyncBench:
    """A random Qwen2 of `layers` layers, `hidden_size` wide, in float32 on CPU and bfloat16 on GPU."""

    hidden_size: int = 1024
    layers: int = 16
    engines: int = 1
    repeats: int = 5

    def __post_init__(self) -> None:
        if self.hidden_size % (4 * _HEAD_DIM):
            raise ValueError(f"hidden_size={self.hidden_size}: must be a multiple of {4 * _HEAD_DIM}")
        for name in ("layers", "engines", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")


def add_sync_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of `SyncBench` as options, and where to write the result."""
    for name, value in asdict(SyncBench()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, metavar="N", help="%(default)s")
    parser.add_argument("--out", type=Path, help="also write the JSON there")


def run_sync(arguments: argparse.Namespace) -> int:
    """Measure, print a table and, on the last line, all as one JSON object."""
    result = measure(SyncBench(**{name: getattr(arguments, name) for name in asdict(SyncBench())}))
    print(table(result))
    return publish(result, arguments.out)


def measure(bench: SyncBench) -> dict[str, Any]:
    """Seconds of every repeat, medians, and ratios of the same repeat, above 1 where ours is faster.

    `ratio_raw_broadcast` counts the whole update, until engines sample with the new weights; a raw broadcast leaves
    them in a buffer. With `_at_rest` nobody asks the engines for anything.
    """
    import torch

    with tempfile.TemporaryDirectory(prefix="ra3-bench-") as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        weights = _Weights(_write_model(folder / "model", bench))
        servers = [stack.enter_context(_server(folder, number)) for number in range(bench.engines)]
        sync = stack.enter_context(_connected(servers))
        peers = stack.enter_context(_RawBroadcast(weights, bench.engines))
        client = stack.enter_context(_Client(servers[0].url))
        runs = []
        for version in range(-1, bench.repeats):
            with client.resting():
                run = {"raw_broadcast_at_rest": _seconds(peers.broadcast)}
                run["sync_at_rest"] = _seconds(lambda version=version: sync.send(weights, 2 * version + 3))
            client.take_waits()
            run["raw_broadcast"] = _seconds(peers.broadcast)
            client.await_answer()
            run["answer"] = statistics.median(client.take_waits())
            run["sync"] = _seconds(lambda version=version: sync.send(weights, 2 * version + 4))
            client.await_answer()  # of the request that waited for the new weights
            run["sampling_stall"] = max(client.take_waits())
            run["reload"] = _seconds(lambda: _save_and_reload(folder / "model", weights, servers))
            if version >= 0:  # the first round warms everything up
                runs.append(run)
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {
        "ratio_raw_broadcast": statistics.median(run["raw_broadcast"] / run["sync"] for run in runs),
        "ratio_raw_broadcast_at_rest": statistics.median(
            run["raw_broadcast_at_rest"] / run["sync_at_rest"] for run in runs
        ),
        "ratio_reload": statistics.median(run["reload"] / run["sync"] for run in runs),
        "seconds": medians,
        "gb_per_s": {
            name: weights.bytes / 1e9 / took
            for name, took in medians.items()
            if name not in ("answer", "sampling_stall")
        },
        "training_stall_s": medians["sync"],
        "sampling_stall_s": medians["sampling_stall"],
        "answer_s": medians["answer"],
        "bytes": weights.bytes,
        "backend": _backend(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "settings": asdict(bench),
        "runs_s": runs,
    }


def table(result: dict[str, Any]) -> str:
    """The result for reading."""
    lines = [f"{result['bytes'] / 1e9:.2f} GB over {result['backend']}, {result['settings']['engines']} engine(s)"]
    lines += [
        f"{name:<22}{result['seconds'][name]:>9.3f} s {rate:>8.2f} GB/s" for name, rate in result["gb_per_s"].items()
    ]
    lines.append(
        f"training waits {result['training_stall_s']:.3f} s, sampling at most {result['sampling_stall_s']:.3f} s "
        f"for an answer that beside a broadcast takes {result['answer_s']:.3f} s"
    )
    lines.append(
        f"raw broadcast / sync: {result['ratio_raw_broadcast']:.2f}, "
        f"at rest {result['ratio_raw_broadcast_at_rest']:.2f}; reload / sync: {result['ratio_reload']:.2f}"
    )
    return "\n".join(lines)


class _Weights:
    """The tensors of a safetensors file as a source of weights."""

    def __init__(self, path: Path) -> None:
        import torch
        from safetensors.torch import load_file

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tensors = {name: tensor.to(device, copy=True) for name, tensor in load_file(path).items()}
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def metadata(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """(name, shape, dtype) of all tensors in order."""
        return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.tensors.items())


class _RawBroadcast:
    """Processes, one an engine, that only receive the same bytes, tensor by tensor."""

    def __init__(self, weights: _Weights, receivers: int) -> None:
        self._weights = weights
        self._receivers = receivers

    def __enter__(self) -> Self:
        spawn = multiprocessing.get_context("spawn")
        with ports.reserve("127.0.0.1") as reserved:
            port, size = reserved.getsockname()[1], 1 + self._receivers
            given = (port, size, [list(tensor.shape) for tensor in self._weights.tensors.values()])
            self._processes = [
                spawn.Process(target=_receive_for_ever, args=(rank, *given, self._dtype), daemon=True)
                for rank in range(1, size)
            ]
            for process in self._processes:
                process.start()
            self._group = _join(port, 0, size)
        return self

    def broadcast(self) -> None:
        """Send all tensors once and wait until every receiver has them."""
        import torch

        for tensor in self._weights.tensors.values():
            self._group.broadcast(tensor.view(-1).view(torch.uint8), 0).wait()
        self._group.barrier().wait()

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    @property
    def _dtype(self) -> str:
        return str(next(iter(self._weights.tensors.values())).dtype).removeprefix("torch.")


def _receive_for_ever(rank: int, port: int, size: int, shapes: Sequence[Sequence[int]], dtype: str) -> None:
    import torch

    device = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    group = _join(port, rank, size)
    buffers = [torch.empty(shape, dtype=getattr(torch, dtype), device=device) for shape in shapes]
    while True:
        for buffer in buffers:
            group.broadcast(buffer.view(-1).view(torch.uint8), 0).wait()
        group.barrier().wait()


def _join(port: int, rank: int, size: int) -> ProcessGroup:
    import torch
    from torch.distributed import ProcessGroupGloo, TCPStore

    timeout = timedelta(seconds=_TIMEOUT_S)
    store = TCPStore("127.0.0.1", port, size, rank == 0, timeout, wait_for_workers=False)
    if not torch.cuda.is_available():
        return ProcessGroupGloo(store, rank, size, timeout)
    from torch.distributed import ProcessGroupNCCL

    torch.cuda.set_device(rank % torch.cuda.device_count())
    return ProcessGroupNCCL(store, rank, size)


class _Client:
    """Asks an engine for one token after another."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._waits_s: list[float] = []

    def __enter__(self) -> Self:
        self._ended, self._answered = threading.Event(), threading.Event()
        self._asking = threading.Lock()
        self._thread = threading.Thread(target=self._ask_on)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def await_answer(self) -> None:
        """Return when the request that is open now is answered."""
        self._answered.clear()
        assert self._answered.wait(_TIMEOUT_S)

    def take_waits(self) -> list[float]:
        """Seconds that each answer since the last call took."""
        waits_s, self._waits_s = self._waits_s, []
        return waits_s

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Ask nothing, once the request that is open now is answered."""
        with self._asking:
            yield

    def _ask_on(self) -> None:
        body = {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 1, "ignore_eos": True}}
        while not self._ended.is_set():
            with self._asking:
                started_s = time.perf_counter()
                _post(self._url, "/inference/v1/generate", body)
                self._waits_s.append(time.perf_counter() - started_s)
                self._answered.set()
            time.sleep(0.001)  # who wants the lock gets it


def _save_and_reload(folder: Path, weights: _Weights, servers: Sequence[VllmServer]) -> None:
    from safetensors.torch import save_file

    save_file(weights.tensors, folder / "new", metadata={"format": "pt"})
    (folder / "new").replace(folder / "model.safetensors")
    for server in servers:
        _post(server.url, "/pause?mode=wait", {})
    for server in servers:
        _post(server.url, "/collective_rpc", {"method": "reload_weights"})
        _post(server.url, "/reset_prefix_cache", {})
        _post(server.url, "/resume", {})


def _write_model(folder: Path, bench: SyncBench) -> Path:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=bench.hidden_size,
        intermediate_size=4 * bench.hidden_size,
        num_hidden_layers=bench.layers,
        num_attention_heads=bench.hidden_size // _HEAD_DIM,
        num_key_value_heads=bench.hidden_size // _HEAD_DIM // 4,
        vocab_size=_VOCAB_SIZE,
        max_position_embeddings=_CONTEXT_TOKENS,
        tie_word_embeddings=False,
    )
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    Qwen2ForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size="1TB")
    return folder / "model.safetensors"


def _server(folder: Path, number: int) -> VllmServer:
    import torch

    from megatron_ra3.rollout.server import ServerConfig, VllmServer

    return VllmServer(
        ServerConfig(
            folder / "model",
            folder / f"engine-{number}.log",
            dtype="bfloat16" if torch.cuda.is_available() else "float32",
            max_model_len=_CONTEXT_TOKENS,
            kv_cache_bytes=_KV_CACHE_BYTES,
            start_timeout_s=_TIMEOUT_S,
            seed=number,
        )
    )


@contextlib.contextmanager
def _connected(servers: Sequence[VllmServer]) -> Iterator[Any]:
    from megatron_ra3.rollout.weights import WeightSync

    sync = WeightSync([server.url for server in servers], backend=_backend(), timeout_s=_TIMEOUT_S)
    sync.connect()
    try:
        yield sync
    finally:
        sync.close()


def _backend() -> Any:
    import torch

    return "nccl" if torch.cuda.is_available() else "gloo"


def _post(url: str, path: str, body: dict[str, Any]) -> None:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310
        answer.read()


def _seconds(work: Any) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s
