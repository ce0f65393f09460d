"""The RA3 mid-training loop: rounds of E-step, bootstrapping, M-step and evaluation (algorithm.md 3, 5, 6).

Without EM rounds the same loop is plain next-token training: a base model from scratch, or the NTP baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ra3.config import NextTokenConfig, RunConfig
from megatron_ra3.latents import Trajectory
from megatron_ra3.mstep import latent_means
from megatron_ra3.observe.journal import recorded
from megatron_ra3.run import Run
from megatron_ra3.schedule import Phase, PhaseName, learning_rate, phase_fraction
from megatron_ra3.stall import watched

Metrics = dict[str, float]


def midtrain(config: RunConfig) -> dict[str, Any]:
    """Run, or resume, a whole mid-training; returns the summary that is also written to the run folder."""
    with (
        watched(Path(config.run_folder) / "stalls", config.stall_timeout_s),
        recorded(config.run_folder, config.logging.timeline_megabytes),
        Run(config) as run,
    ):
        for phase in run.remaining_phases():
            step = PHASES[phase.name]
            for _ in run.remaining_steps(phase):
                run.finish_step(phase, step(run, phase))
        return run.finish()


def warmup(run: Run, phase: Phase) -> Metrics:
    """One step of next-token training on the corpus, its native comments observed as rationales if configured."""
    config = run.config.warmup
    observe = run.config.latents.comments == "observe"
    snippets = run.next_snippets(config.snippets_per_step)
    return _next_token(run, phase, config, [run.format.render(item, observe=observe) for item in snippets])


def estep(run: Run, phase: Phase) -> Metrics:
    """One policy-gradient step: sample G rollouts per snippet, reward them with the likelihood of the real lines.

    With `estep.max_staleness_steps` they were sampled while earlier steps were updated, and those of later ones begin.
    """
    run.sync_engine()
    run.begin_sampling(phase.steps - run.progress.step)
    groups = run.take_rollouts()
    return run.estep.update(groups) | run.sampling_metrics()


def bootstrap(run: Run, _phase: Phase) -> Metrics:
    """Annotate the snippets of one coming M-step with the E-step's last weights."""
    if run.progress.step == 0:
        run.annotated.clear()
    run.sync_engine()
    snippets = run.next_snippets(run.config.mstep.snippets_per_step)
    annotated = [group[0] for group in run.sample(snippets, 1)]
    run.put_annotated(annotated)
    return latent_means(run.layout, annotated)


def mstep(run: Run, phase: Phase) -> Metrics:
    """One step of next-token training on bootstrapped snippets."""
    if run.progress.step == 0 and run.config.em.restart_from_base:
        run.assembly.reset_weights()
    config = run.config.mstep
    metrics = _next_token(run, phase, config, run.take_annotated(phase.steps - run.progress.step))
    run.progress.mstep_tokens += int(metrics["tokens"])
    return metrics


def evaluate(run: Run, _phase: Phase) -> Metrics:
    """Held-out nats per original code token: with `<act>` everywhere, and with latents sampled by the model."""
    snippets = run.heldout_snippets()
    act_only = run.next_token.evaluate([run.format.render(item, observe=False) for item in snippets])
    metrics = {f"act_{name}": value for name, value in act_only.items()}
    if not run.config.em.rounds:
        return metrics | {"nats_per_code_token": act_only["nats_per_code_token"]}
    run.sync_engine()
    sampled = [group[0] for group in run.sample(snippets, 1)]
    run.write_samples(sampled[: run.config.evaluate.samples_shown])
    return metrics | run.next_token.evaluate(sampled) | run.estep.evaluate(sampled)


def _next_token(run: Run, phase: Phase, config: NextTokenConfig, trajectories: list[Trajectory]) -> Metrics:
    fraction = phase_fraction(config, step=run.progress.step, tokens=run.progress.phase_tokens)
    metrics = run.next_token.update(
        trajectories, latent_weight=config.latent_weight, lr=learning_rate(config, fraction)
    )
    run.progress.phase_tokens += int(metrics["tokens"])
    if config.max_tokens and run.progress.phase_tokens >= config.max_tokens:
        run.end_phase(phase)
    return metrics


PHASES: dict[PhaseName, Callable[[Run, Phase], Metrics]] = {
    "warmup": warmup,
    "estep": estep,
    "bootstrap": bootstrap,
    "mstep": mstep,
    "evaluate": evaluate,
}
