"""A plan for reading: a page of aligned lines, the answer before its parts."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ra3.launch.hardware import GIB, GPUS
from megatron_ra3.launch.plan import Plan

WIDTH = 12
SHOWN_SHARES = 4


def report(plan: Plan) -> str:
    """The whole page."""
    sections = (_head(plan), _layout(plan), _batches(plan), _memory(plan), _times(plan), _splits(plan), _end(plan))
    return "\n".join(line for section in sections for line in section)


def _row(name: str, text: str) -> str:
    return f"{name:<{WIDTH}}{text}"


def _head(plan: Plan) -> Iterator[str]:
    asked, layout = plan.question, plan.chosen.layout
    count = f"{plan.parameters / 1e9:.2f} billion" if plan.parameters >= 1e9 else f"{plan.parameters / 1e6:.1f} million"
    yield _row("model", f"{asked.model}, {count} parameters, {asked.config.model.dtype}")
    yield _row("cluster", f"{asked.nodes} x {asked.gpus_per_node} {asked.gpu.upper()}")
    text = f"TP{layout.tp_size} x PP{layout.pp_size} x DP{layout.dp_size} on {layout.trainer_gpus} GPUs"
    if layout.engines:
        text += f"; {layout.engines} engines of TP{layout.engine_tp_size} on {layout.engine_gpus} GPUs"
        if layout.engine_nodes:
            text += f" (RA3_ENGINE_NODES={layout.engine_nodes} RA3_ENGINES_PER_NODE={layout.engines_per_node})"
    yield _row("layout", text)


def _layout(plan: Plan) -> Iterator[str]:
    yield from (_row("", line) for line in plan.chosen.layout.describe())


def _batches(plan: Plan) -> Iterator[str]:
    work, dp_size = plan.work, plan.chosen.layout.dp_size
    yield _row(
        "samples",
        f"{work.snippet_tokens:.0f} tokens with {work.actions:.0f} gates ({work.source}); think rate "
        f"{work.think_rate:g} (assumed), {work.rationale_tokens:g} tokens per rationale: "
        f"{work.trajectory_tokens:.0f} tokens a trajectory",
    )
    if work.samples_latents:
        trajectories = work.estep_snippets * work.rollouts
        yield _row(
            "E-step",
            f"{work.estep_snippets} snippets x {work.rollouts} rollouts = {trajectories} trajectories = "
            f"{work.estep_tokens:,.0f} tokens a step; {_share(plan, trajectories)}",
        )
    yield _row(
        "M-step",
        f"{work.mstep_snippets} snippets = {work.mstep_tokens:,.0f} tokens a step over {dp_size} replicas; "
        f"{_share(plan, work.mstep_snippets)}",
    )


def _share(plan: Plan, sequences: int) -> str:
    own = -(-sequences // plan.chosen.layout.dp_size)
    count, tokens = plan.work.micro_batches(own)
    return f"per replica {own} in {count} micro-batches of {tokens:,.0f} tokens"


def _memory(plan: Plan) -> Iterator[str]:
    used, gpu = plan.chosen.trainer, GPUS[plan.question.gpu].memory_bytes
    parts = {
        "weights": used.weights,
        "gradients": used.gradients,
        "optimizer": used.optimizer,
        "activations": used.activations,
        "head": used.head,
        "reserve": used.reserved,
    }
    listed = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
    stage = f" (pipeline stage {plan.chosen.stage}, the fullest)" if plan.chosen.layout.pp_size > 1 else ""
    yield _row("trainer GPU", f"{_gib(used.total)} of {_gib(gpu)} GiB{stage}: {listed}")
    engine = plan.chosen.engine
    if engine is not None:
        yield _row(
            "engine GPU",
            f"weights {_gib(engine.weights)}, reserve {_gib(engine.reserved)}, KV cache {_gib(engine.kv_cache)} GiB = "
            f"{engine.sequences} trajectories ({engine.kv_bytes_per_token:,} bytes a token)",
        )


def _times(plan: Plan) -> Iterator[str]:
    times, work = plan.chosen.times, plan.work
    if times.estep is not None and times.bootstrap is not None:
        estep = times.estep
        mode = "asynchronous" if estep.asynchronous else "synchronous"
        yield _row(
            "E-step s",
            f"{estep.seconds:.2f} {mode}: sync {estep.sync:.2f}, sampling {estep.sampling.seconds:.2f}, scoring "
            f"{estep.scoring.total + estep.reference:.2f}, update {estep.update.total:.2f}; trainers busy "
            f"{estep.trainers_busy:.0%}, engines {estep.engines_busy:.0%}",
        )
        yield _row(
            "sampling",
            f"{estep.sampling.in_flight} trajectories at a time per engine (limit: {estep.sampling.limit}), "
            f"{estep.sampling.tokens_per_s:,.0f} sampled and {work.estep_tokens / estep.sampling.seconds:,.0f} "
            "trajectory tokens/s over all engines",
        )
        yield _row("bootstrap s", f"{times.bootstrap.seconds:.2f} for the snippets of one M-step")
    mstep = times.mstep
    yield _row(
        "M-step s",
        f"{mstep.total:.2f}: layers {mstep.layers:.2f}, head {mstep.head:.2f}, tensor parallel "
        f"{mstep.tensor_parallel:.2f}, bubble {mstep.bubble:.2f}, gradients {mstep.data_parallel:.2f}, optimizer "
        f"{mstep.optimizer:.2f}; {plan.mstep_tokens_per_s:,.0f} tokens/s, {plan.utilisation:.0%} of the peak",
    )
    yield _row(
        "round s",
        f"{times.seconds:,.0f}: E-steps {times.estep_seconds:,.0f}, bootstrap "
        f"{times.bootstrap_seconds:,.0f}, M-steps {times.mstep_seconds:,.0f}, evaluation {times.evaluation:,.0f}",
    )


def _splits(plan: Plan) -> Iterator[str]:
    if len(plan.splits) < 2:
        return
    for number, split in enumerate(plan.splits):
        layout = split.layout
        mark = " <- best" if split.layout == plan.chosen.layout else ""
        yield _row(
            "" if number else "splits",
            f"{layout.trainer_gpus:>4} trainer + {layout.engine_gpus:>4} engine GPUs: {split.times.seconds:>9,.0f} s "
            f"a round{mark}",
        )


def _end(plan: Plan) -> Iterator[str]:
    total = plan.chosen.times.seconds
    shown = [share for share in plan.shares[:SHOWN_SHARES] if share.seconds >= 0.02 * total]
    for number, share in enumerate(shown):
        yield _row("" if number else "bottleneck", f"{share.seconds / total:>4.0%} {share.name}: {share.fix}")
    if plan.cost is not None:
        money = "" if plan.cost.money is None else f" = {plan.cost.money:,.0f} at the given price"
        yield _row(
            "cost",
            f"{plan.cost.gpu_hours:,.0f} GPU hours{money} per billion M-step tokens, {plan.cost.mstep_gpu_hours:,.0f} "
            "of them in M-steps",
        )
    yield from (_row("warning", text) for text in plan.warnings)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"
