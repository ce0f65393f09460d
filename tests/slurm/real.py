"""A small mid-training as a job: two trainer nodes of one rank each, one node with two vLLM servers."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import yaml

from megatron_ra3.cli import main
from megatron_ra3.settings import to_dict
from tests.slurm.cluster import Slurm
from tests.small import make_config

SCRIPT = Path(__file__).parents[2] / "slurm" / "ra3_midtrain.sbatch"
SETTINGS = ("warmup.steps=1", "checkpoint.every_steps=1", "engine.start_timeout_s=900")
VLLM = ("engine.kind=vllm", "engine.cpu_kv_cache_bytes=67108864")
STEPS = 9
Consumed = list[tuple[int, str, int, str]]


def consumed(run: Path) -> Consumed:
    """Step, phase, number and digest of the samples of all steps in a run folder."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    records = [json.loads(line) for line in lines]
    return [(item["step"], item["phase"], item["samples"], item["samples_digest"]) for item in records]


class RealJob:
    """A submitted job; `engine_nodes` 0 means the in-process engine."""

    def __init__(self, slurm: Slurm, corpus: Path, folder: Path, *, engine_nodes: int = 1) -> None:
        self.slurm = slurm
        self.folder = folder
        self.run = folder / "run"
        config = make_config(corpus, folder, *SETTINGS, *(VLLM if engine_nodes else ()))
        (folder / "run.yaml").write_text(yaml.safe_dump(to_dict(config)))
        submitted = slurm.run(
            "sbatch", "--parsable", f"--nodes={2 + engine_nodes}", "--gpus-per-node=0", "--signal=B:USR1@1",
            f"--chdir={folder}", str(SCRIPT), "run.yaml",
            timeout_s=20, RA3_PYTHON=sys.executable, RA3_ENGINE_NODES=str(engine_nodes), RA3_ENGINES_PER_NODE="2",
            RA3_LOG_DIR=str(folder / "logs"), OMP_NUM_THREADS="1",
        )  # fmt: skip
        assert submitted.returncode == 0, submitted.stderr
        self.id = int(submitted.stdout)
        self.logs = folder / "logs" / f"ra3-midtrain-{self.id}"

    def log(self, name: str) -> str:
        path = self.logs / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def nodes(self) -> list[str]:
        """Where the job was begun last."""
        nodelist = re.findall(r"^job \d+, start \d+, on (\S+)$", self.log("batch"), re.MULTILINE)[-1]
        return self.slurm.run("scontrol", "show", "hostnames", nodelist, timeout_s=20).stdout.split()

    def await_steps(self, count: int, timeout_s: float = 600) -> None:
        """Wait until so many steps are in the metrics."""
        deadline = time.monotonic() + timeout_s
        while len(consumed(self.run)) < count:
            assert time.monotonic() < deadline, self._story()
            time.sleep(0.1)

    def kill(self, node: str, word: str) -> None:
        """SIGKILL one of the job's processes on `node`, whose first words behind the interpreter hold `word`."""
        found = self.slurm.processes(self.id, node)
        chosen = [pid for pid, argv in found.items() if word in " ".join(argv[1:4])]
        assert chosen, found
        os.kill(min(chosen), signal.SIGKILL)

    def ends(self, timeout_s: float = 1500) -> None:
        """Wait for the end, which is a good one: all steps, a whole final checkpoint, and the weights."""
        code = self.slurm.exit_code(self.id, timeout_s)
        assert code == 0, self._story()
        assert json.loads((self.run / "summary.json").read_text())["steps"] == len(consumed(self.run)) == STEPS
        assert (self.run / "checkpoints" / f"step-{STEPS:08d}").is_dir()
        assert main(["checkpoint", "verify", str(self.run)]) == 0
        assert (self.run / "export" / "config.json").is_file()

    def ends_as(self, reference: Consumed) -> None:
        """A good end, and in every step the reference's samples, each used once."""
        self.ends()
        assert consumed(self.run) == reference

    def _story(self) -> str:
        return "\n".join(f"{log.name}:\n{log.read_text(errors='replace')[-3000:]}" for log in self.logs.glob("*.log"))
