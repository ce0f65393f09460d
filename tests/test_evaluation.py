"""`ra3 eval` from prompts to the result, with answers made up in place of a model's: right, wrong and hostile ones."""

import contextlib
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_ra3.evaluate.evaluation import evaluate, missing_requests
from megatron_ra3.evaluate.generate import Answer
from megatron_ra3.evaluate.models import parse_models, resolve_model
from megatron_ra3.evaluate.records import RecordFile, read_records
from megatron_ra3.evaluate.settings import load_eval_config
from megatron_ra3.evaluate.splits import note_training, noted_training
from megatron_ra3.evaluate.suites import load_suites
from megatron_ra3.rollout.engine import EngineError
from tests.support import open_jail

HOSTILE = (
    "    class Yes:\n        def __eq__(self, other):\n            return True\n    return Yes()\n",
    "    import os\n    os._exit(0)\n",
    "    # </pre><script>alert(1)</script>\n    return '<img src=x onerror=alert(1)>'\n",
)


def humaneval(number):
    head = f'def add{number}(x):\n    """ Add {number}. """\n'
    check = f"def check(candidate):\n    for x in (0, 1, 5):\n        assert candidate(x) == x + {number}\n"
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": head,
        "entry_point": f"add{number}",
        "canonical_solution": f"    return x + {number}\n",
        "test": check,
    }


def plus(number):
    return {
        "task_id": f"Mbpp/{number}",
        "prompt": f'"""\nAdd {number}.\nassert f(1) == {1 + number}\n"""\n',
        "entry_point": "f",
        "canonical_solution": f"def f(x):\n    return x + {number}\n",
        "base_input": [[1], [2]],
        "plus_input": [[-1]],
        "atol": 0,
    }


def write_gz(path, records):
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module", autouse=True)
def _jail():
    open_jail(1).close()


@pytest.fixture
def world(tmp_path):
    """Settings for two suites of three tasks, and two folders that look like models."""
    (tmp_path / "data").mkdir()
    human = write_gz(tmp_path / "data" / "HumanEval.jsonl.gz", map(humaneval, range(3)))
    mbpp = write_gz(tmp_path / "data" / "MbppPlus.jsonl.gz", map(plus, (11, 601, 602)))
    for name in ("base", "ra3"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "tokenizer.json", "model.safetensors"):
            (tmp_path / name / file).write_text(json.dumps(name + file))
    overrides = [
        f"out_folder={tmp_path / 'out'}",
        "suites=[humaneval, mbpp+]",
        f"data.folder={tmp_path / 'data'}",
        f"data.humaneval.sha256={human}",
        f"data.mbpp_plus.sha256={mbpp}",
        "grading.workers=2",
    ]
    return lambda *more: load_eval_config(None, [*overrides, *more]), {n: tmp_path / n for n in ("base", "ra3")}


class StandIn:
    """Gives the answers of `write(model, task_id, sample)`; after `dies_after` answers the servers are gone."""

    def __init__(self, write, dies_after=None):
        self.write = write
        self.dies_after = dies_after
        self.asked = []

    @contextlib.contextmanager
    def __call__(self, model, config, requests, log):
        self.model = model.name
        yield self

    def generate(self, requests, on_answer):
        for request in requests:
            if self.dies_after is not None and len(self.asked) == self.dies_after:
                raise EngineError("no engine lives any more")
            self.asked.append((self.model, *request.key))
            written = self.write(self.model, *request.key)
            if not isinstance(written, Answer):
                written = Answer(text=written, finish="end", tokens=len(written))
            on_answer(request, written)


def right(task_id):
    number = task_id.partition("/")[2]
    body = f"    # add it\n    return x + {number}\n"
    return body if task_id.startswith("HumanEval/") else "def f(x):\n" + body


def test_models_side_by_side(world):
    settings, models = world
    config = settings("sampling.preset=low_temperature", "sampling.samples_per_task=3", "sampling.pass_k=[1, 3]")

    def write(model, task_id, sample):
        if model == "base" and task_id.startswith("HumanEval/"):
            return HOSTILE[sample]
        if model == "base" and task_id == "Mbpp/601":
            return "def f(x):\n    return x + 601 if x > 0 else 0\n"  # passes the base inputs only
        if (task_id, sample) == ("HumanEval/2", 0):
            return Answer(text="", finish="error", tokens=0, detail="HTTP 500")
        return right(task_id) if (task_id, sample) != ("HumanEval/1", 2) else "    return x\n"

    result = evaluate(config, models, StandIn(write))
    human, mbpp = (result["suites"][name] for name in ("humaneval", "mbpp+"))
    assert human["models"]["base"]["scores"]["pass@1"]["value"] == 0.0
    ra3 = human["models"]["ra3"]
    assert ra3["scores"]["pass@1"]["value"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert (ra3["scores"]["pass@3"]["tasks"], ra3["infrastructure_errors"]) == (2, 1)
    assert ra3["rationales_per_line"] == pytest.approx(7 / 8)
    assert mbpp["models"]["base"]["scores"]["pass@1"]["value"] == pytest.approx(2 / 3)
    assert mbpp["models"]["base"]["scores"]["pass@1 base inputs only"]["value"] == 1.0
    assert human["pairs"][0]["difference"]["value"] == pytest.approx(8 / 9)
    assert mbpp["models"]["base"]["scores"]["pass@1 test split of MBPP"]["tasks"] == 1
    written = json.loads(Path(config.out_folder, "result.json").read_text())
    assert written["suites"]["humaneval"]["sha256"] == human["sha256"]
    assert human["prompt_example"].startswith("def add0(x):")
    assert "\ndef " in human["stop"]


def test_exactly_what_is_missing_is_done_on_restart(world):
    settings, models = world
    config = settings()
    dying = StandIn(lambda model, task_id, sample: right(task_id), dies_after=2)
    with pytest.raises(EngineError, match="no engine lives"):
        evaluate(config, models, dying)
    out = Path(config.out_folder)
    completions, verdicts = (out / "humaneval" / f"base.{kind}.jsonl" for kind in ("completions", "verdicts"))
    assert len(read_records(completions)) == 2
    verdicts.write_text("")  # killed before they were judged
    with completions.open("a") as file:
        file.write('{"task_id": "HumanEval/2", "sam')  # and in the middle of a line
    again = StandIn(lambda model, task_id, sample: right(task_id))
    result = evaluate(config, models, again)
    assert len(again.asked) == len(set(again.asked)) == 10
    assert ("base", "HumanEval/0", 0) not in again.asked
    for suite in result["suites"].values():
        assert [model["scores"]["pass@1"]["value"] for model in suite["models"].values()] == [1.0, 1.0]
    before = {path: path.read_bytes() for path in out.rglob("*.jsonl")}
    idle = StandIn(None)
    assert evaluate(config, models, idle) == result
    assert idle.asked == []
    assert {path: path.read_bytes() for path in out.rglob("*.jsonl")} == before


def test_errors_of_the_infrastructure_are_tried_again_on_restart(world):
    settings, models = world
    config = settings("suites=[humaneval]")
    broken = Answer(text="", finish="error", tokens=0, detail="HTTP 500")
    one = {"base": models["base"]}
    first = evaluate(config, one, StandIn(lambda *_: broken))
    assert first["suites"]["humaneval"]["models"]["base"]["scores"] == {"pass@1": None}
    again = StandIn(lambda model, task_id, sample: right(task_id))
    assert evaluate(config, one, again)["suites"]["humaneval"]["models"]["base"]["scores"]["pass@1"]["value"] == 1.0
    assert len(again.asked) == 3


def test_changed_settings_are_refused(world):
    settings, models = world
    one = {"base": models["base"]}
    evaluate(settings("suites=[humaneval]"), one, StandIn(lambda model, task_id, sample: right(task_id)))
    for change, named in (
        ("seed=1", "seed=0"),
        ("rationales=strip", "rationales='keep'"),
        ("max_tasks=1", "suite humaneval tasks=3"),
        ("sampling.max_new_tokens=7", "sampling="),
    ):
        with pytest.raises(ValueError, match=f"was begun with {re.escape(named)}"):
            evaluate(settings("suites=[humaneval]", change), one, StandIn(None))


def test_changed_weights_are_refused_and_other_models_may_join(world):
    settings, models = world
    config = settings("suites=[humaneval]")
    good = StandIn(lambda model, task_id, sample: right(task_id))
    evaluate(config, {"base": models["base"]}, good)
    joined = evaluate(config, {"ra3": models["ra3"]}, good)["suites"]["humaneval"]
    assert list(joined["models"]) == ["base", "ra3"]
    assert len(joined["pairs"]) == 1
    (models["base"] / "model.safetensors").write_text("other")
    with pytest.raises(ValueError, match="was begun with model base sha256 weights="):
        evaluate(config, {"base": models["base"]}, good)
    with pytest.raises(ValueError, match="one by one"):
        evaluate(settings("engine.urls=[http://a]"), models, good)


def test_two_evaluations_do_not_share_a_folder(world):
    settings, models = world

    def write(model, task_id, sample):
        with pytest.raises(OSError, match="another `ra3 eval` is at work"):
            evaluate(settings("suites=[humaneval]"), models, StandIn(None))
        return right(task_id)

    evaluate(settings("suites=[humaneval]", "max_tasks=1"), {"base": models["base"]}, StandIn(write))


def test_scoring_what_a_run_says_it_trained_on_is_refused(world, tmp_path):
    settings, _models = world
    note_training(tmp_path, ["other/1"], start=tmp_path)
    note_training(tmp_path, ["Mbpp/11"], start=tmp_path / "export")
    assert noted_training(tmp_path / "export") == {"other/1", "Mbpp/11"}
    with pytest.raises(ValueError, match=rf"model rlvr={tmp_path}: 1 of 6 tasks were trained on, .*trained_tasks.txt"):
        evaluate(settings(), {"rlvr": tmp_path}, StandIn(None))


def test_scoring_what_was_trained_on_is_refused_unless_asked_for(world):
    settings, models = world
    one = {"base": models["base"]}
    with pytest.raises(ValueError, match="2 of 6 tasks were trained on"):
        evaluate(settings("trained_on=['mbpp:train']"), one, StandIn(None))
    with pytest.raises(ValueError, match="splits are"):
        load_suites(settings("trained_on=['mbpp:tset']"))
    config = settings("trained_on=['mbpp:train']", "allow_leaks=true")
    answers = StandIn(lambda model, task_id, sample: right(task_id) if task_id != "Mbpp/11" else "def f(x): return 0")
    suite = evaluate(config, one, answers)["suites"]["mbpp+"]
    assert suite["leaked_tasks"] == 2
    scores = suite["models"]["base"]["scores"]
    assert (scores["pass@1"]["value"], scores["pass@1 not trained on"]["value"]) == (pytest.approx(2 / 3), 0.0)


class Scripts(HTMLParser):
    """Elements and attributes of a page that could do something."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag in ("script", "img", "iframe", "object", "base", "form", "link"):
            self.found.append(tag)
        self.found += [name for name, _ in attributes if name.startswith("on") or name in ("src", "style")]
        self.found += [value for name, value in attributes if name == "href" and not re.fullmatch(r"[\w./+-]+", value)]


def test_pages_show_answers_and_let_nothing_of_them_run(world):
    settings, models = world
    config = settings("suites=[humaneval]", "rationales=strip")
    answers = {
        "HumanEval/0": HOSTILE[2] + "\ndef tail():\n    '</details><script>alert(2)</script>'",
        "HumanEval/1": "    # add it\n    return x + 1\n",
        "HumanEval/2": "   ",
    }
    evaluate(config, {"base": models["base"]}, StandIn(lambda model, task_id, sample: answers[task_id]))
    pages = Path(config.out_folder, "pages")
    assert len(list(pages.rglob("*.html"))) == 4
    for path in pages.rglob("*.html"):
        assert Scripts(path.read_text()).found == ["script"], path
        assert "script-src 'sha256-" in path.read_text()
    hostile = (pages / "humaneval" / "HumanEval_0.html").read_text()
    assert "&lt;script&gt;alert(1)" in hostile
    assert "after the stop" in hostile
    assert '<span class="r">    # add it</span>' in (pages / "humaneval" / "HumanEval_1.html").read_text()
    assert "no code" in (pages / "humaneval" / "HumanEval_2.html").read_text()
    index = (pages / "index.html").read_text()
    assert index.count('data-kind="solved"') == 1
    assert index.count('data-kind="unsolved"') == 2


def test_contest_tasks_are_answered_in_fences(world, tmp_path):
    settings, models = world
    tests = {"inputs": ["1 2", "3 4"], "outputs": ["3", "7"]}
    function = {"fn_name": "double", "inputs": [[2]], "outputs": [4]}
    rows = [
        {"id": number, "question": "Add.", "input_output": json.dumps(content)}
        for number, content in enumerate((tests, function, {}))
    ]
    (tmp_path / "data" / "apps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = {
        "APPS/0": "Sure:\n```python\n# both\nprint(sum(map(int, input().split())))\n```\n",
        "APPS/1": "```python\ndef double(x):\n    return x * x - 1\n```",
    }
    config = settings("suites=[apps]", "data.apps.path=apps.jsonl")
    found = evaluate(config, {"base": models["base"]}, StandIn(lambda model, task_id, sample: answers[task_id]))
    suite = found["suites"]["apps"]
    assert suite["skipped"] == {"no tests": 1}
    assert suite["models"]["base"]["scores"]["pass@1"]["value"] == 0.5
    assert suite["models"]["base"]["rationales"] == 1
    assert suite["max_new_tokens"] == 2000


def test_an_over_long_prompt_fails_and_says_so(world):
    settings, models = world
    config = settings("suites=[humaneval]")
    room = Answer(text="", finish="room", tokens=0, detail="the prompt has 99 tokens")
    found = evaluate(config, {"base": models["base"]}, StandIn(lambda *_: room))["suites"]["humaneval"]["models"][
        "base"
    ]
    assert (found["reasons"], found["scores"]["pass@1"]["value"]) == ({"no room": 3}, 0.0)


def test_samples_have_seeds_of_their_own_that_do_not_depend_on_the_rest(world):
    settings, _ = world
    config = settings("sampling.preset=low_temperature", "sampling.samples_per_task=4")
    suite = load_suites(config)["humaneval"]
    requests = missing_requests(suite, config, {})
    seeds = {request.key: request.seed for request in requests}
    assert len(set(seeds.values())) == 12
    done = {("HumanEval/0", 0): {"finish": "end"}, ("HumanEval/0", 1): {"finish": "error"}}
    assert {request.key: request.seed for request in missing_requests(suite, config, done)} == {
        key: seed for key, seed in seeds.items() if key != ("HumanEval/0", 0)
    }


def test_a_damaged_record_is_an_error(tmp_path):
    with RecordFile(tmp_path / "a.jsonl") as file:
        file.append({"task_id": "a", "sample": 0, "n": 1})
        file.append({"task_id": "a", "sample": 0, "n": 2})
    assert read_records(tmp_path / "a.jsonl") == {("a", 0): {"task_id": "a", "sample": 0, "n": 2}}
    (tmp_path / "a.jsonl").write_text('{"task_id": "a"}\n{}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: is no record"):
        read_records(tmp_path / "a.jsonl")


def test_models_are_named_and_must_be_models(tmp_path):
    assert list(parse_models(["base=a", "ra3=b"])) == ["base", "ra3"]
    for items, message in ((["a"], "write it as name=FOLDER"), (["../x=a"], "name=FOLDER"), (["a=x", "a=y"], "twice")):
        with pytest.raises(ValueError, match=message):
            parse_models(items)
    with pytest.raises(ValueError, match="neither a Hugging Face folder"):
        resolve_model("a", tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("suites=[]", "name at least one"),
        ("suites=[humanevil]", "suites: must be one of"),
        ("sampling.pass_k=[2]", "must be 1 to sampling.samples_per_task=1"),
        ("sampling.samples_per_task=2", "greedy answers are all the same"),
        ("sampling.tempratur=1", "did you mean 'sampling.temperature'"),
        ("prompt.mbpp_shots=5", "mbpp_shots: must be one of"),
    ],
)
def test_bad_settings_are_refused(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_eval_config(None, ["out_folder=out", "suites=[humaneval]", override])


def test_presets_are_the_published_settings():
    config = load_eval_config(None, ["out_folder=o", "suites=[humaneval]", "sampling.preset=high_temperature"])
    assert (config.sampling.samples_per_task, config.sampling.temperature, config.sampling.top_p) == (200, 0.8, 0.95)
    assert config.sampling.pass_k == (1, 10, 100)
