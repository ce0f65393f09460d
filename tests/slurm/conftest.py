"""The launch scripts are tested against a scheduler, not a stand-in."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import PROGRAMS, Slurm, configure, search_path, start
from tests.slurm.real import SETTINGS, Consumed, consumed
from tests.small import make_config
from tests.support import require


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    missing = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    require(not missing, f"Slurm is not installed: no {', '.join(missing)} (Debian: slurm-wlm munge)")
    require(os.geteuid() == 0, "slurmd starts jobs only as root")
    # Not pytest's tmp_path: socket paths may not exceed 107 characters.
    root = Path(tempfile.mkdtemp(prefix="ra3-slurm-"))
    cluster = configure(root)
    try:
        start(cluster)
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def reference(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Consumed:
    """The samples of an uninterrupted run in one process."""
    from megatron_ra3.em import midtrain

    folder = tmp_path_factory.mktemp("reference")
    midtrain(make_config(small_corpus, folder, *SETTINGS))
    return consumed(folder / "run")
