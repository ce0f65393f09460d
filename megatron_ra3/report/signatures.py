"""Failure signatures: what a run that goes wrong looks like in its own metrics (algorithm.md 7), said while it runs.

Without them a run of days ends as plain next-token training, or as one that learned to cheat, and nobody notices before
the benchmark. Pure Python over the records of metrics.jsonl; a resumed run replays it: there is no other state.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from megatron_ra3.config import RunConfig, SignatureConfig

Record = Mapping[str, Any]
Found = Iterator[tuple[str, str]]

ESTEP_METRICS = (
    "reward",
    "advantage_think",
    "think_rate",
    "rationale_tokens",
    "malformed_rate",
    "mismatch",
    "effective_samples",
    "forced_act_rate",
    "grad_norm",
)
"""What the detector reads from E-step records; from M-steps it reads `loss`, from evaluations the held-out nats."""
ADVICE = {
    "think_rate_high": "c is too low; raise {cost}",
    "think_rate_low": "c is too high, this is NTP; lower {cost}, or warm up on observed comments "
    "(warmup.steps={warmup.steps} now)",
    "gate_never": "the gate has collapsed to <act>, and no advantage is left that could open it; raise "
    "objective.gate_exploration ({objective.gate_exploration:g} now), lower {cost}, or warm up on observed comments "
    "(warmup.steps={warmup.steps} now)",
    "gate_always": "the gate has collapsed to <think> and hardly sees a line without a rationale; raise {cost} or "
    "objective.gate_exploration ({objective.gate_exploration:g} now)",
    "no_learning_signal": "all rollouts of every group are alike, nothing is left to learn; lower estep.steps "
    "({estep.steps} now) or raise objective.gate_exploration ({objective.gate_exploration:g} now)",
    "rationales_malformed": "they are empty, unclosed or over the cap; raise objective.format_penalty "
    "({objective.format_penalty:g} now) or warm up on observed comments (warmup.steps={warmup.steps} now)",
    "rationales_cut": "most are cut at the cap; raise latents.max_rationale_tokens "
    "({latents.max_rationale_tokens} now) or objective.format_penalty ({objective.format_penalty:g} now)",
    "thinking_does_not_pay": "rationales cost more than they help; warm up longer on observed comments "
    "(warmup.steps={warmup.steps} now) or lower {cost}",
    "engine_mismatch": "the engine has other weights or another precision; compare model.dtype ({model.dtype} now) "
    "with that of the servers, or lower estep.max_staleness_steps ({estep.max_staleness_steps} now)",
    "few_effective_samples": "importance weights vary too much; lower objective.gate_exploration "
    "({objective.gate_exploration:g} now), estep.max_staleness_steps ({estep.max_staleness_steps} now) or "
    "objective.max_importance_weight ({objective.max_importance_weight:g} now)",
    "acts_forced": "sequences are full; raise corpus.max_snippet_tokens ({corpus.max_snippet_tokens} now) or lower "
    "latents.max_rationale_tokens ({latents.max_rationale_tokens} now)",
    "ce_not_falling": "noisy latents, or nothing is left to learn; raise {cost} or estep.steps "
    "({estep.steps} now), or change mstep.learning_rate ({mstep.learning_rate:g} now)",
    "reward_hacking": "look in samples.jsonl for rationales that copy the next line, which only a leak makes possible; "
    "else the E-step overfits its snippets: lower estep.learning_rate ({estep.learning_rate:g} now)",
}
"""Every signature, and what to do about it; `{cost}` is the setting that makes thinking dearer when raised."""
NEVER, ALWAYS, MOST = 1e-3, 1.0 - 1e-3, 0.5
"""Think rates beyond which, in every step of a window, the gate has collapsed; share of rationales that is most."""
ERRORS = 2.0
"""Standard errors by which a mean must lie beyond its threshold: what noise explains is no signature."""
GAIN_STEPS, GAIN_ERRORS = 10, 5.0
"""Steps and standard errors for the gain of thinking: at the optimum it lies near 0, and windows overlap."""
LEAST_LOSSES, LOSS_ERRORS = 16, 3.0
"""Losses without which an M-step is not judged, and standard errors: medians of short quarters, twice in a phase."""


def entries(record: Record) -> list[dict[str, Any]]:
    """The signatures that a metrics record carries: `step`, `phase`, `round`, `name` and `message` of each."""
    return [
        {**{key: record[key] for key in ("step", "phase", "round")}, "name": name, "message": text}
        for name, text in record.get("signatures", {}).items()
    ]


class _Round(NamedTuple):
    """How an EM round ended: E-step reward (nats per line, with its standard error) and held-out nats."""

    number: int
    reward: float
    reward_error: float
    nats: float
    lines_only: float


class Detector:
    """Reads metrics records in order and tells of each signature once per phase.

    Args:
        config: thresholds (`signatures`), and the settings that the advice names.
    """

    def __init__(self, config: RunConfig) -> None:
        self.found: list[dict[str, Any]] = []
        """Every signature so far, as `entries` gives them."""
        self._config = config
        self._window: deque[Record] = deque(maxlen=min(config.signatures.window, max(config.estep.steps, 1)))
        self._losses: list[float] = []
        self._rounds: deque[_Round] = deque(maxlen=2)
        self._phase: tuple[str, int] = ("", 0)
        self._fired: set[tuple[int, str]] = set()

    def observe(self, record: Record) -> dict[str, str]:
        """Take in the next step; messages of the signatures that it completes, by name."""
        self._remember(record)
        fired = {
            name: f"{evidence}: {self._advice(name)}"
            for name, evidence in self._check(record["phase"])
            if (record["round"], name) not in self._fired
        }
        self._keep({**record, "signatures": fired})
        return fired

    def replay(self, records: Iterable[Record]) -> None:
        """Take in steps of an earlier process; what it found stands in their `signatures`."""
        for record in records:
            self._remember(record)
            self._keep(record)

    def _remember(self, record: Record) -> None:
        phase, number = record["phase"], record["round"]
        if (phase, number) != self._phase:
            self._phase = (phase, number)
            if phase == "estep":
                self._window.clear()
            elif phase == "mstep":
                self._losses.clear()
        if phase == "estep":
            self._window.append(record)
        elif phase == "mstep":
            self._losses.append(record["loss"])
        elif phase == "evaluate" and len(self._window) > 1:
            reward, error = _mean_and_error([item["reward"] for item in self._window])
            nats = record["nats_per_code_token"], record["nats_code_only"]
            self._rounds.append(_Round(number, reward, error, *nats))

    def _keep(self, record: Record) -> None:
        found = entries(record)
        self.found += found
        self._fired |= {(item["round"], item["name"]) for item in found}

    def _check(self, phase: str) -> Found:
        if phase == "estep" and len(self._window) == self._window.maxlen:
            if self._config.objective.gate == "sampled":
                yield from _gate(self._window, self._config.signatures)
            yield from _rationales(self._window, self._config)
            yield from _sampling(self._window, self._config.signatures)
        elif phase == "mstep" and len(self._losses) == self._config.mstep.steps // 2:
            yield from _cross_entropy(self._losses, self._config.signatures)
        elif phase == "evaluate":
            yield from _cross_entropy(self._losses, self._config.signatures)
            yield from _reward_hacking(self._rounds, self._config.signatures)

    def _advice(self, name: str) -> str:
        objective = self._config.objective
        key = "penalty" if objective.latent_cost == "penalty" else "stickiness"
        cost = f"objective.{key} ({getattr(objective, key):g} now)"
        return ADVICE[name].format(cost=cost, **vars(self._config))


def _gate(window: Sequence[Record], limits: SignatureConfig) -> Found:
    """How often the model thinks, and whether anything is left to change that."""
    rates = _values(window, "think_rate")
    yield from _judge("think_rate_high", "think rate", rates, ">", limits.max_think_rate)
    yield from _judge("think_rate_low", "think rate", rates, "<", limits.min_think_rate)
    no_update = not any(_values(window, "grad_norm"))
    over = f"in each of {len(window)} steps"
    if max(rates) < NEVER and no_update:
        yield "gate_never", f"think rate {_percent(max(rates))} < {_percent(NEVER)} and no update {over}"
    elif min(rates) > ALWAYS:
        yield "gate_always", f"think rate {_percent(min(rates))} > {_percent(ALWAYS)} {over}"
    elif no_update:
        yield "no_learning_signal", f"no update {over}, at think rate {_percent(statistics.fmean(rates))}"


def _rationales(window: Sequence[Record], config: RunConfig) -> Found:
    """Whether rationales are whole, and worth their price; steps without any say nothing."""
    limits, cap = config.signatures, config.latents.max_rationale_tokens
    thinking = [record for record in window if record["think_rate"] > 0.0]
    malformed, lengths = _values(thinking, "malformed_rate"), _values(thinking, "rationale_tokens")
    yield from _judge("rationales_malformed", "malformed rationales", malformed, ">", limits.max_malformed_rate)
    if _is_beyond(malformed, ">", MOST):
        what, limit = "rationale tokens / latents.max_rationale_tokens", limits.max_cap_fraction
        yield from _judge("rationales_cut", what, [length / cap for length in lengths], ">", limit)
    aim = config.objective
    later_rewards_stay = aim.baseline == "counterfactual" and aim.horizon > 1
    if len(thinking) >= GAIN_STEPS and aim.gate == "sampled" and not later_rewards_stay:
        what, limit = "advantage of lines with a rationale", -limits.max_thinking_loss_nats
        gain = _values(thinking, "advantage_think")
        yield from _judge("thinking_does_not_pay", what, gain, "<", limit, show=_nats, errors=GAIN_ERRORS)


def _sampling(window: Sequence[Record], limits: SignatureConfig) -> Found:
    """Whether what was sampled is what the trainer scores."""
    mismatch = _values(window, "mismatch")
    what = "trainer and engine differ per decision by"
    yield from _judge("engine_mismatch", what, mismatch, ">", limits.max_mismatch_nats, show=_nats)
    effective = _values(window, "effective_samples")
    yield from _judge("few_effective_samples", "effective samples", effective, "<", limits.min_effective_samples)
    forced = _values(window, "forced_act_rate")
    yield from _judge("acts_forced", "gates not drawn for want of room", forced, ">", limits.max_forced_act_rate)


def _cross_entropy(losses: Sequence[float], limits: SignatureConfig) -> Found:
    """Whether the M-step learns: medians of its first and last quarter, noise from differences of neighbours."""
    if len(losses) < LEAST_LOSSES:
        return
    quarter = len(losses) // 4
    first, last = statistics.median(losses[:quarter]), statistics.median(losses[-quarter:])
    steps = [after - before for before, after in itertools.pairwise(losses)]
    middle = statistics.median(steps)
    deviation = 1.4826 * statistics.median(abs(step - middle) for step in steps) / 2**0.5
    error = 1.2533 * deviation * (2 / quarter) ** 0.5  # of a difference of two medians
    if first - last + LOSS_ERRORS * error < limits.min_mstep_fall * first:
        fall, least = _percent((first - last) / first), _percent(limits.min_mstep_fall)
        over = f"over {len(losses)} steps"
        yield (
            "ce_not_falling",
            f"M-step cross-entropy {first:.4f} -> {last:.4f} nats, a fall of {fall} < {least} {over}",
        )


def _reward_hacking(rounds: Sequence[_Round], limits: SignatureConfig) -> Found:
    """Whether the reward tells of progress that held-out code does not."""
    if len(rounds) < 2:
        return
    before, now = rounds
    noise = ERRORS * (before.reward_error**2 + now.reward_error**2) ** 0.5
    rise = now.nats / before.nats - 1.0
    if now.reward - before.reward > noise and rise > limits.max_heldout_rise:
        reward = f"reward {before.reward:.4f} -> {now.reward:.4f} from round {before.number} to {now.number}"
        nats = f"held-out nats per code token {before.nats:.4f} -> {now.nats:.4f}"
        lines = f"of lines alone {before.lines_only:.4f} -> {now.lines_only:.4f}"
        limit = f"a rise of {_percent(rise)} > {_percent(limits.max_heldout_rise)}"
        yield "reward_hacking", f"{reward}, but {nats}, {limit} ({lines})"


def _values(window: Sequence[Record], name: str) -> list[float]:
    return [record[name] for record in window]


def _percent(share: float) -> str:
    return f"{100.0 * share:.3g} %"


def _nats(value: float) -> str:
    return f"{value:.3g} nats"


def _judge(
    name: str,
    what: str,
    values: Sequence[float],
    sign: Literal["<", ">"],
    limit: float,
    *,
    show: Callable[[float], str] = _percent,
    errors: float = ERRORS,
) -> Found:
    """Name and evidence where the mean of `values` lies beyond `limit` by more than noise explains."""
    if _is_beyond(values, sign, limit, errors):
        yield name, f"{what} {show(statistics.fmean(values))} {sign} {show(limit)} over {len(values)} steps"


def _is_beyond(values: Sequence[float], sign: Literal["<", ">"], limit: float, errors: float = ERRORS) -> bool:
    mean, error = _mean_and_error(values)
    return (mean - limit if sign == ">" else limit - mean) > errors * error


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, which is infinite for fewer than two values."""
    if len(values) < 2:
        return statistics.fmean(values or [0.0]), math.inf
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
