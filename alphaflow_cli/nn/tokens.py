"""Conditioning by tokens: what the network is given stands before the patches, as tokens that these attend to.

    prefix = label, scale, low, high, time       a few learned tokens of each input that the network has, in this order
    a token of an input = its learned vector + the embedding of the input

It takes the place of adaLN, whose modulations are a third of a DiT's weights. Nothing then speaks to a block but its
tokens: its norms have learned scales, and its two gates are learned vectors, which start at 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from alphaflow_cli.nn.tangent import Dual, add, each, join_tokens


class Prefix(nn.Module):
    """The learned vectors of all prefix tokens; `counts` of them for each input, in the inputs' order."""

    def __init__(self, counts: Sequence[int], dim: int) -> None:
        super().__init__()
        self.counts = tuple(counts)
        self.table = nn.Parameter(torch.empty(sum(counts), dim))

    def forward(self, embeddings: Sequence[Tensor | Dual]) -> Tensor | Dual:
        """The tokens (B, n, D) of the inputs' embeddings (B, D)."""
        assert len(embeddings) == len(self.counts), (len(embeddings), self.counts)
        # Each embedding is repeated for its tokens, and their vectors are added.   out = repeat(embeddings) + table
        return add(
            join_tokens([_repeat(one, count) for one, count in zip(embeddings, self.counts, strict=True)]), self.table
        )


def _repeat(embedding: Tensor | Dual, count: int) -> Tensor | Dual:
    """(B, D) → (B, count, D), without a copy."""
    return each(lambda a: a[:, None].expand(-1, count, -1), embedding)


class Gates(nn.Module):
    """The two gates of a block without modulations: learned vectors, in the order of a Modulation's parts."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate, self.gate2 = (nn.Parameter(torch.zeros(dim)) for _ in range(2))

    def forward(self, c: None) -> tuple[Tensor | None, ...]:
        assert c is None, "conditioning by tokens and by modulation at once"
        return None, None, self.gate, None, None, self.gate2
