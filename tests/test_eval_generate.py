"""Answers drawn over HTTP from servers that are made up: pieces, stop strings, retries, dead servers, surface forms."""

import asyncio
import json
import shutil
import threading
from pathlib import Path

import pytest
from aiohttp import web

from megatron_ra3.corpus.tokenizer import CodeTokenizer, load_tokenizer
from megatron_ra3.evaluate.generate import Codec, Request, VllmGenerator, served_context
from megatron_ra3.evaluate.prompts import Prompt
from megatron_ra3.evaluate.settings import EvalEngineConfig, PromptConfig, SamplingConfig
from megatron_ra3.rollout.engine import EngineError

CONTEXT = 400
PROMPT = Prompt(text="def f(x):\n    '''Doc.'''\n", stop=("\ndef ", "\nassert"), max_new_tokens=50, is_code=True)


@pytest.fixture(scope="module")
def folder(small_corpus, tmp_path_factory) -> Path:
    """A model's folder, as far as prompts and answers need one."""
    folder = Path(shutil.copytree(small_corpus / "tokenizer", tmp_path_factory.mktemp("model") / "model"))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> CodeTokenizer:
    return load_tokenizer(folder)


class Server:
    """Writes `script` after any prompt, token by token, then end-of-text; the first `failures` requests fail."""

    def __init__(self, tokenizer, script, prompts, failures=0):
        self.script = [*(script if isinstance(script, list) else tokenizer.encode(script)), tokenizer.eos_id]
        self.prompts = prompts
        self.failures = failures
        self.bodies = []
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def __enter__(self):
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _start(self):
        app = web.Application()
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_get("/health", self._models)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

    async def _models(self, request):
        return web.json_response({"data": [{"id": "made", "max_model_len": CONTEXT}]})

    async def _generate(self, request):
        body = await request.json()
        self.bodies.append(body)
        if len(self.bodies) <= self.failures:
            return web.Response(status=500, text="out of memory")
        sampling = body["sampling_params"]
        done = next(len(body["token_ids"]) - len(p) for p in self.prompts if body["token_ids"][: len(p)] == p)
        part = self.script[done : done + sampling["max_tokens"]]
        ended = part[-1] in sampling["stop_token_ids"]
        return web.json_response({"choices": [{"token_ids": part, "finish_reason": "stop" if ended else "length"}]})


def draw(servers, codec, count=1, prompt=PROMPT, context=CONTEXT, **engine):
    settings = EvalEngineConfig(**{"tokens_per_request": 8, "attempts": 2, **engine})
    urls = [server if isinstance(server, str) else server.url for server in servers]
    generator = VllmGenerator(urls, codec, SamplingConfig(temperature=0.2, top_p=0.95), settings, context)
    requests = [
        Request(key=(str(number), 0), prompt=prompt, max_new_tokens=prompt.max_new_tokens, seed=number)
        for number in range(count)
    ]
    found = {}
    generator.generate(requests, lambda request, answer: found.setdefault(request.key[0], answer))
    return found


@pytest.mark.parametrize(
    ("script", "finish", "text"),
    [
        ("    return x\n", "end", "    return x\n"),
        ("    return x\n\ndef g():\n    return 'never seen by anybody at all'\n" * 3, "stop", None),
        ("    x = 1\n" * 40, "length", None),
    ],
)
def test_an_answer_is_drawn_in_pieces_until_it_ends(folder, tokenizer, script, finish, text):
    codec = Codec(folder, PromptConfig())
    with Server(tokenizer, script, [codec.encode(PROMPT)]) as server:
        answer = draw([server], codec)["0"]
    ids = tokenizer.encode(script)
    assert (answer.finish, answer.tokens <= 50) == (finish, True)
    assert answer.text == (tokenizer.decode(ids[: answer.tokens]) if text is None else text)
    if finish == "stop":
        assert "\ndef " in answer.text
        assert answer.tokens < len(ids) / 3
    lengths = [len(body["token_ids"]) for body in server.bodies]
    assert lengths == [len(codec.encode(PROMPT)) + 8 * piece for piece in range(len(lengths))]
    sampling = server.bodies[0]["sampling_params"]
    assert (sampling["temperature"], sampling["top_p"], sampling["ignore_eos"]) == (0.2, 0.95, True)
    assert len({body["sampling_params"]["seed"] for body in server.bodies}) == len(server.bodies)


def test_a_failed_request_goes_to_another_server_and_only_its_task_is_lost(folder, tokenizer):
    codec = Codec(folder, PromptConfig())
    prompts = [codec.encode(PROMPT)]
    with Server(tokenizer, "    return x\n", prompts) as good, Server(tokenizer, "", prompts, failures=99) as bad:
        assert {answer.finish for answer in draw([bad, good], codec, 6, max_in_flight=2).values()} == {"end"}
        assert bad.bodies
        lost = draw([bad], codec)["0"]
    assert (lost.finish, lost.text) == ("error", "")
    assert "answered HTTP 500: out of memory" in lost.detail


def test_dead_servers_end_the_evaluation(folder, tokenizer):
    codec = Codec(folder, PromptConfig())
    with pytest.raises(EngineError, match=r"no engine lives any more; engine http://127.*goes on from here"):
        draw(["http://127.0.0.1:9"], codec)
    with Server(tokenizer, "", []) as server:
        assert served_context(server.url, "made") == CONTEXT
        with pytest.raises(EngineError, match="serves model 'made', expected 'other'"):
            served_context(server.url, "other")


def test_an_answer_never_leaves_the_context(folder, tokenizer):
    codec = Codec(folder, PromptConfig())
    prompt = codec.encode(PROMPT)
    with Server(tokenizer, "    x = 1\n" * 40, [prompt]) as server:
        short = draw([server], codec, context=len(prompt) + 11)["0"]
        none = draw([server], codec, context=len(prompt))["0"]
    assert (short.finish, short.tokens) == ("length", 11)
    assert (none.finish, none.detail) == ("room", f"the prompt has {len(prompt)} tokens")


def test_the_special_form_writes_gates_into_code_and_reads_rationales_as_comments(folder, tokenizer):
    codec = Codec(folder, PromptConfig(surface="special", start="end_of_text"))
    act, think, end = map(tokenizer.id_of, ("<act>", "<think>", "</think>"))
    lines = ("def f(x):\n", "    '''Doc.'''\n")
    assert codec.encode(PROMPT) == [tokenizer.eos_id, *(i for line in lines for i in (act, *tokenizer.encode(line)))]
    text = Prompt(text="Write f.\n[BEGIN]\n", stop=(), max_new_tokens=9)
    assert codec.encode(text) == [tokenizer.eos_id, *tokenizer.encode(text.text)]
    script = [think, *tokenizer.encode(" as it is"), end, *tokenizer.encode("    return x\n"), act]
    script += tokenizer.encode("\ndef g():") + [act] * 30
    with Server(tokenizer, script, [codec.encode(PROMPT)]) as server:
        answer = draw([server], codec)["0"]
    assert answer.finish == "stop"
    assert answer.text.startswith("# as it is\n    return x\n\ndef ")


def test_the_newline_form_starts_as_the_tokenizer_does(folder, tokenizer, tmp_path):
    assert Codec(folder, PromptConfig()).encode(PROMPT) == tokenizer.encode(PROMPT.text)
    own = json.loads((folder / "tokenizer.json").read_text())
    special = {"SpecialToken": {"id": "<|pad|>", "type_id": 0}}
    own["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [special, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|pad|>": {"id": "<|pad|>", "ids": [tokenizer.id_of("<|pad|>")], "tokens": ["<|pad|>"]}},
    }
    for name in ("tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(own))
    starts = Codec(tmp_path, PromptConfig()).encode(PROMPT)
    assert starts == [tokenizer.id_of("<|pad|>"), *tokenizer.encode(PROMPT.text)]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert Codec(tmp_path, PromptConfig()).end_ids == {tokenizer.eos_id, 5, 7}
