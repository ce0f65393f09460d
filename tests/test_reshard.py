"""Resuming by another number of ranks: the samples are those of the uninterrupted run, the losses equal to rounding."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ra3.config import RunConfig
from megatron_ra3.em import midtrain
from megatron_ra3.lifecycle import StopRequestedError
from tests.distributed import run_ranks
from tests.small import make_config

SETTINGS = ("mstep.snippets_per_step=4", "estep.learning_rate=1e-5", "optimizer.eps=1e-3")
"""Adam's first steps divide gradients by themselves: a larger eps keeps rounding as small as it is."""


def _metrics(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(config.run_folder, "metrics.jsonl").read_text().splitlines()]


def _run(config: RunConfig) -> bool:
    try:
        midtrain(config)
    except StopRequestedError:
        return False
    return True


def _on(ranks: int, config: RunConfig) -> bool:
    return run_ranks(_run, ranks, config)[0] if ranks > 1 else _run(config)


@pytest.fixture(scope="module")
def whole(small_corpus, tmp_path_factory) -> list[dict[str, Any]]:
    config = make_config(small_corpus, tmp_path_factory.mktemp("whole"), *SETTINGS)
    assert _run(config)
    return _metrics(config)


DISTRIBUTED = "parallel.distributed_optimizer=true"


@pytest.mark.parametrize(
    ("stops", "before", "after"),
    [
        ((4,), (1, ()), (2, ("parallel.tensor=2",))),
        ((7,), (2, ("parallel.pipeline=2",)), (1, ())),
        ((8,), (2, (DISTRIBUTED,)), (1, (DISTRIBUTED,))),  # in the middle of the M-step, snippets waiting
        ((8, 1), (1, ()), (2, ())),
    ],
    ids=["1 to TP2 in the E-step", "PP2 to 1 in bootstrapping", "DP2 to 1 in the M-step", "1 to DP2 in the M-step"],
)
def test_a_run_goes_on_in_another_layout(whole, small_corpus, tmp_path, capfd, stops, before, after):
    (ranks, overrides), (ranks_after, overrides_after) = before, after
    assert not _on(
        ranks, make_config(small_corpus, tmp_path, *SETTINGS, *overrides, f"checkpoint.stop_after_steps={stops[0]}")
    )
    for extra in stops[1:]:
        config = make_config(
            small_corpus, tmp_path, *SETTINGS, *overrides_after, f"checkpoint.stop_after_steps={extra}"
        )
        assert not _on(ranks_after, config)
    config = make_config(small_corpus, tmp_path, *SETTINGS, *overrides_after)
    assert _on(ranks_after, config)
    if ranks_after == 1:
        assert "random generators seeded anew" in capfd.readouterr().out
    found = _metrics(config)
    for key in ("step", "phase", "samples", "samples_digest", "stream_epoch", "stream_position"):
        assert [record[key] for record in found] == [record[key] for record in whole], key
    for key in ("loss", "reward", "nats_per_code_token", "objective", "think_rate"):
        assert [record.get(key, 0.0) for record in found] == pytest.approx(
            [record.get(key, 0.0) for record in whole], rel=2e-4
        ), key
