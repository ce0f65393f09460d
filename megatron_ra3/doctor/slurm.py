"""SLURM: is it there, does its controller answer, may this user submit, and does a job know what a run asks it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping

from megatron_ra3.doctor.findings import Finding
from megatron_ra3.doctor.machine import run

JOB_VARIABLES = ("SLURM_JOB_NODELIST", "SLURM_NTASKS", "SLURM_CPUS_ON_NODE")
"""What slurm/ra3_midtrain.sbatch reads inside a job."""


def slurm(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Version, submission, and the variables of the job if this is one."""
    if shutil.which("sbatch") is None:
        yield Finding("slurm", "sbatch", "ok", "not installed: only slurm/ needs it")
        return
    status, output = run(["sbatch", "--version"])
    if status:
        fix = "run it on a node where SLURM is configured (SLURM_CONF)"
        yield Finding("slurm", "sbatch", "warning", _last_line(output), fix)
        return
    yield Finding("slurm", "sbatch", "ok", output)
    status, output = run(["sbatch", "--test-only", "--ntasks=1", "--time=1", "--wrap=true"])
    if status:
        fix = "is slurmctld up (scontrol ping), and do account and partition need naming (sbatch -A, -p)?"
        yield Finding("slurm", "can submit", "warning", _last_line(output), fix)
    else:
        yield Finding("slurm", "can submit", "ok", _last_line(output))
    if "SLURM_JOB_ID" in environment:
        yield from _job(environment)


def _job(environment: Mapping[str, str]) -> Iterator[Finding]:
    lacking = [name for name in JOB_VARIABLES if name not in environment]
    name = f"job {environment['SLURM_JOB_ID']}"
    if lacking:
        fix = "start tasks with srun from inside the job, and do not clear its environment"
        yield Finding("slurm", name, "warning", f"{', '.join(lacking)} not set", fix)
    else:
        yield Finding("slurm", name, "ok", f"{environment['SLURM_NTASKS']} tasks on {environment[JOB_VARIABLES[0]]}")
    if "SLURM_JOB_END_TIME" not in environment:
        text = "SLURM_JOB_END_TIME not set (SLURM before 22.05, or no time limit): a run cannot see its end coming"
        yield Finding("slurm", "time limit", "warning", text, "set checkpoint.wall_clock_limit_s, or use --signal")


def _last_line(output: str) -> str:
    return output.splitlines()[-1] if output else "no output"
