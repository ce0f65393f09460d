"""One jail with one worker, so that every program meets what the one before it left behind."""

import pytest

from tests.support import open_jail


@pytest.fixture(scope="package")
def jail():
    patch = pytest.MonkeyPatch()
    patch.setenv("RA3_HOSTILE_SECRET", "x")
    with open_jail(1) as sandbox:
        yield sandbox
    patch.undo()
