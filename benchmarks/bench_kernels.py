"""The kernels of benchmarks/kernels: are they right, and faster than what the compiler makes of the plain forms?

    python benchmarks/bench_kernels.py --device cuda
    python benchmarks/bench_kernels.py --device cuda --only steps --sizes L/2
    TRITON_INTERPRET=1 python benchmarks/bench_kernels.py --device cpu --toy      (Triton's interpreter)

checks     the relative error of every piece, forward and backward, against the plain form in float64
gradients  that of a compiled step's gradient, without kernels and with all
kernels    milliseconds and GB/s of every piece, compiled with the kernel and without; GB/s of the fewest bytes
launches   the same kernel with other launch figures
steps      the whole step, compiled: without kernels, with all, and with all but one; rotated rounds in one process

The package has none of them: they stand here until this has run on a GPU. Which then pay go to alphaflow_cli/nn, the
others to LOG.md. A GPU's time is that between two events. A kernel that fails its check is left out of the steps.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from bench_step import PEAK, work_of
from counting import count
from kernels import block, operators
from kernels.pieces import BOUNDS, EPS, Piece, check_pieces, inputs, interpret_bf16, pieces, relative
from record import record
from torch import Tensor
from workload import SIZES, Size, build, draw, objective

from alphaflow_cli.model.compiling import compile_blocks, forget_compiled
from alphaflow_cli.nn.layers import split_heads
from alphaflow_cli.train.step import training_step


def check_steps(size: Size, batch: int, device: str, backend: str) -> Iterator[tuple[str, float, float]]:
    """The error of a compiled step's whole gradient: (title, without kernels, with them); bf16 on a GPU only."""
    for alpha in (1.0, 0.0):
        exact = gradient(size, batch, alpha, device, None, bf16=False, dtype=torch.float64)
        for bf16 in (False, True) if device == "cuda" else (False,):
            errors = []
            for kernels in (frozenset[str](), EVERY):
                with using(kernels, anywhere=device == "cpu"):
                    errors.append(relative(gradient(size, batch, alpha, device, backend, bf16=bf16), exact))
            yield f"α = {alpha:g}{', bf16' * bf16}", errors[0], errors[1]


EVERY = block.KERNELS


@contextmanager
def using(kernels: frozenset[str], anywhere: bool = False) -> Iterator[None]:
    """Only these kernels, for what is traced meanwhile."""
    block.install()
    before = block.KERNELS, block.ANYWHERE
    block.KERNELS, block.ANYWHERE = kernels, anywhere
    try:
        yield
    finally:
        block.KERNELS, block.ANYWHERE = before


def gradient(
    size: Size,
    batch: int,
    alpha: float,
    device: str,
    backend: str | None,
    *,
    bf16: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The gradient of a step with respect to all weights, in one row."""
    forget_compiled()
    net = build(size, seed=0, device=device, dtype=dtype)
    if backend is not None:
        compile_blocks(net, backend)
    rows = draw(size, batch, 0.25, seed=0, device=device, dtype=dtype)
    step = training_step(net, net, rows, alpha=alpha, objective=objective(guided=False, bf16=bf16))
    step.loss.backward()  # type: ignore[no-untyped-call]
    return torch.cat([weight.grad.flatten() for weight in net.parameters() if weight.grad is not None])


def milliseconds(work: Callable[[], object], device: str, calls: int, rounds: int = 7) -> float:
    """The median time of one of several calls in a row."""
    if device == "cpu":  # in the interpreter, where no time means anything
        rounds = 1
    for _ in range(2 if device == "cuda" else 0):
        work()
    times = []
    for _ in range(rounds):
        if device == "cuda":
            ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            ends[0].record()
            for _ in range(calls):
                work()
            ends[1].record()
            torch.cuda.synchronize()
            times.append(ends[0].elapsed_time(ends[1]) / calls)
        else:
            start = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def time_piece(name: str, size: Size, batch: int, options: argparse.Namespace) -> dict[str, object]:
    """Forward and backward of a piece, compiled, with its kernels and without."""
    own, plain, letters, floor = pieces(size.heads)[name]
    given = inputs(letters, size, batch, torch.bfloat16, options.device)
    figures: dict[str, object] = {"piece": name, "dim": size.dim, "batch": batch}
    for label, piece in (("plain", plain), ("own", own)):
        torch.compiler.reset()
        forward, backward = both_ways(
            torch.compile(piece, dynamic=False, backend=options.backend, fullgraph=True), given
        )
        figures[f"{label}_forward_ms"] = spent = milliseconds(forward, options.device, 5)
        if backward is not None:
            figures[f"{label}_backward_ms"] = spent = milliseconds(backward, options.device, 5)
        figures[f"{label}_gb_s"] = floor * batch * size.tokens * size.dim / spent / 1e6
    return figures


def both_ways(piece: Piece, given: Sequence[Tensor]) -> tuple[Callable[[], object], Callable[[], object] | None]:
    """One call of a piece, and one of its backward pass where it has one."""
    leaves = [x.detach().requires_grad_() for x in given]
    outs = piece(*leaves)
    if not outs[0].requires_grad:
        return lambda: piece(*leaves), None
    seeds = [torch.randn_like(out) for out in outs]
    return lambda: piece(*leaves), lambda: torch.autograd.grad(outs, leaves, seeds, retain_graph=True)


def launches(size: Size, batch: int, options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Each kernel alone with several launch figures: rows of a program and warps; keys of a block, warps, stages."""
    stream, branch, gate = inputs("xyc", size, batch, torch.bfloat16, options.device)
    hidden, qkv, dqkv = inputs("hqq", size, batch, torch.bfloat16, options.device)
    mean, rstd = stream.mean(2), stream.var(2).add(EPS).rsqrt()
    out, lse = operators.attention_of_qkv(qkv, size.heads)
    parts = [*split_heads(qkv, size.heads), *split_heads(dqkv, size.heads)]
    walk = [(rows, warps) for rows in (8, 16, 32, 64) for warps in (2, 4, 8)]
    norm = lambda: operators.gated_norm_backward(stream, branch, stream, mean, rstd, gate, gate, branch)  # noqa: E731
    trials: list[tuple[str, Callable[[], object], Any, list[Any]]] = [
        ("norm", norm, _set_walk("norm"), walk),
        ("gate", lambda: operators.gate_backward(stream, gate, branch), _set_walk("gate"), walk),
        ("gelu", lambda: operators.gelu_backward(hidden, hidden), _set_gelu, GELUS),
        ("attention", lambda: operators.attention_of_qkv(qkv, size.heads), _set_row(operators.FORWARD, size), FORWARDS),
        ("attention backward", lambda: operators.attention_backward(branch, qkv, out, lse, size.heads),
         _set_row(operators.BACKWARD, size), BACKWARDS),
        ("tangent", lambda: operators.tangent_by_kernel(*parts), _set_row(operators.TANGENT, size), TANGENTS),
    ]  # fmt: skip
    for name, work, put, choices in trials:
        if name.startswith("attention") and size.dim // size.heads > 64:
            continue
        spent: dict[str, object] = {}
        before = _launch_figures()
        for choice in choices[: 1 if options.toy else None]:
            try:
                put(choice)
                spent[str(choice)] = round(milliseconds(work, options.device, 5, 5), 4)
            except Exception as error:  # too many registers, too much shared memory: one choice fewer
                spent[str(choice)] = f"{type(error).__name__} {str(error)[:60]}"
            _restore(before)
        yield {"launch": name, "dim": size.dim, "batch": batch, "ms": spent}


GELUS = [(rows, warps) for rows in (8, 32, 128) for warps in (4, 8)]
FORWARDS = [(128, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 2), (128, 128, 8, 2), (128, 64, 4, 3), (64, 128, 4, 2)]
BACKWARDS = [(64, 8, 1), (32, 8, 1), (16, 8, 1), (32, 16, 1), (64, 16, 1), (32, 8, 2)]
TANGENTS = [(64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 3), (128, 128, 8, 2), (64, 32, 4, 2), (128, 32, 8, 2)]


def _set_walk(name: str) -> Callable[[tuple[int, int]], None]:
    def put(choice: tuple[int, int]) -> None:
        operators.ROWS, operators.WARPS[name] = choice

    return put


def _set_gelu(choice: tuple[int, int]) -> None:
    operators.GELU_ROWS, operators.WARPS["gelu"] = choice


def _set_row(table: dict[int, tuple[int, ...]], size: Size) -> Callable[[tuple[int, ...]], None]:
    def put(choice: tuple[int, ...]) -> None:
        table[64 if size.dim // size.heads <= 64 else 128] = choice

    return put


def _launch_figures() -> tuple[Any, ...]:
    return (
        operators.ROWS,
        operators.GELU_ROWS,
        dict(operators.WARPS),
        dict(operators.FORWARD),
        dict(operators.BACKWARD),
        dict(operators.TANGENT),
    )


def _restore(before: tuple[Any, ...]) -> None:
    operators.ROWS, operators.GELU_ROWS = before[:2]
    for table, old in zip(
        (operators.WARPS, operators.FORWARD, operators.BACKWARD, operators.TANGENT), before[2:], strict=True
    ):
        table.update(old)


def time_steps(
    name: str, batch: int, alpha: float, variants: dict[str, frozenset[str]], options: Any
) -> dict[str, object]:
    """Milliseconds and MFU of a compiled step with each set of kernels, in rotated rounds."""
    size, share = TOY if options.toy else SIZES[name], 0.25
    works: dict[str, tuple[frozenset[str], Callable[[], object]]] = {}
    forget_compiled()
    torch._dynamo.config.recompile_limit = 64
    rows = draw(size, batch, share, seed=0, device=options.device, dtype=torch.float32)
    settings, kind = objective(guided=False, bf16=True), "ours" if alpha < 1.0 else "fm"
    net = build(size, seed=0, device=options.device, dtype=torch.float32)
    flops = count(work_of(kind, net, rows, alpha, settings), options.device).flops if options.device == "cuda" else 0
    compile_blocks(net, options.backend)
    compiling = {}
    for label, kernels in variants.items():
        works[label] = (kernels, work_of(kind, net, rows, alpha, settings))
        with using(kernels, anywhere=options.device == "cpu"):
            began = time.monotonic()
            works[label][1]()
            compiling[label] = round(time.monotonic() - began, 1)
    times: dict[str, list[float]] = {label: [] for label in works}
    for turn in range(options.rounds + 1):
        order = [*works][turn % len(works) :] + [*works][: turn % len(works)]
        for label in order:
            kernels, work = works[label]
            with using(kernels, anywhere=options.device == "cpu"):
                spent = _step_ms(work, options.device)
            if turn:
                times[label].append(spent)
    for label in ("none", "all") if options.profile is not None else ():
        with using(variants[label], anywhere=options.device == "cpu"):
            write_profile(works[label][1], options.profile, f"{name}, α = {alpha:g}, kernels: {label}")
    middle = {label: statistics.median(each) for label, each in times.items()}
    peak = max(
        [each for card, each in PEAK.items() if options.device == "cuda" and card in torch.cuda.get_device_name()]
        or [0.0]
    )
    figures: dict[str, object] = {"size": name, "batch": batch, "alpha": alpha, "ms": middle, "compile_s": compiling}
    if peak and flops:
        figures["mfu"] = {label: flops / ms / peak * 1000 for label, ms in middle.items()}
    return figures


OURS = [f"{name}_kernel" for name in ("norm_backward", "gate_backward", "gelu_backward")]
OURS += [f"attention_{name}_kernel" for name in ("forward", "backward", "tangent")]
KINDS = {  # words in a kernel's name → what it does; the compiler's own begin with triton_
    "ours": OURS,
    "products": ["nvjet", "gemm", "cublas", "cutlass"],
    "attention": ["sdpa", "flash", "cudnn"],
    "written by the compiler": ["triton_"],
}


def write_profile(work: Callable[[], object], file: Path, title: str) -> None:
    """Append what each kernel of a step takes, the longest first, and the sums by kind."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    events = profile.key_averages()
    rows = sorted(((e.self_device_time_total / 1000, e.count, e.key) for e in events), reverse=True)
    sums: dict[str, float] = {}
    for ms, _, name in rows:
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")
        sums[kind] = sums.get(kind, 0.0) + ms
    with file.open("a", encoding="utf-8") as out:
        print(f"\n{title}:", ", ".join(f"{kind} {ms:.1f} ms" for kind, ms in sums.items()), file=out)
        for ms, times, name in rows[:60]:
            print(f"{ms:9.3f} ms {times:5d} x  {name[:160]}", file=out)


def _step_ms(work: Callable[[], object], device: str) -> float:
    """One of several steps in a row, as in a run: nothing waits between them."""
    calls = 3 if device == "cuda" else 1
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        work()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began) / calls


SHAPES = {"B/2": 256, "XL/2": 96, "L/2": 96}  # and rows of a batch
PARTS = ("checks", "gradients", "launches", "steps", "kernels")
TOY = Size(48, 1, 3, latent=4)  # 4 tokens


def variants(alpha: float, able: frozenset[str], *, each: bool) -> dict[str, frozenset[str]]:
    """Which kernels to compile the step with: none, all, and all but each that matters there."""
    without = {"attention", "tangent"} if alpha == 0.0 else able - {"tangent"}
    listed = {"none": frozenset[str](), "all": able}
    return listed | ({f"all but {name}": able - {name} for name in sorted(without & able)} if each else {})


def check(options: argparse.Namespace) -> frozenset[str]:
    """Print the errors of every piece; give the kernels that are right."""
    wrong: set[str] = set()
    for name in [None] if options.toy else options.sizes:
        size = TOY if name is None else SIZES[name]
        for piece, dtype, errors in check_pieces(size, 2 if options.toy else 4, options.device):
            right = max(errors) < BOUNDS[dtype]
            figures = {"piece": piece, "dim": size.dim, "dtype": str(dtype), "right": right, "errors": errors}
            record("kernels: checks", options.device, **figures)
            if not right:
                wrong.add(piece.split()[-1])
    return EVERY - wrong


def check_gradients(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """The errors of whole steps."""
    size = TOY if options.toy else Size(384, 2, 6, latent=32)
    for title, plain, own in check_steps(size, 4, options.device, options.backend):
        yield {"step": title, "error_without": plain, "error_with": own}


def main(words: Sequence[str] | None = None) -> None:
    """Run the parts in order, while there is time, and print a line of JSON for each measurement."""
    options = arguments(words)
    until, able = time.monotonic() + options.seconds, EVERY
    if "checks" in options.only:
        able = check(options)
    work: list[tuple[str, str, Callable[[], Iterator[dict[str, object]]]]] = []
    work.append(("gradients", "", partial(check_gradients, options)))
    shapes = [("tiny", 2)] if options.toy else [(name, SHAPES[name]) for name in options.sizes]
    for name, batch in shapes:
        size = TOY if options.toy else SIZES[name]
        work += [
            ("kernels", f"{piece} {name}", partial(_one, time_piece, piece, size, batch, options))
            for piece in pieces(1)
        ]
        work.append(("launches", name, partial(launches, size, batch, options)))
        for alpha in (1.0, 0.0):
            each = variants(alpha, able, each=name == shapes[0][0] and not options.toy)
            work.append(("steps", f"{name} α={alpha:g}", partial(_one, time_steps, name, batch, alpha, each, options)))
    for part, title, lines in sorted(work, key=lambda one: one[0] == "kernels"):
        if part not in options.only:
            continue
        if time.monotonic() > until:
            print(f"no time left for {part} {title}", flush=True)
            continue
        torch._functorch.config.donated_buffer = part != "kernels"  # there a backward pass is run many times
        try:
            for line in lines():
                record(f"kernels: {part}", options.device, **line)
        except Exception as error:  # the next part may still run: a GPU's minutes are dear
            print(f"{part} {title}: {type(error).__name__}: {str(error)[:500]}", flush=True)


def _one(work: Callable[..., dict[str, object]], *given: Any) -> Iterator[dict[str, object]]:
    yield work(*given)


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sizes", nargs="+", choices=sorted(SHAPES), default=["B/2", "XL/2"])
    parser.add_argument("--rounds", type=int, default=5, help="kept rounds of the steps")
    parser.add_argument("--seconds", type=float, default=600.0, help="after which nothing new is begun")
    parser.add_argument("--toy", action="store_true", help="a tiny network: does everything run?")
    parser.add_argument(
        "--profile", type=Path, help="file for what each kernel of a step takes, without ours and with all"
    )
    parser.add_argument("--backend", default="", help="of torch.compile; inductor on a GPU, else aot_eager")
    options = parser.parse_args(words)
    options.backend = options.backend or ("inductor" if options.device == "cuda" else "aot_eager")
    if options.device == "cpu":
        interpret_bf16()
    return options


if __name__ == "__main__":
    main()
