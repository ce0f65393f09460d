"""Sampling engine over HTTP: token ids to vLLM servers (`/inference/v1/generate`), log-probs back.

Refuses what would silently train on wrong numbers: a server with another model or too short a context, a gate row that
vLLM did not compute, a log-prob that is not finite, an answer cut by an abort. Every error names the engine's URL.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_ra3.rollout.engine import EngineError, GateQuery, GateScores, GenerateQuery, Generation, StopRule

if TYPE_CHECKING:
    import aiohttp

# Version of weights a server loaded from its folder and no trainer has sent.
NEVER_SYNCED = -1
# vLLM's stand-in for minus infinity and NaN in an answer; anything lower is a row the plugin marks as not computed.
NOT_FINITE = -9999.0
# Queries that begin with the same tokens go to the same engine, where those are cached.
ROUTING_TOKENS = 64
ROUTES_KEPT = 65536
# Below the servers' own idle limit (vLLM: 5 s): a connection the server has just closed would fail a request.
KEEP_ALIVE_S = 2.0
PROBE_TIMEOUT_S = 30.0
# Of a scoring request: one token is the least vLLM generates, and nobody looks at it.
SCORING = {"temperature": 0.0, "max_tokens": 1, "ignore_eos": True, "detokenize": False}

Query = TypeVar("Query", GateQuery, GenerateQuery)
Answer = TypeVar("Answer")
GateLogprobs = tuple[tuple[float, ...], ...]


class VllmEngine:
    """`engine.Engine` on one or more vLLM servers; used by one thread at a time.

    `gate_ids` are the tokens scored at gate rows; without them only `generate` works. `expected_model` is the
    servers' model name (`server.served_model_name`), `min_model_len` the context in tokens a query may need; both
    are checked here. `temperature` is that of `generate` (0 is greedy); gates are scored at temperature 1.
    `max_in_flight` requests are open per server; each must be answered within `timeout_s`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        gate_ids: Sequence[int] = (),
        *,
        expected_model: str | None = None,
        min_model_len: int = 1,
        temperature: float = 1.0,
        timeout_s: float = 120.0,
        max_in_flight: int = 64,
    ) -> None:
        if not urls:
            raise ValueError("VllmEngine: needs at least one engine URL")
        if temperature < 0.0:
            raise ValueError(f"temperature={temperature}: must be 0 (greedy) or positive")
        self._urls = [url.rstrip("/") for url in urls]
        self._gate_ids = list(gate_ids)
        self._expected_model = expected_model
        self._min_model_len = min_model_len
        self._temperature = temperature
        self._timeout_s = timeout_s
        self._max_in_flight = max_in_flight
        self._native_scoring: dict[str, bool] = {}
        self._routes: dict[int, str] = {}
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
        unique = list(dict.fromkeys(queries))
        answers = dict(zip(unique, self._runner.run(self._all(unique, self._score)), strict=True))
        return [answers[query] for query in queries]

    def generate(self, queries: Sequence[GenerateQuery], stop: StopRule) -> list[Generation]:
        """Sample continuations; answers in the order of the queries."""

        async def one(url: str, query: GenerateQuery) -> Generation:
            return await self._generate(url, query, stop)

        return self._runner.run(self._all(queries, one))

    def health(self) -> None:
        """Return when every engine answers and serves what is expected; EngineError naming the one that does not."""
        self._runner.run(_gather([self._check(url) for url in self._urls]))

    def close(self) -> None:
        """Release connections; the engine must not be used afterwards."""
        if self._session is not None:
            self._runner.run(self._session.close())
        self._runner.close()

    async def _all(
        self, queries: Sequence[Query], ask: Callable[[str, Query], Coroutine[Any, Any, Answer]]
    ) -> list[Answer]:
        slots = {url: asyncio.Semaphore(self._max_in_flight) for url in self._urls}

        async def one(url: str, query: Query) -> Answer:
            async with slots[url]:
                return await ask(url, query)

        return await _gather([one(url, query) for url, query in zip(self._route(queries), queries, strict=True)])

    def _route(self, queries: Sequence[Query]) -> list[str]:
        """An engine for each query: where its beginning went before, else the one with the fewest tokens."""
        load = dict.fromkeys(self._urls, 0)
        routed = []
        for query in queries:
            key = hash(query.token_ids[:ROUTING_TOKENS])
            url = self._routes.get(key) or min(load, key=lambda url: load[url])
            self._routes[key] = url
            load[url] += len(query.token_ids)
            routed.append(url)
        while len(self._routes) > ROUTES_KEPT:
            del self._routes[next(iter(self._routes))]
        return routed

    async def _check(self, url: str) -> None:
        await self._get(url, "/health")
        models = (await self._get(url, "/v1/models"))["data"]
        name, model_len = models[0]["id"], models[0]["max_model_len"]
        if self._expected_model not in (None, name):
            raise EngineError(f"engine {url} serves model {name!r}, expected {self._expected_model!r}")
        if model_len < self._min_model_len:
            raise EngineError(f"engine {url}: max_model_len={model_len}, but queries may need {self._min_model_len}")
        if self._gate_ids and url not in self._native_scoring:
            self._native_scoring[url] = await self._scores_natively(url)

    async def _scores_natively(self, url: str) -> bool:
        """Whether vLLM itself scores chosen tokens (V2 runner); if not, check that our plugin does (V1 runner)."""
        prefix = [self._gate_ids[0]] * 3
        sampling = {"prompt_logprob_token_ids": [self._gate_ids] * 2}
        status, answer = await self._post(url, prefix, sampling | SCORING)
        if status == 200:
            return True
        if "V2 model runner" not in str(answer):
            raise _refused(url, status, answer)
        answer = await self._ask(url, prefix, self._plugin_request((2,), reread=True))
        if len(answer["prompt_logprobs"]) != 2:
            raise EngineError(
                f"engine {url} does not run the vLLM plugin of megatron_ra3; install the package where it runs, and "
                "leave VLLM_PLUGINS unset"
            )
        return False

    async def _score(self, url: str, query: GateQuery) -> GateScores:
        score = self._score_natively if self._native_scoring[url] else self._score_by_plugin
        logprobs, version = await score(url, query, reread=False)
        if logprobs is None:
            self.rescored_queries += 1
            logprobs, version = await score(url, query, reread=True)
        if logprobs is None or any(
            not math.isfinite(value) or value <= NOT_FINITE for row in logprobs for value in row
        ):
            raise EngineError(f"engine {url}: gate log-probs at rows {query.rows} are not finite: {logprobs}")
        return GateScores(logprobs, version)

    async def _score_by_plugin(self, url: str, query: GateQuery, *, reread: bool) -> tuple[GateLogprobs | None, int]:
        """Log-probs per row, or None where the prefix cache hid a row; `reread` computes the whole prefix."""
        answer = await self._ask(url, query.token_ids, self._plugin_request(query.rows, reread=reread))
        rows = answer["prompt_logprobs"][1:]
        if len(rows) != len(query.rows):
            raise EngineError(f"engine {url}: {len(rows)} scored rows for {len(query.rows)} gate rows")
        logprobs = tuple(tuple(row[str(token)]["logprob"] for token in self._gate_ids) for row in rows)
        hidden = any(value < NOT_FINITE for row in logprobs for value in row)
        return None if hidden else logprobs, _weight_version(answer["choices"][0])

    def _plugin_request(self, rows: Sequence[int], *, reread: bool) -> dict[str, Any]:
        return SCORING | {
            "prompt_logprobs": len(self._gate_ids) - 1,
            "skip_reading_prefix_cache": reread,
            "extra_args": {"gate_rows": list(rows), "gate_ids": self._gate_ids},
        }

    async def _score_natively(self, url: str, query: GateQuery, *, reread: bool) -> tuple[GateLogprobs | None, int]:
        """As `_score_by_plugin`, with vLLM's own scoring of prompt rows (V2 runner; not run in our tests: needs a GPU).

        vLLM does not score a prompt's last row, so the prompt gets one more token, which no scored row sees.
        """
        import numpy as np

        start = min(query.rows)
        wanted = set(query.rows)
        padding = [-1] * len(self._gate_ids)
        sampling = SCORING | {
            "prompt_logprob_start": start,
            "prompt_logprob_token_ids": [
                self._gate_ids if row in wanted else padding for row in range(start, len(query.token_ids))
            ],
            "skip_reading_prefix_cache": reread,
        }
        answer = await self._ask(url, (*query.token_ids, query.token_ids[-1]), sampling)
        encoded, version = answer["prompt_token_id_logprobs"], _weight_version(answer["choices"][0])
        if encoded is None:
            return None, version
        scores = np.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False)
        return tuple(tuple(scores[row - start].tolist()) for row in query.rows), version

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
        choice = (await self._ask(url, query.token_ids, sampling))["choices"][0]
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
        return Generation(tokens, logprobs, _weight_version(choice))

    async def _ask(self, url: str, token_ids: Sequence[int], sampling: dict[str, Any]) -> dict[str, Any]:
        status, answer = await self._post(url, token_ids, sampling)
        if status != 200 or not answer.get("choices"):
            raise _refused(url, status, answer)
        return answer

    async def _post(self, url: str, token_ids: Sequence[int], sampling: dict[str, Any]) -> tuple[int, Any]:
        body = {"token_ids": list(token_ids), "sampling_params": sampling}
        return await self._request("POST", url, "/inference/v1/generate", self._timeout_s, json=body)

    async def _get(self, url: str, path: str) -> Any:
        status, answer = await self._request("GET", url, path, min(self._timeout_s, PROBE_TIMEOUT_S))
        if status != 200:
            raise _refused(url, status, answer)
        return answer

    async def _request(self, method: str, url: str, path: str, timeout_s: float, **options: Any) -> tuple[int, Any]:
        import aiohttp

        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
            self._session = aiohttp.ClientSession(connector=connector, trust_env=False)
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(method, url + path, timeout=timeout, **options) as response:
                body = await response.text()
                is_json = response.content_type == "application/json"
                return response.status, json.loads(body) if is_json else body
        except TimeoutError as error:
            raise EngineError(f"engine {url}: no answer to {path} within timeout_s={timeout_s:g}") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise EngineError(f"engine {url}: {path} failed: {type(error).__name__} {error}") from error


async def _gather(requests: Sequence[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """Results in order; the first error cancels the rest, which makes the engines abort those requests."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(request) for request in requests]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _refused(url: str, status: int, answer: Any) -> EngineError:
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    message = error.get("message", error) if isinstance(error, dict) else error
    return EngineError(f"engine {url} answered HTTP {status}: {message}")


def _finite(logprobs: Sequence[float]) -> bool:
    return all(math.isfinite(value) and value > NOT_FINITE for value in logprobs)


def _weight_version(choice: dict[str, Any]) -> int:
    """Version of the weights the first token was sampled with: the oldest, where they changed on the way."""
    version = choice["weight_versions"][0]["version"]
    return NEVER_SYNCED if version == "default" else int(version)
