"""Measure how long the command line takes to start. --help and a recipe error should take under 0.3 s.

    python benchmarks/bench_start.py --rounds 7

Wall time of fresh processes, best and median over rounds of rotated order; `python` and `import torch` for comparison.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from record import record

ALPHAFLOW = [sys.executable, "-m", "alphaflow_cli"]


def commands(broken: Path) -> dict[str, tuple[list[str], int]]:
    """Name → (command, the exit code it must have)."""
    return {
        "python": ([sys.executable, "-c", "pass"], 0),
        "import torch": ([sys.executable, "-c", "import torch"], 0),
        "alphaflow --help": ([*ALPHAFLOW, "--help"], 0),
        "alphaflow train --help": ([*ALPHAFLOW, "train", "--help"], 0),
        "alphaflow recipe ls": ([*ALPHAFLOW, "recipe", "ls"], 0),
        "alphaflow recipe check b2": ([*ALPHAFLOW, "recipe", "check", "b2"], 0),
        "alphaflow recipe show b2": ([*ALPHAFLOW, "recipe", "show", "b2"], 0),
        "a recipe error": ([*ALPHAFLOW, "recipe", "check", str(broken)], 1),
        "a usage error": ([*ALPHAFLOW, "trian"], 2),
    }


def seconds(command: list[str], code: int) -> float:
    """Time one fresh process."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    took = time.perf_counter() - start
    assert done.returncode == code, (command, done.returncode, done.stderr)
    return took


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="kept rounds")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        broken = Path(folder) / "broken.yaml"
        broken.write_text("train: {stpes: 3}\n")
        todo = commands(broken)
        names = list(todo)
        table = []
        for turn in range(options.rounds + 1):
            order = names[turn % len(names) :] + names[: turn % len(names)]
            table.append({name: seconds(*todo[name]) for name in order})
    found = {
        name: {"best": min(v), "median": statistics.median(v)} for name in names if (v := [t[name] for t in table[1:]])
    }
    record("start", "cpu", seconds=found)


if __name__ == "__main__":
    main()
