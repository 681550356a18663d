"""The tangent that rides along: du/dt in the same forward that computes u (MeanFlow's target, α = 0).

A `Dual` is a value on all rows, with its gradient and its kernels as usual, and the derivative of the LAST rows along
one direction, without gradient. Every rule below leaves the value alone, bit for bit, and pushes the derivative
forward through the value's intermediates, which the forward has at hand:

    linear                d(W x + b) = W dx
    LayerNorm, GELU, SiLU the Jacobian J is symmetric, so J dx is what the backward kernel computes from dx
    softmax               the same, dp = p ∘ (ds − Σ p ds)
    products              d(a b) = da b + a db

One more pass of linear cost on those rows, instead of the three of a double backward or of torch.func.jvp, which also
multiplies by a zero tangent of every weight. Keep the tangent of the residual stream in float32: bf16 doubles the
error. Shapes: B rows, B' ≤ B last rows, N tokens, D channels, d channels of a head.

Rows that go along without gradient: the other rows of a graded forward (guidance's, train/step.py).

A `Beside` is a value on the rows that are learnt from, and the same value on other rows, which nothing is learnt from.
A layer sees the first with gradient and the others without, one after the other in the same call: so there is one call
of the network instead of two, and a sharded network is gathered once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Dual(NamedTuple):
    """A value and the derivative of its last rows. A named tuple, so that hooks and compilers see two tensors."""

    value: Tensor  # (B, ...)
    tangent: Tensor  # (B', ...)


Ride = TypeVar("Ride", Tensor, Dual)  # values alone, or all of them with their tangents
One = TypeVar("One", Tensor, Dual, Tensor | Dual)  # one value, whichever it is
Either = TypeVar("Either", bound=Tensor | tuple[Tensor, ...])  # the same, or a value beside others (nn/tangent.py)


def last_rows(x: Tensor, rows: int) -> Tensor:
    """The last `rows` rows."""
    return x if rows == x.shape[0] else x[x.shape[0] - rows :]


def last(x: Dual) -> Tensor:
    """The value of the rows with a tangent; call it without gradient only. Not a property: older compilers fail."""
    return last_rows(x.value, x.tangent.shape[0])


def moving(s: Tensor, rows: int) -> Tensor | Dual:
    """A time that moves at speed 1 on the last `rows` rows."""
    return Dual(s, torch.ones_like(last_rows(s, rows))) if rows else s


# Linear maps: the tangent goes the same way as the value.


def each(f: Callable[[Tensor], Tensor], x: Either) -> Either:
    """A linear f that only moves numbers (reshape, permute), of a value and of what rides along."""
    return cast(Either, f(x) if isinstance(x, Tensor) else type(x)(*map(f, x)))


def cut(f: Callable[[Tensor], tuple[Tensor, ...]], x: Ride) -> tuple[Ride, ...]:
    """A linear f that cuts into several: chunk, unbind."""
    if isinstance(x, Tensor):
        return f(x)
    return tuple(Dual(*parts) for parts in zip(f(x.value), f(x.tangent), strict=True))


def add(a: Tensor | Dual, b: Tensor | Dual) -> Tensor | Dual:
    """a + b; either may be without a tangent."""
    value = (a.value if isinstance(a, Dual) else a) + (b.value if isinstance(b, Dual) else b)
    tangents = [x.tangent for x in (a, b) if isinstance(x, Dual)]
    return Dual(value, sum(tangents[1:], tangents[0])) if tangents else value


# Layers: `through(layer, x)` is layer(x), and its tangent where there is one.


def through(layer: nn.Module, x: One) -> One:
    """layer(x) by the rule of the layer's type."""
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
    if x.value.dtype in (torch.float32, torch.float64):  # the stream: one kernel gives the value and its statistics
        value, mean, rstd = torch.native_layer_norm(x.value, shape, layer.weight, layer.bias, layer.eps)
    else:  # q and k under autocast, whose value is the device's affair
        value = layer(x.value)
    with torch.no_grad():
        wide, dx = last(x), x.tangent
        if wide.dtype not in (torch.float32, torch.float64):
            wide, dx = wide.float(), dx.float()
            _, mean, rstd = torch.native_layer_norm(wide, shape, None, None, layer.eps)
        mean, rstd = last_rows(mean, rows), last_rows(rstd, rows)
        mask = [True, False, False]
        tangent = torch.ops.aten.native_layer_norm_backward(dx, wide, shape, mean, rstd, None, None, mask)[0]
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
    nn.GELU: _gelu,
    nn.SiLU: _silu,
    nn.Identity: _identity,
    nn.Sequential: _sequence,
}


# Products.


def modulate(x: Ride, shift: Ride, scale: Ride) -> Ride:
    """x (1 + scale) + shift."""
    if isinstance(x, Tensor):
        return x * (1 + scale) + shift
    value = x.value * (1 + scale.value) + shift.value
    with torch.no_grad():
        tangent = torch.addcmul(shift.tangent, last(x), scale.tangent)
        return Dual(value, torch.addcmul(tangent, x.tangent, 1 + last(scale)))


def gated(x: Ride, gate: Ride, branch: Ride) -> Ride:
    """x + gate · branch."""
    if isinstance(x, Tensor):
        return x + gate * branch
    value = x.value + gate.value * branch.value
    with torch.no_grad():
        tangent = torch.addcmul(x.tangent, gate.tangent, last(branch))
        return Dual(value, torch.addcmul(tangent, last(gate), branch.tangent))


def attention(q: Ride, k: Ride, v: Ride, attend: str) -> Ride:
    """softmax(q kᵀ / √d) v, each (B, heads, N, d)."""
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
    """dp v + p dv, with ds = dq kᵀ + q dkᵀ as ONE product of doubled channels; the fused value has kept no p."""
    rows, heads, tokens, size = q.tangent.shape
    left = torch.cat([last(q), q.tangent], -1).flatten(0, 1) * size**-0.5  # (B' heads, N, 2 d)
    right = torch.cat([k.tangent, last(k)], -1).flatten(0, 1).transpose(1, 2)
    p = torch.bmm(left[..., :size], right[:, size:]).softmax(-1)
    ds = torch.bmm(left, right).to(p.dtype)
    dp = torch.ops.aten._softmax_backward_data(ds, p, -1, p.dtype)
    out = torch.baddbmm(torch.bmm(dp, last(v).flatten(0, 1)), p, v.tangent.flatten(0, 1))
    return out.view(rows, heads, tokens, size)


Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # z, t, r, y


class Beside(NamedTuple):
    """A named tuple, so that hooks and compilers see two tensors."""

    value: Tensor  # (B, ...)
    others: Tensor  # (B', ...) without gradient


Loaded = Tensor | Dual | Beside  # what goes through the blocks: values alone, or with what rides along
Load = TypeVar("Load", Tensor, Dual, Beside, Loaded)


def both(ride: Callable[..., Any], x: Any, c: Any, *more: Any) -> Any:
    """ride(x, c, …) of the value, and of the others where there are some. The graded rows first: autocast keeps the
    first cast of a weight, whether it has a gradient or not."""
    if not isinstance(x, Beside):
        return ride(x, c, *more)
    value = ride(x.value, c.value, *more)
    with torch.no_grad():
        return Beside(value, ride(x.others, c.others, *more))


def recomputed(block: nn.Module, x: Load, c: Load, attend: str, *, once: bool) -> Load:
    """The block under gradient checkpointing. `once`: the backward pass recomputes the value, not what rides along,
    whose result it does not need; not so for the tangents of a compiled block, which saves other tensors in its other
    form (rows beside are a call of their own there)."""
    if isinstance(x, Beside) and isinstance(c, Beside) and not once:
        value = recomputed(block, x.value, c.value, attend, once=once)
        with torch.no_grad():
            return Beside(value, block(x.others, c.others, attend))
    if isinstance(x, Tensor) or isinstance(c, Tensor) or not once:
        out: Load = checkpoint(block, x, c, attend, use_reentrant=False, preserve_rng_state=False)
        return out
    kind, riding = type(x), [(x[1], c[1])]

    def run(value: Tensor, condition: Tensor) -> Load:
        if not riding:
            again: Load = block(value, condition, attend)
            return again
        dx, dc = riding.pop()
        first: Load = block(kind(value, dx), kind(condition, dc), attend)
        return first

    return kind(*checkpoint(run, x.value, c.value, use_reentrant=False, preserve_rng_state=False))
