"""What rides along with a value through the network: its derivative, or other rows that are not learnt from.

MeanFlow's target (α = 0) needs u and du/dt. Instead of differentiating the network from outside, the forward pass that
computes u computes du/dt as well: every layer takes a value with its tangent, and gives a value with its tangent.

A `Dual` is such a pair. Its value has all B rows, with gradient and kernels as usual, and is the same, bit for bit, as
without a tangent. Its tangent belongs to the LAST B' ≤ B rows (the r < t rows; the others need none) and has no
gradient. Let J be the derivative of a layer f at x, and dx the tangent of x. Then the layer's value is f(x), and its
tangent J dx. The rules below are the chain rule, layer by layer; each uses intermediates that the value has at hand:

    linear                 d(W x + b) = W dx
    LayerNorm, GELU, SiLU  J is symmetric, so J dx is what the layer's backward kernel computes from dx
    RMSNorm                with x̂ = s x, s = 1 / √(mean x² + ε): dy = n ∘ s (dx − x̂ mean(x̂ ∘ dx))
    softmax                the same: dp = p ∘ (ds − Σ p ds)
    products               d(a b) = da b + a db

That costs one more pass on those rows, where a double backward or torch.func.jvp costs three. (The latter also
multiplies by a zero tangent of every weight.) The tangent of the residual stream stays in float32: bf16 doubles the
error.

A `Beside` is a value on the rows that are learnt from, and the same quantity on other rows without gradient: the rows
that guidance asks about (train/step.py). A layer computes the first, then the others, in the same call. So there is
one call of the network instead of two, and a sharded network is gathered once.

Every function here also takes a plain tensor, and is then the plain operation that its docstring names. Both pairs are
named tuples, so that hooks and compilers see two tensors.

Shapes: B rows, B' rows with a tangent or beside, N tokens, D channels, d channels of a head.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dual(NamedTuple):
    """A value, and the derivative of its last rows along one direction."""

    value: Tensor  # (B, ...)
    tangent: Tensor  # (B', ...) without gradient


class Beside(NamedTuple):
    """A value on the rows that are learnt from, and on other rows, from which nothing is learnt."""

    value: Tensor  # (B, ...)
    others: Tensor  # (B', ...) without gradient


WIDE = (torch.float32, torch.float64)
# z, t, r, y of the rows beside, and their guide where the network takes one
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
Stream = Tensor | Dual | Beside  # what flows through the blocks
# What one call takes and gives: plain tensors throughout, or Duals throughout
PlainOrDual = TypeVar("PlainOrDual", Tensor, Dual)
OneValue = TypeVar("OneValue", Tensor, Dual, Tensor | Dual)
OneStream = TypeVar("OneStream", Tensor, Dual, Beside, Tensor | Dual, Stream)


def last_rows(x: Tensor, rows: int) -> Tensor:
    """Cut the last `rows` rows out of x: those to which a tangent of that many rows belongs."""
    return x if rows == x.shape[0] else x[x.shape[0] - rows :]


def last(x: Dual) -> Tensor:
    """Give the value on the rows that have a tangent; only for use without gradient.

    It is a function and not a property, because older compilers fail on properties of named tuples.
    """
    return last_rows(x.value, x.tangent.shape[0])


def moving(s: Tensor, rows: int) -> Tensor | Dual:
    """Give a time the tangent 1 on its last `rows` rows: there it moves at speed 1; with 0 rows it stands still."""
    return Dual(s, torch.ones_like(last_rows(s, rows))) if rows else s


# Linear maps: the tangent goes the same way as the value.


def each(f: Callable[[Tensor], Tensor], x: OneStream) -> OneStream:
    """f(x) for an f that only moves numbers around (reshape, permute): it does the same to whatever rides along."""
    if isinstance(x, Tensor):
        return f(x)
    moved: OneStream = type(x)(*map(f, x))
    return moved


def cut(f: Callable[[Tensor], tuple[Tensor, ...]], x: PlainOrDual) -> tuple[PlainOrDual, ...]:
    """f(x) for an f that cuts a tensor into several (chunk, unbind); each piece keeps its piece of the tangent."""
    if isinstance(x, Tensor):
        return f(x)
    return tuple(Dual(*parts) for parts in zip(f(x.value), f(x.tangent), strict=True))


def add(a: Tensor | Dual, b: Tensor | Dual) -> Tensor | Dual:
    """a + b, where either may stand still (have no tangent)."""
    value = (a.value if isinstance(a, Dual) else a) + (b.value if isinstance(b, Dual) else b)
    tangents = [x.tangent for x in (a, b) if isinstance(x, Dual)]
    return Dual(value, sum(tangents[1:], tangents[0])) if tangents else value


def join_tokens(parts: Sequence[Tensor | Dual]) -> Tensor | Dual:
    """Put tokens (B, n, D) of several kinds one after the other; those that stand still get a tangent of zeros."""
    value = torch.cat([part.value if isinstance(part, Dual) else part for part in parts], 1)
    rows = next((len(part.tangent) for part in parts if isinstance(part, Dual)), 0)
    if rows == 0:
        return value
    with torch.no_grad():
        tangents = [
            torch.zeros_like(last_rows(part, rows)) if isinstance(part, Tensor) else part.tangent for part in parts
        ]
        return Dual(value, torch.cat(tangents, 1))


# Layers: each has one rule, found by its type.


def through(layer: nn.Module, x: OneValue) -> OneValue:
    """layer(x), with the tangent J dx where x has one."""
    if isinstance(x, Tensor):
        out: Tensor = layer(x)
        return out
    return RULES[type(layer)](layer, x)


def _linear(layer: nn.Linear, x: Dual) -> Dual:
    value = layer(x.value)
    with torch.no_grad():
        return Dual(value, F.linear(x.tangent, layer.weight))


def _layer_norm(layer: nn.LayerNorm, x: Dual) -> Dual:
    shape, rows = layer.normalized_shape, x.tangent.shape[0]
    if x.value.dtype in WIDE:  # the residual stream: one kernel for value and statistics
        value, mean, rstd = torch.native_layer_norm(x.value, shape, layer.weight, layer.bias, layer.eps)
    else:  # q and k under autocast, whose value is the device's affair
        value = layer(x.value)
    with torch.no_grad():
        wide, dx = last(x), x.tangent
        if wide.dtype not in WIDE:
            wide, dx = wide.float(), dx.float()
            _, mean, rstd = torch.native_layer_norm(wide, shape, None, None, layer.eps)
        mean, rstd = last_rows(mean, rows), last_rows(rstd, rows)
        mask = [True, False, False]
        tangent = torch.ops.aten.native_layer_norm_backward(dx, wide, shape, mean, rstd, None, None, mask)[0]
        return Dual(value, tangent if layer.weight is None else tangent * layer.weight)


def _rms_norm(layer: nn.RMSNorm, x: Dual) -> Dual:
    value, eps = layer(x.value), layer.eps
    assert eps is not None, "an RMSNorm without a floor"
    with torch.no_grad():
        wide, dx = last(x), x.tangent
        s = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        normal = wide * s
        tangent = torch.addcmul(dx, normal, (normal * dx).mean(-1, keepdim=True), value=-1) * s
        return Dual(value, tangent if layer.weight is None else tangent * layer.weight)


def _gelu(layer: nn.GELU, x: Dual) -> Dual:
    value = layer(x.value)
    with torch.no_grad():
        return Dual(value, torch.ops.aten.gelu_backward(x.tangent, last(x), approximate=layer.approximate))


def _silu(layer: nn.SiLU, x: Dual) -> Dual:
    value = layer(x.value)
    with torch.no_grad():
        return Dual(value, torch.ops.aten.silu_backward(x.tangent.to(value.dtype), last(x)))


def _identity(layer: nn.Identity, x: Dual) -> Dual:
    return x


def _sequence(layer: nn.Sequential, x: Dual) -> Dual:
    for one in layer:
        x = through(one, x)
    return x


RULES: dict[type, Callable[..., Dual]] = {
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GELU: _gelu,
    nn.SiLU: _silu,
    nn.Identity: _identity,
    nn.Sequential: _sequence,
}


# Products, the residual connection and attention.


def modulate(x: PlainOrDual, shift: PlainOrDual | None, scale: PlainOrDual | None) -> PlainOrDual:
    """x (1 + scale) + shift: adaLN's way to let the conditioning speak to normalised tokens; None: x as it is."""
    if shift is None or scale is None:
        return x
    if isinstance(x, Tensor):
        return x * (1 + scale) + shift
    value = x.value * (1 + scale.value) + shift.value
    with torch.no_grad():
        tangent = torch.addcmul(shift.tangent, last(x), scale.tangent)
        return Dual(value, torch.addcmul(tangent, x.tangent, 1 + last(scale)))


def gated(x: PlainOrDual, gate: Tensor | Dual, branch: PlainOrDual) -> PlainOrDual:
    """x + gate · branch: the residual connection; the gate is set by the conditioning, or is a weight."""
    if isinstance(x, Tensor):
        assert not isinstance(gate, Dual)
        return x + gate * branch
    if isinstance(gate, Tensor):
        value = x.value + gate * branch.value
        with torch.no_grad():
            return Dual(value, torch.addcmul(x.tangent, gate, branch.tangent))
    value = x.value + gate.value * branch.value
    with torch.no_grad():
        tangent = torch.addcmul(x.tangent, gate.tangent, last(branch))
        return Dual(value, torch.addcmul(tangent, last(gate), branch.tangent))


def silu_gated(x: PlainOrDual) -> PlainOrDual:
    """silu(a) b of the two halves a, b of the last axis, as in a SwiGLU."""
    if isinstance(x, Tensor):
        a, b = x.chunk(2, -1)
        return F.silu(a) * b
    value = silu_gated(x.value)
    with torch.no_grad():
        (a, b), (da, db) = last(x).chunk(2, -1), x.tangent.to(value.dtype).chunk(2, -1)
        return Dual(value, torch.addcmul(torch.ops.aten.silu_backward(da * b, a), F.silu(a), db))


def attention(q: PlainOrDual, k: PlainOrDual, v: PlainOrDual, attend: str) -> PlainOrDual:
    """softmax(q kᵀ / √d) v of q, k, v (B, heads, N, d); `attend` names the kernel of the value, "fused" or "math"."""
    if isinstance(q, Tensor):
        return _attention(q, k, v, attend)
    value = _attention(q.value, k.value, v.value, attend)
    with torch.no_grad():
        return Dual(value, _attention_tangent(q, k, v))


def _attention(q: Tensor, k: Tensor, v: Tensor, attend: str) -> Tensor:
    if attend == "fused":
        out: Tensor = F.scaled_dot_product_attention(q, k, v)
        return out
    p: Tensor = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return p.to(v.dtype) @ v


def _attention_tangent(q: Dual, k: Dual, v: Dual) -> Tensor:
    """The tangent dp v + p dv of attention, p = softmax(s), s = q kᵀ / √d; the fused value has kept no p.

    ds = (dq kᵀ + q dkᵀ) / √d is ONE product: of (q, dq) side by side with (dk, k) side by side.
    """
    rows, heads, tokens, size = q.tangent.shape
    left = torch.cat([last(q), q.tangent], -1).flatten(0, 1) * size**-0.5  # (B' heads, N, 2 d)
    right = torch.cat([k.tangent, last(k)], -1).flatten(0, 1).transpose(1, 2)
    p = torch.bmm(left[..., :size], right[:, size:]).softmax(-1)
    ds = torch.bmm(left, right).to(p.dtype)
    dp = torch.ops.aten._softmax_backward_data(ds, p, -1, p.dtype)
    out = torch.baddbmm(torch.bmm(dp, last(v).flatten(0, 1)), p, v.tangent.flatten(0, 1))
    return out.view(rows, heads, tokens, size)


# Blocks: a value with its gradient, then what rides along beside it.


def both(layer: Callable[..., Any], x: Stream, c: Stream | None, *more: Any) -> Stream:
    """layer(x, c, …) of the graded rows, then of the rows beside them where there are some.

    The graded rows come first, because autocast keeps the first cast of a weight, whether it has a gradient or not.
    """
    if isinstance(x, Beside):
        value = layer(x.value, part_of(c, 0), *more)
        with torch.no_grad():
            return Beside(value, layer(x.others, part_of(c, 1), *more))
    out: Stream = layer(x, c, *more)
    return out


def part_of(c: Stream | None, place: int) -> Tensor | None:
    """One half of a pair, by its place; None where there is no conditioning beside the tokens."""
    assert not isinstance(c, Tensor), "the tokens are a pair, and their conditioning is not"
    return None if c is None else c[place]


def recomputed(block: nn.Module, x: Stream, c: Stream | None, *more: Any, once: bool) -> Stream:
    """block(x, c, …) under gradient checkpointing: the backward pass computes the block again to get its gradient.

    `once`: it then recomputes the value alone, and not what rides along, whose result it does not need. A compiled
    block saves other tensors without tangents than with them. There the tangents are recomputed too, and rows beside
    get a call of their own.
    """
    from torch.utils.checkpoint import checkpoint  # here: torch 2.6 imports sympy for it, which takes as long as torch

    if isinstance(x, Beside) and not once:
        value = recomputed(block, x.value, part_of(c, 0), *more, once=once)
        assert isinstance(value, Tensor)
        with torch.no_grad():
            return Beside(value, block(x.others, part_of(c, 1), *more))
    if isinstance(x, Tensor) or not once:
        out: Stream = checkpoint(block, x, c, *more, use_reentrant=False, preserve_rng_state=False)
        return out
    kind, riding = type(x), [(x[1], part_of(c, 1))]

    def run(value: Tensor, condition: Tensor | None) -> Stream:
        if not riding:  # the backward pass: the value alone
            again: Stream = block(value, condition, *more)
            return again
        extra, condition_extra = riding.pop()
        beside = None if condition is None or condition_extra is None else kind(condition, condition_extra)
        first: Stream = block(kind(value, extra), beside, *more)
        return first

    return kind(*checkpoint(run, x.value, part_of(c, 0), use_reentrant=False, preserve_rng_state=False))
