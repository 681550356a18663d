"""A DiT's block with kernels of our own where its time goes to memory: an experiment, which a GPU has to judge.

It computes what alphaflow_cli/nn/blocks.py does, from the same weights; `install` puts it in that place, for blocks
that are compiled for a GPU. Forward, nearly all is left to the compiler, which reads and writes little more than it
must. Backward, these are one kernel each, where the compiler reads the same numbers two to four times:

    norm        LayerNorm with its modulation, the residual connection before it, and all their sums over tokens
    gate        a branch and its gate at the block's end
    gelu        GELU
    attention   forward and backward on qkv as the linear layer gives it: no copies of q, k, v and their gradients
    tangent     the tangent of attention, without an N × N matrix in memory
    bias        the gradient of a linear layer's bias, a sum over all tokens, comes out of the kernel that follows it

The last: y = x Wᵀ + b, with b detached, goes into a function that is also given b. That returns Σ dy for it.

KERNELS says which of them are used. Sums are made in float32, and the result is rounded once.
"""

from typing import Any

import torch
from kernels import operators
from torch import Tensor, nn
from torch.nn import functional as F

from alphaflow_cli.nn.blocks import Block
from alphaflow_cli.nn.layers import Attention, Mlp, Modulation, split_heads
from alphaflow_cli.nn.tangent import (
    Dual,
    PlainOrDual,
    _attention_tangent,
    attention,
    cut,
    gated,
    last,
    modulate,
    through,
)

KERNELS = frozenset({"norm", "gate", "gelu", "attention", "tangent", "bias"})
ANYWHERE = False  # tests: on any device, compiled or not
WIDEST = 4096  # channels that one program holds in its registers


def install() -> None:
    """Let the network's blocks go this way where `applies` says so."""
    plain = Block.compute

    def compute_either_way(self: Block, x: Any, c: Any, *where: Any) -> Any:
        return compute(self, x, c, *where) if c is not None and applies(self, x) else plain(self, x, c, *where)

    if plain.__name__ != compute_either_way.__name__:
        Block.compute = compute_either_way  # type: ignore[method-assign]


def applies(block: Any, x: PlainOrDual) -> bool:
    """Whether a block goes this way: it is the published one, of float32 tokens, and it is compiled for a GPU."""
    value = x if isinstance(x, Tensor) else x.value
    return (
        bool(KERNELS)
        and (ANYWHERE or (value.is_cuda and torch.compiler.is_compiling()))
        and value.dtype == torch.float32
        and value.shape[2] <= WIDEST
        and isinstance(block.attn, Attention)
        and isinstance(block.mlp, Mlp)
        and isinstance(block.modulation, Modulation)
    )


def compute(block: Any, x: PlainOrDual, c: PlainOrDual, attend: str) -> PlainOrDual:
    """The block's output for tokens (B, N, D) and conditioning (B, D)."""
    attn, mlp = block.attn, block.mlp
    assert isinstance(attn, Attention)
    assert isinstance(mlp, Mlp)
    shift, scale, gate, shift2, scale2, gate2 = block.modulation(c)
    #   x = x + gate * attn(norm1(x) * (1 + scale) + shift)
    x, normal = _normed(block.norm1, x, shift, scale)
    branch = _linear(attn.proj, _attention(attn, normal, attend))
    x, normal = _gated_normed(block.norm2, x, gate, branch, attn.proj, shift2, scale2)
    #   x = x + gate2 * mlp(norm2(x) * (1 + scale2) + shift2)
    branch = _linear(mlp.fc2, _gelu(mlp, _linear(mlp.fc1, normal)))
    out: PlainOrDual = _gated(x, gate2, branch, mlp.fc2)
    return out


# Each part takes and gives plain tensors, or Duals, whose tangents go by the plain rules but for that of attention.


def _linear(layer: nn.Linear, x: PlainOrDual) -> PlainOrDual:
    """A linear layer; where its bias gets its gradient from what follows, the bias is a constant here."""
    bias = layer.bias.detach() if "bias" in KERNELS else layer.bias
    if isinstance(x, Tensor):
        return F.linear(x, layer.weight, bias)
    value = F.linear(x.value, layer.weight, bias)
    with torch.no_grad():
        return Dual(value, F.linear(x.tangent, layer.weight))


def _bias(layer: nn.Linear) -> Tensor | None:
    return layer.bias if "bias" in KERNELS else None


def _normed(norm: nn.Module, x: PlainOrDual, shift: PlainOrDual, scale: PlainOrDual) -> tuple[PlainOrDual, PlainOrDual]:
    """The tokens as they are, and normalised and modulated."""
    if isinstance(x, Tensor):
        if "norm" not in KERNELS:
            return x, modulate(norm(x), shift, scale)
        out: tuple[Tensor, Tensor] = _Normed.apply(x, shift, scale, norm.eps)
        return out
    value, normal = _normed(norm, x.value, shift.value, scale.value)
    return Dual(value, x.tangent), _modulated(norm, Dual(value, x.tangent), normal, shift, scale)


def _gated_normed(
    norm: nn.Module,
    x: PlainOrDual,
    gate: PlainOrDual,
    branch: PlainOrDual,
    made_by: nn.Linear,
    shift: PlainOrDual,
    scale: PlainOrDual,
) -> tuple[PlainOrDual, PlainOrDual]:
    """The tokens with a branch added, and these normalised and modulated."""
    if isinstance(x, Tensor):
        if "norm" not in KERNELS:
            return _normed(norm, _gated(x, gate, branch, made_by), shift, scale)
        bias = _bias(made_by)
        out: tuple[Tensor, Tensor] = _GatedNormed.apply(x, gate, branch, bias, shift, scale, norm.eps)
        return out
    value, normal = _gated_normed(norm, x.value, gate.value, branch.value, made_by, shift.value, scale.value)
    with torch.no_grad():
        moved = Dual(value, gated(x, gate, branch).tangent)
    return moved, _modulated(norm, moved, normal, shift, scale)


def _modulated(norm: nn.Module, x: Dual, normal: Tensor, shift: Dual, scale: Dual) -> Dual:
    """The normalised and modulated tokens, which are there, with their tangent."""
    with torch.no_grad():
        return Dual(normal, modulate(through(norm, x), shift, scale).tangent)


def _gated(x: PlainOrDual, gate: PlainOrDual, branch: PlainOrDual, made_by: nn.Linear) -> PlainOrDual:
    """The tokens with a branch added."""
    if isinstance(x, Tensor):
        if "gate" not in KERNELS and "bias" not in KERNELS:
            return x + gate * branch
        out: Tensor = _Gated.apply(x, gate, branch, _bias(made_by))
        return out
    value = _gated(x.value, gate.value, branch.value, made_by)
    with torch.no_grad():
        return Dual(value, gated(x, gate, branch).tangent)


def _gelu(mlp: Mlp, x: PlainOrDual) -> PlainOrDual:
    """GELU in its tanh form."""
    if isinstance(x, Tensor):
        if "gelu" not in KERNELS and "bias" not in KERNELS:
            return F.gelu(x, approximate="tanh")
        out: Tensor = _Gelu.apply(x, _bias(mlp.fc1))
        return out
    value = _gelu(mlp, x.value)
    with torch.no_grad():
        return Dual(value, torch.ops.aten.gelu_backward(x.tangent, last(x), approximate="tanh"))


def _attention(attn: Attention, x: PlainOrDual, attend: str) -> PlainOrDual:
    """What the heads give, (B, N, D), of tokens (B, N, D)."""
    value = x if isinstance(x, Tensor) else x.value
    tokens, size = value.shape[1], value.shape[2] // attn.heads
    plain = isinstance(attn.q_norm, nn.Identity) and attend == "fused" and _short(value)
    if not (plain and "attention" in KERNELS and size <= 64 and tokens <= operators.MOST_TOKENS):
        return _attention_of_parts(attn, x, attend)
    qkv = _linear(attn.qkv, x)
    if isinstance(qkv, Tensor):
        out: Tensor = _Attention.apply(qkv, _bias(attn.qkv), attn.heads)
        return out
    out = _Attention.apply(qkv.value, _bias(attn.qkv), attn.heads)
    with torch.no_grad():
        return Dual(out, _tangent(*cut(lambda a: split_heads(a, attn.heads), qkv)))


def _attention_of_parts(attn: Attention, x: PlainOrDual, attend: str) -> PlainOrDual:
    """The same with torch's kernel for the value."""
    q, k, v = cut(lambda a: split_heads(a, attn.heads), through(attn.qkv, x))
    q, k = through(attn.q_norm, q), through(attn.k_norm, k)
    if isinstance(q, Tensor):
        return attention(q, k, v, attend).transpose(1, 2).flatten(2)
    value = attention(q.value, k.value, v.value, attend).transpose(1, 2).flatten(2)
    with torch.no_grad():
        return Dual(value, _tangent(q, k, v))


def _tangent(q: Dual, k: Dual, v: Dual) -> Tensor:
    """The tangent of attention, (B', N, D)."""
    parts = [*(last(x) for x in (q, k, v)), *(x.tangent for x in (q, k, v))]
    alike = _short(q.value) and len({x.dtype for x in parts}) == 1
    out = operators.tangent_by_kernel(*parts) if "tangent" in KERNELS and alike else _attention_tangent(q, k, v)
    return out.transpose(1, 2).flatten(2)


def _short(x: Tensor) -> bool:
    """Whether the kernels of attention take such numbers: in float32 the chip's fast products would round them."""
    return ANYWHERE or x.dtype in (torch.bfloat16, torch.float16)


# What is differentiated by hand.


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    normal, mean, rstd = torch.native_layer_norm(x, x.shape[2:], None, None, eps)
    y = normal * (1 + scale.float()) + shift.float()
    # torch 2.11 loses the gradient of an output that went through a cast to the type it has
    return y if y.dtype == shift.dtype else y.to(shift.dtype), mean, rstd


class _Normed(torch.autograd.Function):
    """x, norm(x) (1 + scale) + shift."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, mean, rstd = _modulate(x, shift, scale, eps)
        ctx.save_for_backward(x, mean, rstd, scale)
        return x.view_as(x), y

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, scale = ctx.saved_tensors
        dx, sums = operators.norm_backward(grad_x, grad_y, x, mean, rstd, scale)
        dshift, dscale = sums.sum(1).to(scale.dtype).split(1, 1)
        return dx, dshift, dscale, None


class _GatedNormed(torch.autograd.Function):
    """out = x + gate branch, and norm(out) (1 + scale) + shift; the bias is in the branch already."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, branch: Tensor, bias: Tensor | None, shift: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        out = x + gate.float() * branch.float()
        y, mean, rstd = _modulate(out, shift, scale, eps)
        ctx.save_for_backward(out, mean, rstd, scale, gate, branch)
        ctx.has_bias = bias is not None
        return out, y

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        out, mean, rstd, scale, gate, branch = ctx.saved_tensors
        dx, dbranch, sums = operators.gated_norm_backward(grad_x, grad_y, out, mean, rstd, scale, gate, branch)
        sums = sums.sum(1)
        dshift, dscale, dgate, _ = sums.to(scale.dtype).split(1, 1)
        return dx, dgate, dbranch, sums[:, 3].sum(0) if ctx.has_bias else None, dshift, dscale, None


class _Gated(torch.autograd.Function):
    """x + gate branch; the bias is in the branch already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, branch: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, branch)
        ctx.has_bias = bias is not None
        return x + gate.float() * branch.float()

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, ...]:
        gate, branch = ctx.saved_tensors
        if "gate" not in KERNELS:
            dbranch = grad_x * gate.float()
            dgate = (grad_x * branch.float()).sum(1, keepdim=True).to(gate.dtype)
            return grad_x, dgate, dbranch.to(branch.dtype), dbranch.sum((0, 1)) if ctx.has_bias else None
        dbranch, sums = operators.gate_backward(grad_x, gate, branch)
        sums = sums.sum(1)
        dgate = sums[:, :1].to(gate.dtype)
        return grad_x, dgate, dbranch, sums[:, 1].sum(0) if ctx.has_bias else None


class _Gelu(torch.autograd.Function):
    """gelu(x); the bias is in x already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.has_bias = bias is not None
        return F.gelu(x, approximate="tanh")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if "gelu" not in KERNELS:
            dx: Tensor = torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
            return dx, dx.float().sum((0, 1)) if ctx.has_bias else None
        dx, sums = operators.gelu_backward(grad, x)
        return dx, sums.sum(0) if ctx.has_bias else None


class _Attention(torch.autograd.Function):
    """softmax(q kᵀ / √d) v of qkv (B, N, 3 D); the bias is in qkv already."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, heads: int) -> Tensor:
        out: Tensor
        out, lse = operators.attention_of_qkv(qkv, heads)
        ctx.save_for_backward(qkv, out, lse)
        ctx.heads, ctx.has_bias = heads, bias is not None
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse = ctx.saved_tensors
        dqkv, sums = operators.attention_backward(grad, qkv, out, lse, ctx.heads)
        return dqkv, sums.sum(0) if ctx.has_bias else None, None
