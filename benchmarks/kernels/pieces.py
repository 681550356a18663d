"""The pieces of a block that the kernels compute, each beside its plain form, and the check that both are the same."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from kernels import block, operators
from torch import Tensor
from torch.nn import functional as F
from workload import Size

from alphaflow_cli.nn.layers import split_heads
from alphaflow_cli.nn.tangent import Dual, _attention_tangent

EPS = 1e-6
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2e-2}  # in bf16 half of the plain form's own error, and twice as much
Piece = Callable[..., tuple[Tensor, ...]]


def plain_modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift, in the precision of x, given back in that of the shift."""
    return (F.layer_norm(x, x.shape[2:], eps=EPS) * (1 + scale.to(x.dtype)) + shift.to(x.dtype)).to(shift.dtype)


def plain_gated(x: Tensor, gate: Tensor, branch: Tensor, bias: Tensor) -> Tensor:
    """x + gate (branch + bias)."""
    return x + gate.to(x.dtype) * (branch + bias.to(branch.dtype)).to(x.dtype)


def plain_gated_norm(
    x: Tensor, gate: Tensor, branch: Tensor, bias: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, and normalised and modulated."""
    out = plain_gated(x, gate, branch, bias)
    return out, plain_modulated(out, shift, scale)


def plain_attention(qkv: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Attention by torch's own kernel."""
    q, k, v = split_heads(qkv + bias.to(qkv.dtype), heads)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def plain_tangent(qkv: Tensor, dqkv: Tensor, heads: int) -> Tensor:
    """The tangent of attention as five products."""
    parts = zip(split_heads(qkv, heads), split_heads(dqkv, heads), strict=True)
    with torch.no_grad():
        return _attention_tangent(*(Dual(*pair) for pair in parts)).transpose(1, 2).flatten(2)


def own_tangent(qkv: Tensor, dqkv: Tensor, heads: int) -> Tensor:
    """The same by the kernel."""
    with torch.no_grad():
        out: Tensor = operators.tangent_by_kernel(*split_heads(qkv, heads), *split_heads(dqkv, heads))
        return out.transpose(1, 2).flatten(2)


def carried(x: Tensor, bias: Tensor) -> Tensor:
    """x + bias, whose gradient comes from what follows."""
    return x + bias.detach().to(x.dtype)


def pieces(heads: int) -> dict[str, tuple[Piece, Piece, str, int]]:
    """Each piece: with kernels, plain, its inputs by letter (see `inputs`), the fewest bytes of its backward pass."""
    own: Any = block
    return {
        "norm": (
            lambda x, s, c: own._Normed.apply(x, s, c, EPS),
            lambda x, s, c: (x.view_as(x), plain_modulated(x, s, c)),
            "xcc",
            14,
        ),
        "gated norm": (
            lambda x, g, y, b, s, c: own._GatedNormed.apply(x, g, carried(y, b), b, s, c, EPS),
            plain_gated_norm,
            "xcybcc",
            18,
        ),
        "gate": (
            lambda x, g, y, b: (own._Gated.apply(x, g, carried(y, b), b),),
            lambda x, g, y, b: (plain_gated(x, g, y, b),),
            "xcyb",
            8,
        ),
        "gelu": (
            lambda h, b: (own._Gelu.apply(carried(h, b), b),),
            lambda h, b: (F.gelu(h + b.to(h.dtype), approximate="tanh"),),
            "hd",
            24,
        ),
        "attention": (
            lambda q, b: (own._Attention.apply(carried(q, b), b, heads),),
            lambda q, b: (plain_attention(q, b, heads),),
            "qe",
            16,
        ),
        "tangent": (
            lambda q, d: (own_tangent(q, d, heads),),
            lambda q, d: (plain_tangent(q, d, heads),),
            "qq",
            14,
        ),
    }


def inputs(letters: str, size: Size, batch: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """x: tokens in float32; y, h, q: a branch, hidden numbers, qkv; c: a modulation; b, d, e: biases of these."""
    dim, tokens = size.dim, size.tokens
    wide = int(dim * size.mlp_ratio)
    torch.manual_seed(len(letters))
    made = []
    for letter in letters:
        if letter in "bde":
            made.append(torch.randn({"b": dim, "d": wide, "e": 3 * dim}[letter], device=device))
        elif letter == "c":  # one part of six, as a modulation gives them
            made.append(torch.randn(batch, 6, dim, device=device, dtype=dtype)[:, 2:3])
        else:
            width = {"x": dim, "y": dim, "h": wide, "q": 3 * dim}[letter]
            kind = torch.float32 if letter == "x" else dtype
            made.append(torch.randn(batch, tokens, width, device=device, dtype=kind))
    return made


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def results(piece: Piece, given: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """What a piece gives, and the gradients of all its inputs; in another precision of the same numbers if given."""
    leaves = [(x if dtype is None else x.to(dtype)).detach().requires_grad_() for x in given]
    outs = piece(*leaves)
    if not outs[0].requires_grad:
        return list(outs)
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(out.shape, generator=generator).bfloat16().to(out.device, out.dtype) for out in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, seeds)]


def check_pieces(size: Size, batch: int, device: str) -> Iterator[tuple[str, torch.dtype, list[float]]]:
    """The errors of each piece's outputs and gradients, eager, in both precisions."""
    for name, (own, plain, letters, _) in pieces(size.heads).items():
        if name == "attention" and size.dim // size.heads > 64:
            continue
        for dtype in BOUNDS:
            if dtype == torch.float32 and device == "cuda" and name in ("attention", "tangent"):
                continue  # there these take 16 bits only
            given = inputs(letters, size, batch, dtype, device)
            try:
                compared = zip(results(own, given), results(plain, given, torch.float64), strict=True)
                errors = [relative(a, b) for a, b in compared]
                if name == "attention":  # the gradient of the bias of the keys is 0
                    errors[-1] = relative(
                        results(own, given)[-1].chunk(3)[2], results(plain, given, torch.float64)[-1].chunk(3)[2]
                    )
            except Exception as error:  # one line for a kernel that cannot be launched; the others go on
                print(f"{name} {dtype}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                errors = [float("inf")]
            yield name, dtype, errors


def interpret_bf16() -> None:
    """Teach Triton's interpreter products of bf16, which it keeps as the bits of integers."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "on a CPU: TRITON_INTERPRET=1 python benchmarks/bench_kernels.py"
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    if hasattr(builder.create_dot, "widened"):
        return
    plain = builder.create_dot

    def wide(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
        return plain(self, wide(a), wide(b), *more)

    create_dot.widened = True  # type: ignore[attr-defined]
    builder.create_dot = create_dot
