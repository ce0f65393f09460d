"""A plan: what a configuration does on given nodes, from shapes and settings alone. No GPU, no weights, no torch.

It answers what is otherwise learned in the queue: whether the run fits, how to divide the nodes between trainers and
engines, how long a step takes, what limits it, and what a billion tokens cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_ra3.config import RunConfig
from megatron_ra3.corpus.manifest import Manifest
from megatron_ra3.launch.forecast import Share, bottlenecks, model_flops
from megatron_ra3.launch.hardware import GPUS
from megatron_ra3.launch.memory import model_parameters
from megatron_ra3.launch.placement import Cluster, Placement, Task, best
from megatron_ra3.launch.workload import Assumptions, Workload, uneven, workload
from megatron_ra3.model.geometry import Geometry, check_config

TIGHT = 0.95
"""Share of a GPU's memory above which a plan warns: what is not counted may not fit beside it."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be planned."""

    config: RunConfig
    hf_config: Mapping[str, Any]
    model: str
    gpu: str
    nodes: int
    gpus_per_node: int
    engine_nodes: int | None = None
    assumptions: Assumptions = field(default_factory=Assumptions)
    gpu_hour_price: float | None = None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a billion tokens of M-steps, all phases and all GPUs of the nodes in use counted."""

    gpu_hours: float
    mstep_gpu_hours: float
    """The part spent in M-steps themselves."""
    money: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer."""

    question: Question
    geometry: Geometry
    parameters: int
    work: Workload
    chosen: Placement
    splits: list[Placement]
    """The best of each number of engine GPUs, by that number."""
    shares: list[Share]
    """Parts of a round, longest first."""
    mstep_tokens_per_s: float
    utilisation: float
    """Useful products of an M-step over the published peak of the trainer GPUs."""
    cost: Cost | None
    warnings: list[str]


def make_plan(question: Question, manifest: Manifest | None = None) -> Plan:
    """Find the best layout and forecast it.

    ValueError: the model, or settings that no layout of these nodes can take. DoesNotFitError, one of them: nothing
    fits; it names what is missing and what to change.
    """
    config = question.config
    _check(question)
    work = workload(config, question.assumptions, manifest)
    if work.samples_latents and question.engine_nodes == 0:
        raise ValueError("--engine-nodes 0: this objective samples latents and needs engines; give 1 or leave it out")
    geometry = Geometry.of(question.hf_config)
    cluster = Cluster(
        gpu=GPUS[question.gpu],
        nodes=question.nodes,
        gpus_per_node=question.gpus_per_node,
        engine_nodes=question.engine_nodes if question.nodes > 1 else None,
    )
    task = Task(config=config, geometry=geometry, work=work, asynchronous=config.estep.max_staleness_steps > 0)
    chosen, fitting = best(cluster, task)
    splits: dict[int, Placement] = {}
    for placement in fitting:
        other = splits.get(placement.layout.engine_gpus)
        if other is None or placement.times.seconds < other.times.seconds:
            splits[placement.layout.engine_gpus] = placement
    seconds = chosen.times.mstep.total
    per_second = work.mstep_tokens / seconds
    peak = _peak_flops(question) * chosen.layout.trainer_gpus
    return Plan(
        question=question,
        geometry=geometry,
        parameters=model_parameters(geometry),
        work=work,
        chosen=chosen,
        splits=[splits[gpus] for gpus in sorted(splits)],
        shares=bottlenecks(chosen.times, work, chosen.sampler),
        mstep_tokens_per_s=per_second,
        utilisation=per_second * model_flops(geometry, work.trajectory_tokens) / peak,
        cost=_cost(question, work, chosen),
        warnings=_warnings(question, work, chosen),
    )


@dataclass(frozen=True)
class _Cut:
    tp_size: int
    pp_size: int


def _check(question: Question) -> None:
    """Refuse what no number of nodes cures."""
    config = question.config
    if question.gpu not in GPUS:
        raise ValueError(f"--gpu {question.gpu}: must be one of {', '.join(GPUS)}")
    for name in ("nodes", "gpus_per_node"):
        if getattr(question, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(question, name)}: must be at least 1")
    if question.engine_nodes is not None and question.nodes == 1:
        raise ValueError(
            f"--engine-nodes {question.engine_nodes}: a single node is cut by GPUs, not by nodes; leave it out"
        )
    if config.engine.kind == "inprocess":
        raise ValueError(
            "engine.kind=inprocess: samples with the trainer's own weights and has no cache, for tests and small "
            "models; set engine.kind=vllm"
        )
    check_config(question.hf_config, _Cut(config.parallel.tensor, config.parallel.pipeline))
    heads = question.hf_config["num_attention_heads"]
    if heads % config.engine.tensor_parallel:
        raise ValueError(
            f"engine.tensor_parallel={config.engine.tensor_parallel} does not divide the {heads} attention heads of "
            f"{question.model}: choose a divisor"
        )
    longest = question.hf_config["max_position_embeddings"]
    if config.max_sequence_tokens > longest:
        raise ValueError(
            f"corpus.max_snippet_tokens={config.corpus.max_snippet_tokens}: with rationales a trajectory may take "
            f"{config.max_sequence_tokens} tokens but {question.model} has {longest} positions; lower it"
        )


def _peak_flops(question: Question) -> float:
    gpu = GPUS[question.gpu]
    return gpu.bf16_flops if question.config.model.dtype == "bf16" else gpu.fp32_flops


def _cost(question: Question, work: Workload, chosen: Placement) -> Cost | None:
    tokens = work.mstep_steps * work.mstep_tokens
    if not tokens:
        return None
    gpus = chosen.layout.nodes * question.gpus_per_node
    hours = gpus / 3600 * 1e9 / tokens
    total = hours * chosen.times.seconds
    price = question.gpu_hour_price
    return Cost(
        gpu_hours=total,
        mstep_gpu_hours=hours * chosen.times.mstep_seconds,
        money=None if price is None else price * total,
    )


def _warnings(question: Question, work: Workload, chosen: Placement) -> list[str]:
    layout, memory = chosen.layout, GPUS[question.gpu].memory_bytes
    found = list(layout.warnings())
    sizes = [("mstep.snippets_per_step", work.mstep_snippets)]
    if work.samples_latents:
        sizes.append(("estep.snippets_per_step", work.estep_snippets))
    found += uneven(sizes, layout.dp_size)
    idle = question.nodes - layout.nodes
    if idle:
        found.append(
            f"{idle} of {question.nodes} nodes stay unused: with these steps more replicas or engines make no round "
            "faster; raise estep.snippets_per_step and mstep.snippets_per_step, or ask for fewer nodes"
        )
    unused = layout.nodes * question.gpus_per_node - layout.trainer_gpus - layout.engine_gpus
    if unused:
        found.append(f"{unused} GPUs of the nodes in use stay unused")
    if chosen.trainer.total > TIGHT * memory:
        found.append(
            f"trainers use {chosen.trainer.total / memory:.0%} of their memory: lower parallel.micro_batch_tokens"
        )
    count, _ = work.micro_batches(work.mstep_snippets / layout.dp_size)
    if count < layout.pp_size:
        found.append(
            f"{count} micro-batches for {layout.pp_size} pipeline stages: most of them wait; raise "
            "mstep.snippets_per_step or lower parallel.micro_batch_tokens"
        )
    if question.config.model.init == "random":
        found.append("model.init=random: the vocabulary will be the tokenizer's, counted here is config.json's")
    return found


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything in the plan as plain values, sizes in bytes, times in seconds; the configuration is left out."""
    chosen = plan.chosen
    question = dataclasses.asdict(dataclasses.replace(plan.question, hf_config={}))
    for key in ("config", "hf_config"):
        del question[key]
    return {
        "question": question,
        "parameters": plan.parameters,
        "batch": dataclasses.asdict(plan.work)
        | {
            "trajectory_tokens": plan.work.trajectory_tokens,
            "estep_tokens": plan.work.estep_tokens,
            "mstep_tokens": plan.work.mstep_tokens,
        },
        "layout": _layout_json(chosen),
        "memory": {
            "trainer": dataclasses.asdict(chosen.trainer) | {"total": chosen.trainer.total, "stage": chosen.stage},
            "engine": dataclasses.asdict(chosen.engine) if chosen.engine else None,
            "gpu": GPUS[plan.question.gpu].memory_bytes,
        },
        "seconds": _seconds_json(chosen),
        "mstep_tokens_per_s": plan.mstep_tokens_per_s,
        "mstep_utilisation": plan.utilisation,
        "splits": [
            _layout_json(split) | {"round_s": split.times.seconds, "nodes": split.layout.nodes} for split in plan.splits
        ],
        "bottlenecks": [share._asdict() for share in plan.shares],
        "per_billion_mstep_tokens": dataclasses.asdict(plan.cost) if plan.cost else None,
        "warnings": plan.warnings,
    }


def _layout_json(placement: Placement) -> dict[str, Any]:
    layout = placement.layout
    return dataclasses.asdict(layout) | {
        "dp_size": layout.dp_size,
        "engines": layout.engines,
        "trainer_nodes": layout.trainer_nodes,
        "engine_nodes": layout.engine_nodes,
    }


def _seconds_json(placement: Placement) -> dict[str, Any]:
    times = placement.times
    found: dict[str, Any] = {
        "round": times.seconds,
        "mstep": times.mstep.total,
        "mstep_parts": dataclasses.asdict(times.mstep),
        "evaluation": times.evaluation,
    }
    if times.estep is not None and times.bootstrap is not None:
        found |= {
            "estep": times.estep.seconds,
            "estep_parts": {
                "sampling": times.estep.sampling.seconds,
                "scoring": times.estep.scoring.total + times.estep.reference,
                "update": times.estep.update.total,
            },
            "sampling": dataclasses.asdict(times.estep.sampling),
            "sync": times.estep.sync,
            "bootstrap": times.bootstrap.seconds,
        }
    return found
