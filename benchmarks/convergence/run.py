"""The members of the family at equal budget: trains or resumes all of them, measures, and writes RESULTS.md anew.

    python benchmarks/convergence/run.py CIFAR10 --out runs/convergence --minutes 70 --jobs 2

CIFAR10 is a folder or tar with one folder per class. The same command again resumes, and redraws table and picture
from what is there. Runs of seed 0 come first, then further seeds of the members whose order is claimed. A change of
--steps needs another --out.
"""

import argparse
import os
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
from table import write_results  # noqa: E402

MEMBERS = (
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
)
CLAIMED = ("alphaflow-25", "meanflow-25", "alphaflow-50", "meanflow-75", "alphaflow-25-converging")  # several seeds
SEEDS = 3
TOLD = ("meanflow-25", "alphaflow-25")  # whose conflict RESULTS.md tells, at seed 0


@dataclass(frozen=True)
class Job:
    """One run."""

    member: str
    seed: int
    folder: Path

    @property
    def recipe(self) -> Path:
        return HERE / "recipes" / f"{self.member}.yaml"


def jobs_of(out: Path, members: tuple[str, ...], seeds: int) -> list[Job]:
    """All members once, then the claimed ones with further seeds."""
    wanted = [(member, seed) for seed in range(seeds) for member in members if seed == 0 or member in CLAIMED]
    return [Job(member, seed, out / f"{member}-s{seed}") for member, seed in wanted]


def alphaflow(*words: object) -> list[str]:
    """A command line of this project in this interpreter."""
    return [sys.executable, "-m", "alphaflow_cli", *map(str, words)]


def prepare_store(pictures: Path, store: Path) -> None:
    """Pixels at 16 px; a finished store is left alone."""
    line = alphaflow("prep-latents", pictures, "--out", store, "--size", 16, "--autoencoder", "none")
    if not (store / "manifest.json").exists():
        subprocess.run(line, check=True)


def is_done(job: Job, steps: int) -> bool:
    """Whether its last checkpoint was written."""
    return (job.folder / "checkpoints" / f"step-{steps:08d}").is_dir()


def start(job: Job, store: Path, steps: int) -> subprocess.Popen[bytes]:
    """Train or resume, with one thread, its talk in a file beside the runs."""
    line = alphaflow("train", job.recipe, "--data", store, "--out", job.folder, "--no-verify", "--micro-batch", 64)
    line += ["--set", f"train.steps={steps}", "--set", f"train.seed={job.seed}"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    }
    with job.folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(line, stdout=log, stderr=log, env=environment)


def train_all(jobs: list[Job], store: Path, *, steps: int, at_once: int, deadline: float) -> None:
    """So many at a time; at the deadline the running ones are told to save and stop."""
    waiting, running = [job for job in jobs if not is_done(job, steps)], dict[str, subprocess.Popen[bytes]]()
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                say(f"training {job.folder.name}, {len(waiting)} more wait")
                running[job.folder.name] = start(job, store, steps)
            time.sleep(1)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                say(f"{name} ended with code {running.pop(name).returncode}")
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for name, process in running.items():
            say(f"{name} was stopped and saved, code {process.wait()}")


def measure_all(done: list[Job], store: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Scores and page of every finished run, and the conflict of two; one process and one thread each."""
    out = options.out.resolve()
    if not done:
        return {}
    reference = prepare_reference(options.pictures, out, options.reference_name)
    told = [job for job in done if job.seed == 0 and job.member in TOLD]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        measured = [pool.submit(evaluate_run, job.folder, reference, out, images=options.images) for job in done]
        conflicts = {job.member: pool.submit(conflict_of, job.folder, store, options.batches) for job in told}
        for job, score in zip(done, measured, strict=True):
            score.result()
            say(f"measured {job.folder.name}")
        found = {member: conflict.result() for member, conflict in conflicts.items()}
    for job in done:
        subprocess.run(alphaflow("report", job.folder), check=True, stdout=subprocess.DEVNULL)
    return found


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="folder or tar of CIFAR-10, one folder per class")
    parser.add_argument("--out", type=Path, default=Path("runs/convergence"))
    parser.add_argument("--minutes", type=float, default=70.0, help="of training; what is unfinished resumes next time")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--steps", type=int, default=3000, help="of every run")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of the members whose order is claimed")
    parser.add_argument("--members", nargs="+", choices=MEMBERS, default=list(MEMBERS))
    parser.add_argument("--images", type=int, default=5000, help="generated for each score")
    parser.add_argument("--reference-name", default="cifar10-jpeg", help="what the pictures are; the score's protocol")
    parser.add_argument("--results", type=Path, default=HERE, help="where RESULTS.md and results.png are written")
    parser.add_argument("--batches", type=int, default=60, help="for the conflict of the MeanFlow run")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    out, began = options.out.resolve(), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    store = out / "store"
    prepare_store(options.pictures, store)
    jobs = jobs_of(out, tuple(options.members), options.seeds)
    deadline = began + 60 * options.minutes
    train_all(jobs, store, steps=options.steps, at_once=options.jobs, deadline=deadline)
    done = [job for job in jobs if is_done(job, options.steps)]
    conflicts = measure_all(done, store, options)
    write_results(done, jobs, conflicts, options)
    say(f"{len(done)} of {len(jobs)} runs are finished")
    print(options.results / "RESULTS.md")


if __name__ == "__main__":
    main()
