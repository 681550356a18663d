"""The work of benchmarks/gpu.py, item by item: each returns the figures of one line."""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_eval import arguments as eval_arguments
from bench_graph import arguments as graph_arguments
from bench_graph import compare
from bench_step import arguments as step_arguments
from bench_step import cell, work_of
from evaluation_parts import time_parts
from latents_parts import save_pictures, time_latents
from random_networks import AUTOENCODERS
from workload import SIZES, build, draw, objective

from alphaflow_cli.model.compiling import compile_blocks
from alphaflow_cli.train.journal import read_rows

ROOT = Path(__file__).parent.parent
Figures = dict[str, Any]
Item = Callable[[argparse.Namespace], Figures]
FAMILY = ("cifar10", "cifar10-meanflow", "cifar10-shortcut", "cifar10-flow")
STEPS = {  # item → (size, batch, share of r = t rows, α, guided)
    **{f"B/2 α={a:g}{' guided' * g}": ("B/2", 256, 0.25, a, g) for g in (False, True) for a in (1.0, 0.0, 0.5)},
    **{f"{size} α={a:g} guided": (size, 96, 0.5, a, True) for size in ("XL/2", "L/2") for a in (1.0, 0.0)},
    **{f"{size} α={a:g}": (size, 96, 0.5, a, False) for size in ("XL/2", "L/2") for a in (1.0,)},
}
TOY_STEPS = {"tiny α=1": ("tiny", 4, 0.25, 1.0, False), "tiny α=0 guided": ("tiny", 4, 0.25, 0.0, True)}
TOY_NET = ("model.dim=32", "model.depth=1", "model.heads=2", "data.image_size=16", "data.latent_size=16")


def items(toy: bool) -> dict[str, dict[str, Item]]:
    """Every part with its items, in the order of their worth."""
    steps = TOY_STEPS if toy else STEPS
    return {
        "truth": {"numbers": truth_of("tests/test_truth.py")}
        | ({} if toy else {"equal and killed runs": truth_of("tests/train/test_reproducible.py")}),
        "step": {name: step_of(*steps[name]) for name in steps},
        "graphs": {f"quickstart {kind}": graph_of(kind) for kind in ("flow", "between", "derivative")}
        | ({} if toy else {"bits": truth_of("tests/train/test_graphs.py"), "compiled": graph_of("flow", "--compile")}),
        "training": {"quickstart": quickstart} | {name: member_of(name) for name in (FAMILY[:1] if toy else FAMILY)},
        "evaluation": {f"{count:,} pictures": evaluation_of(count) for count in ((8,) if toy else (50_000, 4_000))},
        "latents": {"pictures": latents},
        "profiles": {name: profile_of(*steps[name]) for name in list(steps)[:2]},
    }


def run(*words: str | Path, cwd: Path = ROOT) -> str:
    """A command to its end; its stdout. What it says on stderr goes on to ours."""
    done = subprocess.run(list(map(str, words)), cwd=cwd, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))} ended with {done.returncode}: {done.stdout[-2000:]}")
    return done.stdout


def alphaflow(*words: str | Path) -> str:
    """One of our own commands."""
    return run(sys.executable, "-m", "alphaflow_cli", *words)


def truth_of(file: str) -> Item:
    """The tests of a file that are written for a GPU; failures are figures, not a fault of the benchmark."""

    def truth(options: argparse.Namespace) -> Figures:
        chosen = ["-k", "float32 or sample_i"] if options.toy else []
        line = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "gpu", "-p", "no:cacheprovider", file, *chosen]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
        if not counts:
            raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
        failed = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
        return {"passed": counts.get("passed", 0), "failed": counts.get("failed", 0), "names": failed}

    return truth


def step_of(size: str, batch: int, share: float, alpha: float, guided: bool) -> Item:
    """Forward and backward beside flow matching and beside the published way, eager and compiled."""

    def step(options: argparse.Namespace) -> Figures:
        words = ["--size", size, "--batch", str(batch), "--rounds", "1" if options.toy else "5", "--compile"]
        words += ["--device", options.device]
        words += ["--backend", "eager"] if options.toy else ["--bf16"]
        figures = cell(step_arguments(words), alpha=alpha, share=share, guided=guided)
        speed: Any = figures["speed"]
        counts: Any = figures["counts"]
        return {
            "size": size, "batch": batch, "share": share, "alpha": alpha, "guided": guided,
            "ms": {name: 1000 * each["seconds"] for name, each in speed.items()},
            "mfu": {name: each["flop_utilisation"] for name, each in speed.items() if "flop_utilisation" in each},
            "peak_gb": {name: each["peak_bytes"] / 1e9 for name, each in counts.items()},
            "host_waits": figures["host_waits"],
        }  # fmt: skip

    return step


def graph_of(kind: str, *words: str) -> Item:
    """The quickstart's whole step launched and as a CUDA graph, and whether both leave the same bits."""

    def graph(options: argparse.Namespace) -> Figures:
        toy = [*sets("train.batch=4", "train.save_every=900"), "--steps", "6"] if options.toy else []
        return compare(kind, graph_arguments(["--device", options.device, *words, *toy]))

    return graph


def train(recipe: str, out: Path, *options: str) -> Figures:
    """A run to its end; the speed of its journal by phase. The rest of an earlier run has no time of the whole."""
    began, is_whole = time.monotonic(), not (out / "metrics.jsonl").exists()
    alphaflow("train", recipe, "--out", out, *options)
    spent = {"seconds": time.monotonic() - began} if is_whole else {}
    speeds: dict[str, list[float]] = {}
    for row in read_rows(out / "metrics.jsonl"):
        speeds.setdefault(row["phase"], []).append(1 / max(row["seconds_per_step"], 1e-9))
    fastest = {phase: max(each) for phase, each in speeds.items()}
    return {**spent, "steps_per_second": fastest}


def sets(*values: str) -> list[str]:
    """`--set` before each."""
    return [word for value in values for word in ("--set", value)]


def quickstart(options: argparse.Namespace) -> Figures:
    """The quickstart as it comes."""
    toy = ["train.steps=8", "train.log_every=2", "optim.warmup_steps=2", "data.source=glyphs:60"]
    return train("quickstart", options.out / "quickstart", *sets("train.sample_every=0", *(toy if options.toy else [])))


def member_of(recipe: str) -> Item:
    """A member of the family on CIFAR-10 (without it: on glyphs), so many steps, with its scores and its pictures."""

    def member(options: argparse.Namespace) -> Figures:
        store, out, source = options.out / "store", options.out / recipe, options.pictures or "glyphs:20000"
        side = "16" if options.toy else "32"
        if not (store / "manifest.json").exists():
            source = "glyphs:120" if options.toy else source
            alphaflow("prep-latents", source, "--size", side, "--autoencoder", "none", "--flips", "--out", store)
        steps = 6 if options.toy else options.steps
        changes = [f"train.steps={steps}", f"optim.warmup_steps={min(500, steps // 2)}", f"train.save_every={steps}"]
        changes += ["ema.half_lives=[500]", "train.sample_every=0"]
        if options.toy:
            changes += [*TOY_NET, "train.batch=8", "train.log_every=1", "train.precision=fp32"]
        figures = train(recipe, out, "--data", str(store), *sets(*changes))
        count, reference = ("100", "glyphs:100") if options.toy else ("10000", source)
        line = ["eval", out, "--metrics", "fd-tiny", "--images", count, "--reference", reference, "--json"]
        scores = json.loads(alphaflow(*line))
        rows = [row for each in scores["evaluations"] for row in each["rows"]]
        grid = options.out / f"{recipe}.png"
        alphaflow("sample", out, "--seeds", "0-39", "--nfe", "1", "--grid", grid)
        values = {f"{row['name']} at {row['pictures']['nfe']} NFE": row["value"] for row in rows}
        return figures | {"steps": steps, "source": source, "grid": grid.name, "scores": values}

    return member


def evaluation_of(count: int) -> Item:
    """An evaluation by part, with random networks of the published shapes."""

    def evaluation(options: argparse.Namespace) -> Figures:
        words = ["parts", "--images", str(count), "--device", options.device]
        toy = ["--size", "tiny", "--autoencoder", "tiny", "--metrics", "fd-tiny", "--warm-up", "0"]
        found = time_parts(eval_arguments([*words, *(toy if options.toy else ["--size", "B/2"])]))
        names = ("seconds_before", "seconds", "images_per_second", "decoder_compiled", "precision", "batch")
        return {name: found[name] for name in names}

    return evaluation


def latents(options: argparse.Namespace) -> Figures:
    """prep-latents by part after the start, and the whole command, whose compiled code the parts find."""
    count, side, device = (24, 32, "cpu") if options.toy else (20_480, 256, "cuda")
    folder, autoencoder = options.out / "pictures", options.out / "autoencoder"
    save_pictures(folder, count, side)
    AUTOENCODERS["tiny" if options.toy else "sd-vae"](autoencoder)
    for name in ("latents", "latents-by-part"):  # of an attempt that broke off: the command would only do the rest
        shutil.rmtree(options.out / name, ignore_errors=True)
    began = time.monotonic()
    line = ["prep-latents", folder, "--size", str(side), "--autoencoder", autoencoder, "--out", options.out / "latents"]
    alphaflow(*map(str, line))
    whole = time.monotonic() - began
    parts = time_latents(folder, autoencoder, options.out / "latents-by-part", side, torch.device(device))
    return {**parts, "seconds_of_the_command_with_its_start": whole}


def profile_of(size: str, batch: int, share: float, alpha: float, guided: bool) -> Item:
    """Where the time of a compiled step goes: the kernels that take most of it."""

    def profile(options: argparse.Namespace) -> Figures:
        settings = objective(guided=guided, bf16=not options.toy)
        net = build(SIZES[size], seed=0, device=options.device, dtype=torch.float32)
        compile_blocks(net, backend="eager" if options.toy else "inductor")
        rows = draw(SIZES[size], batch, share, seed=0, device=options.device, dtype=torch.float32)
        work = work_of("ours", net, rows, alpha, settings)
        work()
        work()
        activity = torch.profiler.ProfilerActivity
        seen = [activity.CPU] if options.device == "cpu" else [activity.CPU, activity.CUDA]
        with torch.profiler.profile(activities=seen) as watch:
            work()
        on_gpu = options.device == "cuda"
        spent = [(e.key, e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in watch.key_averages()]
        longest = sorted(spent, key=lambda each: -each[1])[:12]
        return {"ms": {name[:80]: microseconds / 1000 for name, microseconds in longest}}

    return profile
