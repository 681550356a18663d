"""metrics.jsonl: one row every few steps, written at once, readable while the run goes on.

The sums live on the device and are read once per row, so logging never makes a step wait. Rows hold means over the
steps since the last row: the UNWEIGHTED loss l, L_TFM, L_TC, the velocity loss of r = t rows, l per bin of t − r, the
gradient's norm, counts of clipped and non-finite gradients. The weighted loss is near 1 by construction: not shown.

TensorBoard, Weights & Biases and trackio, through Accelerate, beside metrics.jsonl. Only the first process writes.

What they write lies in RUN/trackers. A resumed run goes on in the same W&B or trackio run: its id is kept there.

How much of the device the run uses, estimated: the arithmetic a step needs, over the device's dense bf16 peak.

Counted are the products of the blocks and the final layer, 2 operations per multiply-add, in units of one row's
forward: 3 of a graded row (forward and backward), 1 of a row of an extra call, 1.05 of a riding tangent (the cost
measured beside a plain step). What gradient checkpointing recomputes is not needed, so it is not counted. Guidance's
rows differ from step to step: their mean is counted.
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

from alphaflow_cli.core.objective import Terms, interval_bins
from alphaflow_cli.core.times import sample_times
from alphaflow_cli.errors import AlphaflowError, blamed_on
from alphaflow_cli.files import append, check_regular, make_folder, read_document, write_whole
from alphaflow_cli.recipe.plan import is_guided, phase_kind, tokens
from alphaflow_cli.recipe.schema import Recipe
from alphaflow_cli.runtime.lock import check_lock
from alphaflow_cli.runtime.processes import World
from alphaflow_cli.runtime.progress import say
from alphaflow_cli.train.optimise import COUNTERS
from alphaflow_cli.train.step import ask, ask_all

BINS = 8  # equal bins of t − r in (0, 1]
SUMS = ("later", "error", "trajectory", "consistency", "equal", "velocity")  # then BINS sums and BINS counts
TIMING = ("seconds_per_step", "images_per_second", "memory_gb", "utilisation")  # differ from run to run


class Sums:
    """What is added up over rows and micro-batches, on the device."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(len(SUMS) + 2 * BINS, dtype=torch.float64, device=device)

    def add(self, terms: Terms, t: Tensor, r: Tensor, n_equal: int) -> None:
        """The rows of one micro-batch."""
        k, error = n_equal, terms.error.double()
        sums, counts = interval_bins(t[k:], r[k:], error[k:], BINS)
        parts = [error[k:], terms.trajectory[k:].double(), terms.consistency[k:].double(), error[:k]]
        later, trajectory, consistency, velocity = (part.sum() for part in parts)
        n_later, n_equal_rows = (error.new_full((), count) for count in (len(error) - k, k))  # no copy from the host
        head = torch.stack([n_later, later, trajectory, consistency, n_equal_rows, velocity])
        self.values += torch.cat([head, sums, counts])

    def take(self, world_sum: Tensor) -> dict[str, Any]:
        """Means by name, from the sums over all processes; starts anew."""
        values = world_sum.tolist()
        named, bins = dict(zip(SUMS, values[: len(SUMS)], strict=True)), values[len(SUMS) :]
        self.values.zero_()
        rows = named["later"] + named["equal"]
        return {
            "l": _mean(named["error"] + named["velocity"], rows),
            "l_later": _mean(named["error"], named["later"]),
            "l_tfm": _mean(named["trajectory"], named["later"]),
            "l_tc": _mean(named["consistency"], named["later"]),
            "v_loss": _mean(named["velocity"], named["equal"]),
            "l_bins": [_mean(s, n) for s, n in zip(bins[:BINS], bins[BINS:], strict=True)],
        }


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def take_counters(counters: Tensor) -> dict[str, Any]:
    """The optimiser's counters since the last row; the streak goes on."""
    found = dict(zip(COUNTERS, counters.tolist(), strict=True))
    counters[:-1] = 0
    return {
        "grad_norm": _mean(found["grad_norm"], found["steps"]),
        "clipped": int(found["clipped"]),
        "nonfinite": int(found["nonfinite"]),
    }


class Journal:
    """The file, and the clock between its rows."""

    def __init__(self, path: Path, step: int, *, writes: bool, device_flops: float | None = None) -> None:
        """Rows past `step` belong to work that was lost: they go. `device_flops`: peak of all devices, if known."""
        self.path, self.writes, self.device_flops = path, writes, device_flops
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Forget rows past `step`."""
        self.started, self.last_step = time.monotonic(), step
        if self.writes and self.path.exists():
            self._drop_after(step)

    def _drop_after(self, step: int) -> None:
        lines = _lines(self.path)
        steps = [_step_of(line) for line in lines]
        text = "".join(f"{line}\n" for line, at in zip(lines, steps, strict=True) if at is not None and at <= step)
        damaged = sum(at is None for at in steps[:-1])  # the last one was cut off by a kill, perhaps
        if damaged:
            say(f"{self.path}: {damaged:,} lines were no rows of a journal, and are left out")
        write_whole(self.path, text)

    def row(self, values: dict[str, Any], *, step: int, batch: int, flops: float = 0.0) -> dict[str, Any]:
        """Add the clock's values, and write."""
        now = time.monotonic()
        steps = max(step - self.last_step, 1)
        each = (now - self.started) / steps
        row = values | {"seconds_per_step": round(each, 6), "images_per_second": round(batch / max(each, 1e-9), 1)}
        if torch.cuda.is_available():
            row["memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        if self.device_flops:
            row["utilisation"] = round(flops / max(each, 1e-9) / self.device_flops, 4)
        self.started, self.last_step = now, step
        if self.writes:
            self._append(json.dumps(_without_nan(row), allow_nan=False) + "\n")
        return row

    def _append(self, line: str) -> None:
        check_lock(self.path.parent)
        try:
            append(self.path, line)
        except OSError as error:
            told = "The last checkpoint is kept; the same command resumes."
            raise AlphaflowError(f"{self.path}: cannot be written: {error.strerror}. {told}") from error


def _without_nan(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null stands for them."""
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str) -> int | None:
    """The step of a row; None where the row was cut off by a kill."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _lines(path: Path) -> list[str]:
    """A file that is no text at all is somebody else's, and not for us to cut."""
    check_regular(path)
    with blamed_on(path, "the journal of a run"):
        return path.read_text(encoding="utf-8").split("\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows."""
    lines = _lines(path) if path.exists() else []
    return [json.loads(line) for line in lines if _step_of(line) is not None]


def console_line(row: dict[str, Any]) -> str:
    """A row as a person reads it."""

    def shown(name: str, form: str = ".4f") -> str:
        value = row.get(name)
        return "–" if value is None else format(value, form)

    parts = [f"α {row['alpha']:.3f}", f"l {shown('l')}", f"TFM {shown('l_tfm')}", f"TC {shown('l_tc')}"]
    parts += [f"v {shown('v_loss')}", f"|g| {shown('grad_norm', '.3f')}", f"lr {row['lr']:.1e}"]
    if row["nonfinite"]:
        parts.append(f"NON-FINITE {row['nonfinite']}")
    return "  ".join([*parts, f"{row['images_per_second']:,.0f} img/s"])


def check_trackers(recipe: Recipe) -> None:
    """A package that is missing is named; Accelerate would only warn and track nothing."""
    missing = [name for name in recipe.train.trackers if find_spec(name) is None]
    if missing:
        raise AlphaflowError(
            f"train.trackers: {', '.join(missing)} cannot be imported. "
            f"Run: pip install 'alphaflow[{','.join(missing)}]', or do without: --set train.trackers=[]"
        )


class Trackers:
    """The recipe's trackers, if any; `join_world` has told Accelerate their names."""

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
        """The numbers of a journal row."""
        if self.names:
            numbers = {name: value for name, value in flat(row).items() if isinstance(value, int | float)}
            self.world.accelerator.log(numbers, step=row["step"])

    def close(self) -> None:
        """Flush; the process group stays."""
        for tracker in self.world.accelerator.trackers if self.names else ():
            tracker.finish()


def flat(tree: dict[str, Any], head: str = "") -> dict[str, Any]:
    """Nested names joined by dots, list items numbered; values that are no number, truth or text as text."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, list) and head == "" and not isinstance(value, str):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, dict):
            found |= flat(value, f"{head}{name}.")
        elif value is not None:
            found[head + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


def _run_id(path: Path) -> str:
    """Drawn once per run."""
    if not path.exists():
        path.write_text(secrets.token_hex(8), encoding="utf-8")
    return read_document(path).strip()


TANGENT = 1.05
SAMPLE = 1 << 14
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


def peak_of(device_name: str, precision: str) -> float | None:
    """The device's peak; None where it is not known, or another precision is used."""
    if precision != "bf16":
        return None
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


def forward_flops(recipe: Recipe) -> float:
    """Of one row."""
    model, n, d = recipe.model, tokens(recipe), recipe.model.dim
    per_token = 2 * (4 + 2 * model.mlp_ratio) * d * d + 4 * n * d  # qkv, proj, MLP; q kᵀ and p v
    modulations = 2 * (6 * model.depth + 2) * d * d
    edges = 2 * 2 * n * d * model.patch**2 * recipe.data.channels
    return model.depth * n * per_token + modulations + edges


def mean_asked_rows(recipe: Recipe, n_equal: int) -> float:
    """Guidance's rows of a step, in the mean over SAMPLE draws; compiled blocks always see all of them."""
    batch, law, host = recipe.train.batch, recipe.times, torch.device("cpu")
    if recipe.train.compile:
        return float(len(ask_all(batch, n_equal, recipe.guidance, host).places))
    generator, equal = torch.Generator().manual_seed(0), round(SAMPLE * n_equal / batch)
    normals, uniforms = torch.randn((3, SAMPLE), generator=generator), torch.rand(SAMPLE, generator=generator)
    t, _ = sample_times(normals, equal, law=law.law, mean=law.mean, std=law.std, order=law.order)
    return len(ask(t, uniforms, equal, recipe.guidance, host).places) * batch / SAMPLE


def step_flops(recipe: Recipe, alpha: float, n_equal: int) -> float:
    """Of one step on the global batch."""
    batch, mix = recipe.train.batch, recipe.guidance
    later = batch - n_equal
    units = 3.0 * batch
    if recipe.data.classes and is_guided(mix.omega, mix.kappa):
        units += mean_asked_rows(recipe, n_equal)
    if phase_kind(alpha) == "between":
        units += later * (2 if recipe.loss.velocity == "network" else 1)
    elif phase_kind(alpha) == "derivative":
        units += TANGENT * later
    return units * forward_flops(recipe)
