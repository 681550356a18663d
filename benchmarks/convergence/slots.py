"""A slot: one process that trains and measures run after run, so that it starts and warms up once.

Slots share the work through files alone. A run is claimed by making `claims/NAME`, its line is `lines/NAME.json`, and
what went wrong is `faults/NAME.txt`. Which run comes next is asked anew each time, because some runs hang on what
others have shown. SIGTERM ends a slot: a training saves its state, and what was being measured is measured again.
"""

import gc
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

from members import CURRICULA, MEMBERS, NEW_SEEDS, STEPS, WIDTH, Job, Line, kind_of, plan, sound, table_of, valid
from record import git, hardware, sha256_of

from alphaflow_cli.recipe.schema import Train

STOPPED = (130, 143)
START, LAST = 4.0, 3.0  # seconds that a run takes besides its steps; that a slot waits for others' runs
TOY = 500  # of so many steps a toy run has one
ANALYZED = [("meanflow-25", STEPS, 0, WIDTH), ("alphaflow-25", STEPS, 0, WIDTH)]  # their conflict at rest is measured


@dataclass(frozen=True)
class Work:
    """What every slot is told."""

    out: Path
    results: Path  # with results.jsonl, the lines of earlier times
    device: str
    until: float  # when all slots are ended, by the clock
    images: int
    cuts: tuple[str, ...]
    longest: int  # steps
    toy: bool


def read_lines(path: Path) -> list[Line]:
    """The lines of a file that may have been cut off, or that is not there."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def lines_of(work: Work) -> dict[str, Line]:
    """The line of every run that is finished on this kind of device, by its name."""
    return valid([line for line in all_lines(work) if kind_of(line) == work.device])


def all_lines(work: Work) -> list[Line]:
    """The lines of earlier times, then those of this folder."""
    fresh = [line for path in sorted((work.out / "lines").glob("*.json")) for line in read_lines(path)]
    return [*read_lines(work.results / "results.jsonl"), *fresh]


def missing(work: Work, lines: dict[str, Line]) -> list[Job]:
    """The runs that are still wanted."""
    planned = (job for job in plan(list(lines.values()), work.device) if job.name not in lines)
    return [job for job in planned if job.cut in work.cuts and job.steps <= work.longest]


def with_ruler(work: Work, lines: dict[str, Line]) -> dict[str, Line]:
    """The lines without those that have to be measured anew: where a table lacks a run, all of it by the ruler at hand.

    The ruler is made in each folder of runs, and on another machine it is another one, whose figures belong in no
    table of the first one's.
    """
    path = work.out / "ruler.safetensors"
    ruler = sha256_of(path)[:12] if path.is_file() else ""
    own = {
        line["run"]: line for line in sound(all_lines(work)) if (kind_of(line), line["ruler"]) == (work.device, ruler)
    }
    lacking = {(job.steps, job.width) for job in missing(work, lines)}
    return {name: line for name, line in lines.items() if table_of(line) not in lacking or name in own} | own


def claim(work: Work) -> Job | None:
    """The most wanted run that nobody has begun and that should be done in time; None when there is none left."""
    while True:
        lines = with_ruler(work, lines_of(work))
        waiting = [job for job in missing(work, lines) if not (work.out / "claims" / job.name).exists()]
        for job in waiting:
            if time.time() + expected(job, lines, work) < work.until and take(work.out / "claims" / job.name):
                return job
        begun = [path for path in (work.out / "claims").iterdir() if path.name not in lines]
        running = [path for path in begun if not (work.out / "faults" / f"{path.name}.txt").exists()]
        if not running or time.time() + LAST > work.until:
            return None
        time.sleep(LAST)  # what the others find may ask for more runs


def take(path: Path) -> bool:
    """Make a file that only one can make."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def expected(job: Job, lines: dict[str, Line], work: Work) -> float:
    """Seconds that a run should take, by those that were done at this time."""
    done = [line for line in lines.values() if (work.out / "lines" / f"{line['run']}.json").is_file()]
    rates = [(line["seconds"] - START) / line["steps"] for line in done[-60:] if line["seconds"] > START]
    return START + job.steps * median(rates) if rates else 0.0


def sets_of(job: Job, work: Work) -> list[str]:
    """The settings of a run: those that its name stands for, and those that change no weight."""
    points = 30 if job.steps == STEPS and job.member in ("meanflow-25", *CURRICULA) else 12
    log = 50 if job.steps <= 6_000 else 200 if job.steps <= 20_000 else 600
    if work.toy:
        return [*job.sets, f"train.steps={steps_of(job, work)}", "train.log_every=2", "train.conflict_every=2",
                "train.save_every=1000", "train.sample_every=0", "train.compile=false"]  # fmt: skip
    graphs = ["train.graphs=true"] if work.device == "cuda" and hasattr(Train, "graphs") else []
    quiet = [*graphs, f"train.log_every={log}", f"train.conflict_every={max(log, job.steps // points // log * log)}"]
    quiet.append(f"train.save_every={10_000 if work.device == 'cuda' else 2_000}")  # a CPU needs minutes for so many
    return [*job.sets, *quiet, "train.sample_every=0", "train.compile=false"]


def steps_of(job: Job, work: Work) -> int:
    return max(2, job.steps // TOY) if work.toy else job.steps


def train(job: Job, work: Work) -> bool:
    """Train or resume by `alphaflow train`; False where a signal stopped it."""
    from alphaflow_cli.cli import run as alphaflow

    words = ["train", str(job.recipe), "--data", str(work.out / "store"), "--out", str(work.out / "runs" / job.name)]
    words += ["--no-verify", "--micro-batch", "64", "--device", work.device]
    try:
        code = alphaflow([*words, *(word for each in sets_of(job, work) for word in ("--set", each))])
    except SystemExit as end:  # a signal, after the state was saved
        code = end.code
    if code not in (0, *STOPPED):
        raise RuntimeError(f"alphaflow train ended with code {code}")
    return code == 0


def measure(job: Job, work: Work, ruler: Any) -> Line:
    """The line of a trained run; its strip of pictures goes to `strips/`."""
    import torch
    from measure import BATCHES, at_rest, journal_of, scores_of, strip_of

    run, device, scales = work.out / "runs" / job.name, torch.device(work.device), MEMBERS[job.member].scales
    scores = [scores_of(run, ruler, device, images=work.images, scale=scale) for scale in scales]
    if job.seed in (0, NEW_SEEDS[0]):
        write(work.out / "strips" / f"{job.name}.png", strip_of(run, device, scale=scales[-1]))
    line: Line = {"scores": scores[0], **journal_of(run)}
    if len(scales) > 1:
        line |= {"guided": scores[1], "scale": scales[1]}
    if (job.member, job.steps, job.seed, job.width) in ANALYZED:
        line["at_rest"] = at_rest(run, work.out / "store", device, ((1, 16),) if work.toy else BATCHES)
    return line


def one(job: Job, work: Work, ruler: Callable[[], Any]) -> bool:
    """Train and measure a run, and write its line; False where a signal stopped it."""
    began = time.monotonic()
    if not train(job, work):
        return False
    opened = ruler()
    line: Line = {"run": job.name, "member": job.member, "steps": job.steps, "seed": job.seed, "width": job.width}
    line |= {"recipe": job.digest, **measure(job, work, opened), "images": work.images, "ruler": opened.digest}
    line |= {"seconds": round(time.monotonic() - began, 1), "device": hardware(work.device)}
    line |= {"commit": commit(), "date": datetime.now(timezone.utc).date().isoformat()}
    text = json.dumps(line, ensure_ascii=False) + "\n"
    write(work.out / "lines" / f"{job.name}.json", text.encode())
    return True


def commit() -> str:
    """The program's commit; where the checkout is a copy without git, what $COMMIT says."""
    if os.environ.get("COMMIT") or not shutil.which("git"):
        return os.environ.get("COMMIT", "unknown")
    decides = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.yaml")  # results do not
    changed = "-dirty" if decides else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + changed


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def the_ruler(work: Work) -> Callable[[], Any]:
    """Opens the ruler once, when it is first needed; the first slot has made it, or says why it could not."""
    opened: list[Any] = []

    def get() -> Any:
        import torch
        from cnn_ruler import open_ruler

        while not (work.out / "ruler.safetensors").is_file():
            if (work.out / "ruler.failed").is_file():
                raise RuntimeError("there is no ruler: ruler.failed says why")
            time.sleep(0.5)
        if not opened:
            opened.append(open_ruler(work.out, torch.device(work.device)))
        return opened[0]

    return get


def make_ruler(work: Work) -> None:
    """Train the ruler where it is not there."""
    import torch
    from cnn_ruler import EPOCHS, WIDTH, open_ruler

    try:
        width, epochs = (4, 1) if work.toy else (WIDTH, EPOCHS)
        open_ruler(work.out, torch.device(work.device), width=width, epochs=epochs)
    except BaseException:
        write(work.out / "ruler.failed", traceback.format_exc().encode())
        raise


def forget() -> None:
    """Give back what the last run held of the GPU's memory."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def slot(work: Work, number: int) -> None:
    """Run after run until none is left or a signal comes. A run that fails ends the process."""
    with (work.out / "logs" / f"slot-{number}.log").open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    signal.signal(signal.SIGTERM, leave)
    if number == 0 and not (work.out / "ruler.safetensors").is_file():
        make_ruler(work)
    ruler = the_ruler(work)
    while job := claim(work):
        forget()
        print(f"{time.strftime('%H:%M:%S')} {job.name}", file=sys.stderr, flush=True)
        try:
            if not one(job, work, ruler):
                return
        except Exception as fault:  # whatever it was: it stands in the run's file, and on the page
            write(work.out / "faults" / f"{job.name}.txt", traceback.format_exc().encode())
            raise SystemExit(1) from fault
