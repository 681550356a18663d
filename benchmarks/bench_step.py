"""Our training step beside the published way of computing it, on the same network and batches, in one process.

    python benchmarks/bench_step.py --size small --share 0.25 --alpha 0
    python benchmarks/bench_step.py --size small --all
    python benchmarks/bench_step.py --size XL/2 --device cuda --bf16 --compile --batch 64 --all

Each round runs every variant once on the same batch, in rotated order; round 0 is dropped; the report is the median
of the per-round ratios, with the smallest and the largest. On the CPU a time is the process's own CPU time, so that
other people's jobs count less; on a GPU it is wall time between two synchronisations, of the second call: the first one
with a new number of rows makes room for them. FLOPs, operators and peak bytes
are counted, not timed. "fm" is the plain flow-matching step (all rows r = t), the unit of every cost.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from counting import Cost, count
from record import record
from reference_step import reference_step
from torch import Tensor, nn
from workload import SIZES, asking, build, draw, flow_matching, objective

from alphaflow_cli.model.compiling import compile_blocks
from alphaflow_cli.train.step import Objective, Rows, training_step

PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, from the makers' data sheets
Work = Callable[[], object]


def ours(net: nn.Module, rows: Rows, alpha: float, settings: Objective) -> Tensor:
    """Take the step as the trainer does."""
    return training_step(net, net, rows, alpha=alpha, objective=settings).loss


def reference(net: nn.Module, rows: Rows, alpha: float, settings: Objective) -> Tensor:
    """Take the step as the published system does."""
    return reference_step(net, rows, alpha=alpha, objective=settings)


def fm(net: nn.Module, rows: Rows, alpha: float, settings: Objective) -> Tensor:
    """Plain flow matching: one forward and one backward of all rows."""
    plain = objective(guided=False, bf16=settings.bf16)
    return training_step(net, net, flow_matching(rows), alpha=1.0, objective=plain).loss


VARIANTS = {"fm": fm, "ours": ours, "reference": reference}


def work_of(name: str, net: nn.Module, rows: Rows, alpha: float, settings: Objective) -> Work:
    """Run forward and backward; the gradient buffers stay from call to call."""

    def work() -> None:
        net.zero_grad(set_to_none=False)
        VARIANTS[name](net, rows, alpha, settings).div(len(rows.t)).backward()  # type: ignore[no-untyped-call]

    return work


def seconds(work: Work, device: str) -> float:
    """Time one call, on a GPU the second."""
    if device == "cuda":
        work()  # guidance asks about another number of rows in each round, for which memory is not there yet
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    work()
    return time.process_time() - start


def paired(works: dict[str, Callable[[int], Work]], rounds: int, device: str) -> list[dict[str, float]]:
    """Time every variant per round: the order rotates, each round has its batch, and round 0 is dropped."""
    names = list(works)
    table = []
    for turn in range(rounds + 1):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        table.append({name: seconds(works[name](turn), device) for name in order})
    return table[1:]


def ratio(table: list[dict[str, float]], above: str, below: str) -> dict[str, float]:
    """Give the median, the smallest and the largest of the per-round ratios."""
    values = [times[above] / times[below] for times in table]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def cell(options: argparse.Namespace, *, alpha: float, share: float, guided: bool) -> dict[str, object]:
    """One row of the table: α, share of r = t rows, guidance."""
    size, dtype = SIZES[options.size], torch.float32
    settings = objective(guided=guided, bf16=options.bf16)
    net = build(size, seed=options.seed, device=options.device, dtype=dtype)
    nets: dict[str, nn.Module] = {"fm": net, "ours": net, "reference": net}
    if options.compile:
        compiled = build(size, seed=options.seed, device=options.device, dtype=dtype)
        nets |= {"fm compiled": compile_blocks(compiled, options.backend), "ours compiled": compiled}

    def maker(name: str) -> Callable[[int], Work]:
        def make(turn: int) -> Work:
            seed = options.seed + turn
            rows = draw(size, options.batch, share, seed=seed, device=options.device, dtype=dtype)
            if "compiled" not in name:  # there the number of rows asked must not change
                rows = asking(rows, settings)
            return work_of(name.split()[0], nets[name], rows, alpha, settings)

        return make

    works = {name: maker(name) for name in nets}
    costs = {name: count(works[name](0), options.device) for name in VARIANTS}
    table = paired(works, options.rounds, options.device)
    figures: dict[str, object] = {"alpha": alpha, "equal_share": share, "guided": guided}
    for above, below in (("ours", "fm"), ("reference", "fm"), ("reference", "ours")):
        compared = {"time": ratio(table, above, below), **costs[above].over(costs[below])}
        figures[f"{above}_over_{below}"] = compared
    for name in set(nets) - set(VARIANTS):
        figures[f"reference_over_{name}".replace(" ", "_")] = {"time": ratio(table, "reference", name)}
    figures["host_waits"] = {name: cost.host_waits for name, cost in costs.items()}
    figures["counts"] = {name: asdict(cost) for name, cost in costs.items()}
    figures["speed"] = {name: speed(table, name, costs, options) for name in nets}
    return figures


def speed(table: list[dict[str, float]], name: str, costs: dict[str, Cost], options: argparse.Namespace) -> object:
    """Give images per second, and the share of the device's peak that the step's useful FLOPs reach."""
    middle = statistics.median(times[name] for times in table)
    useful = min(costs["ours"].flops, costs[name.split()[0]].flops)  # what the reference does twice is not useful
    told: dict[str, float] = {"seconds": middle, "images_per_second": options.batch / middle}
    if options.device == "cuda":
        known = [peak for card, peak in PEAK.items() if card in torch.cuda.get_device_name()]
        peak = options.peak_tflops * 1e12 if options.peak_tflops else (known or [0.0])[0]
        told |= {"flop_utilisation": useful / middle / peak} if peak and options.bf16 else {}
    return told


def cells(options: argparse.Namespace) -> list[tuple[float, float, bool]]:
    """List (α, share, guided): the requested row, or the whole table."""
    if not options.all:
        return [(options.alpha, options.share, options.guided)]
    return [(a, share, guided) for guided in (False, True) for a in (1.0, 0.5, 0.0) for share in (0.25, 0.5, 0.75)]


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=0.0)
    parser.add_argument("--share", type=float, default=0.25, help="of r = t rows")
    parser.add_argument("--guided", action="store_true")
    parser.add_argument("--all", action="store_true", help="alpha 1, .5, 0 x share .25, .5, .75 x guidance")
    parser.add_argument("--rounds", type=int, default=11, help="kept rounds")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--compile", action="store_true", help="adds compiled columns; minutes on a CPU")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="dense bf16 peak of a card not in the list")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure each row of the table, and print a JSON line for it."""
    options = arguments(words)
    torch.set_num_threads(options.threads)
    setup = {"size": options.size, "batch": options.batch, "rounds": options.rounds, "bf16": options.bf16}
    for alpha, share, guided in cells(options):
        record("step", options.device, **setup, **cell(options, alpha=alpha, share=share, guided=guided))


if __name__ == "__main__":
    main()
