"""What RLVR needs beside a model and an engine: tasks that can be posed, and a jail that holds and answers.

Without them a run ends after the model was loaded and the engines started, on all nodes.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_ra3.corpus.tokenizer import load_tokenizer
from megatron_ra3.doctor.findings import Finding
from megatron_ra3.evaluate.problems import Problems, load_problems
from megatron_ra3.evaluate.sandbox import Sandbox
from megatron_ra3.evaluate.splits import noted_training, refuse_leaks
from megatron_ra3.evaluate.worker import JailError
from megatron_ra3.latents import LatentFormat
from megatron_ra3.rlvr_config import JailConfig, RlvrRunConfig, TaskFileConfig
from megatron_ra3.rollout.answers import prompt_ids

PROBED_PROGRAMS = 5


def tasks(config: RlvrRunConfig) -> Iterator[Finding]:
    """The task files as the run would read them, and whether it would be evaluated on what it trains on."""
    found: dict[str, Problems] = {}
    wanted = {"tasks": config.tasks} | ({"heldout": config.heldout} if config.evaluate.every_steps else {})
    for section, file in wanted.items():
        try:
            found[section] = load_problems(file)
        except (ValueError, OSError) as error:
            fix = f"correct {section}.file, {section}.format or {section}.sha256"
            yield Finding("tasks", section, "failed", str(error), fix)
        else:
            yield _posed(section, file, found[section])
    yield from _prompts(config, found)
    if len(found) < 2:
        return
    ids = {section: [problem.task.task_id for problem in problems.problems] for section, problems in found.items()}
    earlier = noted_training(Path(config.model.folder))
    try:
        leaked = refuse_leaks(ids["tasks"], ids["heldout"], allow=config.evaluate.allow_leaks)
    except ValueError as error:
        yield Finding("tasks", "leaks", "failed", str(error), "other files, or evaluate.allow_leaks=true")
        return
    before = len(earlier & set(ids["heldout"]))
    text = f"{leaked} held-out tasks are trained on, {before} were by the model before"
    yield Finding("tasks", "leaks", "warning" if leaked or before else "ok", text)


def _posed(section: str, file: TaskFileConfig, found: Problems) -> Finding:
    reasons = ", ".join(f"{count} {why}" for why, count in Counter(found.skipped.values()).items())
    left_out = f"; {len(found.skipped)} left out: {reasons}" if found.skipped else ""
    return Finding("tasks", section, "ok", f"{len(found.problems)} tasks of {file.file} as {file.format}{left_out}")


def _prompts(config: RlvrRunConfig, found: Mapping[str, Problems]) -> Iterator[Finding]:
    """How long the prompts are, where there is a tokenizer."""
    try:
        tokenizer = load_tokenizer(config.tokenizer_folder)
        latent_format = LatentFormat.build(config.latents.surface, tokenizer)
    except (ValueError, OSError):  # told by `model`
        return
    limit = config.rlvr.max_prompt_tokens
    for section, problems in found.items():
        lengths = [len(prompt_ids(problem, latent_format, tokenizer)) for problem in problems.problems]
        long = sum(length > limit for length in lengths)
        text = f"{min(lengths)} to {max(lengths)} tokens, {long} of {len(lengths)} over rlvr.max_prompt_tokens={limit}"
        none_left = long == len(lengths)
        fix = "raise rlvr.max_prompt_tokens" if none_left else ""
        yield Finding("tasks", f"{section} prompts", "failed" if none_left else "ok", text, fix)


def jail(config: JailConfig) -> Iterator[Finding]:
    """Open one, let it look at itself from inside, and run a few programs in it."""
    workers = config.workers or os.cpu_count() or 1
    try:
        with Sandbox(1, isolation=config.isolation) as sandbox:
            began_s = time.monotonic()
            outputs = [sandbox.run_script("print(6 * 7)").stdout for _ in range(PROBED_PROGRAMS)]
            taken_s = (time.monotonic() - began_s) / PROBED_PROGRAMS
            bounded = sandbox.memory_cgroup
    except (ValueError, OSError, JailError) as error:
        yield Finding("jail", config.isolation, "failed", str(error), "install bubblewrap; see docs/evaluation.md")
        return
    if set(outputs) != {b"42\n"}:
        yield Finding("jail", config.isolation, "failed", f"a program that prints 42 printed {outputs}")
        return
    text = f"{taken_s * 1e3:.0f} ms per program, {workers} workers per replica"
    if config.isolation == "unsafe":
        fix = "jail.isolation=bubblewrap, unless nothing on this machine matters"
        yield Finding("jail", "unsafe", "warning", f"programs of the model run as ordinary processes; {text}", fix)
        return
    yield Finding("jail", "bubblewrap", "ok", f"holds; {text}")
    if not bounded:
        text = "no control group may be created: programs that start processes are bounded one by one only"
        yield Finding("jail", "memory", "warning", text, "run as root, or in a delegated control group")
