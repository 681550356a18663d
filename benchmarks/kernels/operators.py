"""The operators that stand before the kernels of written.py: what a compiler sees of them, and how each is launched.

An operator gives new tensors and changes none. Its `register_fake` says their shapes. The launch figures are guesses,
until bench_kernels.py has run on a GPU.
"""

import torch
from torch import Tensor

ROWS = 16  # tokens of one program of the kernels that walk tokens; its sums are written once for so many
GELU_ROWS, GELU_BLOCK = 32, 1024
WARPS = {"norm": 4, "gate": 4, "gelu": 4}  # for a width up to 1024; twice as many beyond


def _walk(name: str, width: int) -> dict[str, int]:
    block = 1 << (width - 1).bit_length()
    return {"ROWS": ROWS, "BLOCK": block, "num_warps": max(1, WARPS[name] * block // 1024)}


def _groups(x: Tensor) -> int:
    return -(-x.shape[1] // ROWS)


@torch.library.custom_op("alphaflow::norm_backward", mutates_args=())
def norm_backward(
    grad_x: Tensor, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and sums (B, groups, 2, D) for shift and scale."""
    from kernels.written import norm_backward_kernel

    grad_x, grad_y, x = grad_x.contiguous(), grad_y.contiguous(), x.contiguous()
    dx, sums = _norm_shapes(grad_x, grad_y, x, mean, rstd, scale)
    norm_backward_kernel[len(x), _groups(x)](
        grad_x, grad_y, x, mean, rstd, scale, x, x, dx, dx, sums,
        x.shape[1], x.shape[2], 0, scale.stride(0), GATED=False, **_walk("norm", x.shape[2]),
    )  # fmt: skip
    return dx, sums


@norm_backward.register_fake
def _norm_shapes(
    grad_x: Tensor, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(len(x), _groups(x), 2, x.shape[2], dtype=torch.float32)


@torch.library.custom_op("alphaflow::gated_norm_backward", mutates_args=())
def gated_norm_backward(
    grad_x: Tensor, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, gate: Tensor, branch: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and of the branch in it, and sums (B, groups, 4, D) for shift, scale, gate and bias."""
    from kernels.written import norm_backward_kernel

    grad_x, grad_y, x, branch = grad_x.contiguous(), grad_y.contiguous(), x.contiguous(), branch.contiguous()
    dx, dbranch, sums = _gated_norm_shapes(grad_x, grad_y, x, mean, rstd, scale, gate, branch)
    norm_backward_kernel[len(x), _groups(x)](
        grad_x, grad_y, x, mean, rstd, scale, gate, branch, dx, dbranch, sums,
        x.shape[1], x.shape[2], gate.stride(0), scale.stride(0), GATED=True, **_walk("norm", x.shape[2]),
    )  # fmt: skip
    return dx, dbranch, sums


@gated_norm_backward.register_fake
def _gated_norm_shapes(
    grad_x: Tensor, grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, gate: Tensor, branch: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    sums = x.new_empty(len(x), _groups(x), 4, x.shape[2], dtype=torch.float32)
    return x.new_empty(x.shape), branch.new_empty(branch.shape), sums


@torch.library.custom_op("alphaflow::gate_backward", mutates_args=())
def gate_backward(grad_x: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the branch, and sums (B, groups, 2, D) for gate and bias."""
    from kernels.written import gate_backward_kernel

    grad_x, branch = grad_x.contiguous(), branch.contiguous()
    dbranch, sums = _gate_shapes(grad_x, gate, branch)
    gate_backward_kernel[len(branch), _groups(branch)](
        grad_x, gate, branch, dbranch, sums,
        branch.shape[1], branch.shape[2], gate.stride(0), **_walk("gate", branch.shape[2]),
    )  # fmt: skip
    return dbranch, sums


@gate_backward.register_fake
def _gate_shapes(grad_x: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    sums = branch.new_empty(len(branch), _groups(branch), 2, branch.shape[2], dtype=torch.float32)
    return branch.new_empty(branch.shape), sums


@torch.library.custom_op("alphaflow::gelu_backward", mutates_args=())
def gelu_backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, and sums (groups, width) for a bias in it."""
    from kernels.written import gelu_backward_kernel

    grad, x = grad.contiguous(), x.contiguous()
    dx, sums = _gelu_shapes(grad, x)
    width = x.shape[2]
    block = min(GELU_BLOCK, 1 << (width - 1).bit_length())
    gelu_backward_kernel[len(sums), -(-width // block)](
        grad, x, dx, sums, x.numel() // width, width,
        ROWS=GELU_ROWS, BLOCK=block, num_warps=max(1, WARPS["gelu"] * block // 1024),
    )  # fmt: skip
    return dx, sums


@gelu_backward.register_fake
def _gelu_shapes(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    rows, width = x.shape[0] * x.shape[1], x.shape[2]
    return x.new_empty(x.shape), x.new_empty(-(-rows // GELU_ROWS), width, dtype=torch.float32)


# Attention on qkv (B, N, 3 D), as the linear layer gives it; d = D / heads.

FORWARD: dict[int, tuple[int, ...]] = {
    64: (128, 64, 4, 2),
    128: (128, 64, 8, 2),
}  # padded d → queries and keys of a block, warps, stages
BACKWARD: dict[int, tuple[int, ...]] = {
    64: (64, 8, 1)
}  # padded d → keys of a block, warps, stages; all queries in one block
TANGENT: dict[int, tuple[int, ...]] = {64: (64, 64, 4, 2), 128: (64, 32, 4, 2)}
MOST_TOKENS = 256  # queries that fit into the registers of one program


def _block(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _figures(table: dict[int, tuple[int, ...]], size: int) -> tuple[int, ...]:
    return table[64 if size <= 64 else 128]


def _exactness(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


@torch.library.custom_op("alphaflow::attention", mutates_args=())
def attention_of_qkv(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The output (B, N, D) of attention, and the logarithms of the sums (B, heads, N)."""
    from kernels.written import attention_forward_kernel

    qkv = qkv.contiguous()
    out, lse = _attention_shapes(qkv, heads)
    tokens, width = out.shape[1:]
    queries, keys, warps, stages = _figures(FORWARD, width // heads)
    attention_forward_kernel[-(-tokens // queries), len(qkv) * heads](
        qkv, out, lse, heads, (width // heads) ** -0.5,
        TOKENS=tokens, SIZE=width // heads, WIDTH=width, ROWS=queries, KEYS=keys, BLOCK=_block(width // heads),
        PRECISION=_exactness(qkv), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


@attention_of_qkv.register_fake
def _attention_shapes(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    rows, tokens, width = qkv.shape
    return qkv.new_empty(rows, tokens, width // 3), qkv.new_empty(rows, heads, tokens, dtype=torch.float32)


@torch.library.custom_op("alphaflow::attention_backward", mutates_args=())
def attention_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The gradient of qkv, and its sums (B, 3 D) over tokens."""
    from kernels.written import attention_backward_kernel

    grad, qkv, out = grad.contiguous(), qkv.contiguous(), out.contiguous()
    dqkv, sums = _attention_backward_shapes(grad, qkv, out, lse, heads)
    tokens, width = out.shape[1:]
    keys, warps, stages = _figures(BACKWARD, width // heads)
    attention_backward_kernel[(len(qkv) * heads,)](
        qkv, out, lse, grad, dqkv, sums, heads, (width // heads) ** -0.5,
        TOKENS=tokens, SIZE=width // heads, WIDTH=width, ROWS=max(64, _block(tokens)), KEYS=keys,
        BLOCK=_block(width // heads), PRECISION=_exactness(qkv), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dqkv, sums


@attention_backward.register_fake
def _attention_backward_shapes(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), qkv.new_empty(len(qkv), qkv.shape[2], dtype=torch.float32)


@torch.library.custom_op("alphaflow::attention_tangent", mutates_args=())
def tangent_by_kernel(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    """The tangent (B, heads, N, d) of attention at q, k, v along dq, dk, dv; without gradient."""
    from kernels.written import attention_tangent_kernel

    parts = [x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v, dq, dk, dv)]
    rows, heads, tokens, size = q.shape
    out: Tensor = _attention_tangent_shape(*parts)
    queries, keys, warps, stages = _figures(TANGENT, size)
    steps = [step for x in (*parts, out) for step in x.stride()[:3]]
    attention_tangent_kernel[-(-tokens // queries), rows * heads](
        *parts, out, heads, size**-0.5, *steps, tokens, size,
        ROWS=queries, KEYS=keys, BLOCK=_block(size), PRECISION=_exactness(q), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


@tangent_by_kernel.register_fake
def _attention_tangent_shape(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    rows, heads, tokens, size = q.shape
    return dq.new_empty(rows, tokens, heads, size).transpose(1, 2)
