"""Who is compared with whom: the members, their runs in the order of their worth, and the name of each run.

A member is a recipe of `recipes/` and the settings that differ from it. A run is a member with its number of steps, its
seed and its width. `plan` gives all runs of a kind of device, the most wanted first; one part depends on what was
measured before: the best curriculum, which is confirmed on new seeds (PROTOCOL.md).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
STEPS, WIDTH, SEEDS, MORE_SEEDS, NEW_SEEDS = 3_000, 64, (0, 1, 2), (3, 4), (10, 11, 12, 13, 14)
BUDGETS, LONG, LONGEST = (2_000, 6_000), 20_000, 60_000
Line = dict[str, Any]  # one finished run, as results.jsonl has it
Table = tuple[int, int]  # steps and width: runs that have both in common are compared


@dataclass(frozen=True)
class Member:
    """A way to train: a recipe and what differs from it. `scales` are those of guidance that it is sampled with."""

    label: str
    recipe: str
    sets: tuple[str, ...] = ()
    scales: tuple[float, ...] = (1.0,)


def curriculum(first: int, last: int) -> Member:
    """The published shape of α, stretched: 1 until the one share of the run, 0 from the other one on."""
    sets = (f"alpha.start={first}%", f"alpha.end={last}%", f"alpha.gamma={GAMMA}")
    return Member(f"α 1 until {first}%, 0 from {last}%", "alphaflow-25", sets)


GAMMA = 10.6  # with the clamp of .005 the sigmoid then fills all of [start, end]
ENDS = ((0, 30), (0, 50), (0, 70), (0, 100), (10, 30), (10, 50), (10, 70), (10, 100), (30, 50), (30, 100))
UNCLAMPED = ("loss.weight=converging", "loss.clamp=0", "alpha.clamp=0")
FLOOR = ("alpha.start=0", "alpha.end=70%", f"alpha.gamma={GAMMA}", *UNCLAMPED)
HEAD = ("model.velocity_head=2",)
SCALE = (*HEAD, "guidance.scale=drawn", "guidance.label_dropout=0.1", "guidance.drop=equal")
INTERVAL = (*SCALE, "model.inputs=[scale, interval]", "guidance.interval=drawn")
TOKENS = (*INTERVAL, "model.conditioning=tokens")
MODERN = (*TOKENS, "model.block=modern", "model.mlp_ratio=2.6666666666666667")
GUIDED = (1.0, 2.0)

MEMBERS = {
    "flow": Member("flow matching", "flow"),
    "trajectory-25": Member("trajectory flow matching .25", "trajectory-25"),
    "shortcut-75": Member("Shortcut .75, plain square", "shortcut-75"),
    "shortcut-75-adaptive": Member("Shortcut .75, adaptive weight", "shortcut-75-adaptive"),
    "meanflow-25": Member("MeanFlow .25", "meanflow-25"),
    "meanflow-75": Member("MeanFlow .75", "meanflow-75"),
    "alphaflow-25": Member("α-Flow .25", "alphaflow-25"),
    "alphaflow-50": Member("α-Flow .5", "alphaflow-50"),
    "alphaflow-25-converging": Member("α-Flow .25, converging weight, no clamp", "alphaflow-25-converging"),
    "alphaflow-25-linear": Member("α-Flow .25, linear schedule", "alphaflow-25-linear"),
    "alphaflow-25-unclamped": Member("α-Flow .25, no clamp", "alphaflow-25-unclamped"),
    **{f"alpha-{first}-{last}": curriculum(first, last) for first, last in ENDS},
    "floor-02": Member("α 1 → .02, no JVP, converging", "alphaflow-25", ("alpha.final=0.02", *FLOOR)),
    "floor-002": Member("α 1 → .002, no JVP, converging", "alphaflow-25", ("alpha.final=0.002", *FLOOR)),
    "low-002": Member(
        "α .1 → .002 as SoFlow, no JVP, converging",
        "alphaflow-25",
        ("alpha.kind=exponential", "alpha.initial=0.1", "alpha.final=0.002", "alpha.gamma=1", *UNCLAMPED),
    ),
    "alphaflow-25-bf16": Member("α-Flow .25 in bf16", "alphaflow-25", ("train.precision=bf16",)),
    "alphaflow-25-precise": Member(
        "α-Flow .25 in bf16, fp32 below α = .05",
        "alphaflow-25",
        ("train.precision=bf16", "train.precise_below=0.05"),
    ),
    "soflow-75": Member("SoFlow, as on ImageNet", "soflow-75"),
    "soflow-0": Member("SoFlow, as on CIFAR-10", "soflow-0"),
    "meanflow-25-boundary": Member("MeanFlow .25, boundary tangent", "meanflow-25-boundary"),
    "meanflow-25-data": Member("MeanFlow .25, predicts the data", "meanflow-25-data"),
    "meanflow-25-short": Member("MeanFlow .25, short intervals first", "meanflow-25-short"),
    "imf-head": Member("… and a velocity head of 2 blocks", "meanflow-25-boundary", HEAD),
    "imf-scale": Member(
        "… and the scale as an input", "meanflow-25-boundary", (*SCALE, "model.inputs=[scale]"), GUIDED
    ),
    "imf-interval": Member("… and the interval as an input", "meanflow-25-boundary", INTERVAL, GUIDED),
    "imf-tokens": Member("… and tokens instead of adaLN", "meanflow-25-boundary", TOKENS, GUIDED),
    "imf-modern": Member("… and the modern block", "meanflow-25-boundary", MODERN, GUIDED),
}
FIRST = (
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
ALONE = ("flow", "trajectory-25", "shortcut-75", "shortcut-75-adaptive")  # one seed: they are far away
RUNGS = ("imf-head", "imf-scale", "imf-interval", "imf-tokens", "imf-modern")
NEWER = (
    "meanflow-25",
    "alphaflow-25",
    "soflow-75",
    "soflow-0",
    "meanflow-25-boundary",
    "meanflow-25-data",
    "meanflow-25-short",
    *RUNGS,
)
SHARES = (("meanflow-25", "meanflow-75"), ("alphaflow-25", "alphaflow-50"))
CLAIMED = ("meanflow-25", "alphaflow-25")
LARGER = "alphaflow-50"  # the larger share of r = t rows that has the least grade after 6,000 steps (EVIDENCE.md)
CURRICULA = (
    "alphaflow-25",
    *(f"alpha-{first}-{last}" for first, last in ENDS),
    "alphaflow-25-linear",
    "alphaflow-25-unclamped",
    "alphaflow-25-converging",
    "floor-02",
    "floor-002",
    "low-002",
)
PRECISIONS = ("alphaflow-25-bf16", "alphaflow-25-precise")
CUTS = {  # the questions, by their short names
    "budget": "(a) budget",
    "curriculum": "(b) curriculum",
    "confirm": "(b) on new seeds",
    "size": "(c) twice the width",
    "newer": "the newer members",
    "first": "the comparison before this one",
    "further": "beyond the protocol",
}


@dataclass(frozen=True)
class Job:
    """One run."""

    cut: str  # for which question; a run that answers several is planned once
    member: str
    steps: int
    seed: int
    width: int = WIDTH

    @property
    def name(self) -> str:
        wide = f"-w{self.width}" if self.width != WIDTH else ""
        return f"{self.member}-{self.steps}{wide}-s{self.seed}"

    @property
    def recipe(self) -> Path:
        return HERE / "recipes" / f"{MEMBERS[self.member].recipe}.yaml"

    @property
    def sets(self) -> list[str]:
        """What differs from the recipe's file and may change a number."""
        wide = [f"model.dim={self.width}", f"model.heads={self.width // 16}"] if self.width != WIDTH else []
        return [*MEMBERS[self.member].sets, *wide, f"train.steps={self.steps}", f"train.seed={self.seed}"]

    @property
    def digest(self) -> str:
        """Names the recipe, without its remarks, and the settings: a line of another digest is none of this run."""
        text = "\n".join(line for line in text_of(self.recipe).splitlines() if not line.startswith("#"))
        return hashlib.sha256("\n".join([text, *self.sets]).encode()).hexdigest()[:12]


@lru_cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def jobs_of(cut: str, members: Sequence[str], steps: Sequence[int], seeds: Sequence[int], **more: int) -> list[Job]:
    return [Job(cut, member, each, seed, **more) for seed in seeds for each in steps for member in members]


def plan(lines: Sequence[Line], kind: str) -> list[Job]:
    """All runs on this kind of device, the most wanted first; a run of several questions keeps its first place."""
    first: dict[str, Job] = {}
    for job in on_a_cpu() if kind == "cpu" else on_a_card(lines):
        first.setdefault(job.name, job)
    return [*first.values()]


def on_a_cpu() -> list[Job]:
    """What PROTOCOL.md asks of a CPU: the longest runs of (a), and the newer members."""
    return [
        *jobs_of("budget", [*CLAIMED, LARGER], (LONG,), SEEDS),
        *jobs_of("budget", CLAIMED, (LONG,), MORE_SEEDS),
        *newer_jobs(),
    ]


def on_a_card(lines: Sequence[Line]) -> list[Job]:
    """All else; the runs that hang on the best curriculum only once it is known."""
    shares = [member for pair in SHARES for member in pair]
    best = best_curriculum(lines)
    winners = [best] if best else []
    return [
        *jobs_of("budget", CLAIMED, (LONG,), SEEDS),  # they take as long as all that follows, beside it
        *jobs_of("curriculum", ["meanflow-25", *CURRICULA], (STEPS,), SEEDS),
        *jobs_of("confirm", dict.fromkeys([*winners, *CLAIMED]), (STEPS,), NEW_SEEDS),
        *jobs_of("budget", shares, (*BUDGETS, STEPS), SEEDS),
        *jobs_of("confirm", winners, BUDGETS, SEEDS),
        *jobs_of("budget", CLAIMED, BUDGETS, MORE_SEEDS),
        *newer_jobs(),
        *jobs_of("size", dict.fromkeys([*winners, *CLAIMED]), (STEPS,), SEEDS, width=2 * WIDTH),
        *jobs_of("first", [member for member in FIRST if member not in ALONE], (STEPS,), SEEDS),
        *jobs_of("first", ALONE, (STEPS,), SEEDS[:1]),
        *jobs_of("further", [LARGER, *winners], (LONG,), SEEDS),
        *jobs_of("further", CLAIMED, (LONG,), MORE_SEEDS),
        *jobs_of("further", CLAIMED, (LONGEST,), SEEDS),
        *jobs_of("further", CLAIMED, (LONG,), SEEDS, width=2 * WIDTH),
        *jobs_of("further", ["meanflow-25", *CURRICULA], (STEPS,), MORE_SEEDS),
    ]


def newer_jobs() -> list[Job]:
    others = [member for member in NEWER if member not in RUNGS]
    return [
        *jobs_of("newer", others, (STEPS,), SEEDS),
        *(job for rung in RUNGS for job in jobs_of("newer", [rung], (STEPS,), SEEDS)),
        *jobs_of("newer", PRECISIONS, (STEPS,), SEEDS),
    ]


def kind_of(line: Line) -> str:
    """Whether a run was on a GPU or on a CPU: their draws differ, so they are never in one table."""
    return "cuda" if " x " in line["device"] else "cpu"


def sound(lines: Sequence[Line]) -> list[Line]:
    """The last line of each run by each ruler; none of a run whose recipe has changed since."""
    found = {}
    for line in lines:
        if line["member"] in MEMBERS:
            job = Job("", line["member"], line["steps"], line["seed"], line["width"])
            if job.digest == line["recipe"]:
                found[job.name, line["ruler"]] = line
    return [*found.values()]


def valid(lines: Sequence[Line]) -> dict[str, Line]:
    """The line of each run. Runs of one length and width stand in one table, so one ruler has measured them: that of
    the most, of two the later one.
    """
    tables: dict[Table, dict[str, dict[str, Line]]] = {}
    for line in sound(lines):
        tables.setdefault(table_of(line), {}).setdefault(line["ruler"], {})[line["run"]] = line
    chosen = [max(reversed(rulers.values()), key=len) for rulers in tables.values()]
    return {name: line for found in chosen for name, line in found.items()}


def table_of(line: Line) -> Table:
    return line["steps"], line["width"]


def grade(lines: Sequence[Line], member: str, steps: int, seeds: Sequence[int]) -> float | None:
    """What a member is chosen by: the mean over seeds of log(FD-tiny · FD-cnn) at 1 NFE; None if a seed is missing."""
    there = {(line["member"], line["steps"], line["seed"]): line for line in lines if line["width"] == WIDTH}
    wanted = [there.get((member, steps, seed)) for seed in seeds]
    scores = [line["scores"]["1"] for line in wanted if line]
    if len(scores) < len(seeds):
        return None
    return mean(log(max(score["fd_tiny"], 1e-9) * max(score["fd_cnn"], 1e-9)) for score in scores)


def best_curriculum(lines: Sequence[Line]) -> str | None:
    """The curriculum of the least grade besides the published one, once all are measured."""
    grades = {member: grade(lines, member, STEPS, SEEDS) for member in CURRICULA if member != "alphaflow-25"}
    known = {member: value for member, value in grades.items() if value is not None}
    return min(known, key=known.__getitem__) if len(known) == len(grades) else None
