"""Answers to prompts, piece by piece: where they end, what they say, and that pieces change nothing."""

from collections.abc import Sequence

import pytest

from megatron_ra3.evaluate.problems import Problem
from megatron_ra3.evaluate.prompts import Prompt
from megatron_ra3.evaluate.tasks import FunctionTask
from megatron_ra3.latents import LatentFormat
from megatron_ra3.rollout.answers import AnswerSampler, Posed, prompt_ids
from megatron_ra3.rollout.engine import (
    GateQuery,
    GateScores,
    GenerateQuery,
    Generation,
    Query,
    Reply,
    StopRule,
    converse_in_batches,
)

EOS, ACT, THINK, CLOSE = range(128, 132)


class Characters:
    """A tokenizer of single characters, with the special tokens of the special form."""

    vocab_size = 132
    eos_id = EOS

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) if i < EOS else {EOS: "<eos>", ACT: "<act>"}.get(i, "<think>") for i in ids)

    def id_of(self, token: str) -> int:
        return {"<act>": ACT, "<think>": THINK, "</think>": CLOSE}[token]

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < EOS else b"<special>"


class Script:
    """An engine that continues every prompt with what is left of one script, piece by piece as it is asked to."""

    scores_while_generating = False

    def __init__(self, prompt: Sequence[int], script: Sequence[int]) -> None:
        self.whole = [*prompt, *script]
        self.asked = 0
        self.sampled = 0
        self.seeds: list[int] = []

    def gate_logprobs(self, queries: Sequence[GateQuery]) -> list[GateScores]:
        raise NotImplementedError

    def generate(self, queries: Sequence[GenerateQuery], stop: StopRule) -> list[Generation]:
        return [self._one(query, stop) for query in queries]

    def _one(self, query: GenerateQuery, stop: StopRule) -> Generation:
        assert list(query.token_ids) == self.whole[: len(query.token_ids)]
        self.asked += 1
        self.seeds.append(query.seed)
        drawn: list[int] = []
        for token in self.whole[len(query.token_ids) :][: stop.max_tokens]:
            drawn.append(token)
            if token in stop.stop_ids:
                break
        self.sampled += len(drawn)
        return Generation(tuple(drawn), tuple(-float(token) for token in drawn), 7)

    def converse(self, queries: Sequence[Query], reply: Reply, stop: StopRule) -> None:
        converse_in_batches(self, queries, reply, stop)

    def health(self) -> None: ...

    def close(self) -> None: ...


def _problem(*stop: str, text: str = "a=1\nb=2\n") -> Problem:
    task = FunctionTask(task_id="t", prompt=text, function="f", tests=())
    return Problem(task, Prompt(text=text, stop=stop, max_new_tokens=9, is_code=True))


def _format(surface: str = "newline") -> LatentFormat:
    return LatentFormat.build(surface, Characters())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("script", "kept", "ended", "sampled"),
    [
        ("return 1\ndef g():", "return 1\ndef", True, 12),  # the stop string ends inside a piece
        ("return 1\n\ndefine", "return 1\n\ndef", True, 16),
        ("x" * 40, "x" * 24, False, 24),
        ([*map(ord, "ok"), EOS, *map(ord, "more")], "ok<eos>", True, 3),
    ],
)
def test_an_answer_ends_with_the_first_token_that_ends_it(script, kept, ended, sampled):
    tokenizer, problem = Characters(), _problem("\ndef")
    prompt = prompt_ids(problem, _format(), tokenizer)
    engine = Script(prompt, script if isinstance(script, list) else tokenizer.encode(script))
    sampler = AnswerSampler(engine, tokenizer, _format(), max_tokens=24, check_tokens=4)
    ((answer,),) = sampler.sample([Posed(problem, prompt, "1")], 1)
    assert tokenizer.decode(answer.answer_ids) == kept
    assert (answer.ended, engine.sampled) == (ended, sampled)
    assert answer.engine_logprobs == [-float(token) for token in answer.answer_ids]
    assert answer.weight_versions == [7] * len(answer.answer_ids)
    assert answer.text == kept.removesuffix("<eos>")
    assert len(set(engine.seeds)) == engine.asked == -(-sampled // 4)


def test_a_token_that_ends_any_answer_ends_the_sampling_too():
    tokenizer, problem = Characters(), _problem("\n")
    prompt = prompt_ids(problem, _format("special"), tokenizer)
    script = [THINK, *tokenizer.encode("ab"), CLOSE, *tokenizer.encode("x=1\ny")]
    engine = Script(prompt, script)
    sampler = AnswerSampler(engine, tokenizer, _format("special"), max_tokens=16, check_tokens=16)
    ((answer,),) = sampler.sample([Posed(problem, prompt, "1")], 1)
    assert answer.answer_ids == script[:-1]
    assert (answer.text, answer.ended, engine.sampled) == ("x=1\n", True, len(script) - 1)


def test_code_prompts_have_an_act_before_every_line_in_the_special_form():
    tokenizer = Characters()
    special = prompt_ids(_problem("\n"), _format("special"), tokenizer)
    assert special == (EOS, ACT, *tokenizer.encode("a=1\n"), ACT, *tokenizer.encode("b=2\n"))
    assert prompt_ids(_problem("\n"), _format(), tokenizer) == (EOS, *tokenizer.encode("a=1\nb=2\n"))
    text = Problem(_problem("\n").task, Prompt(text="Q: b\n", stop=(), max_new_tokens=9))
    assert prompt_ids(text, _format("special"), tokenizer) == (EOS, *tokenizer.encode("Q: b\n"))


def test_rationales_of_the_special_form_are_no_code():
    ids = [ACT, 65, THINK, 66, 67, CLOSE, 68, THINK, 69]
    assert _format("special").code_ids(ids) == [65, 68]
    assert _format().code_ids([10, 35, 66]) == [10, 35, 66]
