"""Shared by tests: a missing system package must not turn a test into a silent skip where it is meant to run."""

import os
import shutil

import pytest

from megatron_ra3.evaluate.sandbox import IsolationError, Sandbox
from megatron_ra3.evaluate.worker import Limits


def require(condition: object, reason: str) -> None:
    """Skip the running test unless `condition` holds; with CI=true fail it instead."""
    if condition:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"cannot be skipped with CI=true: {reason}", pytrace=False)
    pytest.skip(reason)


def open_jail(workers: int, **settings: Limits) -> Sandbox:
    """A sandbox that isolates, for the caller to close; skips the test where the kernel refuses bubblewrap."""
    require(shutil.which("bwrap"), "bubblewrap is not installed")
    try:
        return Sandbox(workers, **settings)
    except IsolationError as error:
        pytest.skip(str(error))
