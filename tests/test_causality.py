"""No latent sees its own line or anything later, in no batch layout: otherwise a rationale could copy the answer.

Tokens of line t and all that follow, the other sequences of the batch and the padding are changed; gates and rationales
up to t must not move, and gradients to those tokens must be exactly 0. Planted leaks show that the probe would see one.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_ra3.batching import LatentBatch, pack
from megatron_ra3.latents import Kind, LatentFormat, Snippet, Trajectory
from megatron_ra3.model import names, parallel
from megatron_ra3.model.build import build_model
from megatron_ra3.model.trainer import MicroBatch, Trainer, build_optimizer
from megatron_ra3.rollout.engine import Engine, GateQuery, GateScores, Query, Reply, StopRule, converse_in_batches
from megatron_ra3.rollout.inprocess import InProcessEngine
from megatron_ra3.rollout.sampler import Sampler, SamplerConfig
from tests.distributed import run_ranks
from tests.table_tokenizer import TableTokenizer
from tests.tiny_model import initialize, qwen2, random_folder

MARKS = ("<eos>", "\n", "#", "\n\n", "<act>", "<think>", "</think>")
LETTERS = tuple(map(chr, range(ord("A"), ord("A") + 30)))
FORMATS = {name: LatentFormat.build(name, TableTokenizer(MARKS + LETTERS)) for name in ("newline", "special")}
CONFIG = qwen2(vocab_size=len(MARKS + LETTERS), num_attention_heads=2, initializer_range=0.3)  # vLLM wants wide heads
SIZES = (1, 60, 10_000)
"""Each trajectory alone, some together, all together."""
LEAKS = [("newline", 1), ("special", 2)]
"""How many tokens too far a gate's row must lie to see its line: `<act>` itself stands between them or not."""
ROUNDING = 2e-5
SERVED_ROUNDING = 1e-4
"""Nats by which other shapes of the same computation may differ, here and in vLLM."""


def changed(token: int, shift: int) -> int:
    """Another letter; marks of the format stay."""
    return token if token < len(MARKS) else len(MARKS) + (token - len(MARKS) + shift) % len(LETTERS)


def letters(draw: random.Random, least: int, most: int) -> tuple[int, ...]:
    return tuple(draw.randrange(len(MARKS), CONFIG["vocab_size"]) for _ in range(draw.randint(least, most)))


def rollout(fmt: LatentFormat, seed: int) -> Trajectory:
    """Three to four lines; the first three hold both choices, and a rationale that ends well or is cut."""
    draw = random.Random(seed)
    lines = tuple(letters(draw, 2, 5) for _ in range(draw.randint(3, 4)))
    trajectory = fmt.begin(Snippet(f"s{seed}", (0, *letters(draw, 0, 6)), lines, (None,) * len(lines)))
    for number, line in enumerate(lines):
        if number == 1 + seed % 2:
            rationale = letters(draw, 1, 3) + fmt.close * (seed // 2 % 2)
            fmt.append_think(trajectory, logprob=-1.0)
            fmt.append_rationale(trajectory, rationale, line, logprobs=[-1.0] * len(rationale))
        else:
            fmt.append_act(trajectory, line, logprob=-1.0)
    return trajectory


def first_of_line(item: Trajectory, line: int) -> int:
    """Position of the first token of a line, right behind its latent."""
    segments = zip(item.kinds, item.line_index, strict=True)
    return next(at for at, segment in enumerate(segments) if segment == (Kind.LINE, line))


def rewritten(item: Trajectory, line: int, shift: int) -> Trajectory:
    """The same with all text from `line` on changed, marks and lengths kept; from -1 on: the prompt, too."""
    first = 0 if line < 0 else first_of_line(item, line)
    tokens = [changed(token, shift) if at >= first else token for at, token in enumerate(item.token_ids)]
    return dataclasses.replace(item, token_ids=tokens)


def cut_short(item: Trajectory, line: int, new_line: Sequence[int]) -> Trajectory:
    """The same up to the latent of `line`, then another line, of another length, and no more."""
    first = first_of_line(item, line)
    fields = {name: getattr(item, name)[:first] for name in ("token_ids", "kinds", "line_index", "sampled")}
    fields |= {name: getattr(item, name)[:first] for name in ("engine_logprobs", "weight_versions")}
    short = Trajectory(item.snippet_id, **fields)
    short.append(Kind.LINE, line, new_line)
    short.thought, short.well_formed = item.thought[: line + 1], item.well_formed[: line + 1]
    return short


class Scored(NamedTuple):
    """One trajectory's log-probs: gates [T], sampled rationale tokens [R] with their lines [R], lines [T]."""

    gate: Tensor
    rationale: Tensor
    line_of_rationale: Tensor
    line: Tensor

    def latents(self, line: int) -> Tensor:
        """Log-probs of all decisions up to the latent of `line`."""
        return torch.cat([self.gate[: line + 1], self.rationale[self.line_of_rationale <= line]])


class Packed(NamedTuple):
    """A micro-batch of the items at `indices`; the trainer gets `micro_batch`."""

    indices: list[int]
    batch: LatentBatch
    micro_batch: MicroBatch


@dataclasses.dataclass
class Probe:
    """Scores trajectories of one format on one trainer, in micro-batches of at most `max_tokens`.

    `leak` plants a mistake: every row lies so many tokens too far to the right.
    """

    trainer: Trainer
    format: LatentFormat
    max_tokens: int
    leak: int = 0

    def pack(self, items: Sequence[Trajectory], padding: int) -> list[Packed]:
        """Micro-batches with `padding` behind the shorter items."""
        packed = []
        for indices in pack([len(item.token_ids) for item in items], self.max_tokens):
            batch = LatentBatch([items[index] for index in indices], self.format, with_lines=True)
            tokens = batch.micro_batch.token_ids.clone()
            for row, index in enumerate(indices):
                tokens[row, len(items[index].token_ids) :] = padding
            rows = (batch.micro_batch.rows + self.leak).clamp(max=tokens.numel() - 1)
            packed.append(Packed(indices, batch, MicroBatch(tokens, rows, batch.micro_batch.targets)))
        return packed

    def score(self, items: Sequence[Trajectory], *, padding: int = 0) -> list[Scored]:
        """Scores of every item."""
        packed = self.pack(items, padding)
        found: dict[int, Scored] = {}
        for part, logprobs in zip(packed, self.trainer.score([part.micro_batch for part in packed]), strict=True):
            found |= zip(part.indices, split(part, logprobs, items), strict=True)
        return [found[index] for index in range(len(items))]

    def gradient(self, items: Sequence[Trajectory], index: int, line: int) -> tuple[float, float] | None:
        """Largest gradient of the latents of item `index` up to `line`: to what they must not see, to what they may.

        Taken at the embedding's output; None on ranks without the embedding.
        """
        packed = self.pack(items, padding=0)
        embedded: list[Tensor] = []

        def keep(_module: Any, _arguments: Any, output: Tensor) -> None:
            output.retain_grad()
            embedded.append(output)

        def loss(number: int, logprobs: Tensor) -> Tensor:
            part = packed[number]
            if index not in part.indices:
                return 0.0 * logprobs.sum()
            return split(part, logprobs, items)[part.indices.index(index)].latents(line).sum()

        first_stage = self.trainer.layout.is_first_stage
        hook = self.trainer.model.module.embedding.register_forward_hook(keep) if first_stage else None
        self.trainer.step([part.micro_batch for part in packed], loss, lr=0.0)
        if hook is None:
            return None
        hook.remove()
        hidden, seen = [], 0.0
        for part, output in zip(packed, embedded, strict=True):
            assert output.grad is not None
            size = output.grad.abs().amax(dim=2).T.clone()
            if index in part.indices:
                may_see = size[part.indices.index(index), : first_of_line(items[index], line)]
                seen = may_see.max().item()
                may_see.zero_()
            hidden.append(size.max().item())
        return max(hidden), seen


def split(part: Packed, logprobs: Tensor, items: Sequence[Trajectory]) -> list[Scored]:
    """Scores of a micro-batch per item."""
    scores = part.batch.read(logprobs)
    assert scores.line is not None
    found, first = [], 0
    for index in part.indices:
        end = first + items[index].num_lines
        own = (part.batch.line_of_rationale >= first) & (part.batch.line_of_rationale < end)
        lines = part.batch.line_of_rationale[own] - first
        found.append(Scored(scores.gate[first:end], scores.rationale[own], lines, scores.line[first:end]))
        first = end
    return found


class Findings(NamedTuple):
    """Largest changes (nats) and gradients over all trajectories and lines of a layout."""

    same_shape: float
    """Of latents, by other text in the same places: later lines, other sequences, padding."""
    other_shape: float
    """Of latents, by a shorter trajectory that goes on otherwise, in a batch of others."""
    line: float
    """Of lines by their own text, the smallest."""
    hidden_gradient: float
    """To what latents must not see."""
    seen_gradient: float
    """To what they may see, the smallest."""


def investigate(
    trainer: Trainer, fmt: LatentFormat, max_tokens: int, *, leak: int = 0, which: Sequence[int] = (0, 1, 2)
) -> Findings:
    """Rewrite, cut short and differentiate at every line of the trajectories `which` of a batch of three."""
    probe, items = Probe(trainer, fmt, max_tokens, leak), [rollout(fmt, seed) for seed in range(3)]
    before = probe.score(items)
    same, other, moved, gradients = [], [], [], []
    for index in which:
        item = items[index]
        for line in range(item.num_lines):
            texts = [rewritten(rest, -1, 5 + line) for rest in items]
            texts[index] = rewritten(item, line, 7 + line)
            after = probe.score(texts, padding=11 + line)[index]
            same.append((after.latents(line) - before[index].latents(line)).abs().max().item())
            moved.append((after.line - before[index].line)[line].abs().item())
            texts = [rollout(fmt, 100 + number) for number in range(2)]
            texts.insert(index, cut_short(item, line, letters(random.Random(line), 6, 9)))
            after = probe.score(texts)[index]
            other.append((after.latents(line) - before[index].latents(line)).abs().max().item())
            gradients.append(probe.gradient(items, index, line) or (0.0, 1.0))
    hidden, seen = zip(*gradients, strict=True)
    return Findings(max(same), max(other), min(moved), max(hidden), min(seen))


def load(folder: Path, tp: int, pp: int) -> Trainer:
    layout = initialize(tp, pp)
    model = build_model(CONFIG, layout, dtype=torch.float32)
    names.import_hf(model, folder)
    return Trainer(model, build_optimizer(model, lr=0.0), layout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_folder(tmp_path_factory.mktemp("model") / "hf", CONFIG)


@pytest.fixture(scope="module")
def trainer(folder: Path) -> Iterator[Trainer]:
    yield load(folder, 1, 1)
    parallel.destroy()


def assert_causal(found: Findings) -> None:
    assert found.same_shape == 0.0
    assert found.other_shape < ROUNDING
    assert found.line > 1e-2
    assert found.hidden_gradient == 0.0
    assert found.seen_gradient > 1e-3


def assert_leaks(found: Findings) -> None:
    assert found.same_shape > 1e-2
    assert found.other_shape > 1e-2
    assert found.hidden_gradient > 1e-3


@pytest.mark.parametrize("surface", FORMATS)
@pytest.mark.parametrize("max_tokens", SIZES)
def test_latents_do_not_see_their_line_in_any_packing(trainer, surface, max_tokens):
    assert_causal(investigate(trainer, FORMATS[surface], max_tokens))


@pytest.mark.parametrize(("surface", "leak"), LEAKS)
def test_rows_too_far_are_seen(trainer, surface, leak):
    assert_leaks(investigate(trainer, FORMATS[surface], 60, leak=leak))


@pytest.mark.parametrize("surface", FORMATS)
def test_attention_without_its_mask_is_seen(trainer, surface, monkeypatch):
    from megatron.core.transformer.enums import AttnMaskType

    for layer in trainer.model.module.decoder.layers:
        softmax = layer.self_attention.core_attention.scale_mask_softmax
        assert softmax.attn_mask_type == AttnMaskType.causal
        monkeypatch.setattr(softmax, "attn_mask_type", AttnMaskType.no_mask)
    assert_leaks(investigate(trainer, FORMATS[surface], 60))


def investigate_on_four_ranks(folder: Path) -> dict[tuple[int, int, str], Findings]:
    found = {}
    for tp, pp in ((2, 2), (2, 1), (1, 2)):
        trainer = load(folder, tp, pp)
        for surface, fmt in FORMATS.items():
            found[tp, pp, surface] = investigate(trainer, fmt, 60, which=[1])
    parallel.destroy()
    return found


def test_latents_do_not_see_their_line_in_any_layout(folder):
    for found in run_ranks(investigate_on_four_ranks, 4, folder):
        assert len(found) == 6
        for findings in found.values():
            assert_causal(findings)


class Hindsight:
    """The in-process engine with a leak planted: gates are scored where their line has begun."""

    def __init__(self, engine: InProcessEngine, leak: int) -> None:
        self.engine, self.leak = engine, leak

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def gate_logprobs(self, queries: Sequence[GateQuery]) -> list[GateScores]:
        late = [
            dataclasses.replace(query, rows=tuple(min(row + self.leak, len(query.token_ids) - 1) for row in query.rows))
            for query in queries
        ]
        return self.engine.gate_logprobs(late)

    def converse(self, queries: Sequence[Query], reply: Reply, stop: StopRule) -> None:
        converse_in_batches(self, queries, reply, stop)


def sampled(engine: Engine, fmt: LatentFormat, lines: Sequence[tuple[int, ...]], window: int) -> list[Trajectory]:
    """Rollouts of a snippet of `lines`, sampled together with another snippet."""
    config = SamplerConfig(
        rollouts_per_snippet=4,
        max_rationale_tokens=4,
        max_sequence_tokens=90,
        window=window or "auto",
        gate_exploration=0.4,
    )
    snippet = Snippet("s", (0, 9, 8), tuple(lines), (None,) * len(lines))
    other = Snippet("other", (0, *lines[-1]), tuple(lines[::-1]), (None,) * len(lines))
    return Sampler(engine, fmt, config).sample([snippet, other], seed=3)[0]


def hindsight(engine: Engine, fmt: LatentFormat, window: int) -> tuple[int, float]:
    """What rewriting a line and all that follow does to the latents up to it.

    Returns in how many rollouts their tokens differ, and the largest change of a log-prob (nats) where they do not.
    """
    draw = random.Random(4)
    lines = [letters(draw, 2, 5) for _ in range(4)]
    before = sampled(engine, fmt, lines, window)
    assert any(any(item.thought) for item in before)
    differing, change = 0, 0.0
    for line in range(len(lines)):
        others = lines[:line] + [tuple(changed(token, 9) for token in text) for text in lines[line:]]
        for old, new in zip(before, sampled(engine, fmt, others, window), strict=True):
            end = first_of_line(old, line)
            if old.token_ids[:end] != new.token_ids[:end]:
                differing += 1
                continue
            pairs = zip(old.engine_logprobs[:end], new.engine_logprobs[:end], strict=True)
            change = max(change, *(abs(a - b) for a, b in pairs))
    return differing, change


@pytest.mark.parametrize("surface", FORMATS)
@pytest.mark.parametrize("window", [1, 3, 0])
def test_sampling_does_not_depend_on_lines_to_come(trainer, surface, window):
    engine = InProcessEngine(trainer, FORMATS[surface], max_batch_tokens=200)
    differing, change = hindsight(engine, FORMATS[surface], window)
    assert differing == 0
    assert change < ROUNDING


@pytest.mark.parametrize(("surface", "leak"), LEAKS)
def test_an_engine_with_hindsight_is_seen(trainer, surface, leak):
    engine = Hindsight(InProcessEngine(trainer, FORMATS[surface], max_batch_tokens=200), leak)
    assert hindsight(engine, FORMATS[surface], 0)[1] > 1e-2


def gate_query(item: Trajectory, fmt: LatentFormat) -> GateQuery:
    """A whole trajectory with the rows that decide its gates."""
    segments = list(zip(item.kinds, item.line_index, strict=True))
    opening = [
        at for at in range(1, len(segments)) if segments[at][0] == Kind.GATE and segments[at - 1] != segments[at]
    ]
    return GateQuery(tuple(item.token_ids), tuple(at + len(fmt.gate_prefix) - 1 for at in opening))


def gate_changes(engine: Engine, fmt: LatentFormat) -> tuple[float, float]:
    """What rewriting a line, all that follow, and all other queries does to gate log-probs (nats).

    Returns the largest change up to the line and the smallest after it.
    """
    items = [rollout(fmt, seed) for seed in range(3)]
    before = torch.tensor(engine.gate_logprobs([gate_query(item, fmt) for item in items])[0].logprobs)
    up_to, after = [], []
    for line in range(items[0].num_lines):
        texts = [rewritten(items[0], line, 7), *(rewritten(item, -1, 3) for item in items[1:])]
        scores = torch.tensor(engine.gate_logprobs([gate_query(item, fmt) for item in texts])[0].logprobs)
        change = (scores - before).abs().amax(dim=1).tolist()
        up_to += change[: line + 1]
        after += change[line + 1 :]
    return max(up_to), min(after)


@pytest.mark.parametrize("surface", FORMATS)
@pytest.mark.parametrize("max_batch_tokens", SIZES)
def test_gate_queries_do_not_see_what_follows_a_row(trainer, surface, max_batch_tokens):
    engine = InProcessEngine(trainer, FORMATS[surface], max_batch_tokens=max_batch_tokens)
    up_to, after = gate_changes(engine, FORMATS[surface])
    assert up_to == 0.0
    assert after > 1e-2


@pytest.mark.vllm
def test_served_latents_do_not_see_their_line(folder, tmp_path):
    from megatron_ra3.rollout.server import ServerConfig, VllmServer
    from megatron_ra3.rollout.vllm_engine import VllmEngine

    settings = {
        "dtype": "float32",
        "max_model_len": 128,
        "block_size": 32,
        "kv_cache_bytes": 1 << 26,
        "max_num_seqs": 64,
    }
    server = VllmServer(ServerConfig(folder, tmp_path / "vllm.log", seed=0, **settings))
    try:
        server.start()
        server.wait()
        for fmt in FORMATS.values():
            engine = VllmEngine([server.url], fmt.gate_ids, timeout_s=120.0)
            up_to, after = gate_changes(engine, fmt)
            assert up_to < SERVED_ROUNDING
            assert after > 1e-2
            differing, change = hindsight(engine, fmt, 0)
            assert differing == 0
            assert change < SERVED_ROUNDING
            engine.close()
    finally:
        server.stop()
