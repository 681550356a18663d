"""A whole training step as one CUDA graph, beside the same step launched one operator after the other.

    python benchmarks/bench_graph.py --device cuda
    python benchmarks/bench_graph.py --device cuda --size S/2@64 --batch 256 --bf16 --steps 50

An experiment: the trainer does not use graphs. Captured are forward, backward, clipping, Adam and the averages, for
α = 1 and for α = 0. The learning rate and the averages' β change from step to step, so there they are numbers on the
device, written before each replay; nothing in the captured part waits for the host. (Between them α moves as well, and
would be one more such number.) We report milliseconds per step, and whether the weights and averages after all steps
are those of the launched steps, bit for bit. On a GPU fused Adam reads such a rate in float32; the launched steps get
the rate rounded alike. On a CPU nothing is captured: the same steps run one after the other.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from record import record
from torch import Tensor, nn
from workload import SIZES, build, draw, objective

from alphaflow_cli.core.ema import ema_beta
from alphaflow_cli.data.batches import to_device
from alphaflow_cli.recipe import load_recipe
from alphaflow_cli.recipe.schema import Recipe
from alphaflow_cli.train.optimise import Optimiser
from alphaflow_cli.train.step import Objective, Rows, training_step

WARM_UP = 3  # steps before the capture, as torch asks for


class DeviceOptimiser(Optimiser):
    """The trainer's optimiser, with the learning rate and the averages' β as numbers on the device."""

    def __init__(self, net: nn.Module, recipe: Recipe) -> None:
        super().__init__(net, recipe)
        device = self.weights[0].device
        self.rate = torch.zeros((), dtype=torch.float32 if device.type == "cuda" else torch.float64, device=device)
        self.moves = torch.zeros(len(self.emas), device=device, dtype=self.weights[0].dtype)  # 1 − β of each average
        for group in self.adam.param_groups:
            group["lr"], group["capturable"] = self.rate, device.type == "cuda"

    def set_numbers(self, step: int) -> None:
        """Write the numbers of a step; no copy waits."""
        ema = self.recipe.ema
        moves = [1.0 - ema_beta(step, half_life=life, ramp=ema.ramp, every=ema.every) for life in ema.half_lives]
        self.rate.copy_(to_device(torch.tensor(self.rate_at(step), dtype=self.rate.dtype), self.rate.device))
        self.moves.copy_(to_device(torch.tensor(moves, dtype=self.moves.dtype), self.moves.device))

    def step(self, step: int) -> None:
        """Clip, step and average with the numbers that were written; `step` itself is not looked at."""
        norm, bad = self._norm(self._gradients())
        self.adam.grad_scale, self.adam.found_inf = None, bad.float()  # type: ignore[attr-defined]
        self.adam.step()
        self.forget_gradients()
        with torch.no_grad():
            for ema, move in zip(self.emas, self.moves.unbind(), strict=True):
                for average, weight in zip(ema, self.weights, strict=True):
                    average.lerp_(weight, move)
        self._count(norm, bad)


class LaunchedOptimiser(Optimiser):
    """The trainer's optimiser; on a GPU with its rate rounded to float32, as fused Adam reads one from the device."""

    def __init__(self, net: nn.Module, recipe: Recipe) -> None:
        super().__init__(net, recipe)
        if self.weights[0].device.type == "cuda":
            exact = self.rate_at
            self.rate_at = lambda step: torch.tensor(exact(step), dtype=torch.float32).item()


def whole_step(net: nn.Module, rows: Rows, alpha: float, settings: Objective, optimiser: Optimiser, step: int) -> None:
    """Forward, backward and optimiser: what is captured."""
    loss = training_step(net, net, rows, alpha=alpha, objective=settings).loss / len(rows.t)
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step(step)


def capture(work: Callable[[], None], device: str) -> Callable[[], None]:
    """The work as one graph; on a CPU the work itself."""
    if device == "cpu":
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def state_of(net: nn.Module, optimiser: Optimiser) -> list[Tensor]:
    """Weights and averages, on the host."""
    return [value.detach().cpu() for value in [*net.parameters(), *(one for ema in optimiser.emas for one in ema)]]


def trained(graphed: bool, alpha: float, options: argparse.Namespace) -> tuple[list[Tensor], float]:
    """Weights and averages after all steps, and milliseconds of a step after the warm-up."""
    size, settings = SIZES[options.size], objective(guided=options.guided, bf16=options.bf16)
    recipe = load_recipe("b2", ["optim.warmup_steps=20", "ema.half_lives=[5, 50]", "ema.ramp=0.5"])
    net = build(size, seed=0, device=options.device, dtype=torch.float32)
    rows = draw(size, options.batch, 0.25, seed=0, device=options.device, dtype=torch.float32)
    optimiser = DeviceOptimiser(net, recipe) if graphed else LaunchedOptimiser(net, recipe)

    def work(step: int) -> None:
        whole_step(net, rows, alpha, settings, optimiser, step)

    def one(step: int, run: Callable[[int], object]) -> None:
        if isinstance(optimiser, DeviceOptimiser):
            optimiser.set_numbers(step)
        run(step)

    beside = torch.cuda.Stream() if options.device == "cuda" and graphed else None
    with torch.cuda.stream(beside):  # None: the stream that is there
        for step in range(WARM_UP):
            one(step, work)
    wait(options.device)
    replay = capture(lambda: work(WARM_UP), options.device) if graphed else None
    began = time.perf_counter()
    for step in range(WARM_UP, options.steps):
        one(step, work if replay is None else lambda _: replay())
    wait(options.device)
    return state_of(net, optimiser), 1000 * (time.perf_counter() - began) / (options.steps - WARM_UP)


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def compare(alpha: float, options: argparse.Namespace) -> dict[str, object]:
    """Launched and graphed, from the same weights."""
    (launched, slow), (graphed, fast) = (trained(each, alpha, options) for each in (False, True))
    equal = all(torch.equal(a, b) for a, b in zip(launched, graphed, strict=True))
    apart = max(float((a - b).abs().max()) for a, b in zip(launched, graphed, strict=True))
    return {"alpha": alpha, "ms_launched": slow, "ms_graph": fast, "same_bits": equal, "largest_difference": apart}


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guided", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """A JSON line per phase."""
    options = arguments(words)
    for alpha in (1.0, 0.0):
        setup = {"size": options.size, "batch": options.batch, "steps": options.steps, "bf16": options.bf16}
        record("graph", options.device, **setup, **compare(alpha, options))


if __name__ == "__main__":
    main()
