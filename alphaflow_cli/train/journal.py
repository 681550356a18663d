"""What a run records of itself: metrics.jsonl, the trackers beside it, and how much of the device the run uses.

metrics.jsonl has one row every few steps, written at once, readable while the run goes on. The sums live on the device
and are read once per row, so logging never makes a step wait. Rows hold means over the steps since the last row: the
UNWEIGHTED loss l, L_TFM, L_TC, the velocity loss of r = t rows, that of a velocity head on all rows, l per bin of
t − r, the gradient's norm, counts of clipped and non-finite gradients. The weighted loss is near 1 by construction: not
shown.

Trackers (TensorBoard, Weights & Biases, trackio) get the same numbers through Accelerate, from the first process only.
What they write lies in RUN/trackers. A resumed run goes on in the same W&B or trackio run: its id is kept there.

Utilisation is estimated: the arithmetic a step needs (recipe/speed.py), over the device's dense bf16 peak. What
gradient checkpointing recomputes is not needed, so it is not counted. Guidance's rows differ from step to step: their
mean is counted.
"""

import json
import math
import os
import secrets
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphaflow_cli.core.draws import StepDraws
from alphaflow_cli.core.objective import Terms, interval_bins
from alphaflow_cli.core.times import sample_times
from alphaflow_cli.errors import AlphaflowError, blamed_on, pip_install
from alphaflow_cli.files import append, check_regular, make_folder, read_document, write_whole
from alphaflow_cli.recipe import speed
from alphaflow_cli.recipe.schema import Recipe
from alphaflow_cli.runtime.lock import check_lock
from alphaflow_cli.runtime.precision import exact_dtype
from alphaflow_cli.runtime.processes import World
from alphaflow_cli.runtime.progress import say
from alphaflow_cli.train.optimise import COUNTERS
from alphaflow_cli.train.questions import ask
from alphaflow_cli.train.step import guide_of, row_draws, time_laws

LOSS_BINS = 8  # equal bins of t − r in (0, 1]
SUMS = ("later", "error", "trajectory", "consistency", "equal", "velocity")  # then LOSS_BINS sums and LOSS_BINS counts,
# then the velocity head's sum, if there is a head
TIME_DRAWS = 1 << 14  # draws of times, for the mean number of rows that guidance evaluates
# NVIDIA's data sheets, dense bf16 with float32 accumulation, in FLOP/s; the first name found in the device's counts
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


class Sums:
    """The losses, added up over rows and micro-batches on the device, until a row of the journal takes their means."""

    def __init__(self, device: torch.device, *, has_head: bool = False) -> None:
        self.has_head, count = has_head, len(SUMS) + 2 * LOSS_BINS + has_head
        self.values = torch.zeros(count, dtype=exact_dtype(device), device=device)

    def add(self, terms: Terms, t: Tensor, r: Tensor, n_equal: int) -> None:
        """Add the rows of one micro-batch."""
        k, error = n_equal, terms.error.to(self.values.dtype)
        sums, counts = interval_bins(t[k:], r[k:], error[k:], LOSS_BINS)
        parts = [error[k:], *(each[k:].to(error.dtype) for each in (terms.trajectory, terms.consistency)), error[:k]]
        later, trajectory, consistency, velocity = (part.sum() for part in parts)
        n_later, n_equal_rows = (error.new_full((), count) for count in (len(error) - k, k))  # no copy from the host
        head = torch.stack([n_later, later, trajectory, consistency, n_equal_rows, velocity])
        last = [] if terms.head is None else [terms.head.to(error.dtype).sum()[None]]
        self.values += torch.cat([head, sums, counts, *last])

    def take(self, world_sum: Tensor) -> dict[str, Any]:
        """The journal's means by name, from the sums over all processes; this process's own sums begin again at 0."""
        values = world_sum.tolist()
        named, bins = dict(zip(SUMS, values[: len(SUMS)], strict=True)), values[len(SUMS) : len(SUMS) + 2 * LOSS_BINS]
        self.values.zero_()
        rows = named["later"] + named["equal"]
        return {
            "l": _mean(named["error"] + named["velocity"], rows),
            "l_later": _mean(named["error"], named["later"]),
            "l_tfm": _mean(named["trajectory"], named["later"]),
            "l_tc": _mean(named["consistency"], named["later"]),
            "v_loss": _mean(named["velocity"], named["equal"]),
            "l_bins": [_mean(s, n) for s, n in zip(bins[:LOSS_BINS], bins[LOSS_BINS:], strict=True)],
        } | ({"l_head": _mean(values[-1], rows)} if self.has_head else {})


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def take_counters(counters: Tensor) -> dict[str, Any]:
    """The journal's values of the optimiser's counters, which begin again at 0; only the streak goes on."""
    counts = dict(zip(COUNTERS, counters.tolist(), strict=True))
    counters[:-1] = 0
    return {
        "grad_norm": _mean(counts["grad_norm"], counts["steps"]),
        "clipped": int(counts["clipped"]),
        "nonfinite": int(counts["nonfinite"]),
    }


class Journal:
    """metrics.jsonl, and the clock that runs between its rows."""

    def __init__(self, path: Path, step: int, *, writes: bool, device_flops: float | None = None) -> None:
        """Rows past `step` belong to work that was lost, and go. `device_flops`: the peak of all devices, if known."""
        self.path, self.writes, self.device_flops = path, writes, device_flops
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Remove the rows past `step` from the file, and start the clock anew."""
        self.started, self.last_step = time.monotonic(), step
        if self.writes and self.path.exists():
            self._drop_after(step)

    def _drop_after(self, step: int) -> None:
        lines = _lines(self.path)
        steps = [_step_of(line) for line in lines]
        text = "".join(f"{line}\n" for line, at in zip(lines, steps, strict=True) if at is not None and at <= step)
        damaged = sum(at is None for at in steps[:-1])  # the last one was cut off by a kill, perhaps
        if damaged:
            say(f"{self.path}: {damaged:,} lines were not rows of a journal, and are left out")
        write_whole(self.path, text)

    def row(self, values: dict[str, Any], *, step: int, batch: int, flops: float = 0.0) -> dict[str, Any]:
        """Write a row of these values and the clock's; returns the row."""
        now = time.monotonic()
        steps = max(step - self.last_step, 1)
        each = (now - self.started) / steps
        row = values | {"seconds_per_step": round(each, 6), "images_per_second": round(batch / max(each, 1e-9), 1)}
        if torch.cuda.is_available():
            row["memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        if self.device_flops:
            row["utilisation"] = round(flops / max(each, 1e-9) / self.device_flops, 4)
        self.started, self.last_step = now, step
        self.note(row)
        return row

    def note(self, values: dict[str, Any]) -> None:
        """Write any row as it is, such as the scores of a checkpoint; the clock runs on."""
        if self.writes:
            check_lock(self.path.parent)
            line = json.dumps(_without_nan(values), allow_nan=False) + "\n"
            append(self.path, line, kept="The last checkpoint is kept; the same command resumes.")

    def leave_out(self, seconds: float) -> None:
        """Do not count these seconds as training: the next row's speed is that of the steps."""
        self.started += seconds


def _without_nan(value: Any) -> Any:
    """Put null in place of NaN and infinity, which JSON does not know."""
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str) -> int | None:
    """The step of a row; None where the line is no row, because a kill cut it off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _lines(path: Path) -> list[str]:
    """The file's lines; a file that is no text at all is somebody else's, and not for us to cut."""
    check_regular(path)
    with blamed_on(path, "the journal of a run"):
        return path.read_text(encoding="utf-8").split("\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read all whole rows of a journal; none where there is no file."""
    lines = _lines(path) if path.exists() else []
    return [json.loads(line) for line in lines if _step_of(line) is not None]


def console_line(row: dict[str, Any]) -> str:
    """Write a row of the journal as a person reads it, for the terminal."""

    def shown(name: str, form: str = ".4f") -> str:
        value = row.get(name)
        return "–" if value is None else format(value, form)

    rate = f"{row['images_per_second']:,.0f} img/s"
    parts = [f"α {row['alpha']:.3f}", f"l {shown('l')}", rate, f"TFM {shown('l_tfm')}", f"TC {shown('l_tc')}"]
    parts += [f"v {shown('v_loss')}", f"|g| {shown('grad_norm', '.3f')}", f"lr {row['lr']:.1e}"]
    if row["nonfinite"]:
        parts.append(f"NON-FINITE {row['nonfinite']}")
    return "  ".join(parts)


def check_trackers(recipe: Recipe) -> None:
    """Refuse trackers whose package is missing; Accelerate would only warn and track nothing."""
    missing = [name for name in recipe.train.trackers if find_spec(name) is None]
    if missing:
        raise AlphaflowError(
            f"train.trackers: {', '.join(missing)} cannot be imported. "
            f"Run: {pip_install(','.join(missing))}, or do without: --set train.trackers=[]"
        )


class Trackers:
    """The recipe's trackers, if any; Accelerate got their names in `join_world`."""

    def __init__(self, recipe: Recipe, world: World, folder: Path, step: int) -> None:
        self.world, self.names = world, recipe.train.trackers if world.is_main else ()
        if not self.names:
            return
        home = folder / "trackers"
        make_folder(home)
        os.environ.setdefault("TRACKIO_DIR", str(home.resolve() / "trackio"))
        run = {"name": folder.name, "resume": "allow"}
        options = {
            "tensorboard": {"purge_step": step + 1},  # rows past the step where we resume are forgotten
            "wandb": {**run, "id": _run_id(home / "id"), "dir": str(home)},
            "trackio": run,
        }
        config = None if step else flat(asdict(recipe))
        world.accelerator.init_trackers("alphaflow", config, {name: options[name] for name in self.names})

    def log(self, row: dict[str, Any]) -> None:
        """Send the numbers of a journal row to every tracker."""
        if self.names:
            numbers = {name: value for name, value in flat(row).items() if isinstance(value, int | float)}
            self.world.accelerator.log(numbers, step=row["step"])

    def close(self) -> None:
        """Let the trackers write what they still hold; the process group stays."""
        for tracker in self.world.accelerator.trackers if self.names else ():
            tracker.finish()


def flat(tree: dict[str, Any], head: str = "") -> dict[str, bool | int | float | str]:
    """Flatten a tree: nested names joined by dots, list items numbered, values that trackers do not know as text."""
    leaves: dict[str, bool | int | float | str] = {}
    for name, value in tree.items():
        if isinstance(value, list) and head == "":
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, dict):
            leaves |= flat(value, f"{head}{name}.")
        elif value is not None:
            leaves[head + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return leaves


def _run_id(path: Path) -> str:
    """The run's id at the trackers: drawn at the first start, read at every later one."""
    if not path.exists():
        path.write_text(secrets.token_hex(8), encoding="utf-8")
    return read_document(path).strip()


def peak_of(device_name: str, precision: str) -> float | None:
    """The device's peak in FLOP/s; None where it is not known, or another precision than bf16 is used.

    A part of a card (MIG) and a laptop's have less than the card whose name they bear.
    """
    if precision != "bf16" or "MIG" in device_name or "Laptop" in device_name:
        return None
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


def mean_asked_rows(recipe: Recipe, n_equal: int, *, compiled: bool, tangent: bool = False) -> float:
    """Rows that guidance and the tangent evaluate in a step, in the mean over TIME_DRAWS draws.

    Compiled blocks always see all that could be needed.
    """
    batch, host = recipe.train.batch, torch.device("cpu")
    if compiled or not (speed.is_guided_run(recipe) or tangent):
        return float(speed.most_asked_rows(recipe, n_equal, tangent=tangent))
    generator, equal = torch.Generator().manual_seed(0), round(TIME_DRAWS * n_equal / batch)
    normals, uniforms = torch.randn((3, TIME_DRAWS), generator=generator), torch.rand(TIME_DRAWS, generator=generator)
    draws = StepDraws(normals, normals, uniforms, torch.rand((3, TIME_DRAWS), generator=generator))
    t, r = sample_times(normals, equal, time_laws(recipe.times))
    drawn = row_draws(t, r, draws, equal, recipe.guidance)
    question = ask(t, drawn[2], equal, recipe.guidance, host, guide=guide_of(drawn), tangent=tangent)
    return len(question.places) * batch / TIME_DRAWS


def mean_step_flops(recipe: Recipe, alpha: float, n_equal: int, *, compiled: bool) -> float:
    """Floating-point operations of one step on the global batch, in the mean over its draws."""
    tangent = speed.asks_tangent(recipe, alpha)
    extra_rows = mean_asked_rows(recipe, n_equal, compiled=compiled, tangent=tangent)
    return speed.step_flops(recipe, alpha, n_equal, extra_rows)
