"""Looks for the trainer:engine split of the nodes at hand that ends a round soonest, and says why nothing fits.

A refusal names the memory that is missing, and the smallest change of settings under which the same nodes would do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_ra3.config import RunConfig
from megatron_ra3.launch.forecast import RoundTime, Sampler, forecast
from megatron_ra3.launch.hardware import GIB, Gpu, device
from megatron_ra3.launch.layout import DoesNotFitError, Layout
from megatron_ra3.launch.memory import (
    EngineMemory,
    MicroBatchShape,
    TrainerMemory,
    engine_memory,
    trainer_memory,
)
from megatron_ra3.launch.timing import Machine
from megatron_ra3.launch.workload import Workload
from megatron_ra3.model.geometry import Geometry

MOST_NODES = 256
"""How far a refusal looks for a number of nodes that would do."""


class TooLittleMemoryError(DoesNotFitError):
    """Bytes are missing on a trainer's GPU, or else, where trainers fit, on an engine's."""

    def __init__(self, message: str, lacking_bytes: float, *, of_engine: bool) -> None:
        super().__init__(message)
        self.lacking_bytes = lacking_bytes
        self.of_engine = of_engine


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes. `engine_nodes` None: as is best."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    engine_nodes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to run."""

    config: RunConfig
    geometry: Geometry
    work: Workload
    asynchronous: bool


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A layout that fits, and what it does."""

    layout: Layout
    machine: Machine
    trainer: TrainerMemory
    """Of the fullest pipeline stage."""
    stage: int
    engine: EngineMemory | None
    times: RoundTime
    sampler: Sampler


def layouts(cluster: Cluster, task: Task, *, coarse: bool = False) -> Iterator[Layout]:
    """Candidates that use at most the nodes at hand; a single node is cut by GPUs. `coarse`: few of many nodes."""
    parallel, per_node = task.config.parallel, cluster.gpus_per_node

    def layout(trainer_gpus: int, engine_gpus: int) -> Layout:
        return Layout(
            gpus_per_node=per_node,
            trainer_gpus=trainer_gpus,
            engine_gpus=engine_gpus,
            tp_size=parallel.tensor,
            pp_size=parallel.pipeline,
            engine_tp_size=task.config.engine.tensor_parallel,
        )

    if not task.work.samples_latents:
        yield from (layout(nodes * per_node, 0) for nodes in _counts(cluster.nodes, coarse))
    elif cluster.nodes == 1:
        for engine_gpus in range(1, per_node):
            yield from (layout(gpus, engine_gpus) for gpus in range(1, per_node - engine_gpus + 1))
    else:
        fixed = cluster.engine_nodes
        for engine_nodes in _counts(cluster.nodes - 1, coarse) if fixed is None else (fixed,):
            for nodes in _counts(cluster.nodes - engine_nodes, coarse):
                yield layout(nodes * per_node, engine_nodes * per_node)


def _counts(most: int, coarse: bool) -> Iterator[int]:
    """1 to `most`, or the powers of two among them and `most` itself."""
    return (count for count in range(1, most + 1) if not coarse or count == most or count & (count - 1) == 0)


def place(cluster: Cluster, task: Task, layout: Layout) -> Placement:
    """Check a layout and forecast it; DoesNotFitError."""
    config = task.config
    layout.check()
    _check_batches(task, layout)
    machine = Machine(
        device=device(cluster.gpu, config.model.dtype),
        layout=layout,
        dtype=config.model.dtype,
        distributed_optimizer=config.parallel.distributed_optimizer,
    )
    stage, trainer = fullest_stage(task, machine)
    lacking = trainer.total - cluster.gpu.memory_bytes
    if lacking > 0:
        raise TooLittleMemoryError(
            f"a trainer GPU of pipeline stage {stage} needs {trainer.total / GIB:.1f} GiB, {lacking / GIB:.1f} more "
            f"than the {cluster.gpu.memory_bytes / GIB:.1f} it has",
            lacking,
            of_engine=False,
        )
    engine = _engine(cluster, task) if layout.engine_gpus else None
    sampler = Sampler(
        max_in_flight=config.engine.max_in_flight,
        cached_sequences=engine.sequences if engine else 0,
        fp8_rewards=config.model.reward_precision.startswith("fp8"),
        asynchronous=task.asynchronous,
    )
    return Placement(
        layout=layout,
        machine=machine,
        trainer=trainer,
        stage=stage,
        engine=engine,
        times=forecast(task.geometry, machine, task.work, sampler),
        sampler=sampler,
    )


def fullest_stage(task: Task, machine: Machine) -> tuple[int, TrainerMemory]:
    """The pipeline stage that needs most memory, and what for."""
    widest = task.work.widest_batch
    shape = MicroBatchShape(tokens=widest, sequence_tokens=min(widest, task.work.max_sequence_tokens))
    trajectories = max(task.work.mstep_snippets, task.work.estep_snippets * task.work.rollouts)
    batches, _ = task.work.micro_batches(trajectories / machine.layout.dp_size)
    stages = {
        stage: trainer_memory(
            task.geometry,
            machine.sharding,
            stage,
            machine.dtype,
            shape,
            micro_batches=batches,
            device=machine.device,
        )
        for stage in range(machine.layout.pp_size)
    }
    return max(stages.items(), key=lambda item: item[1].total)


def _engine(cluster: Cluster, task: Task) -> EngineMemory:
    settings, longest = task.config.engine, task.work.max_sequence_tokens
    found = engine_memory(
        task.geometry,
        settings.tensor_parallel,
        task.config.model.dtype,
        memory_bytes=settings.memory_fraction * cluster.gpu.memory_bytes,
        trajectory_tokens=task.work.trajectory_tokens,
    )
    lacking = longest * found.kv_bytes_per_token - found.kv_cache
    if lacking > 0:
        raise TooLittleMemoryError(
            f"an engine GPU has {lacking / GIB:.1f} GiB too little: {found.weights / GIB:.1f} GiB of weights and "
            f"{found.reserved / GIB:.1f} beside them leave no room for one trajectory of {longest} tokens in "
            f"engine.memory_fraction={settings.memory_fraction:g} of {cluster.gpu.memory_bytes / GIB:.1f}",
            lacking,
            of_engine=True,
        )
    return found


def _check_batches(task: Task, layout: Layout) -> None:
    """A replica without a snippet is refused when a run starts; here no node is bought for it."""
    work = task.work
    sizes = {"mstep.snippets_per_step": work.mstep_snippets, "evaluate.snippets": work.evaluate_snippets}
    if work.samples_latents:
        sizes["estep.snippets_per_step"] = work.estep_snippets
    for key, value in sizes.items():
        if value < layout.dp_size:
            raise DoesNotFitError(f"{key}={value} is less than the {layout.dp_size} replicas: raise it, or lower nodes")


def best(cluster: Cluster, task: Task) -> tuple[Placement, list[Placement]]:
    """The layout whose round ends soonest (the smaller one where two do), and all that fit, best first.

    DoesNotFitError: none fits; it tells why, by how much, and what would.
    """
    refusals: list[DoesNotFitError] = []
    fitting = _fitting(cluster, task, layouts(cluster, task), refusals)
    if not fitting:
        raise _refusal(cluster, task, refusals)
    return fitting[0], fitting


def _fitting(
    cluster: Cluster, task: Task, candidates: Iterable[Layout], refusals: list[DoesNotFitError]
) -> list[Placement]:
    """All layouts that fit, best first; the others' refusals are appended to `refusals`."""
    fitting = []
    for layout in candidates:
        try:
            fitting.append(place(cluster, task, layout))
        except DoesNotFitError as refusal:
            refusals.append(refusal)
    return sorted(fitting, key=lambda placement: (placement.times.seconds, placement.layout.nodes))


def _refusal(cluster: Cluster, task: Task, refusals: list[DoesNotFitError]) -> DoesNotFitError:
    """The refusal that was nearest to fitting, with the remedy."""
    if not refusals:
        need = "a trainer node and an engine node" if cluster.engine_nodes is None else "a trainer node too"
        return DoesNotFitError(f"--nodes {cluster.nodes} --engine-nodes {cluster.engine_nodes}: need {need}")
    by_memory = [refusal for refusal in refusals if isinstance(refusal, TooLittleMemoryError)]
    nearest = (
        min(by_memory, key=lambda refusal: (not refusal.of_engine, refusal.lacking_bytes)) if by_memory else refusals[0]
    )
    return DoesNotFitError(f"{nearest}. {remedy(cluster, task)}")


def remedy(cluster: Cluster, task: Task) -> str:
    """The fastest change of settings under which the task fits, on as many nodes or on the first doubling that does."""
    more = cluster
    while more.nodes <= MOST_NODES:
        fitting = [
            (found[0].times.seconds, changed)
            for changed in _changes(more, task)
            if (found := _fitting(more, changed, layouts(more, changed, coarse=True), []))
        ]
        if fitting:
            _, changed = min(fitting, key=lambda pair: pair[0])
            settings = " ".join(_differences(task.config, changed.config)) or "the settings as they are"
            if more is cluster:
                return f"What would fit on these nodes: {settings}"
            return f"No settings fit on {cluster.nodes} nodes; {more.nodes} nodes would do with {settings}"
        more = dataclasses.replace(cluster, nodes=2 * more.nodes, engine_nodes=None)
    return f"Nothing fits on up to {MOST_NODES} nodes: choose a GPU with more memory (--gpu)"


def _changes(cluster: Cluster, task: Task) -> Iterator[Task]:
    """Settings that save memory: sharded optimizer, smaller micro-batches, more ranks per model or engine."""
    config, g = task.config, task.geometry
    widths = [size for size in (1, 2, 4, 8) if cluster.gpus_per_node % size == 0]
    engine_widths = [size for size in widths if size >= config.engine.tensor_parallel and g.heads % size == 0]
    served = next((size for size in engine_widths if _engine_fits(cluster, task, size)), config.engine.tensor_parallel)
    batch_tokens = [config.parallel.micro_batch_tokens]
    while batch_tokens[-1] // 2 >= config.max_sequence_tokens:
        batch_tokens.append(batch_tokens[-1] // 2)
    for pipeline in (size for size in range(config.parallel.pipeline, 17) if g.layers % size == 0):
        for tensor in (size for size in widths if size >= config.parallel.tensor and _divides(g, size)):
            for tokens in batch_tokens:
                for sharded in sorted({config.parallel.distributed_optimizer, True}):
                    parallel = dataclasses.replace(
                        config.parallel,
                        pipeline=pipeline,
                        tensor=tensor,
                        micro_batch_tokens=tokens,
                        distributed_optimizer=sharded,
                    )
                    engine = dataclasses.replace(config.engine, tensor_parallel=served)
                    work = dataclasses.replace(task.work, micro_batch_tokens=tokens)
                    changed = dataclasses.replace(config, parallel=parallel, engine=engine)
                    yield dataclasses.replace(task, config=changed, work=work)


def _engine_fits(cluster: Cluster, task: Task, tp_size: int) -> bool:
    engine = dataclasses.replace(task.config.engine, tensor_parallel=tp_size)
    try:
        _engine(cluster, dataclasses.replace(task, config=dataclasses.replace(task.config, engine=engine)))
    except TooLittleMemoryError:
        return False
    return True


def _divides(g: Geometry, size: int) -> bool:
    return not (g.heads % size or g.kv_heads % size or g.ffn % size)


def _differences(before: RunConfig, after: RunConfig) -> list[str]:
    """The changed settings as `key=value`."""
    found = []
    for section in ("parallel", "engine"):
        old, new = (dataclasses.asdict(getattr(config, section)) for config in (before, after))
        found += [f"{section}.{key}={str(new[key]).lower()}" for key in new if new[key] != old[key]]
    return found
