"""`srun alphaflow train …`: one process per task. Slurm says who is who in its own variables; torch reads others.

A port is not something Slurm hands out: it follows from the job's number, so that all tasks find the same one. Set
MASTER_PORT yourself where it is taken.
"""

import os
import re
from collections.abc import Mapping

from alphaflow_cli.errors import AlphaflowError

PORTS = range(20_000, 60_000)


def slurm_environment(there: Mapping[str, str]) -> dict[str, str]:
    """What torch wants to know of a task of a job step; empty outside one, and where a launcher has said it already."""
    # of the step: a batch script is none, whatever the job has
    tasks = whole_number(there, "SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in there or tasks < 2 or "SLURM_PROCID" not in there:
        return {}
    job, step = (whole_number(there, name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    visible = [name for name in there.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]  # none: all, or hidden
    sees_one = len(visible) == 1  # --gpus-per-task 1: its GPU is number 0
    found = {
        "RANK": there["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": "0" if sees_one else there.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": there.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0],
        "MASTER_ADDR": first_host(there.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        "MASTER_PORT": str(PORTS[(job * 7 + step) % len(PORTS)]),
    }
    return {name: there.get(name, value) for name, value in found.items()}


def whole_number(there: Mapping[str, str], name: str, default: str = "") -> int:
    """A launcher's variable as a number; another text in it is refused by its name."""
    text = there.get(name, default)
    if not re.fullmatch("[0-9]{1,12}", text):
        raise AlphaflowError(
            f"{name}={text[:40]!r} in the environment is no number. A launcher sets it (torchrun, srun, accelerate "
            "launch): start with one, or unset it."
        )
    return int(text)


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
