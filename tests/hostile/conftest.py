"""One jail with one worker, so that every program meets what the one before it left behind."""

import pytest

from megatron_ra3.evaluate.sandbox import IsolationError, Sandbox
from tests.support import require


@pytest.fixture(scope="package")
def jail():
    patch = pytest.MonkeyPatch()
    patch.setenv("RA3_HOSTILE_SECRET", "x")
    try:
        sandbox = Sandbox(1)
    except IsolationError as error:
        require(False, str(error))
        raise
    with sandbox:
        yield sandbox
    patch.undo()
