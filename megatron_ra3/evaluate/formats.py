"""Which loader reads a task file, and which file of a benchmark is the known one; for `ra3 eval` and for RLVR alike.

A task that training and scoring read in two ways could be trained on under one name and scored under another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ra3.evaluate import contests, tasks
from megatron_ra3.evaluate.tasks import TaskFile


@dataclass(frozen=True)
class Format:
    """One format of task files, with the benchmark's own file where there is a single one."""

    load: Callable[..., TaskFile[Any]]
    usual_name: str = ""
    sha256: str | None = None


FORMATS = {
    "humaneval": Format(tasks.load_humaneval, "HumanEval.jsonl.gz", tasks.HUMANEVAL_SHA256),
    "mbpp": Format(tasks.load_mbpp, "mbpp.jsonl", tasks.MBPP_SHA256),
    "sanitized_mbpp": Format(tasks.load_sanitized_mbpp, "sanitized-mbpp.json", tasks.SANITIZED_MBPP_SHA256),
    "humaneval_plus": Format(tasks.load_humaneval_plus, "HumanEvalPlus.jsonl.gz", tasks.HUMANEVAL_PLUS_SHA256),
    "mbpp_plus": Format(tasks.load_mbpp_plus, "MbppPlus.jsonl.gz", tasks.MBPP_PLUS_SHA256),
    "livecodebench": Format(contests.load_livecodebench),
    "codeforces": Format(contests.load_codeforces),
    "input_output": Format(contests.load_input_output),
}


def read_tasks(path: Path, file_format: str, sha256: str, **options: Any) -> TaskFile[Any]:
    """The tasks of a file in this format; `options` are those of its loader.

    Empty `sha256`: the known file, or any where there is none. ValueError: missing, another file, or broken.
    """
    chosen = FORMATS[file_format]
    return chosen.load(path, sha256 or chosen.sha256, **options)
