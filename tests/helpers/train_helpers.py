"""Helpers of the training tests: a tiny recipe, runs in forked processes that can be killed, what a run left behind.

A fork of this process has torch imported already, so a run of twenty steps costs half a second, on two processes too.
Signals, exit codes and files are those of real processes; test_train_launch.py goes through the command line.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from latent_stores import random_moments, write_store

from alphaflow_cli.model.find import step_of
from alphaflow_cli.recipe import load_recipe
from alphaflow_cli.runtime import launch
from alphaflow_cli.train import start, state
from alphaflow_cli.train.journal import read_rows

CPU = torch.device("cpu")
HAS_FSDP2 = torch.__version__ >= "2.13"  # train refuses it on older ones (alphaflow_cli/train/parallel.py)
NEEDS_FSDP2 = pytest.mark.skipif(not HAS_FSDP2, reason="train.strategy fsdp2 needs torch 2.13")
RECIPE = """
model: {dim: 32, depth: 2, heads: 2, patch: 2}
data: {image_size: 32, channels: 4, latent_size: 4, classes: 10, stats_images: 0}
times: {equal_share: 0.25}
alpha: {kind: linear, start: 5, end: 15, clamp: 0.05}
guidance: {omega: 0.6, kappa: 0.2, label_dropout: 0.2}
optim: {lr: 1e-3, warmup_steps: 4}
ema: {half_lives: [5, 50], ramp: 0.5}
train:
  {steps: 20, batch: 16, precision: fp32, save_every: 5, keep: 2, milestone_every: 0, log_every: 3, sample_every: 0}
eval: {metrics: [fd-tiny], draw: balanced}
"""
MEMBERS = {  # the family's newer members, as changes of the tiny recipe
    "soflow": (
        "model.positions=fixed", "model.second_init=xavier", "times.order=min", "times.second.mean=-1",
        "times.equal.mean=-0.2", "times.gap=1e-3", "alpha.kind=exponential", "alpha.initial=0.5", "alpha.final=0.02",
        "alpha.gamma=1", "alpha.clamp=0", "alpha.start=0", "alpha.end=20", "guidance.dropped=plain",
        "guidance.fade_from=0.7", "loss.weight=converging", "loss.power=0.75", "loss.later=0.5", "loss.clamp=0",
        "loss.short_first=true", "optim.kind=radam", "ema.ramp=0", "ema.every=4",
    ),
    "boundary": ("loss.tangent=network", "guidance.kappa=0", "guidance.t_max=0.8"),
    "scale": (
        "model.velocity_head=0", "model.inputs=[scale]", "guidance.scale=drawn", "guidance.omega=1", "guidance.kappa=0",
        "guidance.t_max=0.8",
    ),
    "imf": (
        "model.velocity_head=1", "model.inputs=[scale, interval]", "model.conditioning=tokens", "model.block=modern",
        "guidance.scale=drawn", "guidance.interval=drawn", "guidance.drop=equal", "guidance.omega=1",
        "guidance.kappa=0", "times.equal_draw=max", "loss.tangent=network", "loss.reduction=sum", "loss.c=0.01",
        "loss.clamp=0", "optim.warmup_from=zero", "optim.clip_norm=0", "ema.ramp=0",
    ),
}  # fmt: skip


def make_store(folder: Path, count: int = 48) -> Path:
    """Moments of invented latents: posterior noise is drawn."""
    write_store(folder, {"moments": random_moments(count)}, np.arange(count) % 10)
    classes = {f"class-{i}": {"index": i, "name": f"class {i}"} for i in range(10)}
    (folder / "classes.json").write_text(json.dumps(classes))
    return folder


def make_recipe(folder: Path, *sets: str, text: str = RECIPE):
    """The tiny recipe: flow matching until step 5, between until 15, then the derivative; guided; two averages."""
    path = folder / "tiny.yaml"
    path.write_text("# tiny" + text)
    return load_recipe(str(path), sets)


@dataclass
class Started:
    """Processes of one run."""

    pids: list[int]
    folder: Path

    def wait(self, seconds: float = 120) -> list[int]:
        """Exit codes; minus the signal where one killed it."""
        codes, until = dict.fromkeys(self.pids), time.monotonic() + seconds
        while None in codes.values() and time.monotonic() < until:
            for pid in [pid for pid, code in codes.items() if code is None]:
                done, status = os.waitpid(pid, os.WNOHANG)
                codes[pid] = os.waitstatus_to_exitcode(status) if done else None
            time.sleep(0.005)
        stuck = [pid for pid, code in codes.items() if code is None]
        for pid in stuck:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert not stuck, f"{len(stuck)} processes still ran after {seconds} s:\n{self.said()}"
        return list(codes.values())

    def signal(self, number: int) -> None:
        for pid in self.pids:
            os.kill(pid, number)

    def said(self) -> str:
        """All of stderr, and what the workers left for their parent."""
        files = [*sorted(self.folder.glob("*.err")), *sorted(self.folder.glob("rank-*.json"))]
        return "".join(path.read_text() for path in files)


def fork(work, folder: Path, processes: int = 1) -> Started:
    """Call `work()` in so many new processes, joined as a launcher would have joined them."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.err"), *folder.glob("rank-*.json")):
        old.unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            _child(work, folder, rank, processes, port)
        pids.append(pid)
    return Started(pids, folder)


def _child(work, folder: Path, rank: int, processes: int, port: int) -> None:
    code = 70
    try:
        handle = os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = sys.stderr = os.fdopen(handle, "w", buffering=1)
        warnings.simplefilter("ignore")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        os.environ |= {"ALPHAFLOW_ERRORS": str(folder)}
        if processes > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ |= {name: str(value) for name, value in names.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        else:
            os.environ.pop("RANK", None)
        AcceleratorState._reset_state(reset_partial_state=True)  # what earlier tests joined in this process
        GradientState._reset_state()
        launch.as_worker(lambda: work() or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def begin(recipe, store: Path, out: Path, *, processes: int = 1, micro_batch=None, init_from="", work=None) -> Started:
    """Start `alphaflow train` as its own parent would: checked first, then forked."""
    options = start.TrainOptions(out, store, micro_batch, init_from)
    start.prepare_run(recipe, options)
    errors = out.parent / f"{out.name}-errors"
    return fork(work or (lambda: start.train(recipe, options)), errors, processes)


def train(recipe, store: Path, out: Path, *, processes: int = 1, seconds: float = 120, **options) -> Path:
    """To the end, without a fault."""
    started = begin(recipe, store, out, processes=processes, **options)
    assert started.wait(seconds) == [0] * processes, started.said()
    return out


def wait_for_step(out: Path, step: int, seconds: float = 60) -> None:
    """Until metrics.jsonl or a state tells of this step."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if saved_step(out) >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"{out}: no step {step} after {seconds} s")


def saved_step(out: Path) -> int:
    """Of the newest state; -1 where there is none."""
    return max((step_of(path) for path in (out / "state").glob("step-*.safetensors")), default=-1)


TIMING = ("seconds_per_step", "images_per_second", "memory_gb", "utilisation")  # of a row: differ from run to run


def left_behind(out: Path) -> dict[str, object]:
    """Everything that must be the same: weights, averages, optimiser, counters, journal without its clock."""
    path = state.newest_state(out)
    assert path is not None, out
    rows = [{k: v for k, v in row.items() if k not in TIMING} for row in read_rows(out / "metrics.jsonl")]
    tensors = state.read_tensors(path)
    return {**tensors, "step": step_of(path), "rows": rows}


def assert_same(one: Path, other: Path) -> None:
    """Bit for bit."""
    a, b = left_behind(one), left_behind(other)
    assert a.keys() == b.keys()
    for name, value in a.items():
        if name == "sums":  # by process: what counts is their sum
            continue
        same = torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
        assert same, (name, value, b[name])


def largest_difference(one: Path, other: Path) -> float:
    """Over all tensors, relative to the largest value of each."""
    a, b = left_behind(one), left_behind(other)
    pairs = [(a[n].double(), b[n].double()) for n in a if n not in ("rows", "step", "sums", "counters")]
    return max(float((x - y).abs().max() / x.abs().max().clamp(min=1e-30)) for x, y in pairs)


def row_values(out: Path, name: str) -> list[float]:
    return [row[name] for row in read_rows(out / "metrics.jsonl")]


@contextlib.contextmanager
def small_disk(folder, kilobytes):
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("no small disk can be mounted here; the file size limit stands in for it")
    try:
        yield lambda option: subprocess.run(["mount", "-o", f"remount,{option}", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


def case(name, *marks):
    """A case by its name, which says whether FSDP2 is in it."""
    return pytest.param(name, marks=[*marks, *([NEEDS_FSDP2] if "fsdp2" in name else [])])
