"""Measure seconds per step of a run on a CPU: with as many threads as cores, and with `--threads auto`.

    python benchmarks/bench_load.py DIR --rounds 3

Three conditions: the machine as it is (idle, if nothing else runs), beside one busy process, and under a quota of one
core (a cgroup, version 1 or 2, where we may make one). Each round takes every pair of condition and variant in turn,
each a fresh `alphaflow train`. Reported are the median of the journal's seconds per step, without its first row, and
the load of the machine before each run. What `auto` chose is in `threads`; `start` is the time besides the steps.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from record import record

ALPHAFLOW = [sys.executable, "-m", "alphaflow_cli"]
CGROUPS = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def nothing() -> Iterator[None]:
    """The machine as it is."""
    yield None


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """One other process computes all the time."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield None
    finally:
        other.kill()
        other.wait()


@contextlib.contextmanager
def quota() -> Iterator[Path | None]:
    """A cgroup that grants one core; its list of processes, or None where none may be made."""
    first = CGROUPS / "cpu" / "cpu.cfs_quota_us"
    folder = (first.parent if first.parent.is_dir() else CGROUPS) / f"alphaflow-bench-{os.getpid()}"
    try:
        folder.mkdir()
        if (folder / "cpu.max").exists():
            (folder / "cpu.max").write_text("100000 100000")
        else:
            (folder / "cpu.cfs_period_us").write_text("100000")
            (folder / "cpu.cfs_quota_us").write_text("100000")
    except OSError:
        yield None
        return
    try:
        yield folder / "cgroup.procs"
    finally:
        with contextlib.suppress(OSError):  # a process of it may still be leaving
            folder.rmdir()


CONDITIONS: dict[str, Callable[[], contextlib.AbstractContextManager[Path | None]]] = {
    "as it is": nothing,
    "beside a busy process": busy,
    "quota of one core": quota,
}


def seconds_per_step(folder: Path, store: Path, threads: str, steps: int, group: Path | None) -> dict[str, object]:
    """One run: its seconds per step by the journal, its start, and the number of threads."""
    out = folder / f"run-{time.monotonic_ns()}"
    sets = [f"train.steps={steps}", "alpha.unfinished=true", "train.log_every=5", "train.sample_every=0"]
    words = [*ALPHAFLOW, "train", "quickstart", "--data", str(store), "--out", str(out), "--threads", threads]
    words += [part for value in [*sets, f"train.save_every={steps}"] for part in ("--set", value)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if group is not None:
        words = ["sh", "-c", f'echo $$ > {group} && exec "$@"', "sh", *words]
    load, began = os.getloadavg()[0], time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    whole = time.monotonic() - began
    rows = [json.loads(line)["seconds_per_step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    number = re.search(r"threads: (\d+)|beware: (\d+) thread", done.stderr)
    chosen = int(number[1] or number[2]) if number else None
    start = whole - 5 * sum(rows)
    return {"seconds": statistics.median(rows[1:]), "threads": chosen, "start": start, "load": load}


def main(words: Sequence[str] | None = None) -> None:
    """Measure all pairs in turn; each run is shown on stderr, each pair is one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the store and the runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(words)
    store = options.folder / "store"
    prepare = [*ALPHAFLOW, "prep-latents", "shapes:4000", "--size", "24", "--autoencoder", "none", "--out", str(store)]
    subprocess.run(prepare, capture_output=True, check=True)
    pairs = [(name, threads) for name in CONDITIONS for threads in (str(os.cpu_count()), "auto")]
    found: dict[tuple[str, str], list[dict[str, object]]] = {pair: [] for pair in pairs}
    for turn in range(options.rounds):
        shift = turn % len(pairs)
        for pair in pairs[shift:] + pairs[:shift]:
            with CONDITIONS[pair[0]]() as group:
                if pair[0].startswith("quota") and group is None:
                    continue  # no cgroup may be made here
                found[pair].append(seconds_per_step(options.folder, store, pair[1], options.steps, group))
                print(*pair, found[pair][-1], file=sys.stderr, flush=True)
    for (name, threads), runs in found.items():
        figures = {key: [run[key] for run in runs] for key in ("seconds", "threads", "start", "load")}
        record("load", "cpu", condition=name, requested=threads, steps=options.steps, **figures)


if __name__ == "__main__":
    main()
