"""The small world of `ra3 chaos` as a configuration for tests."""

from pathlib import Path

from megatron_ra3.chaos.world import MODEL, make_corpus, settings
from megatron_ra3.config import RunConfig, load_config

__all__ = ["MODEL", "make_config", "make_corpus"]


def make_config(corpus: Path, folder: Path, *overrides: str) -> RunConfig:
    """A run of a few seconds on `corpus`: one EM round, in-process engine."""
    return load_config(None, settings(corpus, folder, *overrides))
