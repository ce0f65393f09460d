"""Weight transfer from a trainer to vLLM engines over gloo, staged: a failed transfer leaves the old weights served.

vLLM's backends put the model on meta tensors when an update starts, so anything sampled before it ends kills the
engine, and a trainer that dies half-way leaves no model at all. Here a worker first receives everything into host
memory and touches the model only in `finish_weight_update`. The price is one host copy of the weights.

Both sides of vLLM's transfer API (0.32): the worker's engine and the trainer's. One process group of the trainer's
sender (rank 0) and every worker of every engine; one broadcast per tensor, as raw bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar, Self

import torch
from torch.distributed import ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer import base

BACKEND = "gloo"


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
    """What one transfer brings, in order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


@dataclass
class GlooTrainerInitInfo(base.TrainerInitInfo):
    """Rendezvous, as the trainer gives it; `world_size` counts the sender and every worker of every engine."""

    backend: ClassVar[str] = BACKEND

    master_address: str
    master_port: int
    world_size: int
    timeout_s: float


class GlooWorkerEngine(base.WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Worker side: receive into host memory, load in one go at the end."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._group: ProcessGroupGloo | None = None
        self._staged: list[tuple[str, torch.Tensor]] = []

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the trainer's group, leaving any earlier one."""
        self.shutdown()
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._group = _join(init_info, rank)

    def start_weight_update(self) -> None:
        """Forget what a failed update may have left."""
        self._staged = []

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receive every tensor into host memory; RuntimeError when the trainer does not deliver in time."""
        if self._group is None:
            raise RuntimeError("gloo weight transfer: no trainer connected; call init_weight_transfer_engine first")
        try:
            for name, dtype_name, shape in zip(
                update_info.names, update_info.dtype_names, update_info.shapes, strict=True
            ):
                tensor = torch.empty(shape, dtype=getattr(torch, dtype_name), device="cpu")
                self._group.broadcast(_as_bytes(tensor), 0).wait()
                self._staged.append((name, tensor))
        except BaseException:
            self._staged = []
            self.shutdown()
            raise

    def finish_weight_update(self) -> None:
        """Load what was received; RuntimeError when nothing was."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        if not self._staged:
            raise RuntimeError("gloo weight transfer: nothing was received, the model is unchanged")
        staged, self._staged = self._staged, []
        initialize_layerwise_reload(self.model)
        self.model.load_weights((name, tensor.to(self.device)) for name, tensor in staged)
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied_head(self.model)

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
        """One full update of every engine: start, broadcast while the workers receive, finish."""
        assert self.source is not None
        declared = self.source.metadata()
        update_info = GlooUpdateInfo(
            [item.name for item in declared],
            [str(item.dtype).removeprefix("torch.") for item in declared],
            [list(item.shape) for item in declared],
        )
        self.client.start_weight_update()
        with ThreadPoolExecutor(max_workers=1) as pool:
            received = pool.submit(self.client.update_weights, asdict(update_info))
            try:
                self._send(declared)
            except BaseException as error:
                self.shutdown()
                if isinstance(error, RuntimeError):
                    received.result()  # a broken group is the symptom; an engine's own message says more
                raise
            received.result()
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        """Leave the group: its connections close with it, so that no worker waits for its time-out."""
        self._group = None

    def _send(self, declared: Sequence[base.ParamMeta]) -> None:
        assert self.source is not None
        assert self._group is not None
        for expected, (name, tensor) in zip(declared, self.source, strict=True):
            if (name, tensor.dtype, tuple(tensor.shape)) != (expected.name, expected.dtype, tuple(expected.shape)):
                raise ValueError(
                    f"weights: {name} {tensor.dtype} {tuple(tensor.shape)} where metadata() announced "
                    f"{expected.name} {expected.dtype} {tuple(expected.shape)}"
                )
            self._group.broadcast(_as_bytes(tensor.detach().to("cpu").contiguous()), 0).wait()


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
