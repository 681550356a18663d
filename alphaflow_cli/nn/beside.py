"""Rows that go along without gradient: the other rows of a graded forward (guidance's, engine/guide.py).

A `Beside` is a value on the rows that are learnt from, and the same value on other rows, which nothing is learnt from.
A layer sees the first with gradient and the others without, one after the other in the same call: so there is one call
of the network instead of two, and a sharded network is gathered once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alphaflow_cli.nn.tangent import Dual

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
