"""Trainer's weights into running vLLM engines, through vLLM's weight-transfer API. The only module that knows it.

An update is all or nothing, for all engines together: the weights are broadcast once, prefix caches are emptied (vLLM
keeps stale ones), the version is set and read back. Engines are paused where their models change: with the gloo backend
after the broadcast, so that sampling goes on beside it; a failure before that leaves the old weights served. With NCCL
they are paused throughout. An engine that dies or hangs meanwhile is dropped, and the others are sent the weights again
with a new rendezvous.

`connect`, `send` and `check` are collective over the trainer's ranks: an export of sharded weights is a collective
itself, so every rank iterates the source to its end, whatever happens to the transfer, and all learn its outcome.
They talk to engines by themselves, so a `VllmEngine` may sample in another thread meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import logging
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar
from urllib.parse import urlsplit

from megatron_ra3.rollout import ports
from megatron_ra3.rollout.engine import EngineError, EnginesLostError
from megatron_ra3.stall import ACTIVITY

if TYPE_CHECKING:
    import torch

Backend = Literal["gloo", "nccl"]
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
# vLLM pads the vocabulary to a multiple of this, so a table of another height has other bytes there.
VLLM_VOCABULARY_MULTIPLE = 64
DIGEST_OF_NOTHING = hashlib.sha256(b"").hexdigest()
ATTEMPTS = 2
"""Failures of a transfer that no engine explains."""
PROBE_TIMEOUT_S = 30.0
"""How long an engine may take for a request that costs it nothing, before it counts as stuck."""
TICK_S = 2.0

T = TypeVar("T")

log = logging.getLogger(__name__)


class WeightSource(Protocol):
    """The trainer's weights under Hugging Face names, as full tensors."""

    def metadata(self) -> Sequence[tuple[str, Sequence[int], torch.dtype]]:
        """(name, shape, dtype) of all tensors, in the order of iteration."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """A fresh pass over (name, full tensor); may be a collective over the trainer's ranks."""


class WeightSync:
    """Sends weights from trainer rank 0 to every worker of the engines at `urls`.

    `backend` must be the servers' (`--weight-transfer-config`): gloo on CPU, nccl on GPU (vLLM's own engine, not
    staged: between a failed update and the next whole one the engines stay paused). `rank` is the trainer's global
    rank; with more than one, torch.distributed must be initialised. Every wait is bounded by `timeout_s`.

    `dropped` says which of `urls` died on the way and why, the same on every rank.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        backend: Backend,
        timeout_s: float,
        rank: int = 0,
    ) -> None:
        self.dropped: dict[str, str] = {}
        self._backend = backend
        self._timeout_s = timeout_s
        self._rank = rank
        self._source = _SharedPass()
        self._transfer: Any = None
        self.regroup(urls)

    @property
    def urls(self) -> list[str]:
        """The engines that the next update reaches."""
        return self._fleet.urls

    def regroup(self, urls: Sequence[str]) -> None:
        """Send to these engines from now on; the next `send` begins with a rendezvous."""
        self._disconnect()
        self._fleet = _Fleet(urls, self._timeout_s, staged=self._backend == "gloo")
        self._master_address = _master_address(urls)
        self.dropped = {}

    def connect(self) -> None:
        """One rendezvous with all engines; EngineError on every rank, naming the engine that does not come."""
        error = _from_rank_0(self._try(self._rendezvous))
        if error is not None:
            raise EngineError(f"weight sync: {error}")

    def send(self, source: WeightSource, version: int) -> None:
        """Make the engines serve the source's weights as `version`.

        On every rank: EnginesLostError when all have died, EngineError when the weights do not arrive though none has.
        """
        self._with_survivors(source, lambda: self._update(version), f"weights version {version}")

    def check(self, source: WeightSource) -> int:
        """Compare sha256 digests of the source's tensors with the engines' own; returns how many were compared.

        Only tensors that vLLM keeps whole and under the same name can be compared: norms, and with one worker per
        engine also the embedding and the projections that it does not join with others. Errors as `send`.
        """
        compared = 0

        def compare() -> None:
            nonlocal compared
            compared = self._fleet.compare(self._source)

        self._with_survivors(source, compare, "weight check")
        return compared

    def _with_survivors(self, source: WeightSource, action: Callable[[], None], what: str) -> None:
        """Let rank 0 do what takes a pass over the source; once more without the engines that died, as often as any."""
        unexplained = 0
        while True:
            self._source.begin(source)
            error = self._try(action)
            self._source.drain()
            dead = self._fleet.dead() if error is not None else {}
            error, dead = _from_rank_0((error, dead))
            if error is None:
                return
            self._drop(dead)
            if not self._fleet.urls:
                raise EnginesLostError(f"{what}: no engine is left: {'; '.join(self.dropped.values())}")
            unexplained += not dead
            if unexplained == ATTEMPTS:
                raise EngineError(f"{what} failed: {error}")
            log.warning("%s: %s; trying again with %d engines", what, error, len(self._fleet.urls))

    def _drop(self, dead: dict[str, str]) -> None:
        if dead:
            self._disconnect()
            self._fleet.urls = [url for url in self._fleet.urls if url not in dead]
            self.dropped |= dead

    def close(self) -> None:
        """Leave the engines' transfer group; they go on serving."""
        if self._transfer is not None:
            self._try(self._fleet.release)
        self._disconnect()

    def _try(self, action: Callable[[], None]) -> str | None:
        """Run the action on rank 0 only; the message of a failed transfer, None if all went well."""
        if self._rank != 0:
            return None
        try:
            action()
        except (RuntimeError, ValueError, OSError) as error:  # EngineError and torch's distributed errors included
            return str(error)
        return None

    def _rendezvous(self) -> None:
        self._disconnect()
        for problem in self._fleet.dead().values():
            raise EngineError(problem)
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        with ports.reserve("") as reserved:
            init_info = self._init_info(reserved.getsockname()[1], 1 + self._fleet.count_workers())
            self._transfer = WeightTransferTrainerFactory.trainer_init(
                init_info, client=self._fleet, source=self._source
            )

    def _disconnect(self) -> None:
        if self._transfer is not None:
            self._transfer.shutdown()
            self._transfer = None

    def _init_info(self, port: int, world_size: int) -> Any:
        if self._backend == "nccl":
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            return NCCLTrainerInitInfo(self._master_address, port, world_size, rank=0)
        from megatron_ra3.rollout.vllm_plugin import gloo_transfer

        gloo_transfer.register_backend()
        return gloo_transfer.GlooTrainerInitInfo(self._master_address, port, world_size, self._timeout_s, rank=0)

    def _update(self, version: int) -> None:
        self._fleet.greet()
        if self._transfer is None:
            self._rendezvous()
        fleet = self._fleet
        fleet.version = str(version)
        try:
            self._transfer.send_weights()
        except (RuntimeError, ValueError, OSError) as error:
            self._disconnect()
            if fleet.undefined:
                raise EngineError(f"{error}; the engines' weights are undefined, they stay paused") from error
            raise
        for url, answer in fleet.post("/reset_prefix_cache").items():
            if not answer["success"]:
                raise EngineError(f"engine {url}: the prefix cache could not be emptied")
        for url, answer in fleet.get("/weight_info").items():
            if answer["weight_version"] != fleet.version:
                raise EngineError(f"engine {url} reports weight version {answer['weight_version']}, sent {version}")
        fleet.undefined = False
        fleet.post("/resume")


class _SharedPass:
    """One pass over a source that can be finished by someone else, in the shape of vLLM's own `WeightSource`."""

    def __init__(self) -> None:
        self._declared: list[tuple[str, Sequence[int], torch.dtype]] = []
        self._pairs: Iterator[tuple[str, torch.Tensor]] = iter(())

    def begin(self, source: WeightSource) -> None:
        self._declared = list(source.metadata())
        self._pairs = iter(source)

    def drain(self) -> None:
        for _ in self._pairs:
            pass

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, dtype, tuple(shape)) for name, shape, dtype in self._declared]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._pairs


class _Fleet:
    """The engines as one: every call goes to all of them at once. Also vLLM's `VLLMWeightSyncClient`.

    `undefined` says that an engine may hold a mixture of weights; until an update succeeds it must stay paused.
    """

    def __init__(self, urls: Iterable[str], timeout_s: float, *, staged: bool) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        self._timeout_s = timeout_s
        self._probe_timeout_s = min(timeout_s, PROBE_TIMEOUT_S)
        self._staged = staged
        self._first_rank: dict[str, int] = {}
        self._connections: dict[str, http.client.HTTPConnection] = {}
        self.version = ""
        self.undefined = False

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._all(
            lambda url: self._call(
                url, "/init_weight_transfer_engine", {"init_info": {**init_info, "rank_offset": self._first_rank[url]}}
            ),
            "/init_weight_transfer_engine",
        )

    def start_weight_update(self) -> None:
        if not self._staged:
            self._pause()
        self.post("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self.post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        if self._staged:
            self._pause()
        self.post("/finish_weight_update", {"weight_version": weight_version or self.version})

    def _pause(self) -> None:
        """From here on the models change, so nothing may be sampled."""
        self.post("/pause?mode=wait")
        self.undefined = True

    def count_workers(self) -> int:
        """Workers of all engines; the rank of each engine's first one is kept for the rendezvous."""
        rank = 1
        for url, answer in self.get("/get_world_size").items():
            self._first_rank[url] = rank
            rank += answer["world_size"]
        return rank - 1

    def release(self) -> None:
        """Let the engines leave the transfer group."""
        path = "/shutdown_weight_transfer_engine"
        self._all(lambda url: self._call(url, path, {}, self._probe_timeout_s), path)

    def dead(self) -> dict[str, str]:
        """Engines that do not answer any more, and how that shows; the others are recovered on the way.

        Undone is what a failed update, or a trainer that died, may have left: an open update and a pause.
        """

        def recover(url: str) -> str:
            timeout_s = self._probe_timeout_s
            try:
                self._call(url, "/health", None, timeout_s)
                # An update that names nothing is refused, and that closes an open one.
                self._call(url, "/update_weights", {"update_info": {}}, timeout_s, expect_refusal=True)
                if not self.undefined:
                    self._call(url, "/resume", {}, timeout_s)
            except EngineError as error:
                return str(error)
            return ""

        found = self._all(recover, "looking for dead engines")
        return {url: problem for url, problem in found.items() if problem}

    def greet(self) -> None:
        """Return when all engines answer, without the patience that an update takes."""
        self._all(lambda url: self._call(url, "/health", None, self._probe_timeout_s), "/health")

    def compare(self, source: Iterable[tuple[str, torch.Tensor]]) -> int:
        """`WeightSync.check` on rank 0."""
        import torch

        dtypes = {
            url: getattr(torch, answer["vllm_config"]["model_config"]["dtype"].removeprefix("torch."))
            for url, answer in self.get("/server_info?config_format=json").items()
        }
        digests = {
            url: _by_name(answer["checksums"])
            for url, answer in self.post("/weight_checker", {"action": "checksum"}).items()
        }
        compared = 0
        for name, tensor in source:
            for url, engine in digests.items():
                found = engine.get(name, [DIGEST_OF_NOTHING])
                sharded = tensor.ndim > 1 and (len(found) > 1 or tensor.shape[0] % VLLM_VOCABULARY_MULTIPLE != 0)
                if sharded or DIGEST_OF_NOTHING in found:
                    continue
                if set(found) != {_digest(tensor.to(dtypes[url]))}:
                    raise EngineError(f"engine {url}: {name} differs from the trainer's")
                compared += 1
        if not compared:
            raise EngineError("not one tensor could be compared; do the source's names follow the engines' model?")
        return compared

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Answers by URL; EngineError naming the first engine that failed, after all have been asked."""
        return self._all(lambda url: self._call(url, path, body or {}), path)

    def get(self, path: str) -> dict[str, Any]:
        """As `post`."""
        return self._all(lambda url: self._call(url, path, None), path)

    def _all(self, call: Callable[[str], T], what: str) -> dict[str, T]:
        with ThreadPoolExecutor(max_workers=len(self.urls)) as pool:
            calls = {url: pool.submit(call, url) for url in self.urls}
            while wait(calls.values(), TICK_S).not_done:
                ACTIVITY.moved(f"weight sync: {what}")
                for url, answer in calls.items():
                    if not answer.done():
                        self._hang_up_on_the_dead(url)
        return {url: answer.result() for url, answer in calls.items()}

    def _hang_up_on_the_dead(self, url: str) -> None:
        """End a call that nobody will answer: a server whose engine died listens no more, but leaves it open."""
        connection = self._connections.get(url)
        if connection is None or connection.sock is None:
            return
        try:
            socket.create_connection((connection.host, connection.port), timeout=TICK_S).close()
        except ConnectionRefusedError:
            with contextlib.suppress(OSError, AttributeError):  # it has ended by itself
                connection.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def _call(
        self,
        url: str,
        path: str,
        body: dict[str, Any] | None,
        timeout_s: float | None = None,
        *,
        expect_refusal: bool = False,
    ) -> Any:
        timeout_s = timeout_s or self._timeout_s
        place = urlsplit(url)
        kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
        connection = kind(place.hostname or "", place.port, timeout=timeout_s)
        self._connections[url] = connection
        try:
            data, headers = (None, {}) if body is None else (json.dumps(body), {"Content-Type": "application/json"})
            connection.request("GET" if body is None else "POST", path, data, headers)
            response = connection.getresponse()
            content = response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"engine {url}: {path} failed within timeout_s={timeout_s:g}: {error}") from error
        finally:
            connection.close()
        if response.status >= 400 and not expect_refusal:
            raise EngineError(f"engine {url} answered HTTP {response.status} to {path}: {content}")
        return json.loads(content) if content and response.status < 400 else None


def _by_name(checksums: dict[str, str]) -> dict[str, list[str]]:
    """Digests of all workers by parameter name; vLLM's keys are `dp0:pp0:pcp0:tp0:name`."""
    digests: dict[str, list[str]] = {}
    for key, digest in checksums.items():
        digests.setdefault(key.rpartition(":")[2], []).append(digest)
    return digests


def _digest(tensor: torch.Tensor) -> str:
    import torch

    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()


def _from_rank_0(value: T) -> T:
    """Rank 0's value, on every rank."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box: list[Any] = [value]
    with ACTIVITY.waiting("how the weight sync went", root=0):
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _master_address(urls: Sequence[str]) -> str:
    """Where engines reach rank 0: on its own machine, at the address of the ranks' rendezvous, or by its name."""
    hosts = {urlsplit(url).hostname for url in urls}
    if hosts <= {*LOCAL_HOSTS, socket.gethostname()}:
        return LOCAL_HOSTS[0]
    rendezvous = os.environ.get("MASTER_ADDR", LOCAL_HOSTS[0])
    return socket.gethostname() if rendezvous in LOCAL_HOSTS else rendezvous
