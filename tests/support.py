"""Shared by tests: a missing system package must not turn a test into a silent skip where it is meant to run."""

import os

import pytest


def require(condition: object, reason: str) -> None:
    """Skip the running test unless `condition` holds; with CI=true fail it instead."""
    if condition:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"cannot be skipped with CI=true: {reason}", pytrace=False)
    pytest.skip(reason)
