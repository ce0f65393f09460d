"""The ranks that look together: who came, and a way to agree that survives one that does not answer.

Under torchrun or srun all ranks start the same command. They meet in a key-value store rather than in a process group:
a group hangs as a whole where one member is missing, and the point is to say which.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megatron_ra3.doctor.findings import Finding, to_json

if TYPE_CHECKING:
    from torch.distributed import Store

PREFIX = "ra3-doctor"
PORTS_PER_JOB, FIRST_PORT, JOB_BLOCKS = 250, 10000, 88
"""Where SLURM names no port for the rendezvous: one that follows from the job's number."""


class MeetingError(OSError):
    """A rank could not meet the others."""


@dataclass
class World:
    """One rank among those that came. `hosts` maps ranks to host names; a rank that fell silent leaves it."""

    rank: int
    expected: int
    """Ranks that were started."""
    store: Store
    timeout_s: float
    """For one exchange between two ranks."""
    host: str
    hosts: dict[int, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Ranks that came and still answer."""
        return len(self.hosts)

    @property
    def first(self) -> int:
        """The rank that holds the store and the report."""
        return 0

    @property
    def absent(self) -> list[int]:
        """Ranks that never came."""
        return [rank for rank in range(self.expected) if rank not in self.hosts]

    def call_roll(self) -> None:
        """Find out who came; the first rank decides, so that all agree. MeetingError where it is too late."""
        self._set(f"host/{self.rank}", self.host)
        if self.rank == self.first:
            self._set("roll", self._collect("host", range(self.expected), patience=1))
        roll = self._get("roll", self.timeout_s * 3)
        self.hosts = {int(rank): host for rank, host in (roll or {}).items()}
        if self.rank not in self.hosts:
            raise MeetingError(f"rank {self.rank} ({self.host}) came too late, or rank 0 does not answer")

    def agree(self, name: str, value: Any) -> Any:
        """The first rank's value, on all."""
        if self.rank == self.first:
            self._set(f"agreed/{name}", value)
        found = self._get(f"agreed/{name}", self.timeout_s * 4)
        if found is None:
            raise MeetingError(f"rank {self.rank} ({self.host}): rank 0 did not answer within {4 * self.timeout_s:g} s")
        return found

    def meet(self, name: str, value: Any = True, *, patience: int = 2) -> dict[int, Any]:
        """What each rank brought to the meeting `name`; who does not come in `patience` time limits leaves `hosts`."""
        self._set(f"meeting/{name}/{self.rank}", value)
        if self.rank == self.first:
            self._set(f"met/{name}", self._collect(f"meeting/{name}", self.hosts, patience))
        met = self._get(f"met/{name}", self.timeout_s * (2 * patience + 2))
        found = {int(rank): brought for rank, brought in (met or {}).items()}
        if self.rank not in found:
            raise MeetingError(f"rank {self.rank} ({self.host}) fell behind, or rank 0 does not answer")
        self.hosts = {rank: host for rank, host in self.hosts.items() if rank in found}
        return found

    def gather(self, findings: Iterable[Finding]) -> list[Finding]:
        """On the first rank: its findings, and what the others found amiss, marked with rank and host."""
        own = list(findings)
        brought = self.meet("findings", to_json(own), patience=12)
        if self.rank != self.first:
            self._set(f"left/{self.rank}", True)
            return own
        self._collect("left", [rank for rank in brought if rank != self.first], patience=1)  # the store ends with us
        for rank, items in brought.items():
            amiss = [Finding(**item) for item in items if item["status"] != "ok"]
            where = f"rank {rank} ({self.hosts[rank]})"
            new = [finding for finding in amiss if finding not in own]
            own += [Finding(item.topic, item.name, item.status, f"{where}: {item.text}", item.fix) for item in new]
        return own

    def _set(self, key: str, value: Any) -> None:
        from torch.distributed import DistError

        try:
            self.store.set(f"{PREFIX}/{key}", json.dumps(value))
        except DistError as error:
            raise self._lost(error) from error

    def _collect(self, key: str, ranks: Iterable[int], patience: int) -> dict[int, Any]:
        """The values that ranks set within `patience` time limits from now on."""
        deadline_s = time.monotonic() + patience * self.timeout_s
        found = {rank: self._get(f"{key}/{rank}", max(0.01, deadline_s - time.monotonic())) for rank in ranks}
        return {rank: value for rank, value in found.items() if value is not None}

    def _get(self, key: str, limit_s: float) -> Any:
        """The value of a key, None where it does not appear in time."""
        from torch.distributed import DistError, DistStoreError

        try:
            self.store.wait([f"{PREFIX}/{key}"], timedelta(seconds=limit_s))
            return json.loads(self.store.get(f"{PREFIX}/{key}"))
        except DistStoreError:
            return None
        except DistError as error:
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> MeetingError:
        return MeetingError(f"rank {self.rank} ({self.host}) lost the rendezvous: {str(error).splitlines()[0]}")


def join(timeout_s: float, environment: MutableMapping[str, str] = os.environ) -> World | None:
    """Meet the other ranks; None where this process was started alone. MeetingError where the first is out of reach."""
    adopt_srun(environment)
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        return None
    from torch.distributed import DistError, TCPStore

    rank, expected = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    host = socket.gethostname()
    held_by_torchrun = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            address,
            port,
            is_master=rank == 0 and not held_by_torchrun,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
    except DistError as error:
        raise MeetingError(
            f"rank {rank} ({host}) cannot reach the rendezvous {address}:{port} within {timeout_s:g} s: "
            f"{str(error).splitlines()[0]}; does a firewall between the nodes close the port?"
        ) from error
    world = World(rank=rank, expected=expected, store=store, timeout_s=timeout_s, host=host)
    world.call_roll()
    return world


def adopt_srun(environment: MutableMapping[str, str]) -> None:
    """Translate srun's variables to torchrun's, where a bare srun started several tasks."""
    if (
        "RANK" in environment
        or "SLURM_STEP_ID" not in environment
        or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) < 2
    ):
        return
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=environment["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=environment["SLURM_LOCALID"],
    )
    if "MASTER_ADDR" not in environment:
        nodes = ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]]
        environment["MASTER_ADDR"] = subprocess.run(nodes, capture_output=True, text=True, check=True).stdout.split()[0]
    block = int(environment["SLURM_JOB_ID"]) % JOB_BLOCKS
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + block * PORTS_PER_JOB))
