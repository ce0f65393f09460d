"""One thread per process, set before torch is imported: ranks and engines in tests share few cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest

from tests.small import make_corpus

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of ten standard-library files with a tokenizer."""
    return make_corpus(tmp_path_factory.mktemp("small"))
