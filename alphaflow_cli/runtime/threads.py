"""How many threads compute on a CPU: what this process may use, what was requested, what is used.

OpenMP threads that wait spin: more of them than free cores make a small step many times slower. So the number is
bounded by what the system grants, the affinity mask and the quotas of the cgroups (version 1 and 2, every level), and
shared by the processes of a command. `OMP_NUM_THREADS` of the user and `--threads N` come before that.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from alphaflow_cli.runtime.progress import say
from alphaflow_cli.text import counted

OURS = "ALPHAFLOW_OMP"  # set beside an OMP_NUM_THREADS that --processes has chosen, not the user


@dataclass(frozen=True)
class Cores:
    """The cores that this process may use, and what bounds their number."""

    count: int
    bound: str


@dataclass(frozen=True)
class Threads:
    """A number of threads, and why it is this one."""

    count: int
    reason: str
    chosen: bool = False  # by the user; otherwise it is the most that there may be


def cores_here(root: Path = Path("/")) -> Cores:
    """The whole cores that this process may use: the affinity mask and the cgroups' quota bound the machine's."""
    there = os.cpu_count() or 1
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    quota = cgroup_quota(root)
    if quota < mask:
        return Cores(max(1, math.floor(quota)), f"a cgroup's quota of {counted_cores(quota)}")
    if mask < there:
        return Cores(mask, f"an affinity mask of {counted_cores(mask)}")
    return Cores(there, counted_cores(there))


def counted_cores(number: float) -> str:
    """Write a number of cores, which may be a fraction by a quota: `1 core`, `1.5 cores`."""
    return f"{number:g} core{'s' * (number != 1)}"


def cgroup_quota(root: Path = Path("/")) -> float:
    """The cores' worth of time that this process's cgroups and all above them grant; infinite without a limit."""
    limits = [math.inf]
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return math.inf
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in (controllers, "cpu") if controllers else ("", "unified"):
            folder = root / "sys/fs/cgroup" / mount
            limits.append(_limit(folder))
            for part in Path(path).parts[1:]:  # in a container the path may be one that is not mounted here
                folder /= part
                limits.append(_limit(folder))
    return min(limits)


def _limit(folder: Path) -> float:
    """The quota of one cgroup in cores: version 2 keeps it in one file, version 1 in two."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # `max`, -1, or no limit is kept here
        return math.inf


def threads_granted(requested: int | None) -> Threads:
    """The threads of this process: as --threads or the user's OMP_NUM_THREADS says, else at most its share of cores."""
    import torch

    if requested:
        return Threads(requested, "--threads", chosen=True)
    if os.environ.get("OMP_NUM_THREADS") and OURS not in os.environ:
        return Threads(torch.get_num_threads(), f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS'][:20]}", chosen=True)
    cores, beside = cores_here(), os.environ.get("LOCAL_WORLD_SIZE", "1")
    processes = int(beside) if beside.isdecimal() and int(beside) else 1
    reason = cores.bound if processes == 1 else f"{cores.bound} for {processes} processes"
    return Threads(max(1, min(torch.get_num_threads(), cores.count // processes)), reason)


def crowded(threads: Threads) -> str:
    """A line on more threads than cores, where the user wants them; otherwise nothing."""
    cores = cores_here()
    if threads.count <= cores.count:
        return ""
    return (
        f"beware: {counted(threads.count, 'thread')} ({threads.reason}) on {cores.bound}: those that wait for a core "
        f"make every step many times as long. --threads {cores.count} is the most that helps."
    )


@contextmanager
def threads_kept() -> Iterator[None]:
    """Give torch its number of threads back at the end: who called us from Python did not ask for another."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def threads_bounded(requested: int | None, *, on_cpu: bool, is_main: bool) -> Iterator[None]:
    """Compute with as many threads as --threads says, else with at most as many as the system grants.

    On a GPU the host's threads are torch's own affair, unless the user names a number.
    """
    import torch

    with threads_kept():
        if on_cpu or requested:
            threads, before = threads_granted(requested), torch.get_num_threads()
            line = crowded(threads)
            if not threads.chosen and threads.count < before:
                line = f"threads: {threads.count} ({threads.reason})"
            if line and is_main:
                say(line)
            torch.set_num_threads(threads.count)
        yield
