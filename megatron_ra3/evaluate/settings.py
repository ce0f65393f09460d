"""The settings of `ra3 eval`, apart from those of a training run.

Samples of one setting and verdicts of another must not end up in one score; so what a score depends on is told apart
here from how fast it is made (`engine`, `grading`), which may change when an evaluation is resumed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_ra3.settings import build, read_settings

SuiteName = Literal["humaneval", "mbpp", "sanitized-mbpp", "humaneval+", "mbpp+", "livecodebench", "codeforces", "apps"]
SAMPLING_PRESETS: dict[str, dict[str, Any]] = {
    "greedy": {"samples_per_task": 1, "temperature": 0.0, "top_p": 1.0, "pass_k": [1]},
    "low_temperature": {"samples_per_task": 200, "temperature": 0.2, "top_p": 0.95, "pass_k": [1]},
    "high_temperature": {"samples_per_task": 200, "temperature": 0.8, "top_p": 0.95, "pass_k": [1, 10, 100]},
    "livecodebench": {"samples_per_task": 10, "temperature": 0.2, "top_p": 0.95, "pass_k": [1, 5]},
}
"""As published: greedy decoding; 200 samples at 0.2 for pass@1 and at 0.8 for pass@10 and pass@100; 10 at 0.2."""


@dataclass(frozen=True, kw_only=True)
class FileConfig:
    """A benchmark file."""

    path: str = ""
    """Under `data.folder` where it is relative; empty: the usual name."""
    sha256: str = ""
    """Empty: that of the known version; of a contest file, any, and the result says which."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the benchmark files lie; nothing is downloaded."""

    folder: str = ""
    humaneval: FileConfig = field(default_factory=FileConfig)
    mbpp: FileConfig = field(default_factory=FileConfig)
    sanitized_mbpp: FileConfig = field(default_factory=FileConfig)
    humaneval_plus: FileConfig = field(default_factory=FileConfig)
    mbpp_plus: FileConfig = field(default_factory=FileConfig)
    livecodebench: FileConfig = field(default_factory=FileConfig)
    codeforces: FileConfig = field(default_factory=FileConfig)
    apps: FileConfig = field(default_factory=FileConfig)
    first_date: str = ""
    """LiveCodeBench: ISO dates of contests, both included."""
    last_date: str = "9999"
    python_time_factor: float = 3.0
    """Codeforces: what its time limits are multiplied by."""
    reference_folder: str = ""
    """Where outputs of EvalPlus's references are kept between evaluations; empty: in `out_folder`."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How many answers per task, and how they are drawn. A preset gives what is not set."""

    preset: Literal["greedy", "low_temperature", "high_temperature", "livecodebench"] = "greedy"
    samples_per_task: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    pass_k: tuple[int, ...] = (1,)
    max_new_tokens: int = 0
    """0: as published for the prompt (768, 256 few-shot, 2000 for contests)."""


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """What a model is given besides the task."""

    mbpp_shots: Literal[0, 1, 2, 3] = 3
    """Solved examples before an MBPP task (its tasks 2, 3 and 4); 0: the text and one test as a docstring."""
    start: Literal["tokenizer", "end_of_text"] = "tokenizer"
    """First token: what the tokenizer puts there by itself, if anything; or the end-of-text token, as in training."""
    surface: Literal["newline", "special"] = "newline"
    """Form of the latents (`latents.surface` of the run); `special` also writes `<act>` before each line of a prompt
    that is code."""


@dataclass(frozen=True, kw_only=True)
class EvalEngineConfig:
    """vLLM servers. One is started per model, unless some are given."""

    urls: tuple[str, ...] = ()
    """Running servers, for one model only: they cannot be asked whose weights they hold."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    max_model_len: int = 0
    """Context in tokens; 0: what the longest prompt and answer need, if the model has as much."""
    tensor_parallel: int = 1
    memory_fraction: float = 0.9
    cpu_kv_cache_bytes: int = 1 << 30
    max_in_flight: int = 256
    """Open requests per server."""
    tokens_per_request: int = 128
    """An answer is asked for in pieces of so many tokens; in between it is searched for stop strings."""
    attempts: int = 4
    """Tries of a request, on any server, before it counts as an infrastructure error."""
    server_args: tuple[str, ...] = ()
    """Passed to the server as they are, for instance `--data-parallel-size=8`."""
    request_timeout_s: float = 600.0
    start_timeout_s: float = 900.0


@dataclass(frozen=True, kw_only=True)
class GradingConfig:
    """The jail."""

    workers: int = 0
    """0: one per processor."""
    isolation: Literal["bubblewrap", "unsafe"] = "bubblewrap"


@dataclass(frozen=True, kw_only=True)
class EvalLoggingConfig:
    """Where scores go besides the result file (docs/observability.md)."""

    wandb_project: str = ""
    wandb_group: str = ""
    """Empty: the group of the run that the first model comes from, else the name of `out_folder`."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Everything of one evaluation."""

    out_folder: str = ""
    """Completions, verdicts, pages and the result."""
    suites: tuple[SuiteName, ...] = ()
    seed: int = 0
    mbpp_split: Literal["test", "all"] = "test"
    """Of MBPP and sanitized MBPP: the 500 (257) test tasks that are published, or all."""
    max_tasks: int = 0
    """If positive: only so many tasks of every suite, for a quick look."""
    rationales: Literal["keep", "strip"] = "keep"
    """Whether comments on lines of their own stay in the programs that are run."""
    trained_on: tuple[str, ...] = ()
    """What the models were trained on: task ids, splits ("mbpp:train") or "@FILE" with one id per line."""
    allow_leaks: bool = False
    """Score tasks of `trained_on` all the same; the result says how many, and gives the score without them."""
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    engine: EvalEngineConfig = field(default_factory=EvalEngineConfig)
    grading: GradingConfig = field(default_factory=GradingConfig)
    logging: EvalLoggingConfig = field(default_factory=EvalLoggingConfig)

    @property
    def workers(self) -> int:
        """Jails at a time."""
        return self.grading.workers or os.cpu_count() or 1


def load_eval_config(path: str | Path | None, overrides: Sequence[str] = ()) -> EvalConfig:
    """Read a YAML file and overrides as `config.load_config` does; ValueError naming the key and the fix."""
    settings = read_settings(path, overrides)
    sampling = settings.get("sampling") or {}
    if isinstance(sampling, dict):
        preset = SAMPLING_PRESETS.get(sampling.get("preset", "greedy"), {})
        settings = {**settings, "sampling": {**preset, **sampling}}
    config: EvalConfig = build(EvalConfig, settings)
    _check(config)
    return config


def _check(config: EvalConfig) -> None:
    if not config.out_folder:
        raise ValueError("out_folder: must be set")
    if not config.suites or len(set(config.suites)) < len(config.suites):
        raise ValueError(f"suites={list(config.suites)}: name at least one, each once")
    sampling = config.sampling
    if sampling.samples_per_task < 1 or any(not 1 <= k <= sampling.samples_per_task for k in sampling.pass_k):
        raise ValueError(
            f"sampling.pass_k={list(sampling.pass_k)}: each must be 1 to sampling.samples_per_task="
            f"{sampling.samples_per_task}"
        )
    if not sampling.pass_k:
        raise ValueError("sampling.pass_k: name at least one k")
    if sampling.temperature < 0 or not 0 < sampling.top_p <= 1:
        raise ValueError(
            f"sampling.temperature={sampling.temperature}, top_p={sampling.top_p}: need >= 0 and 0 < p <= 1"
        )
    if sampling.temperature == 0 and sampling.samples_per_task > 1:
        raise ValueError(
            f"sampling.temperature=0 with samples_per_task={sampling.samples_per_task}: greedy answers are all the same"
        )
    positive = {
        "engine.max_in_flight": config.engine.max_in_flight,
        "engine.tokens_per_request": config.engine.tokens_per_request,
        "engine.attempts": config.engine.attempts,
        "engine.tensor_parallel": config.engine.tensor_parallel,
    }
    for name, value in positive.items():
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    for name, value in {
        "max_tasks": config.max_tasks,
        "sampling.max_new_tokens": sampling.max_new_tokens,
        "engine.max_model_len": config.engine.max_model_len,
        "grading.workers": config.grading.workers,
    }.items():
        if value < 0:
            raise ValueError(f"{name}={value}: must not be negative")
