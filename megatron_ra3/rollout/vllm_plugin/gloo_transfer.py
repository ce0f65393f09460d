"""Weight transfer from a trainer to vLLM engines over gloo, staged: a failed transfer leaves the old weights served.

vLLM's backends put the model on meta tensors when an update starts, so anything sampled before it ends kills the
engine, and a trainer that dies half-way leaves no model at all. Here a worker receives everything into host memory
beside its sampling and touches the model only in `finish_weight_update`, the one moment for which it must be paused.
Plain weights are loaded as they come into a twin of the model (`twin`), and that moment takes none. The price is two
host copies of the weights, which are kept: fresh memory for every update would cost as much as a copy.

Both sides of vLLM's transfer API (0.32): the worker's engine and the trainer's. One process group of the trainer's
sender (rank 0) and every worker of every engine; one broadcast per tensor, as raw bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch.distributed import ProcessGroupGloo, TCPStore, Work
from vllm.distributed.weight_transfer import base

from megatron_ra3.rollout.vllm_plugin.plain_weights import are_plain
from megatron_ra3.rollout.vllm_plugin.twin import Twin

BACKEND = "gloo"
MAX_IN_FLIGHT = 4


def register_backend() -> None:
    """Register both sides with vLLM's factories, unless a backend of that name is there."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    if BACKEND not in WeightTransferEngineFactory._registry:  # noqa: SLF001
        WeightTransferEngineFactory.register_engine(BACKEND, __name__, "GlooWorkerEngine")
    if BACKEND not in WeightTransferTrainerFactory._registry:  # noqa: SLF001
        WeightTransferTrainerFactory.register_engine(BACKEND, __name__, "GlooTrainerEngine")


@dataclass
class GlooInitInfo(base.WeightTransferInitInfo):
    """Rendezvous, as a worker gets it; `rank_offset` is the rank of its engine's first worker."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(base.WeightTransferUpdateInfo):
    """What one transfer brings, in order; no names: wait until what was announced before is here."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


ALL_RECEIVED = GlooUpdateInfo([], [], [])


@dataclass
class GlooTrainerInitInfo(base.TrainerInitInfo):
    """Rendezvous, as the trainer gives it; `world_size` counts the sender and every worker of every engine."""

    backend: ClassVar[str] = BACKEND

    master_address: str
    master_port: int
    world_size: int
    timeout_s: float


class GlooWorkerEngine(base.WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Worker side: receive into host memory, put in place in one go at the end."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._group: ProcessGroupGloo | None = None
        self._buffers: dict[str, torch.Tensor] = {}
        self._receiver = _one_thread()
        self._twin: Twin | None = None
        self._receiving: Future[Callable[[], None]] | None = None
        self._put_in_place: Callable[[], None] | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the trainer's group, leaving any earlier one, though it may still wait for a trainer that is gone."""
        self.shutdown()
        self._receiver = _one_thread()
        self._buffers, self._twin = {}, None  # an earlier receiver may still write into its own
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._group = _join(init_info, rank)

    def start_weight_update(self) -> None:
        """Forget what a failed update may have left."""
        self._receiving, self._put_in_place = None, None

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Begin to receive into host memory while the old weights are served; without names wait for the end of that.

        RuntimeError when no trainer is connected or it does not deliver in time.
        """
        if update_info.names:
            if self._group is None:
                raise RuntimeError("gloo weight transfer: no trainer connected; call init_weight_transfer_engine first")
            self._receiving = self._receiver.submit(self._receive, self._group, update_info)
        elif self._receiving is not None:
            receiving, self._receiving = self._receiving, None
            self._put_in_place = receiving.result()

    def finish_weight_update(self) -> None:
        """Serve what was received; RuntimeError when nothing was."""
        if self._put_in_place is None:
            raise RuntimeError("gloo weight transfer: nothing was received, the model is unchanged")
        put_in_place, self._put_in_place = self._put_in_place, None
        put_in_place()

    def _load_and_process(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load what vLLM has to quantise, pack or otherwise derive from the weights."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        initialize_layerwise_reload(self.model)
        self.model.load_weights((name, tensor.to(self.device)) for name, tensor in weights)
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied_head(self.model)

    def _receive(self, group: ProcessGroupGloo, update_info: GlooUpdateInfo) -> Callable[[], None]:
        """Take everything in; returns what puts it in place."""
        try:
            arriving = self._arriving(group, self._buffers, update_info)
            if not are_plain(self.model):
                return partial(self._load_and_process, list(arriving))
            if self._twin is None or self._twin.model is not self.model:
                self._twin = Twin(self.model)
            twin = self._twin
            try:
                twin.fill(arriving)
            except Exception:
                deque(arriving, maxlen=0)  # else the trainer waits for its time-out and not for this error
                raise
        except BaseException:
            if self._group is group:
                self.shutdown()
            raise
        return twin.exchange

    @staticmethod
    def _arriving(
        group: ProcessGroupGloo, buffers: dict[str, torch.Tensor], update_info: GlooUpdateInfo
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor when it is here, while the next ones travel."""
        coming: deque[tuple[str, torch.Tensor]] = deque()
        with _InFlight() as in_flight:
            for name, dtype_name, shape in zip(
                update_info.names, update_info.dtype_names, update_info.shapes, strict=True
            ):
                buffer = _buffer(buffers, name, dtype_name, shape)
                in_flight.add(group.broadcast(_as_bytes(buffer), 0))
                coming.append((name, buffer))
                if len(coming) > MAX_IN_FLIGHT:
                    yield coming.popleft()
        yield from coming

    def shutdown(self) -> None:
        """Leave the trainer's group."""
        self._group = None


class GlooTrainerEngine(base.TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """Trainer side, on the sender only (rank 0); the other ranks iterate the source themselves."""

    init_info_cls = GlooTrainerInitInfo

    def __init__(
        self, *, client: base.VLLMWeightSyncClient, source: base.WeightSource, group: ProcessGroupGloo
    ) -> None:
        super().__init__(client=client, source=source)
        self._group: ProcessGroupGloo | None = group

    @classmethod
    def trainer_init(
        cls,
        init_info: GlooTrainerInitInfo,
        *,
        client: base.VLLMWeightSyncClient,
        source: base.WeightSource | None = None,
    ) -> Self:
        """Rendezvous with every worker; RuntimeError or the client's error when one does not come in time."""
        assert source is not None
        assert init_info.is_sender
        worker_info = {**asdict(init_info), "rank_offset": 1}
        del worker_info["rank"]
        with ThreadPoolExecutor(max_workers=1) as pool:
            joined = pool.submit(client.init_weight_transfer_engine, worker_info)
            try:
                group = _join(init_info, 0)
            except RuntimeError:
                joined.result()  # an engine's own message, if there is one, says more
                raise
            joined.result()
        return cls(client=client, source=source, group=group)

    def send_weights(self) -> None:
        """One full update of every engine: announce, broadcast while they go on sampling, load."""
        assert self.source is not None
        declared = self.source.metadata()
        update_info = GlooUpdateInfo(
            [item.name for item in declared],
            [str(item.dtype).removeprefix("torch.") for item in declared],
            [list(item.shape) for item in declared],
        )
        self.client.start_weight_update()
        self.client.update_weights(asdict(update_info))
        try:
            self._send(declared)
        except BaseException as error:
            self.shutdown()
            if isinstance(error, RuntimeError):
                self.client.update_weights(asdict(ALL_RECEIVED))  # an engine's own message says more
            raise
        self.client.update_weights(asdict(ALL_RECEIVED))
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        """Leave the group: its connections close with it, so that no worker waits for its time-out."""
        self._group = None

    def _send(self, declared: Sequence[base.ParamMeta]) -> None:
        assert self.source is not None
        assert self._group is not None
        with _InFlight() as in_flight:
            for expected, (name, tensor) in zip(declared, self.source, strict=True):
                if (name, tensor.dtype, tuple(tensor.shape)) != (expected.name, expected.dtype, tuple(expected.shape)):
                    raise ValueError(
                        f"weights: {name} {tensor.dtype} {tuple(tensor.shape)} where metadata() announced "
                        f"{expected.name} {expected.dtype} {tuple(expected.shape)}"
                    )
                in_flight.add(self._group.broadcast(_as_bytes(tensor.detach().to("cpu").contiguous()), 0))


class _InFlight:
    """Broadcasts under way, a few at a time, so that the next tensor is made ready while the last ones travel."""

    def __init__(self) -> None:
        self._works: deque[Work] = deque()

    def add(self, work: Work) -> None:
        """Count one more in; RuntimeError of an earlier one that failed."""
        self._works.append(work)
        del work  # as in __exit__
        if len(self._works) > MAX_IN_FLIGHT:
            self._works.popleft().wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        while self._works and kind is None:
            self._works.popleft().wait()
        self._works.clear()  # else an error's traceback keeps them, and they the connections, until the time-out


def _buffer(buffers: dict[str, torch.Tensor], name: str, dtype_name: str, shape: list[int]) -> torch.Tensor:
    dtype, found = getattr(torch, dtype_name), buffers.get(name)
    if found is None or found.dtype != dtype or list(found.shape) != shape:
        found = buffers[name] = torch.empty(shape, dtype=dtype, device="cpu")
    return found


def _one_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="gloo weight transfer")


def _repack_tied_head(model: torch.nn.Module) -> None:
    """Pack the output layer anew: on CPU a tied one keeps a packed copy of the embedding that no reload renews.

    Without this a synced engine computes new hidden states and the old model's logits from them.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


def _join(info: GlooInitInfo | GlooTrainerInitInfo, rank: int) -> ProcessGroupGloo:
    timeout = timedelta(seconds=info.timeout_s)
    store = TCPStore(info.master_address, info.master_port, info.world_size, rank == 0, timeout, wait_for_workers=False)
    return ProcessGroupGloo(store, rank, info.world_size, timeout)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
