"""Sampling engine over HTTP: token ids to vLLM servers (`/inference/v1/generate`), log-probs back.

Refuses what would silently train on wrong numbers: a server with another model or too short a context, a gate row that
vLLM did not compute, a log-prob that is not finite, an answer cut by an abort. Every error names the engine's URL.
What can be mended by asking another engine is, in `dispatch`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import math
from collections.abc import Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_ra3.observe.spans import TIMELINE
from megatron_ra3.rollout.dispatch import Conversation, EngineGoneError, Limits, UnansweredError
from megatron_ra3.rollout.engine import (
    Answer,
    EngineError,
    EnginesLostError,
    GateQuery,
    GateScores,
    GenerateQuery,
    Generation,
    Query,
    Reply,
    StopRule,
)
from megatron_ra3.rollout.health import Roster
from megatron_ra3.rollout.routing import Router

if TYPE_CHECKING:
    import aiohttp

# Version of weights a server loaded from its folder and no trainer has sent.
NEVER_SYNCED = -1
# vLLM's stand-in for minus infinity and NaN in an answer; anything lower is a row the plugin marks as not computed.
NOT_FINITE = -9999.0
# Below the servers' own idle limit (vLLM: 5 s): a connection the server has just closed would fail a request.
KEEP_ALIVE_S = 2.0
# A machine that is gone refuses nothing, it is silent.
CONNECT_TIMEOUT_S = 15.0
# Of a scoring request: one token is the least vLLM generates, and nobody looks at it.
SCORING = {"temperature": 0.0, "max_tokens": 1, "ignore_eos": True, "detokenize": False}

T = TypeVar("T")
GateLogprobs = tuple[tuple[float, ...], ...]


class VllmEngine:
    """`engine.Engine` on one or more vLLM servers: their URLs, or a roster that other threads change meanwhile.

    Used by one thread at a time, not always the same one: its event loop only runs inside its methods. Weights may be
    sent from another thread during a call, inside `Roster.moving_weights`; engines hold back what they are asked then.

    `gate_ids` are the tokens scored at gate rows; without them only `generate` works. `expected_model` is the
    servers' model name (`server.served_model_name`), `min_model_len` the context in tokens a query may need; both
    are checked here. `temperature` is that of `generate` (0 is greedy); gates are scored at temperature 1.
    `max_in_flight` requests are open per server; one is asked elsewhere when it is not answered within `timeout_s`. A
    server that has said nothing for `silence_s` must answer a health check within `beat_timeout_s`.
    """

    scores_while_generating = True

    def __init__(
        self,
        engines: Sequence[str] | Roster,
        gate_ids: Sequence[int] = (),
        *,
        expected_model: str | None = None,
        min_model_len: int = 1,
        temperature: float = 1.0,
        timeout_s: float = 120.0,
        silence_s: float = 5.0,
        beat_timeout_s: float = 30.0,
        max_in_flight: int = 64,
    ) -> None:
        if not engines:
            raise ValueError("VllmEngine: needs at least one engine URL")
        if temperature < 0.0:
            raise ValueError(f"temperature={temperature}: must be 0 (greedy) or positive")
        self._roster = engines if isinstance(engines, Roster) else Roster.of([url.rstrip("/") for url in engines])
        self._gate_ids = list(gate_ids)
        self._expected_model = expected_model
        self._min_model_len = min_model_len
        self._temperature = temperature
        self._limits = Limits(timeout_s, silence_s, beat_timeout_s)
        self._router = Router(max_in_flight)
        self._known: set[str] = set()
        self._meetings: dict[str, asyncio.Lock] = {}
        self._native_scoring: dict[str, bool] = {}
        self._runner = asyncio.Runner()
        self._session: aiohttp.ClientSession | None = None
        self.rescored_queries = 0
        try:
            self.health()
        except BaseException:
            self.close()
            raise

    def gate_logprobs(self, queries: Sequence[GateQuery]) -> list[GateScores]:
        """Score gate rows of many prefixes, equal queries once; answers in the order of the queries."""
        for query in queries:
            if not query.rows or not all(0 <= row < len(query.token_ids) for row in query.rows):
                raise ValueError(f"gate rows {query.rows} of a prefix of {len(query.token_ids)} tokens")
        answers = self._ask_all(queries, StopRule(frozenset(), max_tokens=1))
        return [answer for answer in answers if isinstance(answer, GateScores)]

    def generate(self, queries: Sequence[GenerateQuery], stop: StopRule) -> list[Generation]:
        """Sample continuations, equal queries once; answers in the order of the queries."""
        return [answer for answer in self._ask_all(queries, stop) if isinstance(answer, Generation)]

    def converse(self, queries: Sequence[Query], reply: Reply, stop: StopRule) -> None:
        """Ask `queries`, and whatever `reply` returns for each answer as soon as it is there, until nothing is left.

        EnginesLostError: no engine is left. EngineError: what another engine would not mend.
        """
        wire = _Wire(self, stop)
        conversation = Conversation(wire, self._roster, self._router, self._limits, max_tokens=stop.max_tokens)
        before = self._router.moves
        try:
            with TIMELINE.span("requests", awaits="engines"):
                self._runner.run(conversation.run(queries, reply))
        finally:
            self._roster.count("groups_moved", self._router.moves - before)

    def health(self) -> None:
        """Return when every engine answers and serves what is expected; EngineError naming the one that does not."""
        present = self._roster.present()
        if not present:
            raise EnginesLostError(f"no engine is left: {self._roster.described()}")
        self._runner.run(_gather([self._check_in_time(url) for url in present]))

    def close(self) -> None:
        """Release connections; the engine must not be used afterwards."""
        if self._session is not None:
            self._runner.run(self._session.close())
        self._runner.close()

    def _ask_all(self, queries: Sequence[Query], stop: StopRule) -> list[Answer]:
        answers: dict[Query, Answer] = {}

        def keep(query: Query, answer: Answer) -> Sequence[Query]:
            answers[query] = answer
            return ()

        self.converse(list(dict.fromkeys(queries)), keep, stop)
        return [answers[query] for query in queries]

    async def answer(self, url: str, query: Query, stop: StopRule) -> Answer:
        """One engine's answer to one query, after a look at the engine where it is new here."""
        async with self._meetings.setdefault(url, asyncio.Lock()):
            if url not in self._known:
                await self._check(url)
        if isinstance(query, GenerateQuery):
            return await self._generate(url, query, stop)
        return await self._score(url, query)

    async def beat(self, url: str, timeout_s: float) -> None:
        """Return when the engine calls itself healthy; EngineGoneError when not."""
        status, answer = await self._request("GET", url, "/health", timeout_s)
        if status != 200:
            raise EngineGoneError(str(_refused(url, status, answer)))

    async def _check_in_time(self, url: str) -> None:
        timeout_s = self._limits.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._check(url)
        except TimeoutError as error:
            raise EngineGoneError(f"engine {url}: no answer within timeout_s={timeout_s:g}") from error

    async def _check(self, url: str) -> None:
        await self.beat(url, self._limits.beat_timeout_s)
        status, answer = await self._request("GET", url, "/v1/models", self._limits.beat_timeout_s)
        if status != 200:
            raise _refused(url, status, answer)
        name, model_len = answer["data"][0]["id"], answer["data"][0]["max_model_len"]
        if self._expected_model not in (None, name):
            raise EngineError(f"engine {url} serves model {name!r}, expected {self._expected_model!r}")
        if model_len < self._min_model_len:
            raise EngineError(f"engine {url}: max_model_len={model_len}, but queries may need {self._min_model_len}")
        if self._gate_ids and url not in self._native_scoring:
            self._native_scoring[url] = await self._scores_natively(url)
        self._known.add(url)

    async def _scores_natively(self, url: str) -> bool:
        """Whether vLLM itself scores chosen tokens (V2 runner); if not, check that our plugin does (V1 runner)."""
        prefix = [self._gate_ids[0]] * 3
        sampling = {"prompt_logprob_token_ids": [self._gate_ids] * 2}
        status, answer = await self._post(url, prefix, sampling | SCORING)
        if status == 200:
            return True
        if "V2 model runner" not in str(answer):
            raise _refused(url, status, answer)
        answer = await self._ask(url, prefix, SCORING | self._plugin_request((2,), reread=True))
        if len(answer["prompt_logprobs"]) != 2:
            raise EngineError(
                f"engine {url} does not run the vLLM plugin of megatron_ra3; install the package where it runs, and "
                "leave VLLM_PLUGINS unset"
            )
        return False

    async def _score(self, url: str, query: GateQuery) -> GateScores:
        # vLLM does not score a prompt's last row by itself: one more token, which no scored row sees, makes it inner.
        tokens = (*query.token_ids, query.token_ids[-1]) if self._native_scoring[url] else query.token_ids
        answer = await self._ask(url, tokens, SCORING | self._gate_request(url, tokens, query.rows, reread=False))
        logprobs = self._read_gates(url, query.rows, answer)
        if logprobs is None:
            self.rescored_queries += 1
            answer = await self._ask(url, tokens, SCORING | self._gate_request(url, tokens, query.rows, reread=True))
            logprobs = self._read_gates(url, query.rows, answer)
        if logprobs is None or not all(_finite(row) for row in logprobs):
            raise EngineError(f"engine {url}: gate log-probs at rows {query.rows} are not finite: {logprobs}")
        return GateScores(logprobs, _weight_version(url, answer["choices"][0]))

    def _gate_request(self, url: str, tokens: Sequence[int], rows: Sequence[int], *, reread: bool) -> dict[str, Any]:
        """Sampling parameters that score gate rows; `reread` computes the whole prefix, cached or not."""
        if not self._native_scoring[url]:
            return self._plugin_request(rows, reread=reread)
        start, wanted, padding = min(rows), set(rows), [-1] * len(self._gate_ids)
        return {
            "prompt_logprob_start": start,
            "prompt_logprob_token_ids": [
                self._gate_ids if row in wanted else padding for row in range(start, len(tokens) - 1)
            ],
            "skip_reading_prefix_cache": reread,
        }

    def _plugin_request(self, rows: Sequence[int], *, reread: bool) -> dict[str, Any]:
        return {
            "prompt_logprobs": len(self._gate_ids) - 1,
            "skip_reading_prefix_cache": reread,
            "extra_args": {"gate_rows": list(rows), "gate_ids": self._gate_ids},
        }

    def _read_gates(self, url: str, rows: Sequence[int], answer: dict[str, Any]) -> GateLogprobs | None:
        """Log-probs of the gate ids per row, or None where the prefix cache hid a row."""
        if self._native_scoring[url]:
            return _read_native_gates(rows, answer["prompt_token_id_logprobs"])
        scored = answer["prompt_logprobs"][1:]
        if len(scored) != len(rows):
            raise EngineError(f"engine {url}: {len(scored)} scored rows for {len(rows)} gate rows")
        logprobs = tuple(tuple(row[str(token)]["logprob"] for token in self._gate_ids) for row in scored)
        return None if any(value < NOT_FINITE for row in logprobs for value in row) else logprobs

    async def _generate(self, url: str, query: GenerateQuery, stop: StopRule) -> Generation:
        sampling = {
            "temperature": self._temperature,
            "max_tokens": stop.max_tokens,
            "stop_token_ids": sorted(stop.stop_ids),
            "ignore_eos": True,
            "seed": query.seed,
            "logprobs": 0,
            "detokenize": False,
        }
        if query.rows:
            sampling |= self._gate_request(url, query.token_ids, query.rows, reread=False)
        answer = await self._ask(url, query.token_ids, sampling)
        choice = answer["choices"][0]
        tokens = tuple(choice["token_ids"])
        logprobs = tuple(entry["logprob"] for entry in choice["logprobs"]["content"])
        stopped = bool(tokens) and tokens[-1] in stop.stop_ids
        if not (stopped or len(tokens) == stop.max_tokens) or len(logprobs) != len(tokens):
            raise EngineError(
                f"engine {url}: {len(tokens)} tokens and {len(logprobs)} log-probs, finish_reason="
                f"{choice['finish_reason']!r}, after a prefix of {len(query.token_ids)}; expected a stop token or "
                f"max_tokens={stop.max_tokens} (vLLM cuts at its max_model_len)"
            )
        if not _finite(logprobs):
            raise EngineError(f"engine {url}: log-probs of sampled tokens are not finite: {logprobs}")
        version = gate_version = _weight_version(url, choice)
        gates: GateLogprobs | None = self._read_gates(url, query.rows, answer) if query.rows else ()
        if gates is None or not all(_finite(row) for row in gates):
            scores = await self._score(url, GateQuery(query.token_ids, query.rows))
            gates, gate_version = scores.logprobs, scores.weight_version
        return Generation(tokens, logprobs, version, gates, gate_version)

    async def _ask(self, url: str, token_ids: Sequence[int], sampling: dict[str, Any]) -> dict[str, Any]:
        status, answer = await self._post(url, token_ids, sampling)
        if status >= 500:
            await self.beat(url, self._limits.beat_timeout_s)  # a dead engine is worth another error than this one
            raise UnansweredError(str(_refused(url, status, answer)))
        if status != 200 or not answer.get("choices"):
            raise _refused(url, status, answer)
        if answer["choices"][0].get("finish_reason") == "abort":
            raise UnansweredError(f"engine {url} aborted a request")
        return answer

    async def _post(self, url: str, token_ids: Sequence[int], sampling: dict[str, Any]) -> tuple[int, Any]:
        body = {"token_ids": list(token_ids), "sampling_params": sampling}
        return await self._request("POST", url, "/inference/v1/generate", None, json=body)

    async def _request(
        self, method: str, url: str, path: str, timeout_s: float | None, **options: Any
    ) -> tuple[int, Any]:
        """Status and answer; without `timeout_s` the caller cancels what takes too long."""
        import aiohttp

        was_sent = False
        try:
            try:
                return await self._send(method, url + path, timeout_s, **options)
            except aiohttp.ServerDisconnectedError:  # of an idle connection as a rule, and asking twice does no harm
                was_sent = True
                return await self._send(method, url + path, timeout_s, **options)
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
            was_sent = was_sent or not isinstance(error, aiohttp.ClientConnectorError)
            message = f"{path} failed: {type(error).__name__} {error}"
            if isinstance(error, TimeoutError):
                message = f"no answer to {path} within {timeout_s or CONNECT_TIMEOUT_S:g} s"
            raise EngineGoneError(f"engine {url}: {message}", was_sent=was_sent) from error

    async def _send(self, method: str, address: str, timeout_s: float | None, **options: Any) -> tuple[int, Any]:
        import aiohttp

        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
            self._session = aiohttp.ClientSession(connector=connector, trust_env=False)
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        async with self._session.request(method, address, timeout=timeout, **options) as response:
            body = await response.text()
            is_json = response.content_type == "application/json"
            return response.status, json.loads(body) if is_json else body


class _Wire:
    """`dispatch.Wire` for queries of one stop rule."""

    def __init__(self, engine: VllmEngine, stop: StopRule) -> None:
        self._engine = engine
        self._stop = stop
        self.beat = engine.beat

    async def ask(self, url: str, query: Query) -> Answer:
        return await self._engine.answer(url, query, self._stop)


async def _gather(requests: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order."""
    with _first_error():
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(request) for request in requests]
    return [task.result() for task in tasks]


@contextlib.contextmanager
def _first_error() -> Iterator[None]:
    """A task group's first error in place of its group; it has cancelled the rest, whose requests engines abort."""
    try:
        yield
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


def _read_native_gates(rows: Sequence[int], encoded: str | None) -> GateLogprobs | None:
    """Log-probs as vLLM itself scores them (V2 runner; not run in our tests: needs a GPU), from the first row on."""
    import numpy as np

    if encoded is None:
        return None
    scores = np.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False)
    return tuple(tuple(scores[row - min(rows)].tolist()) for row in rows)


def _refused(url: str, status: int, answer: Any) -> EngineError:
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    message = error.get("message", error) if isinstance(error, dict) else error
    return EngineError(f"engine {url} answered HTTP {status}: {message}")


def _finite(logprobs: Sequence[float]) -> bool:
    return all(math.isfinite(value) and value > NOT_FINITE for value in logprobs)


def _weight_version(url: str, choice: dict[str, Any]) -> int:
    """Version of the weights that sampled the answer; UnansweredError where they changed on the way.

    A pause waits for open requests, except for one that was preempted: it goes on afterwards, with other weights.
    """
    versions = [span["version"] for span in choice["weight_versions"]]
    if len(versions) > 1:
        raise UnansweredError(
            f"engine {url}: weights changed from version {versions[0]} to {versions[-1]} within one answer, whose "
            "request was preempted for want of KV cache; raise engine.memory_fraction or lower engine.max_in_flight"
        )
    return NEVER_SYNCED if versions[0] == "default" else int(versions[0])
