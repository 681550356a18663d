"""The cost grows as the work grows: images per second and memory against batch, tokens, depth and processes.

    python benchmarks/bench_scaling.py --plot docs

The α = 0 step at share .25 beside plain flow matching, on a DiT of 128 channels. Each point is the median over rounds
of rotated order, with all points of an axis in each; on the CPU an image per second is one per second of the slowest
process's own CPU time.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from bench_step import Work, paired, ratio, work_of
from counting import count
from record import record
from torch import distributed, multiprocessing, nn
from workload import Size, build, draw, objective

from alphaflow_cli.charts.chart import BLUE, ORANGE, Chart, Line, Panel
from alphaflow_cli.charts.draw import to_svg
from alphaflow_cli.train.step import training_step

BASE, BATCH, SHARE = Size(dim=128, depth=4, heads=4, latent=16), 16, 0.25  # 64 tokens
STEPS = ("fm", "alpha_zero")
TURNS = 3  # of the numbers of processes
POINTS = {
    "batch": (4, 8, 16, 32, 64),
    "tokens": (16, 64, 256),
    "depth": (2, 4, 8, 16),
    "processes": (1, 2),
}
UNITS = {"batch": "rows of a step", "tokens": "tokens of a row", "depth": "blocks", "processes": "processes"}


def in_one_process(axis: str, values: Sequence[int], rounds: int) -> dict[int, dict[str, object]]:
    """Time and peak memory of both steps at each value. A round has all of them: a machine that slows down for a
    minute slows down all."""
    works: dict[str, Work] = {}
    plain = objective(guided=False, bf16=False)
    for value in values:
        size = replace(BASE, depth=value) if axis == "depth" else BASE
        size = replace(size, latent=2 * round(value**0.5)) if axis == "tokens" else size
        net = build(size, seed=0, device="cpu", dtype=torch.float32)
        rows = draw(size, batch_of(axis, value), SHARE, seed=0, device="cpu", dtype=torch.float32)
        works[f"{value} fm"] = work_of("fm", net, rows, 1.0, plain)
        works[f"{value} alpha_zero"] = work_of("ours", net, rows, 0.0, plain)
    costs = {name: count(work) for name, work in works.items()}
    table = paired({name: lambda turn, work=work: work for name, work in works.items()}, rounds, "cpu")
    seconds = {name: statistics.median(times[name] for times in table) for name in works}
    return {
        value: {
            "images_per_second": {each: batch_of(axis, value) / seconds[f"{value} {each}"] for each in STEPS},
            "ratio": ratio(table, f"{value} alpha_zero", f"{value} fm"),
            "peak_mib": {each: costs[f"{value} {each}"].peak_bytes / 2**20 for each in STEPS},
            "flops": {each: costs[f"{value} {each}"].flops for each in STEPS},
        }
        for value in values
    }


def batch_of(axis: str, value: int) -> int:
    """Measure against the rows of a step."""
    return value if axis == "batch" else BATCH


def on_processes(axis: str, values: Sequence[int], rounds: int) -> dict[int, dict[str, object]]:
    """The same global batch, cut over processes whose gradients synchronise; each number of processes in turn."""
    turns = [{value: spawn(value, rounds) for value in values} for _ in range(TURNS)]
    return {
        value: {
            "images_per_second": {
                each: statistics.median(BATCH * 2 / turn[value]["seconds"][each] for turn in turns) for each in STEPS
            },
            "ratio": {"median": statistics.median(turn[value]["ratio"]["alpha_zero"] for turn in turns)},
            "peak_mib": turns[0][value]["peak_mib"],
        }
        for value in values
    }


def spawn(processes: int, rounds: int) -> dict[str, dict[str, float]]:
    """The slowest process's seconds, the largest ratio of them, and the largest peak."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(one_process, (processes, rounds, folder), nprocs=processes)  # type: ignore[no-untyped-call]
        found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(processes)]
    return {
        key: {name: max(each[key][name] for each in found) for name in STEPS}
        for key in ("seconds", "ratio", "peak_mib")
    }


def one_process(rank: int, processes: int, rounds: int, folder: str) -> None:
    """Rank `rank`: its rows of a global batch of 2 · BATCH, r = t rows first on every rank."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": str(processes)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    net = build(BASE, seed=0, device="cpu", dtype=torch.float32)
    wrapped = nn.parallel.DistributedDataParallel(net)
    rows = draw(BASE, 2 * BATCH // processes, SHARE, seed=rank, device="cpu", dtype=torch.float32)
    flow = replace(rows, r=rows.t, n_equal=len(rows.t))
    plain = objective(guided=False, bf16=False)

    def step(alpha: float, some: object) -> None:
        net.zero_grad(set_to_none=False)
        training_step(wrapped, net, some, alpha=alpha, objective=plain).loss.div(len(rows.t)).backward()  # type: ignore

    works = {"fm": lambda turn: lambda: step(1.0, flow), "alpha_zero": lambda turn: lambda: step(0.0, rows)}
    table = paired(works, rounds, "cpu")
    seconds = {name: statistics.median(times[name] for times in table) for name in works}
    peaks = {name: count(work(0)).peak_bytes / 2**20 for name, work in works.items()}
    ratios = {name: ratio(table, name, "fm")["median"] for name in works}
    torch.save({"seconds": seconds, "ratio": ratios, "peak_mib": peaks}, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def chart(axis: str, found: dict[int, dict[str, dict[str, float]]]) -> str:
    """Draw speed and memory in two panels."""

    def lines(key: str) -> list[Line]:
        named = (("fm", "flow matching", ORANGE), ("alpha_zero", "α = 0, share .25", BLUE))
        return [
            Line(label, [(x, values[key][name]) for x, values in found.items()], colour, markers=True)
            for name, label, colour in named
        ]

    panels = [
        Panel("images per second of CPU time", lines("images_per_second"), log_y=axis in ("tokens", "depth")),
        Panel("peak memory above the weights, MiB", lines("peak_mib"), log_y=axis != "processes"),
    ]
    title = f"A training step against its {axis}"
    return to_svg(Chart(title, panels, UNITS[axis], log_x=axis != "processes", x_ticks=list(found), width=720))


def main(words: Sequence[str] | None = None) -> None:
    """Measure each axis, and make a JSON line and a picture of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", choices=[*POINTS, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--points", type=int, nargs="+", help="other values of the one axis than the built-in ones")
    parser.add_argument("--plot", type=Path, help="folder for speed-<axis>.svg")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    for axis in POINTS if options.axis == "all" else [options.axis]:
        measure = on_processes if axis == "processes" else in_one_process
        found = measure(axis, options.points or POINTS[axis], options.rounds)
        record("scaling", "cpu", axis=axis, points=found)
        if options.plot:
            options.plot.mkdir(parents=True, exist_ok=True)
            (options.plot / f"speed-{axis}.svg").write_text(chart(axis, found), encoding="utf-8")


if __name__ == "__main__":
    main()
