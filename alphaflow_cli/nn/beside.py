"""Rows that go along without gradient: the other rows of a graded forward (guidance's, engine/guide.py).

A `Beside` is a value on the rows that are learnt from, and the same value on other rows, which nothing is learnt from.
A layer sees the first with gradient and the others without, one after the other in the same call: so there is one call
of the network instead of two, and a sharded network is gathered once.
"""

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


class Part(nn.Module):
    """A part of the network that is compiled, sharded and recomputed as a whole: subclasses say what `ride` does."""

    def forward(self, x: Any, c: Any, *how: Any) -> Any:
        """The graded rows first: autocast keeps the first cast of a weight, whether it has a gradient or not."""
        if not isinstance(x, Beside):
            return self.ride(x, c, *how)
        value = self.ride(x.value, c.value, *how)
        with torch.no_grad():
            return Beside(value, self.ride(x.others, c.others, *how))

    def ride(self, x: Any, c: Any, *how: Any) -> Any:
        """Of values alone, or with their tangents."""
        raise NotImplementedError


def recomputed(block: nn.Module, x: Load, c: Load, attend: str, *, once: bool) -> Load:
    """The block under gradient checkpointing. `once`: the backward pass recomputes the value, not what rides along,
    whose result it does not need; not so for a compiled block, which saves other tensors in its other form."""
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
