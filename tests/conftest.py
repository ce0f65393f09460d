"""One thread per process, set before torch is imported: ranks and engines in tests share few cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest

from tests.small import make_corpus

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `--dist loadgroup`: a file's tests share fixtures and stay together; real servers start one by one."""
    for item in items:
        serves = any(item.get_closest_marker(name) for name in ("vllm", "slurm"))
        item.add_marker(pytest.mark.xdist_group("servers" if serves else item.path.name))


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of ten standard-library files with a tokenizer."""
    return make_corpus(tmp_path_factory.mktemp("small"))
