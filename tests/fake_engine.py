"""A server that answers like vLLM with our plugin, and can be told to die, hang, be late, or forget its weights.

What it samples is a function of prefix and seed alone, as of a real engine, so a test can tell the one right answer. In
a thread (`Fakes`), or as a process in the place of vLLM's (`ENTRY`).
"""

import argparse
import asyncio
import contextlib
import json
import random
import threading
from collections.abc import Iterator

from aiohttp import web

GATES = (1, 2)
ENTRY = "from tests.fake_engine import main; main()"


def sampled(token_ids, seed: int, stop_ids, max_tokens: int) -> list[int]:
    """Up to `max_tokens` tokens, the last one a stop token where one was drawn."""
    generator, tokens = random.Random(f"{list(token_ids)} {seed}"), []
    while len(tokens) < max_tokens and not (tokens and tokens[-1] in stop_ids):
        tokens.append(generator.randrange(20))
    return tokens


def _tokens(token_ids, sampling) -> list[int]:
    return sampled(token_ids, sampling.get("seed", 0), sampling.get("stop_token_ids", ()), sampling["max_tokens"])


def gate_logprob(token_ids, row: int, gate: int) -> float:
    """Log-prob of a gate token after the prefix that ends with `row`."""
    return -1.0 - random.Random(f"{list(token_ids[: row + 1])} {gate}").random()


class FakeEngine:
    """Faults: `delay_s` before any answer and `token_s` for each of its tokens; never answers the prefix `late_for`;
    `hangs` and `mute` for ever, the latter also when asked for its health; the next `aborts`, and the next `errors`;
    `forgets` its weights after so many more answers."""

    def __init__(self, model: str = "fake") -> None:
        self.model = model
        self.version = "default"
        self.delay_s = self.token_s = 0.0
        self.late_for: list[int] = []
        self.hangs = self.mute = self.paused = False
        self.aborts = self.errors = 0
        self.forgets: int | None = None
        self.answered = self.most_open = self.open = 0
        self._requests: dict[asyncio.Task, web.Request] = {}
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int) -> int:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_post("/resume", self._resume)
        app.router.add_post("/fake", self._set)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, reuse_address=True)
        await site.start()
        return site._server.sockets[0].getsockname()[1]

    async def kill(self) -> None:
        """As SIGKILL: connections break, new ones are refused."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        for site in list(runner.sites):
            site._server.close()
        for task, request in list(self._requests.items()):
            if request.transport is not None:
                request.transport.abort()
            task.cancel()
        await runner.cleanup()

    async def _resume(self, request: web.Request) -> web.Response:
        return web.json_response({})

    async def _set(self, request: web.Request) -> web.Response:
        for name, value in (await request.json()).items():
            setattr(self, name, value)
        return web.json_response({})

    async def _health(self, request: web.Request) -> web.Response:
        while self.mute:
            await asyncio.sleep(0.05)
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": self.model, "max_model_len": 1000}]})

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        sampling = body["sampling_params"]
        if "prompt_logprob_token_ids" in sampling:
            return web.json_response({"error": {"message": "needs the V2 model runner"}}, status=400)
        task = asyncio.current_task()
        self._requests[task] = request
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await asyncio.sleep(self.delay_s + self.token_s * len(_tokens(body["token_ids"], sampling)))
            while body["token_ids"] == self.late_for:
                await asyncio.sleep(0.05)
            while self.hangs or self.mute or self.paused:
                await asyncio.sleep(0.01)
            return self._answer(body["token_ids"], sampling)
        finally:
            del self._requests[task]
            self.open -= 1

    def _answer(self, token_ids, sampling) -> web.Response:
        if self.errors:
            self.errors -= 1
            return web.json_response({"error": {"message": "EngineCore encountered an issue"}}, status=500)
        if self.forgets is not None:
            self.forgets -= 1
            if self.forgets < 0:
                self.version = "default"
        tokens = _tokens(token_ids, sampling)
        reason = "stop"
        if self.aborts:
            self.aborts -= 1
            tokens, reason = tokens[:1], "abort"
        self.answered += 1
        choice = {
            "token_ids": tokens,
            "finish_reason": reason,
            "logprobs": {"content": [{"logprob": -0.5} for _ in tokens]},
            "weight_versions": [{"version": self.version}],
        }
        rows = sampling.get("extra_args", {}).get("gate_rows", ())
        scored = [{str(gate): {"logprob": gate_logprob(token_ids, row, gate)} for gate in GATES} for row in rows]
        return web.json_response({"choices": [choice], "prompt_logprobs": [None, *scored]})


class Fakes:
    """Fake engines in the event loop of a thread, by URL."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.engines: dict[str, FakeEngine] = {}

    def start(self, *, port: int = 0, **settings) -> str:
        engine = FakeEngine(**settings)
        port = asyncio.run_coroutine_threadsafe(engine.start("127.0.0.1", port), self._loop).result(10)
        url = f"http://127.0.0.1:{port}"
        self.engines[url] = engine
        return url

    def kill(self, url: str) -> None:
        asyncio.run_coroutine_threadsafe(self.engines[url].kill(), self._loop).result(10)

    def kill_when(self, url: str, ready) -> threading.Thread:
        """Kill an engine as soon as `ready(engine)`."""

        async def watch() -> None:
            while not ready(self.engines[url]):
                await asyncio.sleep(0.002)
            await self.engines[url].kill()

        done = asyncio.run_coroutine_threadsafe(watch(), self._loop)
        thread = threading.Thread(target=lambda: done.result(10))
        thread.start()
        return thread

    def close(self) -> None:
        for url in self.engines:
            self.kill(url)
        self._loop.call_soon_threadsafe(self._loop.stop)


@contextlib.contextmanager
def fakes() -> Iterator[Fakes]:
    made = Fakes()
    try:
        yield made
    finally:
        made.close()


def main() -> None:
    """Serve as vLLM's own entry would; options it does not know are vLLM's."""
    parser = argparse.ArgumentParser()
    for name in ("host", "port", "served-model-name", "seed"):
        parser.add_argument(f"--{name}")
    options, _ = parser.parse_known_args()

    async def serve() -> None:
        engine = FakeEngine(options.served_model_name)
        await engine.start(options.host, int(options.port))
        print(json.dumps({"seed": int(options.seed)}), flush=True)
        await asyncio.Event().wait()

    asyncio.run(serve())
