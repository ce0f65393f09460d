"""The sampler is exact: an explicit law over a tiny vocabulary, small enough to enumerate every complete latent."""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
from scipy.stats import chisquare

from megatron_ra3.latents import Kind, Snippet, Surface, Trajectory
from megatron_ra3.rollout import sampler as sampler_module
from megatron_ra3.rollout.engine import (
    Answer,
    EngineError,
    GateQuery,
    GateScores,
    GenerateQuery,
    Generation,
    Query,
    Reply,
    StopRule,
)
from megatron_ra3.rollout.sampler import SamplerConfig
from tests.tabular_engine import (
    ACT,
    BLANK_LINE,
    CAP,
    END,
    EOS,
    FORMATS,
    HASH,
    LAWS,
    LINES,
    NEWLINE,
    SNIPPET,
    THINK,
    TWELVE,
    WORD,
    DisorderlyEngine,
    Law,
    Path,
    TabularEngine,
    ThinkAt,
    X,
    make_sampler,
    path_of,
)

WINDOWS: tuple[Any, ...] = (1, 2, 4, len(LINES), "auto")
# Surface, exploration, window: each combination is tried either way, the window changing fastest.
REPLAYED_CASES = [(*case, window) for case in (("newline", 0.3), ("special", 0.0)) for window in WINDOWS]
COUNTED_CASES = [(*case, window) for case in (("newline", 0.0), ("special", 0.3)) for window in WINDOWS]


@cache
def enumerate_law(surface: Surface, exploration: float) -> dict[Path, float]:
    """Probability of every complete latent, written without any of the package's code."""
    before_gate, act, think = ((NEWLINE,), (), (HASH,)) if surface == "newline" else ((), (ACT,), (THINK,))
    close = NEWLINE if surface == "newline" else END
    stops = {NEWLINE, BLANK_LINE, END, EOS}
    law = LAWS[surface]

    def rationales(prefix: tuple[int, ...], drawn: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], float]]:
        if len(drawn) == CAP or (drawn and drawn[-1] in stops):
            yield drawn, 1.0
            return
        for token, probability in law.rationale(prefix + drawn).items():
            for full, rest in rationales(prefix, (*drawn, token)):
                yield full, probability * rest

    def walk(prefix: tuple[int, ...], line: int) -> Iterator[tuple[Path, float]]:
        if line == len(LINES):
            yield (), 1.0
            return
        q = (1 - exploration) * law.think(prefix + before_gate) + exploration / 2
        for path, rest in walk(prefix + before_gate + act + LINES[line], line + 1):
            yield (None, *path), (1 - q) * rest
        opened = prefix + before_gate + think
        for rationale, probability in rationales(opened):
            ending = () if rationale[-1] == close else (close,)
            for path, rest in walk(opened + rationale + ending + LINES[line], line + 1):
                yield (rationale, *path), q * probability * rest

    return dict(walk(SNIPPET.prompt, 0))


def pattern(path: Path) -> tuple[bool, ...]:
    return tuple(rationale is not None for rationale in path)


def first_think(path: Path) -> int:
    return next((line for line, rationale in enumerate(path) if rationale is not None), len(path))


def chi_square_p(observed: Counter[Any], exact: dict[Path, float], statistic: Any) -> float:
    """p-value of the counts of a statistic of the path; cells expecting less than five counts are pooled."""
    total = observed.total()
    expected: Counter[Any] = Counter()
    for path, probability in exact.items():
        expected[statistic(path)] += probability * total
    assert set(observed) <= set(expected)
    small = [cell for cell in expected if expected[cell] < 5]
    cells = [(observed[cell], expected[cell]) for cell in expected if expected[cell] >= 5]
    if small:
        cells.append((sum(observed[cell] for cell in small), sum(expected[cell] for cell in small)))
    return float(chisquare(*zip(*cells, strict=True)).pvalue)


def assert_logprobs_follow_the_law(trajectory: Trajectory, surface: Surface, exploration: float) -> None:
    assert sum(trajectory.sampled) >= len(LINES)
    for i, sampled in enumerate(trajectory.sampled):
        if sampled:
            exact = logprob_of(LAWS[surface], trajectory, i, exploration)
            assert abs(trajectory.engine_logprobs[i] - exact) < 1e-12


def logprob_of(law: Law, trajectory: Trajectory, i: int, exploration: float = 0.0) -> float:
    """Of the decision that the trajectory's token `i` is."""
    tokens, thought = tuple(trajectory.token_ids), trajectory.thought[trajectory.line_index[i]]
    if trajectory.kinds[i] != Kind.GATE:
        return math.log(law.rationale(tokens[:i])[tokens[i]])
    row_end = i + 1 if law.surface == "newline" and not thought else i
    q = (1 - exploration) * law.think(tokens[:row_end]) + exploration / 2
    return math.log(q if thought else 1 - q)


@pytest.mark.parametrize(("surface", "exploration", "window"), REPLAYED_CASES)
def test_every_latent_has_its_exact_probability(
    surface: Surface, exploration: float, window: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lead the sampler along each complete latent in turn; what it records must be the enumerated probability."""
    exact = enumerate_law(surface, exploration)
    paths = list(exact)

    def lead(purpose: str, rollout: Any, line: int) -> int:
        if purpose == "rationale":
            return rollout.number * len(LINES) + line
        return 2**63 - 1 if paths[rollout.number][line] is None else 0

    class LedEngine(TabularEngine):
        def _generate(self, query: GenerateQuery, stop: StopRule) -> Generation:
            rationale = paths[query.seed // len(LINES)][query.seed % len(LINES)]
            assert rationale is not None
            logprobs = tuple(
                math.log(self.law.rationale(query.token_ids + rationale[:i])[token])
                for i, token in enumerate(rationale)
            )
            return Generation(rationale, logprobs, 0)

    monkeypatch.setattr(sampler_module, "_keyed_draw", lead)
    sampler = make_sampler(LedEngine(LAWS[surface]), surface, len(paths), window=window, gate_exploration=exploration)
    (trajectories,) = sampler.sample([SNIPPET], seed=0)
    recorded = {
        path_of(trajectory): math.exp(math.fsum(itertools.compress(trajectory.engine_logprobs, trajectory.sampled)))
        for trajectory in trajectories
    }
    assert len(paths) == 6**5
    assert recorded.keys() == exact.keys()
    assert math.fsum(recorded.values()) == pytest.approx(1.0, abs=1e-12)
    for path, probability in exact.items():
        assert abs(recorded[path] / probability - 1) < 1e-11


@pytest.mark.parametrize(("surface", "exploration", "window"), COUNTED_CASES)
def test_sampled_frequencies_follow_the_law(surface: Surface, exploration: float, window: Any) -> None:
    seed = 100 + COUNTED_CASES.index((surface, exploration, window))
    engine = TabularEngine(LAWS[surface])
    sampler = make_sampler(engine, surface, 20_000, window=window, gate_exploration=exploration)
    (trajectories,) = sampler.sample([SNIPPET], seed=seed)
    for trajectory in trajectories[:500]:
        assert_logprobs_follow_the_law(trajectory, surface, exploration)
    paths = [path_of(trajectory) for trajectory in trajectories]
    exact = enumerate_law(surface, exploration)
    for statistic in (first_think, pattern, lambda path: path[:2]):
        assert chi_square_p(Counter(map(statistic, paths)), exact, statistic) > 0.001


@pytest.mark.parametrize("surface", ["newline", "special"])
def test_window_batch_and_order_change_nothing_that_is_sampled(surface: Surface) -> None:
    prompt = SNIPPET.prompt + ((NEWLINE,) if surface == "newline" else (ACT,)) + LINES[0]
    other = Snippet("t", prompt, LINES[1:], (None,) * 4)  # same tokens as SNIPPET's first window, from a later line on

    def draw(snippets: list[Snippet], window: Any, engine: Any = TabularEngine) -> dict[str, list[dict[str, object]]]:
        sampler = make_sampler(engine(LAWS[surface]), surface, 50, window=window, gate_exploration=0.1)
        groups = sampler.sample(snippets, seed=5)
        records = {group[0].snippet_id: [trajectory.to_json() for trajectory in group] for group in groups}
        for record in itertools.chain.from_iterable(records.values()):
            del record["weight_versions"]  # counts the calls, which do differ
        return records

    expected = draw([SNIPPET, other], 1)
    for window in WINDOWS[1:]:
        assert draw([SNIPPET, other], window) == expected
    assert draw([other, SNIPPET], "auto") == expected
    assert draw([other], 2) == {"t": expected["t"]}
    for window in (1, "auto"):
        assert draw([SNIPPET, other], window, DisorderlyEngine) == expected
    assert draw([SNIPPET, other], "auto", partial(TabularEngine, scores_while_generating=False)) == expected


def test_draws_differ_by_seed_rollout_and_repetition() -> None:
    sampler = make_sampler(TabularEngine(LAWS["newline"]), "newline", 40)
    first, again = sampler.sample([SNIPPET, SNIPPET], seed=1)
    (other_seed,) = sampler.sample([SNIPPET], seed=2)
    groups = [[path_of(trajectory) for trajectory in group] for group in (first, again, other_seed)]
    assert all(len(set(group)) > 20 for group in groups)
    assert all(a != b for a, b in itertools.combinations(groups, 2))


def test_think_is_refused_where_it_would_not_fit() -> None:
    r"""The twelve lines take 25 tokens; `\n#`, two tokens and a close take four more than `\n`."""
    for limit, most_thinks in ((28, 0), (29, 1), (33, 2), (100, 12)):
        sampler = make_sampler(TabularEngine(ThinkAt(*range(12))), "newline", 30, max_sequence_tokens=limit)
        (trajectories,) = sampler.sample([TWELVE], seed=0)
        thinks = [sum(trajectory.thought) for trajectory in trajectories]
        assert most_thinks in thinks
        for trajectory in trajectories:
            assert trajectory.num_lines == 12
            assert len(trajectory.token_ids) <= limit
            gate_sampled = {
                line: sampled
                for kind, line, sampled in zip(trajectory.kinds, trajectory.line_index, trajectory.sampled, strict=True)
                if kind == Kind.GATE  # the last token of a gate decides
            }
            assert gate_sampled == dict(enumerate(trajectory.thought))
        assert (sampler.stats.thinks, sampler.stats.forced_acts) == (sum(thinks), 30 * 12 - sum(thinks))


def test_special_surface_uses_the_limit_up_to_the_last_token() -> None:
    """The snippet takes 22 tokens; two tokens that do not close are closed by a third."""
    snippet = Snippet("s", (EOS,), ((X, X),) * 7, (None,) * 7)

    class Unclosed:
        def gate(self, prefix: tuple[int, ...]) -> tuple[float, ...]:
            return (-1000.0, 0.0)

        def rationale(self, prefix: tuple[int, ...]) -> dict[int, float]:
            return {WORD: 1.0}

    for limit, thinks in ((24, 0), (25, 1), (27, 1), (28, 2), (43, 7)):
        sampler = make_sampler(TabularEngine(Unclosed()), "special", 1, max_sequence_tokens=limit)
        ((trajectory,),) = sampler.sample([snippet], seed=0)
        assert trajectory.thought == [True] * thinks + [False] * (7 - thinks)
        assert len(trajectory.token_ids) == 22 + 3 * thinks


@pytest.mark.parametrize("surface", ["newline", "special"])
def test_always_thinking_draws_only_rationales_from_their_law(surface: Surface) -> None:
    law, engine, fmt = LAWS[surface], TabularEngine(LAWS[surface]), FORMATS[surface]
    sampler = make_sampler(engine, surface, 5_000, gate="always", gate_exploration=0.3)
    (trajectories,) = sampler.sample([SNIPPET], seed=9)
    assert engine.gate_calls == []
    assert sampler.think_rate == sampler_module.FIRST_THINK_RATE
    stats = sampler.stats
    assert (stats.generate_requests, stats.thinks, stats.lines, stats.forced_acts) == (25_000, 25_000, 25_000, 0)
    for trajectory in trajectories:
        assert trajectory.thought == [True] * len(LINES)
        assert {kind for kind, sampled in zip(trajectory.kinds, trajectory.sampled, strict=True) if sampled} == {
            Kind.RATIONALE
        }
        for i in itertools.compress(range(len(trajectory.token_ids)), trajectory.sampled):
            exact = math.log(law.rationale(tuple(trajectory.token_ids[:i]))[trajectory.token_ids[i]])
            assert abs(trajectory.engine_logprobs[i] - exact) < 1e-12
    opened = SNIPPET.prompt + fmt.gate_prefix + fmt.think_suffix
    observed = Counter(path_of(trajectory)[0] for trajectory in trajectories)
    exact: dict[Path, float] = {}
    for first, probability in law.rationale(opened).items():
        if first in fmt.stop_ids:
            exact[(first,),] = probability
            continue
        for second, rest in law.rationale((*opened, first)).items():
            exact[(first, second),] = probability * rest
    assert chi_square_p(Counter({(path,): count for path, count in observed.items()}), exact, tuple) > 0.001


def test_always_thinking_stops_where_no_rationale_fits() -> None:
    for limit, thinks in ((28, 0), (29, 1), (100, 12)):
        engine = TabularEngine(ThinkAt())
        sampler = make_sampler(engine, "newline", 2, gate="always", max_sequence_tokens=limit)
        (trajectories,) = sampler.sample([TWELVE], seed=0)
        for trajectory in trajectories:
            assert trajectory.thought[:thinks] == [True] * thinks
            assert len(trajectory.token_ids) <= limit
            assert not any(
                sampled for kind, sampled in zip(trajectory.kinds, trajectory.sampled, strict=True) if kind == Kind.GATE
            )
        assert sampler.stats.thinks == sum(sum(trajectory.thought) for trajectory in trajectories)
        assert sampler.stats.forced_acts == 24 - sampler.stats.thinks


@pytest.mark.parametrize("surface", ["newline", "special"])
def test_never_thinking_asks_the_engine_nothing(surface: Surface) -> None:
    sampler = make_sampler(None, surface, 3, gate="never", gate_exploration=0.5)
    (trajectories,) = sampler.sample([SNIPPET], seed=0)
    rendered = FORMATS[surface].render(SNIPPET, observe=False)
    assert [trajectory.to_json() for trajectory in trajectories] == [rendered.to_json()] * 3
    stats = sampler.stats
    assert (stats.gate_queries, stats.generate_requests, stats.lines, stats.forced_acts) == (0, 0, 15, 15)


def test_snippet_over_the_limit_is_named() -> None:
    sampler = make_sampler(TabularEngine(ThinkAt()), "newline", 1, max_sequence_tokens=24)
    with pytest.raises(ValueError, match="snippet twelve: 25 tokens without any rationale, but max_sequence_tokens=24"):
        sampler.sample([TWELVE], seed=0)


def test_weight_versions_are_those_of_the_call() -> None:
    engine = TabularEngine(ThinkAt(2))
    ((trajectory,),) = make_sampler(engine, "newline", 1, window=2).sample([TWELVE], seed=0)
    by_kind = {
        (kind, line): version
        for kind, line, version, sampled in zip(
            trajectory.kinds, trajectory.line_index, trajectory.weight_versions, trajectory.sampled, strict=True
        )
        if sampled
    }
    expected = {(Kind.GATE, line): version for line, version in enumerate([1, 1, 2, 4, 4, 5, 5, 6, 6, 7, 7, 8])}
    assert by_kind == expected | {(Kind.RATIONALE, 2): 3}


class OtherLaw(Law):
    def _numbers(self, prefix: tuple[int, ...]) -> list[float]:
        return super()._numbers((*prefix, EOS))


@dataclass
class ChangingEngine(TabularEngine):
    """Every round of answers is of other weights; if `rescores`, gates that come with a rationale are a round later."""

    rescores: bool = False

    def converse(self, queries: Sequence[Query], reply: Reply, stop: StopRule) -> None:
        for version in itertools.cycle((0, 1)):
            queries = [new for query in queries for new in reply(query, self._answer(query, version, stop))]
            if not queries:
                return

    def _answer(self, query: Query, version: int, stop: StopRule) -> Answer:
        one, other = (TabularEngine(self.law[number], number) for number in (version, 1 - version))
        if isinstance(query, GateQuery):
            return GateScores(one._gates(query), version)
        drawn = one._generate(query, stop)
        if not self.rescores:
            return replace(drawn, gate_logprobs=one._gates(query))
        return replace(drawn, gate_logprobs=other._gates(query), gate_version=other.version)


def sample_changing(laws: tuple[Law, Law], count: int, *, rescores: bool) -> tuple[list[Path], list[float], int]:
    """Paths, the product of q/b over each one's decisions for q the first law, and how many are of both versions."""
    sampler = make_sampler(ChangingEngine(laws, rescores=rescores), "newline", 1)
    paths, weights, mixed = [], [], 0
    for seed in range(count):
        ((trajectory,),) = sampler.sample([SNIPPET], seed=seed)
        decisions = [i for i, sampled in enumerate(trajectory.sampled) if sampled]
        versions = [trajectory.weight_versions[i] for i in decisions]
        recorded = [trajectory.engine_logprobs[i] for i in decisions]
        exact = [logprob_of(laws[version], trajectory, i) for i, version in zip(decisions, versions, strict=True)]
        assert recorded == pytest.approx(exact, abs=1e-12)
        weights.append(math.exp(sum(logprob_of(laws[0], trajectory, i) for i in decisions) - sum(recorded)))
        paths.append(path_of(trajectory))
        mixed += len(set(versions)) > 1
    return paths, weights, mixed


def after_first_think(path: Path) -> tuple[Any, ...]:
    """Where the first rationale stands, what it says, and whether the next line has one too."""
    line = first_think(path)
    return (line, *path[line : line + 1], *pattern(path[line + 1 : line + 2]))


def test_weights_that_change_on_the_way_are_undone_by_the_recorded_log_probs() -> None:
    """Each decision is of the version it carries; weighted by q/b for one law q, paths have the frequencies of q."""
    laws = (LAWS["newline"], OtherLaw("newline"))
    sample_changing(laws, 100, rescores=True)
    count = 5000
    paths, weights, mixed = sample_changing(laws, count, rescores=False)
    assert mixed > count / 2
    expected: Counter[Any] = Counter()
    for path, probability in enumerate_law("newline", 0.0).items():
        expected[after_first_think(path)] += probability
    z, unweighted = [], []
    for cell in (cell for cell, probability in expected.items() if probability > 0.01):
        for found, values in ((z, weights), (unweighted, [1.0] * count)):
            hits = [w * (after_first_think(path) == cell) for w, path in zip(values, paths, strict=True)]
            error = statistics.stdev(hits) / count**0.5
            found.append(abs(statistics.fmean(hits) - expected[cell]) / error)
    assert max(z) < 4 < 8 < max(unweighted)


def test_gate_law_at_its_ends() -> None:
    """Exploration keeps a hopeless gate alive, with the log-prob of the mixture."""
    for exploration in (1e-18, 0.5, 1.0):
        sampler = make_sampler(TabularEngine(ThinkAt()), "newline", 400, gate_exploration=exploration)
        (trajectories,) = sampler.sample([TWELVE], seed=0)
        logprobs = {
            (trajectory.thought[line], logprob)
            for trajectory in trajectories
            for line, kind, logprob in zip(
                trajectory.line_index, trajectory.kinds, trajectory.engine_logprobs, strict=True
            )
            if kind == Kind.GATE and logprob != 0.0
        }
        act = {(False, math.log(1 - exploration / 2))} if exploration > 1e-17 else set()
        think = {(True, math.log(exploration / 2))} if exploration > 1e-17 else set()
        assert logprobs == act | think


def test_nan_of_a_broken_model_is_an_engine_error() -> None:
    class Broken(ThinkAt):
        def gate(self, prefix: tuple[int, ...]) -> tuple[float, ...]:
            return (math.nan,)

    with pytest.raises(EngineError, match="gate log-prob is NaN: snippet twelve, line 0"):
        make_sampler(TabularEngine(Broken()), "newline", 1).sample([TWELVE], seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollouts_per_snippet": 0}, "rollouts_per_snippet=0: must be at least 1"),
        ({"max_rationale_tokens": 0}, "max_rationale_tokens=0: must be at least 1"),
        ({"max_sequence_tokens": 8}, "max_sequence_tokens=8 has no room .* max_rationale_tokens=8: raise"),
        ({"window": 0}, 'window=0: must be "auto" or a number of lines, at least 1'),
        ({"window": "atuo"}, "window='atuo': must be"),
        ({"gate_exploration": -0.1}, r"gate_exploration=-0.1: must lie in \[0, 1\]"),
        ({"gate_exploration": 1.5}, "gate_exploration=1.5: must lie"),
        ({"gate": "maybe"}, 'gate=\'maybe\': must be "sampled", "always" or "never"'),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    good = {"rollouts_per_snippet": 4, "max_rationale_tokens": 8, "max_sequence_tokens": 64}
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**(good | settings))
