"""How much of the gradient does rounding eat at small α? The table of docs/understanding.md.

    python benchmarks/bench_precision.py CHECKPOINT --data STORE

For each α: the gradient of r < t rows, by the trainer's own step, with the network's products in bf16, TF32 and fp32,
against the same in float64. `one batch` is the median of the relative error over batches; `mean` is that of the mean
gradient over all batches, so what does not average out. `between batches` is how far one batch's exact gradient lies
from the mean one, relative to that one: beside it an error must be seen, times √(1 + between²), the length of one
batch's gradient in lengths of the mean one. α = 0 is MeanFlow's step, whose derivative rides along.

TF32 is computed as a GPU does it: the inputs of every product rounded to 10 bits of mantissa, the sums in float32.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from alphaflow_cli.sample.generator import open_generator
from alphaflow_cli.train.conflict import conflict_rows, renormalised
from alphaflow_cli.train.start import recipe_stream
from alphaflow_cli.train.step import Objective, Rows, training_step

ALPHAS = (1.0, 0.5, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.0)
PRECISIONS = ("bf16", "tf32", "fp32")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "linear", "matmul")


class RoundedProducts(TorchDispatchMode):
    """Rounds the float32 inputs of every matrix product and convolution to TF32's 10 bits, to the nearest."""

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if op.__name__.split(".")[0] in PRODUCTS:
            args = tuple(to_tf32(each) if isinstance(each, Tensor) else each for each in args)
        return op(*args, **(kwargs or {}))


def to_tf32(x: Tensor) -> Tensor:
    """The nearest numbers with 10 bits of mantissa; ties to even."""
    if x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Compute inside as this precision does; bf16 is switched on by the objective."""
    if precision == "tf32":
        with RoundedProducts():
            yield
    else:
        yield


def gradient(net: nn.Module, rows: Rows, objective: Objective, alpha: float) -> Tensor:
    """The step's gradient as one vector in float64."""
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    loss = training_step(net, net, rows, alpha=alpha, objective=objective).loss / len(rows.t)
    grads = torch.autograd.grad(loss, weights, materialize_grads=True)
    return torch.cat([grad.double().flatten() for grad in grads])


def in_float64(rows: Rows) -> Rows:
    return replace(rows, **{name: getattr(rows, name).double() for name in ("x", "noise", "t", "r", "uniforms")})


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def measure(net: nn.Module, batches: Sequence[Rows], objective: Objective, alpha: float) -> dict[str, Any]:
    """The errors of one α."""
    wide = deepcopy(net).double()
    exact, rounded = [], {name: list[Tensor]() for name in PRECISIONS}
    for rows in batches:
        exact.append(gradient(wide, in_float64(rows), replace(objective, bf16=False), alpha))
        for name in PRECISIONS:
            with products(name):
                rounded[name].append(gradient(net, rows, replace(objective, bf16=name == "bf16"), alpha))

    mean = torch.stack(exact).mean(0)
    row: dict[str, Any] = {"alpha": alpha, "between": median(distance(each, mean) for each in exact)}
    for name in PRECISIONS:
        row[name] = median(distance(a, b) for a, b in zip(rounded[name], exact, strict=True))
        row[f"{name}_mean"] = distance(torch.stack(rounded[name]).mean(0), mean)
    return row


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table in markdown."""
    lines = ["| α | bf16: one batch | mean | TF32: one batch | mean | fp32: one batch | mean | between batches |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        errors = " | ".join(f"{row[key]:.2g}" for name in PRECISIONS for key in (name, f"{name}_mean"))
        lines.append(f"| {row['alpha']:g} | {errors} | {row['between']:.2g} |")
    return lines


def read(options: argparse.Namespace) -> tuple[nn.Module, list[Rows], Objective]:
    """The network with its raw or averaged weights, batches of r < t rows, and the recipe's objective."""
    device = torch.device("cpu")
    generator = open_generator(options.checkpoint, device=device, weights=options.weights)
    recipe = generator.recipe
    stream = recipe_stream(
        recipe, options.data, batch=options.rows, seed=0, device=device, resident=False, verify="sizes"
    )
    batches = []
    for index in range(options.batches):
        batch = stream.batch_at(index, slice(None))
        x = renormalised(batch.latents, (stream.mean, stream.std), (generator.mean, generator.std))
        batches.append(conflict_rows(recipe, x, batch.y, seed=0, index=index))
    stream.close()
    return generator.net.requires_grad_(), batches, Objective.of(recipe)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run, or a checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="the latents it was trained on")
    parser.add_argument("--weights", choices=("ema", "raw"), default="raw")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--rows", type=int, default=64, help="of a batch, all r < t")
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS)
    options = parser.parse_args(words)
    net, batches, objective = read(options)
    count = sum(weight.numel() for weight in net.parameters())
    print(f"{options.checkpoint}: {count:,} parameters, {options.batches} batches of {options.rows} rows\n", flush=True)
    rows = [measure(net, batches, objective, alpha) for alpha in options.alphas]
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
