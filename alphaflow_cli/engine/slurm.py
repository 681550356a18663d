"""`srun alphaflow train …`: one process per task. Slurm says who is who in its own variables; torch reads others.

A port is not something Slurm hands out: it follows from the job's number, so that all tasks find the same one. Set
MASTER_PORT yourself where it is taken.
"""

import os
import re
from collections.abc import Mapping

PORTS = range(20_000, 60_000)


def slurm_environment(there: Mapping[str, str]) -> dict[str, str]:
    """What torch wants to know of a task of a job step; empty outside one, and where a launcher has said it already."""
    tasks = int(there.get("SLURM_STEP_NUM_TASKS", "1"))  # of the step: a batch script is none, whatever the job has
    if "RANK" in there or tasks < 2 or "SLURM_PROCID" not in there:
        return {}
    visible = [name for name in there.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]  # none: all, or hidden
    sees_one = len(visible) == 1  # --gpus-per-task 1: its GPU is number 0
    job, step = int(there.get("SLURM_JOB_ID", "0")), int(there.get("SLURM_STEP_ID", "0"))
    found = {
        "RANK": there["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": "0" if sees_one else there.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": there.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0],
        "MASTER_ADDR": first_host(there.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        "MASTER_PORT": str(PORTS[(job * 7 + step) % len(PORTS)]),
    }
    return {name: there.get(name, value) for name, value in found.items()}


def first_host(nodes: str) -> str:
    """`gpu[003-005,9],login1` → `gpu003`."""
    match = re.match(r"([^,\[]+)(?:\[([^,\]-]+)[^\]]*\])?([^,\[]*)", nodes)
    if not match:
        return nodes
    head, number, tail = match.groups()
    return f"{head}{number or ''}{tail or ''}"


def join_slurm() -> None:
    """Tell torch."""
    os.environ.update(slurm_environment(os.environ))
