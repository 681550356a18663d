"""The kernels in Triton, which operators.py launches; this file is imported there, when the first one is needed.

Shapes: B samples, N tokens, D channels of a token ("width"), d channels of a head. Sums are kept in float32 whatever
the tensors hold. A program walks several tokens of ONE sample, and so keeps the sums over tokens in its registers. It
writes them to a place of its own, and they are added afterwards in a fixed order: equal calls give equal bits.
"""

from typing import Any

import triton
import triton.language as tl

constexpr: Any = tl.constexpr


@triton.jit
def norm_backward_kernel(
    grad_out, grad_y, x, mean, rstd, scale, gate, branch, grad_x, grad_branch, sums,
    tokens, width, gate_step, scale_step,
    GATED: constexpr, ROWS: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """Of y = norm(x) (1 + scale) + shift: the gradient of x, and the sums over ROWS tokens for shift and scale.

    `grad_out` is the gradient of x from elsewhere, that of the residual connection. GATED: x was made from a branch,
    x = … + gate branch; then also the branch's gradient, and the sums for the gate and for a bias of the branch.
    """
    sample, group = tl.program_id(0), tl.program_id(1)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    factor = 1.0 + tl.load(scale + sample * scale_step + cols, mask=inside, other=0.0).to(tl.float32)
    shift_sum, scale_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if GATED:
        open_ = tl.load(gate + sample * gate_step + cols, mask=inside, other=0.0).to(tl.float32)
        gate_sum, total_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for i in range(ROWS):
        token = group * ROWS + i
        here = inside & (token < tokens)
        row = sample.to(tl.int64) * tokens + token
        place = row * width + cols
        given = tl.load(grad_y + place, mask=here, other=0.0).to(tl.float32)
        value = tl.load(x + place, mask=here, other=0.0).to(tl.float32)
        residual = tl.load(grad_out + place, mask=here, other=0.0).to(tl.float32)
        if GATED:
            added = tl.load(branch + place, mask=here, other=0.0).to(tl.float32)
        middle = tl.load(mean + row, mask=token < tokens, other=0.0)
        inverse = tl.load(rstd + row, mask=token < tokens, other=0.0)
        normal = tl.where(inside, (value - middle) * inverse, 0.0)
        shift_sum += given
        scale_sum += given * normal
        inner = given * factor
        level = tl.sum(inner, 0) / width
        along = tl.sum(inner * normal, 0) / width
        total = tl.where(here, residual + (inner - level - normal * along) * inverse, 0.0)
        tl.store(grad_x + place, total, mask=here)
        if GATED:
            gate_sum += total * added
            total_sum += total
            tl.store(grad_branch + place, (total * open_).to(grad_branch.dtype.element_ty), mask=here)
    parts: constexpr = 4 if GATED else 2
    place = (sample * tl.num_programs(1) + group) * parts * width + cols
    tl.store(sums + place, shift_sum, mask=inside)
    tl.store(sums + place + width, scale_sum, mask=inside)
    if GATED:
        tl.store(sums + place + 2 * width, gate_sum, mask=inside)
        tl.store(sums + place + 3 * width, total_sum * open_, mask=inside)


@triton.jit
def gate_backward_kernel(
    grad_out, gate, branch, grad_branch, sums,
    tokens, width, gate_step,
    ROWS: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """Of out = x + gate branch: the branch's gradient, and the sums over ROWS tokens for gate and the branch's bias."""
    sample, group = tl.program_id(0), tl.program_id(1)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    open_ = tl.load(gate + sample * gate_step + cols, mask=inside, other=0.0).to(tl.float32)
    gate_sum, total_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for i in range(ROWS):
        token = group * ROWS + i
        here = inside & (token < tokens)
        place = (sample.to(tl.int64) * tokens + token) * width + cols
        total = tl.load(grad_out + place, mask=here, other=0.0).to(tl.float32)
        gate_sum += total * tl.load(branch + place, mask=here, other=0.0).to(tl.float32)
        total_sum += total
        tl.store(grad_branch + place, (total * open_).to(grad_branch.dtype.element_ty), mask=here)
    place = (sample * tl.num_programs(1) + group) * 2 * width + cols
    tl.store(sums + place, gate_sum, mask=inside)
    tl.store(sums + place + width, total_sum * open_, mask=inside)


@triton.jit
def gelu_backward_kernel(grad, x, grad_x, sums, rows, width, ROWS: constexpr, BLOCK: constexpr):
    """Of gelu(x) in its tanh form: the gradient of x, and its sums over ROWS of all tokens, for a bias in x."""
    group, cols = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(ROWS):
        row = group * ROWS + i
        here = inside & (row < rows)
        place = row.to(tl.int64) * width + cols
        h = tl.load(x + place, mask=here, other=0.0).to(tl.float32)
        given = tl.load(grad + place, mask=here, other=0.0).to(tl.float32)
        inner = 0.7978845608028654 * (h + 0.044715 * h * h * h)  # √(2/π)
        t = 2.0 * tl.sigmoid(2.0 * inner) - 1.0
        slope = 0.5 * (1.0 + t) + 0.5 * h * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * h * h)
        total += given * slope
        tl.store(grad_x + place, (given * slope).to(grad_x.dtype.element_ty), mask=here)
    tl.store(sums + group * width + cols, total, mask=inside)


@triton.jit
def attention_forward_kernel(
    qkv, out, lse, heads, factor,
    TOKENS: constexpr, SIZE: constexpr, WIDTH: constexpr, ROWS: constexpr, KEYS: constexpr, BLOCK: constexpr,
    PRECISION: constexpr,
):  # fmt: skip
    """softmax(q kᵀ factor) v of ROWS queries of one head, from qkv (B, N, 3 D); and the logarithm of their sums."""
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = cols[None, :] < SIZE
    here = (rows[:, None] < TOKENS) & inside
    q = qkv + b * TOKENS * 3 * WIDTH + h * SIZE
    k, v = q + WIDTH, q + 2 * WIDTH
    query = tl.load(q + rows[:, None] * 3 * WIDTH + cols[None, :], mask=here, other=0.0)
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total, result = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, TOKENS, KEYS):
        places = start + tl.arange(0, KEYS)
        real = (places[:, None] < TOKENS) & inside
        key = tl.load(k + places[:, None] * 3 * WIDTH + cols[None, :], mask=real, other=0.0)
        value = tl.load(v + places[:, None] * 3 * WIDTH + cols[None, :], mask=real, other=0.0)
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION) * factor
        s = tl.where(places[None, :] < TOKENS, s, -float("inf"))
        higher = tl.maximum(highest, tl.max(s, 1))
        shrink, e = tl.exp(highest - higher), tl.exp(s - higher[:, None])
        total = total * shrink + tl.sum(e, 1)
        result = tl.dot(e.to(value.dtype), value, result * shrink[:, None], input_precision=PRECISION)
        highest = higher
    place = out + b * TOKENS * WIDTH + h * SIZE + rows[:, None] * WIDTH + cols[None, :]
    tl.store(place, (result / total[:, None]).to(out.dtype.element_ty), mask=here)
    tl.store(lse + tl.program_id(1) * TOKENS + rows, highest + tl.log(total), mask=rows < TOKENS)


@triton.jit
def attention_backward_kernel(
    qkv, out, lse, grad, grad_qkv, sums, heads, factor,
    TOKENS: constexpr, SIZE: constexpr, WIDTH: constexpr, ROWS: constexpr, KEYS: constexpr, BLOCK: constexpr,
    PRECISION: constexpr,
):  # fmt: skip
    """The gradient of qkv from that of the output, for one head with all of its queries (ROWS ≥ N) in one program.

    It is written where q, k and v stand in qkv; the sums over tokens are those for the bias of qkv.
    """
    b, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    rows, cols = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = cols[None, :] < SIZE
    here = (rows[:, None] < TOKENS) & inside
    q, dq = qkv + b * TOKENS * 3 * WIDTH + h * SIZE, grad_qkv + b * TOKENS * 3 * WIDTH + h * SIZE
    place = b * TOKENS * WIDTH + h * SIZE + rows[:, None] * WIDTH + cols[None, :]
    query = tl.load(q + rows[:, None] * 3 * WIDTH + cols[None, :], mask=here, other=0.0)
    given = tl.load(grad + place, mask=here, other=0.0)
    result = tl.load(out + place, mask=here, other=0.0)
    delta = tl.sum(given.to(tl.float32) * result.to(tl.float32), 1)
    level = tl.load(lse + tl.program_id(0) * TOKENS + rows, mask=rows < TOKENS, other=float("inf"))
    query_grad = tl.zeros([ROWS, BLOCK], tl.float32)
    key_sum, value_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, TOKENS, KEYS):
        places = start + tl.arange(0, KEYS)
        real = (places[:, None] < TOKENS) & inside
        step = places[:, None] * 3 * WIDTH + cols[None, :]
        key = tl.load(q + WIDTH + step, mask=real, other=0.0)
        value = tl.load(q + 2 * WIDTH + step, mask=real, other=0.0)
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION) * factor
        p = tl.where(places[None, :] < TOKENS, tl.exp(s - level[:, None]), 0.0)
        dp = tl.dot(given, tl.trans(value), input_precision=PRECISION)
        ds = (p * (dp - delta[:, None]) * factor).to(query.dtype)
        value_grad = tl.dot(tl.trans(p.to(query.dtype)), given, input_precision=PRECISION)
        key_grad = tl.dot(tl.trans(ds), query, input_precision=PRECISION)
        query_grad = tl.dot(ds, key, query_grad, input_precision=PRECISION)
        value_sum += tl.sum(value_grad, 0)
        key_sum += tl.sum(key_grad, 0)
        tl.store(dq + WIDTH + step, key_grad.to(grad_qkv.dtype.element_ty), mask=real)
        tl.store(dq + 2 * WIDTH + step, value_grad.to(grad_qkv.dtype.element_ty), mask=real)
    place = dq + rows[:, None] * 3 * WIDTH + cols[None, :]
    tl.store(place, query_grad.to(grad_qkv.dtype.element_ty), mask=here)
    place = sums + b * 3 * WIDTH + h * SIZE + cols
    tl.store(place, tl.sum(query_grad, 0), mask=cols < SIZE)
    tl.store(place + WIDTH, key_sum, mask=cols < SIZE)
    tl.store(place + 2 * WIDTH, value_sum, mask=cols < SIZE)


@triton.jit
def attention_tangent_kernel(
    q, k, v, dq, dk, dv, out, heads, factor,
    Q_B: constexpr, Q_H: constexpr, Q_N: constexpr, K_B: constexpr, K_H: constexpr, K_N: constexpr,
    V_B: constexpr, V_H: constexpr, V_N: constexpr, DQ_B: constexpr, DQ_H: constexpr, DQ_N: constexpr,
    DK_B: constexpr, DK_H: constexpr, DK_N: constexpr, DV_B: constexpr, DV_H: constexpr, DV_N: constexpr,
    O_B: constexpr, O_H: constexpr, O_N: constexpr, TOKENS: constexpr, SIZE: constexpr,
    ROWS: constexpr, KEYS: constexpr, BLOCK: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """The tangent of softmax(q kᵀ factor) v for ROWS queries of one head, in one walk over blocks of KEYS keys.

    With s = q kᵀ factor, e = exp(s − max), l = Σ e, ds = (dq kᵀ + q dkᵀ) factor and any number c per query,
        do = (Σ e (ds − c) v + Σ e dv) / l − (Σ e (ds − c) / l) (Σ e v / l).
    c is the mean of the first block's ds: so that no large terms cancel after they were rounded.
    """
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    some, inside = rows[:, None] < TOKENS, cols[None, :] < SIZE
    here = some & inside
    query = tl.load(q + b * Q_B + h * Q_H + rows[:, None] * Q_N + cols[None, :], mask=here, other=0.0)
    dquery = tl.load(dq + b * DQ_B + h * DQ_H + rows[:, None] * DQ_N + cols[None, :], mask=here, other=0.0)
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    centre = tl.zeros([ROWS], tl.float32)
    total, moved = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    value_sum, tangent_sum = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, TOKENS, KEYS):
        places = start + tl.arange(0, KEYS)
        real = (places[:, None] < TOKENS) & inside
        key = tl.load(k + b * K_B + h * K_H + places[:, None] * K_N + cols[None, :], mask=real, other=0.0)
        dkey = tl.load(dk + b * DK_B + h * DK_H + places[:, None] * DK_N + cols[None, :], mask=real, other=0.0)
        s = tl.dot(query, tl.trans(key), input_precision=PRECISION) * factor
        ds = tl.dot(dquery, tl.trans(key), input_precision=PRECISION)
        ds = tl.dot(query, tl.trans(dkey), ds, input_precision=PRECISION) * factor
        s = tl.where(places[None, :] < TOKENS, s, -float("inf"))
        higher = tl.maximum(highest, tl.max(s, 1))
        shrink = tl.exp(highest - higher)
        e = tl.exp(s - higher[:, None])
        if start == 0:
            centre = tl.sum(e * ds, 1) / tl.sum(e, 1)
        weighted = e * (ds - centre[:, None])
        value = tl.load(v + b * V_B + h * V_H + places[:, None] * V_N + cols[None, :], mask=real, other=0.0)
        dvalue = tl.load(dv + b * DV_B + h * DV_H + places[:, None] * DV_N + cols[None, :], mask=real, other=0.0)
        total = total * shrink + tl.sum(e, 1)
        moved = moved * shrink + tl.sum(weighted, 1)
        e = e.to(value.dtype)
        value_sum = tl.dot(e, value, value_sum * shrink[:, None], input_precision=PRECISION)
        tangent_sum = tl.dot(e, dvalue, tangent_sum * shrink[:, None], input_precision=PRECISION)
        tangent_sum = tl.dot(weighted.to(value.dtype), value, tangent_sum, input_precision=PRECISION)
        highest = higher
    result = tangent_sum / total[:, None] - (moved / total / total)[:, None] * value_sum
    tl.store(out + b * O_B + h * O_H + rows[:, None] * O_N + cols[None, :], result.to(out.dtype.element_ty), mask=here)
