"""A run over a damaged corpus: what is skipped shows in the metrics, and a rank left without samples goes along."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ra3.config import RunConfig, StreamConfig
from megatron_ra3.corpus.manifest import Manifest
from megatron_ra3.corpus.order import EpochOrder
from megatron_ra3.em import midtrain
from tests.distributed import run_ranks
from tests.small import make_config

TAKEN = [4] * 2 + [2] * 3 + [3] * 2  # samples per step of warm-up, E-step and bootstrapping


@pytest.fixture
def damaged(small_corpus, tmp_path) -> Path:
    """A corpus whose second E-step meets two samples of wrong headers."""
    folder = tmp_path / "corpus"
    shutil.copytree(small_corpus, folder)
    (shard,) = Manifest.load(folder).splits["train"].shards
    start = sum(TAKEN[:3])
    data = bytearray((folder / shard.tar.name).read_bytes())
    for sample in EpochOrder([shard.samples], 0, 0, StreamConfig()).samples(start, start + 2):
        data[int(np.load(folder / shard.index.name)[sample, 0])] ^= 1
    (folder / shard.tar.name).write_bytes(data)
    return folder


def metrics_of(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(config.run_folder, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("ranks", "tensor"), [(1, 1), (2, 1), (2, 2)])
def test_skipped_samples_show_in_the_metrics(damaged, tmp_path, ranks, tensor):
    settings = ["corpus.max_bad_samples=2", f"parallel.tensor={tensor}"]
    config = make_config(damaged, tmp_path, *settings)
    run_ranks(midtrain, ranks, config)
    metrics = metrics_of(config)
    assert [record["bad_samples"] for record in metrics] == [0] * 3 + [2] * 7
    assert all(record["stream_wait_seconds"] >= 0.0 for record in metrics)
    assert metrics[3]["think_rate"] == 0.0  # nothing left to think about
    assert len(metrics) == 10


def test_a_run_ends_on_all_ranks_when_the_budget_is_spent(damaged, tmp_path):
    config = make_config(damaged, tmp_path, "corpus.max_bad_samples=1")
    with pytest.raises(RuntimeError, match=r"train-00000\.tar: sample \d+ at byte \d+ is torn .*max_bad_samples=1"):
        run_ranks(midtrain, 2, config)
    assert len(metrics_of(config)) == 3
