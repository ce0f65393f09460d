"""The engine process of a CPU server, forked from its API server: it starts without importing everything again.

vLLM on CPU spawns it, since a pool of threads does not survive a fork; a server of one thread has none. The imports are
most of what a start costs.

Servers of this project ask for it by `FORKED_CORE` in their environment; other vLLM processes stay as they are.
"""

from __future__ import annotations

import multiprocessing
import os

FORKED_CORE = "RA3_FORKED_CORE"


def install() -> None:
    """Let vLLM fork its engine process, where `FORKED_CORE` asks for it; idempotent."""
    if os.environ.get(FORKED_CORE) != "1":
        return
    from vllm.v1.engine import utils

    utils.get_mp_context = lambda: multiprocessing.get_context("fork")
