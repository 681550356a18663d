"""All comparisons of the family: trains or resumes what is missing, measures it, and writes every page anew.

    python benchmarks/convergence/run.py                                # all pages, and what is missing
    python benchmarks/convergence/run.py CIFAR10 --jobs 16 --minutes 8  # about 100 runs of 3,000 steps on one H100
    python benchmarks/convergence/run.py CIFAR10 --device cpu           # what is a CPU's part, on two cores: a day

CIFAR10 is a folder with `train` and `test`, each with a folder per class. What is measured, and in which order, was
written down before (PROTOCOL.md, newer/PROTOCOL.md). A finished run is a line of results.jsonl; those that are there
are not done again, so that the pages are made from this repository alone. The same command again goes on. To begin
anew, give another folder of results: --results DIR. A run that fails is named on the pages, and the exit code is 1.
Of runs on another machine, `lines`, `strips` and `faults` of its --out come into a folder here, which --out names.
Runs on a GPU and runs on a CPU draw other numbers, so they are other runs: the pages of the latter are in `cpu`.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from operator import itemgetter
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from members import CUTS, kind_of, sound  # noqa: E402
from slots import Work, all_lines, lines_of, missing, slot, write  # noqa: E402

KINDS = ("cuda", "cpu")
FOLDERS = ("runs", "lines", "claims", "faults", "strips", "logs")
STOPS = 12  # seconds that a slot has for saving; what is measured then is measured again
FAULTS = 24  # after so many the machine is at fault, not a run


def prepare(pictures: Path | None, work: Work) -> bool:
    """Make the folders and both stores; whether there is something to train on."""
    for name in FOLDERS:
        (work.out / name).mkdir(parents=True, exist_ok=True)
    for path in (*(work.out / "claims").iterdir(), *(work.out / "faults").iterdir(), work.out / "ruler.failed"):
        path.unlink(missing_ok=True)
    for part, store in (("train", work.out / "store"), ("test", work.out / "test")):
        if not (store / "manifest.json").exists():
            if pictures is None:
                return False
            words = ["prep-latents", pictures / part, "--out", store, "--size", 16, "--autoencoder", "none"]
            subprocess.run([sys.executable, "-m", "alphaflow_cli", *map(str, words)], check=True)
    return True


def start(work: Work, number: int) -> BaseProcess:
    process = get_context("spawn").Process(target=slot, args=(work, number), name=f"slot-{number}")
    process.start()
    return process


def work_off(work: Work, jobs: int) -> None:
    """Keep so many slots busy until nothing is left or the time is over; then they save and end."""
    running = [start(work, number) for number in range(jobs)]
    began, shown = time.time(), 0
    while running and time.time() < work.until and not (work.out / "ruler.failed").exists():
        time.sleep(0.5)
        ended = [process for process in running if not process.is_alive()]
        faults = len(list((work.out / "faults").iterdir()))
        for process in ended:
            running.remove(process)
            if process.exitcode and faults < FAULTS:
                running.append(start(work, int(process.name.removeprefix("slot-")) or jobs))
        done = len(list((work.out / "lines").iterdir()))
        if done != shown:
            shown = done
            say(f"{done} runs are measured after {time.time() - began:.0f} s, {faults} faults")
    for process in running:
        process.terminate()
    for process in running:
        process.join(max(0.1, STOPS - max(0.0, time.time() - max(work.until, began))))
        if process.is_alive():
            process.kill()
            process.join()


def keep(work: Work) -> None:
    """Write all lines to results.jsonl, of every kind of device, in the order of their names."""
    lines = all_lines(work)
    kinds = [sound([line for line in lines if kind_of(line) == kind]) for kind in KINDS]
    work.results.mkdir(parents=True, exist_ok=True)
    found = (line for lines in kinds for line in sorted(lines, key=itemgetter("run")))
    texts = (json.dumps(line, ensure_ascii=False) + "\n" for line in found)
    write(work.results / "results.jsonl", "".join(texts).encode())


def keep_strips(fresh: Path, kept: Path, found: Collection[str]) -> None:
    """Put the new strips of finished runs beside the pages, so that the grids can be drawn from there."""
    for strip in sorted(fresh.glob("*.png")):
        if strip.stem in found:
            kept.mkdir(parents=True, exist_ok=True)
            write(kept / strip.name, strip.read_bytes())


def pages_of(work: Work) -> Path:
    return work.results if work.device == "cuda" else work.results / work.device


def close(work: Work, faults: dict[str, str], *, pages: bool) -> None:
    """Write the pages of a kind of device, and say what it lacks."""
    found = lines_of(work)
    left = missing(work, found)
    if pages and found:
        from pages import write_pages

        for path in write_pages(list(found.values()), faults, left, pages_of(work)):
            print(path)
    counts = Counter(CUTS[job.cut] for job in left)
    of_each = ", ".join(f"{question} {count}" for question, count in counts.items())
    say(f"{work.device}: {len(found)} runs are finished, {len(left)} are missing" + f": {of_each}" * bool(left))


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    each = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    each.add_argument("pictures", type=Path, nargs="?", help="folder of CIFAR-10 with train and test")
    each.add_argument("--out", type=Path, default=Path("runs/evidence"), help="of the runs, the stores and the ruler")
    each.add_argument("--results", type=Path, default=HERE, help="of results.jsonl and the pages")
    each.add_argument(
        "--device", choices=KINDS, default="cuda", help="whose runs: those of another kind are in no table of these"
    )
    each.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    each.add_argument("--minutes", type=float, default=math.inf, help="what is unfinished then resumes next time")
    each.add_argument("--cuts", nargs="+", choices=[*CUTS], default=[*CUTS], help="only these questions")
    each.add_argument("--images", type=int, default=5_000, help="generated for each score")
    each.add_argument("--longest", type=int, default=10**9, help="only runs of at most so many steps")
    each.add_argument("--toy", action="store_true", help="a few steps of each run, to try all of this")
    each.add_argument("--pages", action="store_true", help="write the pages and train nothing")
    each.add_argument("--runs", action="store_true", help="train and measure, and write no page")
    return each


def main() -> None:
    options, began = parser().parse_args(), time.time()
    os.environ["OMP_NUM_THREADS"] = "1"  # before the slots are started
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    until = began + 60 * options.minutes
    out, results = options.out.resolve(), options.results.resolve()
    work = Work(out, results, options.device, until, options.images, tuple(options.cuts), options.longest, options.toy)
    train = not options.pages and options.out.is_dir() | (options.pictures is not None)
    if train and missing(work, lines_of(work)) and prepare(options.pictures, work):
        work_off(work, options.jobs)
    keep(work)
    faults = {path.stem: path.read_text(encoding="utf-8") for path in sorted((out / "faults").glob("*.txt"))}
    if not options.runs:
        keep_strips(out / "strips", pages_of(work) / "strips", lines_of(work))
    for kind in KINDS:
        close(replace(work, device=kind), faults if kind == options.device else {}, pages=not options.runs)
    for name, text in faults.items():
        say(f"{name} failed: {text.strip().splitlines()[-1]}")
    broken = (out / "ruler.failed").exists()
    if broken:
        say((out / "ruler.failed").read_text(encoding="utf-8"))
    raise SystemExit(1 if faults or broken else 0)


if __name__ == "__main__":
    main()
