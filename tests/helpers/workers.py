"""How many processes run the tests, where they write, and whether they see a GPU."""

import os
import re
import tempfile

MOST = 8
ROOM = 2 << 30  # bytes: many times what the tests that run at one time have written
MEMORY_EACH = 2 << 30  # bytes: torch, the networks of a test, and the processes that it starts


def wants_gpu(marks):
    """Whether an expression of -m chooses the tests that need a GPU."""
    return bool(re.search(r"\bgpu\b", re.sub(r"\bnot\s+gpu\b", "", marks or "")))


def count_workers(config):
    """One for each core, within bounds; 0, no processes beside this one, where those would only be in the way."""
    if config.option.capture == "no" or config.option.collectonly or wants_gpu(config.option.markexpr):
        return 0  # somebody watches, nothing runs, or all would want the one GPU
    if count_files(config.invocation_params.dir, config.args) < 2:
        return 0  # to start a process takes longer than most files
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = min(cores, MOST, memory() // MEMORY_EACH)
    return most if most > 1 else 0


def count_files(folder, arguments):
    """How many test files these arguments of a command line name."""
    paths = [folder / argument.split("::")[0] for argument in arguments]
    return len({file for path in paths for file in ([path] if path.is_file() else path.rglob("test_*.py"))})


def memory():
    """Of this machine, in bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # this system does not say
        return MOST * MEMORY_EACH


def quick_folder(folder="/dev/shm"):
    """Where the tests write: in memory where there is room, for the disk costs minutes; else where temporary files go.

    What the package writes it syncs to the disk, file by file, and the tests delete it at once.
    """
    try:
        facts = os.statvfs(folder)
        fits = facts.f_bavail * facts.f_frsize > ROOM and os.access(folder, os.W_OK)
        return folder if fits and not facts.f_flag & os.ST_NOEXEC else tempfile.gettempdir()
    except (AttributeError, OSError):  # another system
        return tempfile.gettempdir()
