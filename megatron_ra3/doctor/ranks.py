"""Can every rank reach every other, over gloo and over NCCL; if not, which pair cannot.

A collective that hangs names nobody: half an hour later all ranks fail with the same words. Here pairs try each other
one by one, every attempt with a time limit, many pairs at a time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Literal

from megatron_ra3.doctor.findings import Finding
from megatron_ra3.doctor.world import World

Backend = Literal["gloo", "nccl"]
REDUCED_BYTES = 64 * 2**20
PAIR_FIX = "open all TCP ports between these hosts, and name the interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
SHOWN_PAIRS = 8
ATTEMPT = "doctor attempt"
"""Name of the threads that exchange."""


def ranks(world: World) -> Iterator[Finding]:
    """Roll call, all pairs, and one reduction over all ranks for each backend that the run would use."""
    import torch

    if world.absent:
        listed = ", ".join(str(rank) for rank in world.absent)
        yield Finding(
            "ranks",
            "roll call",
            "failed",
            f"{world.size} of {world.expected} ranks came within {world.timeout_s:g} s, missing: rank {listed}",
            "look into the log of those ranks; did their node start, and can it reach MASTER_ADDR:MASTER_PORT?",
        )
    else:
        hosts = len(set(world.hosts.values()))
        yield Finding("ranks", "roll call", "ok", f"{world.size} ranks on {hosts} hosts")
    yield from _reachability(world, "gloo")
    with_gpu = world.meet("GPU", torch.cuda.is_available())
    if all(with_gpu.values()):
        yield from _reachability(world, "nccl")
    elif any(with_gpu.values()):
        lacking = ", ".join(f"{rank} ({world.hosts[rank]})" for rank, has in with_gpu.items() if not has)
        yield Finding("ranks", "nccl", "failed", f"no GPU on rank {lacking}", "give every rank a GPU, or none")


def _reachability(world: World, backend: Backend) -> Iterator[Finding]:
    """NCCL starts slowly, so there pairs are tried only where the reduction over all has failed."""
    if backend == "nccl":
        reduced = _reduction(world, backend)
        yield reduced
        if reduced.status == "ok":
            return
    failed = unreachable_pairs(world, backend)
    if not failed:
        yield Finding("ranks", f"{backend} pairs", "ok", f"all {world.size * (world.size - 1) // 2} pairs exchange")
    for text in failed[:SHOWN_PAIRS]:
        yield Finding("ranks", f"{backend} pair", "failed", text, PAIR_FIX)
    if len(failed) > SHOWN_PAIRS:
        yield Finding("ranks", f"{backend} pairs", "failed", f"{len(failed)} pairs in all cannot exchange", PAIR_FIX)
    if backend == "gloo" and not failed:
        yield _reduction(world, backend)


def unreachable_pairs(world: World, backend: Backend) -> list[str]:
    """Let all pairs exchange a number in both directions; what failed, the same on all ranks.

    Pairs meet as in a round-robin tournament, so n ranks need n - 1 rounds. After each round the ranks report; one that
    does not is left out of the rounds to come, so that it costs the others one time limit and not one per pair.
    """
    failed: dict[tuple[int, int], str] = {}
    members = dict(world.hosts)
    for number, pairs in enumerate(rounds(sorted(world.hosts))):
        own = next((pair for pair in pairs if world.rank in pair and all(rank in world.hosts for rank in pair)), None)
        problem = _try_pair(world, backend, own) if own else ""
        reports = world.meet(f"{backend} round {number}", problem)
        for pair in pairs:
            told = [text for rank in pair if (text := reports.get(rank))]
            if told or any(rank not in world.hosts for rank in pair):
                silent = [rank for rank in pair if rank not in world.hosts]
                why = f"rank {silent[0]} fell silent" if silent else told[0]
                failed[pair] = f"rank {pair[0]} ({members[pair[0]]}) and rank {pair[1]} ({members[pair[1]]}): {why}"
    return [failed[pair] for pair in sorted(failed)]


def rounds(members: list[int]) -> Iterator[list[tuple[int, int]]]:
    """Every pair once, in rounds of disjoint pairs (the circle method)."""
    circle: list[int | None] = [*members, *([None] if len(members) % 2 else [])]
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        yield [(min(one, two), max(one, two)) for one, two in pairs if one is not None and two is not None]
        circle = [circle[0], circle[-1], *circle[1:-1]]


def _try_pair(world: World, backend: Backend, pair: tuple[int, int]) -> str:
    """Empty where both directions work, else what went wrong."""

    def exchange() -> None:
        import torch

        place = pair.index(world.rank)
        group = _group(world, backend, f"{backend}/{pair[0]}-{pair[1]}", place, 2)
        sent, received = torch.full((1,), float(world.rank)), torch.zeros(1)
        if backend == "nccl":
            sent, received = sent.cuda(), received.cuda()
        for sender in (0, 1):
            if place == sender:
                group.send([sent], 1 - place, 0).wait()
            else:
                group.recv([received], 1 - place, 0).wait()
        if received.item() != pair[1 - place]:
            raise RuntimeError(f"sent {pair[1 - place]}, received {received.item():g}")

    return _within(world.timeout_s, exchange)


def _reduction(world: World, backend: Backend) -> Finding:
    """Sum 64 MiB over all ranks, twice: the first time builds connections, the second is timed."""
    order = sorted(world.hosts)
    taken_s = 0.0

    def reduce() -> None:
        import torch

        nonlocal taken_s
        group = _group(world, backend, f"{backend}/all", order.index(world.rank), len(order))
        values = torch.empty(REDUCED_BYTES // 4, device="cuda" if backend == "nccl" else "cpu")
        for _ in range(2):
            values.fill_(1.0)
            started_s = time.perf_counter()
            group.allreduce([values]).wait()
            total = float(values.sum() / len(values))
            taken_s = time.perf_counter() - started_s
        if total != len(order):
            raise RuntimeError(f"the sum of {len(order)} ones is {total:g}")

    problem = _within(4 * world.timeout_s, reduce)
    found = world.meet(f"{backend} all-reduce", problem, patience=5)
    problems = [f"rank {rank} ({world.hosts[rank]}): {text}" for rank, text in found.items() if text]
    name = f"{backend} all-reduce"
    if problems:
        return Finding("ranks", name, "failed", problems[0], PAIR_FIX)
    rate = 2 * (len(order) - 1) / len(order) * REDUCED_BYTES / taken_s / 1e9
    return Finding("ranks", name, "ok", f"64 MiB over {len(order)} ranks in {taken_s * 1e3:.0f} ms, {rate:.1f} GB/s")


def _group(world: World, backend: Backend, name: str, rank: int, size: int) -> Any:
    """A process group of its own store keys, so that a failed one leaves nothing behind for the next."""
    import torch
    from torch.distributed import PrefixStore, ProcessGroupGloo

    store, timeout = PrefixStore(f"ra3-doctor/group/{name}", world.store), timedelta(seconds=world.timeout_s)
    if backend == "gloo":
        return ProcessGroupGloo(store, rank, size, timeout)
    from torch.distributed import ProcessGroupNCCL

    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    options = ProcessGroupNCCL.Options()
    options._timeout = timeout  # noqa: SLF001 - torch's own name for it
    return ProcessGroupNCCL(store, rank, size, options)


def _within(timeout_s: float, work: Callable[[], None]) -> str:
    """Run `work` in a thread; empty, or what went wrong. A thread that hangs is left behind."""
    outcome: list[str] = []

    def attempt() -> None:
        try:
            work()
        except (RuntimeError, ValueError) as error:  # torch's distributed errors are RuntimeErrors
            outcome.append(str(error).splitlines()[0] or type(error).__name__)
        else:
            outcome.append("")

    thread = threading.Thread(target=attempt, name=ATTEMPT, daemon=True)
    thread.start()
    thread.join(timeout_s + 1.0)
    return outcome[0] if outcome else f"no answer within {timeout_s:g} s"


def hangs() -> bool:
    """Whether a thread was left behind in an exchange that never ends; it would keep the process from its end."""
    return any(thread.name == ATTEMPT for thread in threading.enumerate())
