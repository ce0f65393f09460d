"""Two real vLLM servers with a tiny random model: sampling, live weights, and what happens when something dies.

The servers are shared by the whole file and the last tests kill them, so the order of the tests matters.
"""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ra3.corpus.tokenizer import train_tokenizer
from megatron_ra3.evaluate.generate import Request, VllmGenerator
from megatron_ra3.evaluate.prompts import Prompt
from megatron_ra3.evaluate.settings import EvalEngineConfig, SamplingConfig
from megatron_ra3.lifecycle import StopRequestedError
from megatron_ra3.rlvr import rlvr
from megatron_ra3.rlvr_config import RlvrRunConfig, load_rlvr_config
from megatron_ra3.rlvr_run import RlvrRun
from megatron_ra3.rollout.engine import EngineError, EnginesLostError, GateQuery, GateScores, GenerateQuery, StopRule
from megatron_ra3.rollout.server import ServerConfig, VllmServer, served_model_name
from megatron_ra3.rollout.vllm_engine import NEVER_SYNCED, VllmEngine
from megatron_ra3.rollout.weights import WeightSync
from tests.distributed import run_ranks
from tests.support import open_jail

pytestmark = pytest.mark.vllm

VOCABULARY = 322  # not a multiple of 64: vLLM pads it
GATES = (11, 7)
BLOCK = 32
MODEL_LEN = 256
TIMEOUT_S = 60.0
# The second server computes long prompts in pieces. Only gates may do that: with a seed it kills the CPU engine.
CHUNKED = ("--enable-chunked-prefill", "--max-num-batched-tokens=192")


class Served(NamedTuple):
    servers: list[VllmServer]
    folder: Path
    first: torch.nn.Module
    second: torch.nn.Module

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]

    def engine(self, count: int = 1, **options) -> VllmEngine:
        return VllmEngine(self.urls[:count], GATES, **{"timeout_s": TIMEOUT_S, **options})


class Weights:
    """A Hugging Face model as a weight source; `before` is called with each tensor's number before it is given."""

    def __init__(self, model, before=lambda number: None):
        self.named = list(model.named_parameters())
        self.before = before
        self.given = 0

    def metadata(self):
        return [(name, tuple(parameter.shape), parameter.dtype) for name, parameter in self.named]

    def __iter__(self):
        for number, (name, parameter) in enumerate(self.named):
            self.before(number)
            self.given += 1
            yield name, parameter


def random_model(seed: int):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MODEL_LEN,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=3,
    )
    model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    first, second = random_model(1), random_model(2)
    first.save_pretrained(folder / "model")
    servers = [
        VllmServer(
            ServerConfig(
                folder / "model",
                folder / f"vllm{number}.log",
                dtype="float32",
                max_model_len=MODEL_LEN,
                block_size=BLOCK,
                kv_cache_bytes=1 << 26,
                max_num_seqs=64,
                seed=number,
                extra_args=((), CHUNKED)[number],
            )
        )
        for number in range(2)
    ]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait()
        yield Served(servers, folder / "model", first, second)
    finally:
        for server in servers:
            server.stop()


def draw(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist())


def law(model, token_ids) -> Tensor:
    """Log-probs of every next token, [len, vocabulary]."""
    return model(torch.tensor([token_ids])).logits[0].float().log_softmax(-1)


def assert_scores(model, queries: list[GateQuery], scores: list[GateScores], version: int) -> None:
    for query, score in zip(queries, scores, strict=True):
        expected = law(model, query.token_ids)[list(query.rows)][:, list(GATES)]
        torch.testing.assert_close(torch.tensor(score.logprobs), expected, atol=1e-4, rtol=0)
        assert score.weight_version == version


def gate_queries(seed: int) -> list[GateQuery]:
    """Long and short prefixes, last rows, equal queries, and prefixes that share cached blocks."""
    long = draw(250, seed)
    return [
        GateQuery(long, (0, 31, 32, 190, 191, 192, 249)),
        GateQuery(long[:70], (69, 2)),
        GateQuery(long[:1], (0,)),
        GateQuery(long[:70], (69, 2)),
        GateQuery(long[:64] + draw(40, seed + 1), (103, 64, 63)),
        *(GateQuery(draw(20 + 9 * index, seed + 2 + index), (index, 19 + index)) for index in range(8)),
    ]


def members(group: int) -> list[str]:
    """Processes of a process group, zombies aside."""
    table = subprocess.run(["ps", "-wweo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = (line.split(None, 2) for line in table.splitlines())
    return [args for pgid, stat, args in rows if int(pgid) == group and not stat.startswith("Z")]


def engine_core(server: VllmServer) -> int:
    table = subprocess.run(["ps", "-wweo", "pgid=,pid=,args="], capture_output=True, text=True, check=True).stdout
    rows = (line.split(None, 2) for line in table.splitlines())
    (found,) = [int(pid) for pgid, pid, args in rows if int(pgid) == server._process.pid and "EngineCore" in args]
    return found


def post(url: str, path: str) -> None:
    with urllib.request.urlopen(urllib.request.Request(url + path, b"", method="POST"), timeout=TIMEOUT_S):
        pass


@contextmanager
def connected(served: Served, **options) -> Iterator[WeightSync]:
    sync = WeightSync(served.urls, **{"backend": "gloo", "timeout_s": TIMEOUT_S, **options})
    try:
        sync.connect()
        yield sync
    finally:
        sync.close()


@pytest.mark.parametrize("server", [0, 1], ids=["whole_prompts", "chunked_prompts"])
def test_gate_logprobs_equal_transformers_also_where_the_prefix_cache_hides_rows(served, server):
    engine = VllmEngine([served.urls[server]], GATES, timeout_s=TIMEOUT_S)
    queries = gate_queries(seed=0)
    assert_scores(served.first, queries, engine.gate_logprobs(queries), NEVER_SYNCED)
    before = engine.rescored_queries
    assert_scores(served.first, queries, engine.gate_logprobs(queries), NEVER_SYNCED)
    # Now every full block is cached; hidden are the rows before the last block boundary of each prefix.
    unique = set(queries)
    hidden = [query for query in unique if min(query.rows) < (len(query.token_ids) - 1) // BLOCK * BLOCK]
    assert 0 < len(hidden) < len(unique)
    assert engine.rescored_queries - before == len(hidden)
    engine.close()


def test_an_evaluation_draws_greedy_answers_piece_by_piece(served):
    codec = SimpleNamespace(
        end_ids=frozenset(), encode=lambda prompt: list(draw(20, int(prompt.text))), decode=lambda ids: str(ids)
    )
    engine = EvalEngineConfig(tokens_per_request=7)
    generator = VllmGenerator(served.urls, codec, SamplingConfig(), engine, MODEL_LEN)
    prompts = [Prompt(text=str(seed), stop=(), max_new_tokens=24) for seed in range(6)]
    requests = [Request(key=(prompt.text, 0), prompt=prompt, max_new_tokens=24, seed=0) for prompt in prompts]
    found = {}
    generator.generate(requests, lambda request, answer: found.setdefault(request.key[0], answer))
    for prompt in prompts:
        tokens = codec.encode(prompt)
        for _ in range(24):
            tokens.append(int(law(served.first, tokens)[-1].argmax()))
        assert (found[prompt.text].text, found[prompt.text].finish) == (str(tokens[20:]), "length")


def test_generations_follow_the_models_law_and_keep_the_stop_token(served):
    engine = served.engine(count=2, max_in_flight=3)
    stop = StopRule(frozenset(range(0, VOCABULARY, 12)), max_tokens=12)
    queries = [GenerateQuery(draw(10 + index, 100 + index), seed=index) for index in range(12)]
    generations = engine.generate(queries, stop)
    for query, generation in zip(queries, generations, strict=True):
        whole = query.token_ids + generation.token_ids
        rows = law(served.first, whole)[len(query.token_ids) - 1 : -1]
        expected = rows.gather(1, torch.tensor(generation.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(generation.logprobs), expected, atol=1e-4, rtol=0)
        assert not stop.stop_ids & set(generation.token_ids[:-1])
        assert generation.token_ids[-1] in stop.stop_ids or len(generation.token_ids) == stop.max_tokens
        assert generation.weight_version == NEVER_SYNCED
    ends = [generation.token_ids[-1] in stop.stop_ids for generation in generations]
    assert 0 < sum(ends) < len(ends)

    assert [g.token_ids for g in engine.generate(queries, stop)] == [g.token_ids for g in generations]
    again = engine.generate([GenerateQuery(query.token_ids, query.seed + 1000) for query in queries], stop)
    assert [g.token_ids for g in again] != [g.token_ids for g in generations]
    engine.close()


def test_one_request_scores_gates_and_continues_also_where_the_prefix_cache_hides_rows(served):
    engine = served.engine()
    stop = StopRule(frozenset(range(0, VOCABULARY, 12)), max_tokens=12)
    prefixes = [draw(70 + 20 * index, 300 + index) for index in range(4)]
    queries = [GenerateQuery(prefix, index, (40, len(prefix) - 2)) for index, prefix in enumerate(prefixes)]
    plain = [GenerateQuery(query.token_ids, query.seed) for query in queries]
    for hidden in (0, len(queries)):  # the second time every row at 40 lies in a cached block
        before = engine.rescored_queries
        generations = engine.generate(queries, stop)
        assert engine.rescored_queries - before == hidden
        for query, generation in zip(queries, generations, strict=True):
            expected = law(served.first, query.token_ids)[list(query.rows)][:, list(GATES)]
            torch.testing.assert_close(torch.tensor(generation.gate_logprobs), expected, atol=1e-4, rtol=0)
        assert [g.token_ids for g in generations] == [g.token_ids for g in engine.generate(plain, stop)]
    engine.close()


def test_greedy_generation_takes_the_likeliest_token(served):
    engine = served.engine(temperature=0.0)
    prefix = draw(30, 7)
    (generation,) = engine.generate([GenerateQuery(prefix, seed=1)], StopRule(frozenset(), max_tokens=5))
    rows = law(served.first, prefix + generation.token_ids)[len(prefix) - 1 : -1]
    assert rows.argmax(-1).tolist() == list(generation.token_ids)
    engine.close()


def test_what_an_engine_cannot_serve_is_an_error_that_names_it(served):
    (url,) = served.urls[:1]
    with pytest.raises(EngineError, match=r"http://127\.0\.0\.1:9.*(refused|connect)"):
        VllmEngine(["http://127.0.0.1:9"], GATES, timeout_s=5)
    with pytest.raises(EngineError, match=f"{url} serves model 'Qwen2ForCausalLM-v322-.*expected 'other'"):
        served.engine(expected_model="other")
    with pytest.raises(EngineError, match=f"{url}: max_model_len={MODEL_LEN}, but queries may need 300"):
        served.engine(min_model_len=300)
    engine = served.engine(expected_model=served_model_name(served.folder), min_model_len=MODEL_LEN)
    with pytest.raises(EngineError, match=f"(?s){url} answered HTTP 400: .*{MODEL_LEN}"):
        engine.gate_logprobs([GateQuery(draw(MODEL_LEN + 1, 1), (0,))])
    with pytest.raises(EngineError, match=f"{url}: 6 tokens .*'length', after a prefix of 250; .*max_tokens=20"):
        engine.generate([GenerateQuery(draw(250, 1), 0)], StopRule(frozenset(), max_tokens=20))
    with pytest.raises(ValueError, match="gate rows"):
        engine.gate_logprobs([GateQuery((1, 2, 3), (3,))])
    engine.close()


def test_an_engine_that_does_not_answer_in_time_is_an_error_that_names_it(served):
    engine = served.engine(timeout_s=3.0)
    post(served.urls[0], "/pause?mode=wait")
    try:
        with pytest.raises(EnginesLostError, match=rf"{served.urls[0]} lost \(no answer to any .*timeout_s=3"):
            engine.gate_logprobs(gate_queries(seed=50))
    finally:
        post(served.urls[0], "/resume")
    engine.close()
    engine, queries = served.engine(), gate_queries(seed=50)
    assert_scores(served.first, queries, engine.gate_logprobs(queries), NEVER_SYNCED)
    engine.close()


def test_sent_weights_are_served_under_their_version_by_every_engine(served):
    engine, queries = served.engine(count=2), gate_queries(seed=20)
    assert_scores(served.first, queries, engine.gate_logprobs(queries), NEVER_SYNCED)  # fills the prefix caches
    with connected(served) as sync:
        sync.send(Weights(served.second), version=7)
        for url in served.urls:
            single = VllmEngine([url], GATES, timeout_s=TIMEOUT_S)
            assert_scores(served.second, queries, single.gate_logprobs(queries), 7)
            single.close()
        (generation,) = engine.generate([GenerateQuery(queries[0].token_ids[:40], 1)], StopRule(frozenset(), 6))
        whole = queries[0].token_ids[:40] + generation.token_ids
        expected = law(served.second, whole)[39:-1].gather(1, torch.tensor(generation.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(generation.logprobs), expected, atol=1e-4, rtol=0)
        assert generation.weight_version == 7
        # Five norms and, of two layers, o_proj and down_proj; vLLM joins q, k and v, gate and up, and pads the head.
        assert sync.check(Weights(served.second)) == 2 * (5 + 2 * 2)
        with pytest.raises(EngineError, match=r"o_proj.weight differs from the trainer's"):
            sync.check(Weights(served.first))
        sync.send(Weights(served.first), version=8)
    assert_scores(served.first, queries, engine.gate_logprobs(queries), 8)
    engine.close()


def test_a_broken_transfer_is_tried_again_and_then_leaves_the_old_weights_served(served):
    passes = itertools.count()

    def fail_first(number):
        if number == 5 and next(passes) == 0:
            raise RuntimeError("export interrupted")

    def fail_always(number):
        if number == 5:
            raise RuntimeError("export interrupted")

    engine, queries = served.engine(count=2), gate_queries(seed=30)
    with connected(served) as sync:
        began = time.monotonic()
        sync.send(Weights(served.second, fail_first), version=9)
        assert_scores(served.second, queries, engine.gate_logprobs(queries), 9)
        with pytest.raises(EngineError, match="weights version 10 failed"):
            sync.send(Weights(served.first, fail_always), version=10)
        assert time.monotonic() - began < TIMEOUT_S / 2  # no engine waits until its time is out
        assert_scores(served.second, queries, engine.gate_logprobs(queries), 9)
        sync.send(Weights(served.first), version=11)
        assert_scores(served.first, queries, engine.gate_logprobs(queries), 11)
    engine.close()


def test_announced_and_given_weights_must_agree(served):
    class Mislabelled(Weights):
        def metadata(self):
            first, *rest = super().metadata()
            return [("model.other.weight", *first[1:]), *rest]

    announced = r"where metadata\(\) announced model.other.weight"
    with connected(served) as sync, pytest.raises(EngineError, match=announced):
        sync.send(Mislabelled(served.second), version=12)


def test_weights_that_no_engine_can_load_end_with_its_own_words_and_leave_the_old_ones_served(served):
    engine, queries = served.engine(count=2), gate_queries(seed=31)
    strange = Weights(served.first)
    strange.named[3:3] = [("model.layers.0.other.weight", torch.zeros(3))]
    with connected(served) as sync:
        sync.send(Weights(served.second), version=12)
        began = time.monotonic()
        with pytest.raises(EngineError, match=r"weights version 13 failed.*other"):
            sync.send(strange, version=13)
        assert time.monotonic() - began < TIMEOUT_S / 2  # the trainer does not wait until its time is out
        assert_scores(served.second, queries, engine.gate_logprobs(queries), 12)
        sync.send(Weights(served.first), version=14)
        assert_scores(served.first, queries, engine.gate_logprobs(queries), 14)
    engine.close()


def test_a_trainer_that_vanishes_leaves_the_old_weights_and_a_new_one_takes_over(served):
    engine, queries = served.engine(count=2), gate_queries(seed=40)
    before = engine.gate_logprobs(queries)
    child = os.fork()
    if child == 0:
        try:
            with connected(served) as sync:
                sync.send(Weights(served.second, lambda number: os._exit(3) if number == 5 else None), version=13)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    with connected(served) as sync:
        assert_scores(served.first, queries, engine.gate_logprobs(queries), before[0].weight_version)
        sync.send(Weights(served.second), version=14)
    assert_scores(served.second, queries, engine.gate_logprobs(queries), 14)
    engine.close()


def test_ranks_that_do_not_send_only_iterate(served):
    sync = WeightSync(served.urls, backend="gloo", timeout_s=TIMEOUT_S, rank=1)
    source = Weights(served.first)
    sync.connect()
    sync.send(source, version=99)
    assert source.given == len(source.named)
    sync.close()
    engine = served.engine()
    assert engine.gate_logprobs([GateQuery((1, 2, 3), (2,))])[0].weight_version == 14
    engine.close()


HEAD = "def f():\n    return 0 and "
STOPS = "\nABCDEFGHIJKLMNOPQRSTUVWXYZ"


def rlvr_config(served: Served, folder: Path, *overrides: str) -> RlvrRunConfig:
    """Three steps on the first server; a task is solved by what makes an expression behind `0 and`."""
    model, tasks = folder / "model", folder / "tasks.jsonl"
    if not tasks.exists():
        shutil.copytree(served.folder, model)
        train_tokenizer(["token " * 9], 300, model)
        task = {"stop": list(STOPS), "head": HEAD, "function": "f", "tests": [[[], 0]], "max_new_tokens": 2}
        records = [{"task_id": f"t/{number}", "prompt": f"{number} and ", **task} for number in range(4)]
        tasks.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = (
        f"run_folder={folder / 'run'}",
        f"model.folder={model}",
        f"tasks.file={tasks}",
        "rlvr.steps=3",
        "rlvr.tasks_per_step=2",
        "rlvr.samples_per_task=8",
        "rlvr.max_prompt_tokens=32",
        "rlvr.max_answer_tokens=2",
        "rlvr.check_tokens=1",
        "rlvr.learning_rate=1e-2",
        "evaluate.every_steps=0",
        "jail.workers=1",
        "engine.kind=vllm",
        f"engine.urls=[{served.urls[0]}]",
    )
    return load_rlvr_config(None, [*settings, *overrides])


def is_right(answer: str) -> bool:
    """What the jail should find, found here: the part after `and` is never evaluated."""
    found: dict[str, object] = {}
    try:
        exec(HEAD + re.split(f"[{STOPS}]", answer)[0], found)
        return found["f"]() == 0  # type: ignore[operator]
    except (SyntaxError, ValueError):
        return False


def test_rlvr_learns_from_the_jail_with_the_weights_of_every_step_served(served, tmp_path, monkeypatch):
    open_jail(1).close()  # skips where there is none
    judged = []
    judge = RlvrRun.judge
    monkeypatch.setattr(RlvrRun, "judge", lambda run, sampled: judged.append(judge(run, sampled)) or judged[-1])
    with pytest.raises(StopRequestedError, match="after step 2"):
        rlvr(rlvr_config(served, tmp_path, "checkpoint.stop_after_steps=2"))
    rlvr(rlvr_config(served, tmp_path))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [(step["step"], step["epoch"], step["position"], step["answers"]) for step in steps] == [
        (1, 0, 2, 16),
        (2, 0, 4, 16),
        (3, 1, 2, 16),
    ]
    for version, (step, items) in enumerate(zip(steps, judged, strict=True)):
        answers = [answer for item in items for answer in item.answers]
        assert {found for answer in answers for found in answer.weight_versions} == {version}
        right = [float(is_right(answer.text)) for answer in answers]
        assert [reward for item in items for reward in item.rewards] == right
        assert 0 < sum(right) < 16
        assert step["pass_rate"] == pytest.approx(sum(right) / 16)
        assert step["truncated"] == pytest.approx(sum(not answer.ended for answer in answers) / 16)
        assert step["mismatch"] < 1e-5  # of 8e-7 as a rule
        assert (step["updates"], step["grad_norm"] > 0) == (1, True)
    assert 0 < sum(step["truncated"] for step in steps) < 3
    engine = served.engine()
    assert engine.gate_logprobs([GateQuery((1, 2, 3), (2,))])[0].weight_version == 2
    engine.close()


def connect_to_nobody() -> str:
    dist.init_process_group("gloo")
    sync = WeightSync(["http://127.0.0.1:9"], backend="gloo", timeout_s=5, rank=dist.get_rank())
    try:
        sync.connect()
    except EngineError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    return "connected"


def test_every_rank_learns_that_an_engine_cannot_be_reached():
    first, second = run_ranks(connect_to_nobody, 2)
    assert "engine http://127.0.0.1:9: /health failed" in first
    assert second == first


def test_an_engine_that_dies_while_weights_are_sent_is_dropped_and_the_others_get_them(served):
    dying = served.servers.pop()
    group, core = dying._process.pid, engine_core(dying)
    urls = [served.urls[0], dying.url]
    engine, queries = VllmEngine(urls, GATES, timeout_s=TIMEOUT_S), gate_queries(seed=60)
    passes = []

    def kill(number):
        passes.append(number)
        if passes == [0, 1, 2]:
            os.kill(core, signal.SIGKILL)

    sync = WeightSync(urls, backend="gloo", timeout_s=300.0)
    began = time.monotonic()
    sync.send(Weights(served.first, kill), version=15)
    assert time.monotonic() - began < 100  # nobody waits for the dead
    assert list(sync.dropped) == [dying.url]
    assert sync.urls == served.urls
    assert sync.check(Weights(served.first)) == 5 + 2 * 2
    # The client finds out by itself, and asks the other one.
    assert_scores(served.first, queries, engine.gate_logprobs(queries), 15)
    sync.close()
    engine.close()
    assert_ended(dying, group)


def assert_ended(server: VllmServer, group: int) -> None:
    deadline = time.monotonic() + 20
    while members(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert members(group) == []
    assert not server.poll()
    assert "EngineCore" in server.log_tail()


def test_a_killed_engine_is_an_error_that_names_it_and_leaves_no_process(served):
    (server,) = served.servers
    engine, group, core = served.engine(), server._process.pid, engine_core(server)
    queries = [GenerateQuery(draw(10, index), index) for index in range(64)]

    def kill_soon():
        time.sleep(0.3)
        os.kill(core, signal.SIGKILL)
        return time.monotonic()

    def generate_until_it_fails():
        while True:
            engine.generate(queries, StopRule(frozenset(), max_tokens=200))

    with ThreadPoolExecutor(max_workers=1) as pool:
        killed = pool.submit(kill_soon)
        with pytest.raises(EngineError, match=server.url):
            generate_until_it_fails()
        assert time.monotonic() - killed.result() < 20
    with pytest.raises(EngineError, match=server.url):
        engine.health()
    assert_ended(server, group)
    with pytest.raises(EngineError, match=f"engine {server.url}: /health failed"):
        WeightSync([server.url], backend="gloo", timeout_s=5).connect()
    engine.close()
