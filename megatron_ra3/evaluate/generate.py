"""Answers from vLLM servers: prompts in, text out, over the endpoint that takes and gives token ids.

The servers have no tokenizer and so know no stop strings: an answer is asked for in pieces and searched in between,
which costs a lookup in the prefix cache and saves most of the tokens after the stop. A request that fails again and
again on servers that live is an infrastructure error of its task; servers that are gone end the evaluation, which goes
on where it was when it is started again.
"""

from __future__ import annotations

import asyncio
import collections
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from megatron_ra3.corpus.tokenizer import CodeTokenizer, load_tokenizer
from megatron_ra3.evaluate.models import EvaluatedModel, context_tokens, end_ids
from megatron_ra3.evaluate.prompts import Prompt, prompt_tokens, stopped
from megatron_ra3.evaluate.rationales import SpecialIds, as_comments
from megatron_ra3.evaluate.records import Key
from megatron_ra3.evaluate.settings import EvalConfig, EvalEngineConfig, PromptConfig, SamplingConfig
from megatron_ra3.rollout.engine import EngineError
from megatron_ra3.rollout.server import ServerConfig, VllmServer, answers, served_model_name

if TYPE_CHECKING:
    import aiohttp

_FIRST_PAUSE_S = 0.5
_KEEP_ALIVE_S = 2.0
_PROBE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """One answer to be drawn."""

    key: Key
    prompt: Prompt
    max_new_tokens: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model wrote. Rationales of the special form are comments in `text`.

    `finish`: a stop string, the end-of-text token, the limit of tokens, no room in the context, or an error of the
    servers (then `detail` says which, and there is no answer to judge).
    """

    text: str
    finish: Literal["stop", "end", "length", "room", "error"]
    tokens: int
    detail: str = ""


class Generator(Protocol):
    """Draws answers."""

    def generate(self, requests: Sequence[Request], on_answer: Callable[[Request, Answer], None]) -> None:
        """Call `on_answer` once per request, in any order, in this thread. EngineError: nothing more can be drawn."""


class Codec:
    """Prompts to token ids and answers to text, in the form that the model was trained on."""

    def __init__(self, folder: Path, settings: PromptConfig) -> None:
        self.tokenizer: CodeTokenizer = load_tokenizer(folder)
        self.end_ids = end_ids(folder, self.tokenizer)
        self._start = self._starting(folder) if settings.start == "tokenizer" else [self.tokenizer.eos_id]
        self._encoded: dict[str, list[int]] = {}
        self._special: SpecialIds | None = None
        if settings.surface == "special":
            self._special = SpecialIds(*map(self.tokenizer.id_of, ("<act>", "<think>", "</think>")))

    def _starting(self, folder: Path) -> list[int]:
        """What the tokenizer writes before a text by itself, as Llama's does."""
        from tokenizers import Tokenizer

        ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("").ids
        return ids

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; in the special form with `<act>` before each line of code."""
        if prompt.text not in self._encoded:
            act = None if self._special is None else [self._special.act]
            self._encoded[prompt.text] = self._start + prompt_tokens(prompt, self.tokenizer.encode, act)
        return self._encoded[prompt.text]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer."""
        if self._special is None:
            return self.tokenizer.decode(ids)
        return as_comments(ids, self._special, self.tokenizer.decode)


class VllmGenerator:
    """`Generator` on vLLM servers that hold one model. `context` is what all of them have room for, in tokens."""

    def __init__(
        self, urls: Sequence[str], codec: Codec, sampling: SamplingConfig, engine: EvalEngineConfig, context: int
    ) -> None:
        self._urls = [url.rstrip("/") for url in urls]
        self._codec = codec
        self._engine = engine
        self._context = context
        self._sampling: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop_token_ids": sorted(codec.end_ids),
            "ignore_eos": True,
            "detokenize": False,
        }

    def generate(self, requests: Sequence[Request], on_answer: Callable[[Request, Answer], None]) -> None:
        """Draw all answers; see `Generator`."""
        asyncio.run(self._generate(requests, on_answer))

    async def _generate(self, requests: Sequence[Request], on_answer: Callable[[Request, Answer], None]) -> None:
        import aiohttp

        waiting = collections.deque(requests)

        async def serve(session: aiohttp.ClientSession, first_url: int) -> None:
            while waiting:
                request = waiting.popleft()
                on_answer(request, await self._answer(session, first_url, request))

        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
        async with aiohttp.ClientSession(connector=connector, trust_env=False) as session:
            lanes = min(len(requests), self._engine.max_in_flight * len(self._urls))
            try:
                async with asyncio.TaskGroup() as group:
                    for lane in range(lanes):
                        group.create_task(serve(session, lane % len(self._urls)))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None

    async def _answer(self, session: aiohttp.ClientSession, first_url: int, request: Request) -> Answer:
        prompt = self._codec.encode(request.prompt)
        budget = min(request.max_new_tokens, self._context - len(prompt))
        if budget < 1:
            return Answer(text="", finish="room", tokens=0, detail=f"the prompt has {len(prompt)} tokens")
        ids: list[int] = []
        while True:
            count = min(self._engine.tokens_per_request, budget - len(ids))
            sampling = {**self._sampling, "max_tokens": count, "seed": (request.seed + len(ids)) % 2**31}
            try:
                part = await self._ask(session, first_url, prompt + ids, sampling)
            except _RequestError as error:
                return Answer(text="", finish="error", tokens=len(ids), detail=str(error))
            ended = bool(part) and part[-1] in self._codec.end_ids
            ids += part[:-1] if ended else part
            text = self._codec.decode(ids)
            if ended:
                return Answer(text=text, finish="end", tokens=len(ids))
            if stopped(request.prompt, text):
                return Answer(text=text, finish="stop", tokens=len(ids))
            if len(ids) >= budget:
                return Answer(text=text, finish="length", tokens=len(ids))

    async def _ask(
        self, session: aiohttp.ClientSession, first_url: int, ids: list[int], sampling: dict[str, Any]
    ) -> list[int]:
        """The next tokens, from any server that gives them. EngineError: none of them lives."""
        problem = ""
        for attempt in range(self._engine.attempts):
            if attempt:
                await asyncio.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
            url = self._urls[(first_url + attempt) % len(self._urls)]
            try:
                return await self._post(session, url, {"token_ids": ids, "sampling_params": sampling})
            except _RequestError as error:
                problem = str(error)
        if any([await asyncio.to_thread(answers, url) for url in self._urls]):
            raise _RequestError(problem)
        raise EngineError(f"no engine lives any more; {problem}. Start the evaluation again and it goes on from here")

    async def _post(self, session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> list[int]:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=self._engine.request_timeout_s)
        try:
            async with session.post(f"{url}/inference/v1/generate", json=body, timeout=timeout) as response:
                if response.status != 200:
                    raise _RequestError(
                        f"engine {url} answered HTTP {response.status}: {(await response.text())[:500]}"
                    )
                choice = (await response.json())["choices"][0]
        except TimeoutError:
            limit_s = self._engine.request_timeout_s
            raise _RequestError(f"engine {url}: no answer within engine.request_timeout_s={limit_s:g}") from None
        except (aiohttp.ClientError, OSError, ValueError, LookupError) as error:
            raise _RequestError(f"engine {url}: {type(error).__name__} {error}") from error
        tokens: list[int] = choice["token_ids"]
        if choice["finish_reason"] not in ("stop", "length") or not tokens:
            raise _RequestError(f"engine {url}: {len(tokens)} tokens, finish_reason={choice['finish_reason']!r}")
        return tokens


class _RequestError(Exception):
    """One request failed."""


@contextmanager
def open_vllm(model: EvaluatedModel, config: EvalConfig, requests: Sequence[Request], log: Path) -> Iterator[Generator]:
    """A generator for `requests`, on a server started here or on those of `engine.urls`.

    EngineError: a server does not start, or serves another kind of model.
    """
    codec = Codec(model.folder, config.prompt)
    engine = config.engine
    if engine.urls:
        context = min([served_context(url, served_model_name(model.folder)) for url in engine.urls])
        yield VllmGenerator(engine.urls, codec, config.sampling, engine, context)
        return
    needed = max(len(codec.encode(request.prompt)) + request.max_new_tokens for request in requests)
    context = engine.max_model_len or min(context_tokens(model.folder), needed)
    server = VllmServer(_server_config(model, config, context, log))
    with server:
        yield VllmGenerator([server.url], codec, config.sampling, engine, context)


def served_context(url: str, expected_model: str) -> int:
    """The context of a running server; EngineError where it does not answer or serves another kind of model."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/v1/models", timeout=_PROBE_S) as response:  # noqa: S310
            served = json.load(response)["data"][0]
    except (urllib.error.URLError, OSError, ValueError, LookupError) as error:
        raise EngineError(f"engine {url} does not answer: {error}") from error
    if served["id"] != expected_model:
        raise EngineError(f"engine {url} serves model {served['id']!r}, expected {expected_model!r}")
    return int(served["max_model_len"])


def _server_config(model: EvaluatedModel, config: EvalConfig, context: int, log: Path) -> ServerConfig:
    import torch

    engine = config.engine
    return ServerConfig(
        model_folder=model.folder,
        log_file=log,
        dtype=engine.dtype,
        max_model_len=context,
        gpu_memory_utilization=engine.memory_fraction,
        kv_cache_bytes=None if torch.cuda.is_available() else engine.cpu_kv_cache_bytes,
        tensor_parallel_size=engine.tensor_parallel,
        max_num_seqs=engine.max_in_flight,
        seed=config.seed,
        start_timeout_s=engine.start_timeout_s,
        extra_args=engine.server_args,
    )
