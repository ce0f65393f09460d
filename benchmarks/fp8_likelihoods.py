"""Are eight bits enough? Errors of likelihoods on the hidden states of a trained model, and what they do to rewards.

    python benchmarks/fp8_likelihoods.py --model FOLDER --out FILE
    python benchmarks/fp8_likelihoods.py --model FOLDER --corpus FOLDER --out FILE

The model, a Hugging Face folder with its tokenizer, reads Python files (default: the standard library) token by token,
or held-out snippets of a prepared corpus, their comments as rationales. Its hidden states and output layer, rounded to
bf16, are what every precision is given; float64 on the same operands is the truth. Printed:

- errors of log-probs in nats; `bf16 logits` is the usual way, logits rounded to bf16 and log-softmax in fp32;
- log-probs above 0, over all tokens;
- ranks: a line's reward, the mean log-prob of its tokens, after 16 different comments of the same file, or with
  `--corpus` after 16 rationales that the model itself samples at temperature 1, before lines that the corpus comments;
  Spearman's correlation with the float64 ranks, line by line, and the error of advantages (reward minus the mean of
  the 16, over their standard deviation). A line with one reward for all is left out and counted.

One JSON object on the last line.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ra3.corpus.stream import ShardStream
from megatron_ra3.corpus.tokenized import SnippetTokenizer
from megatron_ra3.corpus.tokenizer import CodeTokenizer, load_tokenizer
from megatron_ra3.kernels import HeadCache, Precision, linear_logprob
from megatron_ra3.latents import LatentFormat, Snippet
from megatron_ra3.rollout.engine import GenerateQuery, StopRule
from megatron_ra3.rollout.inprocess import InProcessEngine

if TYPE_CHECKING:
    from megatron_ra3.model.trainer import Trainer

CONTEXT = 256
"""Tokens a piece of a file is read in."""
BATCH = 32
COMMENTS = 16
LINES_BEFORE = 12
MAX_RATIONALE_TOKENS = 12
Likelihood = Callable[[Tensor, Tensor], Tensor]
"""From hidden states [N, H] and targets [N] to log-probs [N]."""
Case = tuple[list[list[int]], int]
"""Sequences of token ids that all end in the same line, and the tokens of that line."""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sources", type=Path, default=Path(sysconfig.get_path("stdlib")), help="folder of *.py files")
    parser.add_argument(
        "--corpus", type=Path, help="a prepared corpus, in the special surface form, in place of sources"
    )
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--lines", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    reader = Reader(given.model)
    pieces, cases = _of_corpus(reader, given) if given.corpus else _of_sources(reader, given)
    result = {
        **errors(reader, pieces),
        "ranks": ranks(reader, cases),
        "model": {"hidden": reader.weight.shape[1], "vocab": len(reader.weight)},
        "machine": {"device": platform.machine(), "torch": torch.__version__},
    }
    print(
        f"{result['tokens']} tokens, mean {result['mean']:.3f} nats, {result['ranks']['lines']} lines, "
        f"rewards of a line differ by {result['ranks']['std_nats_median']:.2g} nats (median standard deviation), "
        f"{result['ranks']['equal']} lines left out whose rewards are all equal\n"
    )
    print("| precision | rms error, nats | 99th pct. | largest | above 0 | Spearman, mean | lowest | advantage, rms |")
    print("|---|---|---|---|---|---|---|---|")
    for name, found in result["errors"].items():
        rank = result["ranks"]["precisions"][name]
        print(
            f"| {name} | {found['rms']:.2g} | {found['p99']:.2g} | {found['max']:.2g} | {found['positive']} "
            f"| {rank['mean']:.5f} | {rank['min']:.4f} | {rank['advantage_rms']:.2g} |"
        )
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def _of_sources(reader: Reader, given: argparse.Namespace) -> tuple[Iterator[Tensor], Iterator[Case]]:
    texts = list(sources(given.sources, given.seed))
    pieces = islice(reader.pieces(texts), math.ceil(given.tokens / CONTEXT))
    return pieces, contexts(reader, texts, given.lines, given.seed)


def _of_corpus(reader: Reader, given: argparse.Namespace) -> tuple[Iterator[Tensor], Iterator[Case]]:
    form = LatentFormat.build("special", reader.tokenizer)
    tokenize = SnippetTokenizer(
        reader.tokenizer, form, "observe", max_tokens=CONTEXT, max_rationale_tokens=MAX_RATIONALE_TOKENS
    )
    with closing(ShardStream(given.corpus, "heldout", given.seed)) as stream:
        snippets = tokenize.snippets(stream.take(min(len(stream), math.ceil(given.tokens / LINES_BEFORE))))
    rendered = (torch.tensor(form.render(snippet, observe=True).token_ids) for snippet in snippets)
    return _up_to(given.tokens, rendered), islice(rationales(reader, form, snippets, given.seed), given.lines)


def _up_to(tokens: int, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
    for piece in pieces:
        if tokens <= 0:
            return
        tokens -= len(piece) - 1
        yield piece


class Reader:
    """A model's hidden states, and the ways to make likelihoods of them."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer: CodeTokenizer = load_tokenizer(folder)
        self.weight = self.model.get_output_embeddings().weight.detach().bfloat16()
        exact = self.weight.double()

        def truth(hidden: Tensor, targets: Tensor) -> Tensor:
            return (hidden.double() @ exact.T).log_softmax(dim=1).gather(1, targets[:, None]).squeeze(1)

        def rounded_logits(hidden: Tensor, targets: Tensor) -> Tensor:
            logits = hidden @ self.weight.T
            return logits.float().log_softmax(dim=1).gather(1, targets[:, None]).squeeze(1)

        self.truth: Likelihood = truth
        self.ways: dict[str, Likelihood] = {
            "bf16": self._ours("bf16"),
            "bf16 logits": rounded_logits,
            "fp8": self._ours("fp8"),
            "fp8_rescored": self._ours("fp8_rescored"),
        }

    def _ours(self, precision: Precision) -> Likelihood:
        cache = HeadCache()

        def way(hidden: Tensor, targets: Tensor) -> Tensor:
            found = linear_logprob(hidden, self.weight, targets, precision=precision, cache=cache)
            assert isinstance(found, Tensor)
            return found

        return way

    def pieces(self, texts: list[str]) -> Iterator[Tensor]:
        """Token ids [CONTEXT + 1] of one file after the other; what is left of a file is dropped."""
        for text in texts:
            ids = torch.tensor(self.tokenizer.encode(text))
            yield from ids.unfold(0, CONTEXT + 1, CONTEXT) if len(ids) > CONTEXT else ()

    @torch.no_grad()
    def hidden(self, token_ids: Tensor) -> Tensor:
        """Final hidden states [b, s, H] in bf16 of [b, s]."""
        states: Tensor = self.model.model(token_ids)[0]
        return states.bfloat16()

    def logits(self, token_ids: Tensor, rows: Tensor) -> Tensor:
        """As a trainer's, [K, V] in fp32: what `InProcessEngine` samples with."""
        return self.hidden(token_ids).flatten(0, 1)[rows].float() @ self.weight.float().T


def sources(folder: Path, seed: int) -> Iterator[str]:
    """The texts of all readable Python files, in an order that depends on the seed."""
    paths = sorted(folder.rglob("*.py"))
    random.Random(seed).shuffle(paths)
    for path in paths:
        try:
            yield path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue


def errors(reader: Reader, pieces: Iterator[Tensor]) -> dict[str, Any]:
    """Errors of every way over all tokens."""
    gaps: dict[str, list[Tensor]] = {name: [] for name in reader.ways}
    positive = dict.fromkeys(reader.ways, 0)
    truths = []
    while batch := list(islice(pieces, BATCH)):
        token_ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-1)
        targets = token_ids[:, 1:]
        hidden, targets = reader.hidden(token_ids[:, :-1].clamp(min=0))[targets >= 0], targets[targets >= 0]
        truths.append(reader.truth(hidden, targets))
        for name, way in reader.ways.items():
            found = way(hidden, targets).double()
            positive[name] += int((found > 0).sum())
            gaps[name].append((found - truths[-1]).float())
    truth = torch.cat(truths)
    table = {}
    for name, parts in gaps.items():
        gap = torch.cat(parts).abs().numpy()
        table[name] = {
            "rms": float(np.sqrt(np.square(gap, dtype=np.float64).mean())),
            "p99": float(np.quantile(gap, 0.99)),
            "max": float(gap.max()),
            "positive": positive[name],
        }
    return {"tokens": len(truth), "mean": float(truth.mean()), "errors": table}


def contexts(reader: Reader, texts: list[str], count: int, seed: int) -> Iterator[Case]:
    """Lines of code, each with COMMENTS contexts that differ in the comment before it alone."""
    draw = random.Random(seed)
    for text in islice((text for text in texts if _comments(text)), count):
        lines = text.splitlines()
        candidates = [i for i in range(LINES_BEFORE, len(lines)) if len(lines[i].split()) > 2 and "#" not in lines[i]]
        if not candidates:
            continue
        place = draw.choice(candidates)
        before, line = "\n".join(lines[place - LINES_BEFORE : place]), lines[place] + "\n"
        indent = line[: len(line) - len(line.lstrip())]
        ids = reader.tokenizer.encode(line)
        prefixes = [f"{before}\n{indent}{comment}\n" for comment in draw.sample(_comments(text), COMMENTS)]
        yield [[*reader.tokenizer.encode(prefix)[-CONTEXT:], *ids] for prefix in prefixes], len(ids)


def rationales(reader: Reader, form: LatentFormat, snippets: list[Snippet], seed: int) -> Iterator[Case]:
    """Lines that the corpus comments, one of each snippet, each after COMMENTS rationales of the model's own.

    Sampled as an E-step samples them, in process; what comes before is as the corpus has it.
    """
    engine = InProcessEngine(cast("Trainer", reader), form, max_batch_tokens=BATCH * CONTEXT)
    stop = StopRule(form.stop_ids, MAX_RATIONALE_TOKENS)
    draw = random.Random(seed)
    for snippet in snippets:
        commented = [line for line, native in enumerate(snippet.native) if native is not None]
        if not commented:
            continue
        place = draw.choice(commented)
        before = form.render(snippet, observe=True).before(place)
        form.append_think(before)
        queries = [GenerateQuery(tuple(before.token_ids), draw.getrandbits(60)) for _ in range(COMMENTS)]
        sequences, line = [], snippet.lines[place]
        for drawn in engine.generate(queries, stop):
            closed = drawn.token_ids if drawn.token_ids[-1] in form.close_ids else drawn.token_ids + form.close
            sequences.append([*before.token_ids, *closed, *line])
        yield sequences, len(line)


def _comments(text: str) -> list[str]:
    """The different full-line comments of a file; none where they are too few."""
    found = sorted({line.strip() for line in text.splitlines() if line.strip().startswith("# ")})
    return found if len(found) >= COMMENTS else []


def ranks(reader: Reader, cases: Iterator[Case]) -> dict[str, Any]:
    """How the rewards of a line's COMMENTS contexts rank in every precision, against float64."""
    correlations: dict[str, list[float]] = {name: [] for name in reader.ways}
    advantage_errors: dict[str, list[float]] = {name: [] for name in reader.ways}
    equal, spreads = 0, []
    for sequences, length in cases:
        ids = {tuple(sequence): None for sequence in sequences}  # the same context has the same reward
        rows = torch.cat([reader.hidden(torch.tensor([whole]))[0, -length - 1 : -1] for whole in ids])
        targets = torch.tensor(sequences[0][-length:] * len(ids))
        of_each = [list(ids).index(tuple(sequence)) for sequence in sequences]

        def rewards(way: Likelihood, rows: Tensor = rows, targets: Tensor = targets, n: int = length) -> Tensor:
            return way(rows, targets).double().view(-1, n).mean(dim=1)

        truth = rewards(reader.truth)[of_each]
        if truth.min() == truth.max():
            equal += 1
            continue
        spreads.append(float(truth.std()))
        for name, way in reader.ways.items():
            found = rewards(way)[of_each]
            correlations[name].append(float(spearmanr(found, truth).statistic))
            gap = _advantages(found) - _advantages(truth)
            advantage_errors[name].append(float(gap.square().mean()))
    precisions = {
        name: {
            "mean": float(np.mean(values)),
            "min": min(values),
            "advantage_rms": float(np.sqrt(np.mean(advantage_errors[name]))),
        }
        for name, values in correlations.items()
    }
    return {
        "lines": len(spreads),
        "equal": equal,
        "std_nats_median": float(np.median(spreads)),
        "precisions": precisions,
    }


def _advantages(rewards: Tensor) -> Tensor:
    return (rewards - rewards.mean()) / rewards.std()


if __name__ == "__main__":
    main()
