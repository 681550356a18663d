"""The members of the family at equal budget: trains or resumes all of them, measures, and writes RESULTS.md anew.

    python benchmarks/convergence/run.py CIFAR10 --out runs/convergence --jobs 2
    python benchmarks/convergence/run.py CIFAR10 --out runs/convergence --jobs 2 --comparison newer

CIFAR10 is a folder or tar with one folder per class. The same command again resumes, and redraws table and picture
from what is there. Runs of seed 0 come first, then further seeds of the members whose order is claimed. A change of
--steps, or of a recipe, needs another --out. A run that fails is named in RESULTS.md, and the exit code is then 1.
"""

import argparse
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from measure import conflict_of, evaluate_run, prepare_reference  # noqa: E402
from page import write_results  # noqa: E402
from record import git  # noqa: E402
from table import NAMES, NEWER  # noqa: E402

from alphaflow_cli.recipe import diff_recipes, load_recipe  # noqa: E402


@dataclass(frozen=True)
class Comparison:
    """Members that are compared with each other, and those of them that get several seeds."""

    members: tuple[str, ...]
    claimed: tuple[str, ...]
    folder: Path  # of its RESULTS.md


COMPARISONS = {
    "first": Comparison(
        members=(
            "flow",
            "trajectory-25",
            "shortcut-75",
            "shortcut-75-adaptive",
            "meanflow-25",
            "meanflow-75",
            "alphaflow-25",
            "alphaflow-50",
            "alphaflow-25-converging",
            "alphaflow-25-linear",
            "alphaflow-25-unclamped",
        ),
        claimed=("alphaflow-25", "meanflow-25", "alphaflow-50", "meanflow-75", "alphaflow-25-converging"),
        folder=HERE,
    ),
    "newer": Comparison(members=NEWER, claimed=NEWER, folder=HERE / "newer"),
}
SEEDS = 3
TOLD = ("meanflow-25", "alphaflow-25")  # whose conflict RESULTS.md tells, at seed 0
TOLD_ROWS = (64, 512)  # of a batch; the larger ones are an eighth as many, so as many rows in all
UNTOLD = ("pictures", "out", "results", "minutes")  # options that change no number


@dataclass(frozen=True)
class Job:
    """One run: a member with its seed."""

    member: str
    seed: int
    folder: Path

    @property
    def recipe(self) -> Path:
        return HERE / "recipes" / f"{self.member}.yaml"


def jobs_of(out: Path, members: list[str], claimed: tuple[str, ...], seeds: int) -> list[Job]:
    """All members once, then the claimed ones with further seeds."""
    wanted = [(member, seed) for seed in range(seeds) for member in members if seed == 0 or member in claimed]
    return [Job(member, seed, out / f"{member}-s{seed}") for member, seed in wanted]


def alphaflow(*words: object) -> list[str]:
    """A command line of this project in this interpreter."""
    return [sys.executable, "-m", "alphaflow_cli", *map(str, words)]


def prepare_store(pictures: Path, store: Path) -> None:
    """Pixels at 16 px; a finished store is left alone."""
    line = alphaflow("prep-latents", pictures, "--out", store, "--size", 16, "--autoencoder", "none")
    if not (store / "manifest.json").exists():
        subprocess.run(line, check=True)


def sets_of(job: Job, steps: int) -> list[str]:
    """Give the settings that differ from the member's recipe."""
    return [f"train.steps={steps}", f"train.seed={job.seed}"]


def is_done(job: Job, steps: int) -> bool:
    """Whether its last checkpoint was written, by this very recipe."""
    if not (job.folder / "checkpoints" / f"step-{steps:08d}").is_dir():
        return False
    wanted, found = load_recipe(str(job.recipe), sets_of(job, steps)), load_recipe(str(job.folder / "recipe.yaml"))
    others = [name for name, _, _ in diff_recipes(wanted, found) if name not in ("name", "data.store")]
    if others:
        raise SystemExit(f"{job.folder} was trained with another {', '.join(others)}: give another --out")
    return True


def start(job: Job, store: Path, steps: int) -> subprocess.Popen[bytes]:
    """Train or resume, with one thread; its talk and the program's commit in files beside the runs."""
    line = alphaflow("train", job.recipe, "--data", store, "--out", job.folder, "--no-verify", "--micro-batch", 64)
    line += [word for each in sets_of(job, steps) for word in ("--set", each)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }
    changed = "-dirty" if git("status", "--porcelain") else ""
    with job.folder.with_suffix(".commits").open("a") as commits:
        commits.write(f"{git('rev-parse', '--short', 'HEAD') or 'unknown'}{changed}\n")
    with job.folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(line, stdout=log, stderr=log, env=environment)


def train_all(jobs: list[Job], store: Path, *, steps: int, at_once: int, deadline: float) -> dict[str, str]:
    """Run this many at a time; at the deadline those still running save and stop. Returns what failed, and why."""
    waiting, running = [job for job in jobs if not is_done(job, steps)], dict[str, subprocess.Popen[bytes]]()
    failed = {}
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                say(f"training {job.folder.name}, {len(waiting)} more wait")
                running[job.folder.name] = start(job, store, steps)
            time.sleep(1)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                code = running.pop(name).returncode
                say(f"{name} ended with code {code}")
                if code:
                    failed[name] = f"training ended with code {code}; {name}.log says why"
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for name, process in running.items():
            say(f"{name} was stopped and saved, code {process.wait()}")
    return failed


def measure_all(
    done: list[Job], store: Path, options: argparse.Namespace
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Scores and page of every finished run, and the conflict of two; returns what failed, and the conflicts."""
    if not done:
        return {}, []
    out = options.out.resolve()
    reference = prepare_reference(options.pictures, out, options.reference_name)
    told = [(job, rows) for job in done if job.seed == 0 and job.member in TOLD for rows in TOLD_ROWS]
    failed = {}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        measured = [pool.submit(evaluate_run, job.folder, reference, out, images=options.images) for job in done]
        conflicts = [
            pool.submit(
                conflict_of, job.folder, store, **size(rows, options), out=out / "conflict" / f"{job.member}-{rows}"
            )
            for job, rows in told
        ]
        for job, score in zip(done, measured, strict=True):
            if fault := score.exception():
                failed[job.folder.name] = f"measuring failed: {fault}"
            say(failed.get(job.folder.name, f"measured {job.folder.name}"))
        found = [{"member": job.member, **each.result()} for (job, _), each in zip(told, conflicts, strict=True)]
    for job in done:
        if job.folder.name not in failed:
            subprocess.run(alphaflow("report", job.folder), check=True, stdout=subprocess.DEVNULL)
    return failed, found


def size(rows: int, options: argparse.Namespace) -> dict[str, int]:
    """Choose how many batches of this many rows to analyze, so that all analyses have equally many rows."""
    return {"rows": rows, "batches": max(1, options.batches * TOLD_ROWS[0] // rows)}


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    each = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    each.add_argument("pictures", type=Path, help="folder or tar of CIFAR-10, one folder per class")
    each.add_argument("--out", type=Path, default=Path("runs/convergence"))
    each.add_argument(
        "--minutes", type=float, default=math.inf, help="of training; what is unfinished resumes next time"
    )
    each.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    each.add_argument("--steps", type=int, default=3000, help="of every run")
    each.add_argument("--seeds", type=int, default=SEEDS, help="of the members whose order is claimed")
    each.add_argument("--comparison", choices=COMPARISONS, default="first", help="which members")
    each.add_argument("--members", nargs="+", choices=NAMES, help="only these")
    each.add_argument("--images", type=int, default=5000, help="generated for each score")
    each.add_argument("--reference-name", default="cifar10-jpeg", help="what the pictures are; the score's protocol")
    each.add_argument(
        "--results", type=Path, help="where RESULTS.md and results.png go, if not to the comparison's folder"
    )
    each.add_argument("--batches", type=int, default=64, help="of 64 rows, for the conflict of two runs")
    return each


def told_options(options: argparse.Namespace) -> str:
    """The options that change a number and are not the default, to be typed again."""
    words = []
    for name, value in vars(options).items():
        if name not in UNTOLD and value != parser().get_default(name):
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return "".join(f" {shlex.quote(word)}" for word in words)


def main() -> None:
    options, began = parser().parse_args(), time.monotonic()
    if not options.pictures.exists():
        raise SystemExit(f"{options.pictures}: no such folder or tar of pictures")
    options.told, comparison = told_options(options), COMPARISONS[options.comparison]
    options.members, options.results = options.members or list(comparison.members), options.results or comparison.folder
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    store = out / "store"
    prepare_store(options.pictures, store)
    jobs = jobs_of(out, options.members, comparison.claimed, options.seeds)
    deadline = began + 60 * options.minutes
    failed = train_all(jobs, store, steps=options.steps, at_once=options.jobs, deadline=deadline)
    trained = [job for job in jobs if is_done(job, options.steps)]
    unmeasured, conflicts = measure_all(trained, store, options)
    failed |= unmeasured
    done = [job for job in trained if job.folder.name not in failed]
    write_results(done, failed, len(jobs), conflicts, options)
    say(f"{len(done)} of {len(jobs)} runs are finished, {len(failed)} failed")
    print(options.results / "RESULTS.md")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
