"""The DiT that predicts the average velocity u(z, r, t).

Shapes: B rows, C channels, H = W side of a latent, P side of a patch, N = (H/P)² patches, D channels of a token.

    c = e(t) + e'(t − r) + label          conditioning, used by the adaLN modulations only
    tokens = patches(z) + table           → blocks → final → unpatchify; no output scaling

The second time embedder is fed the interval t − r (published) or r. The positional table is initialised to sines and
cosines and trained. Attention is "fused", or "math" where a derivative passes through (fused kernels have no
forward-mode derivative).

A `Design` takes that network up the ladder of improved MeanFlow (arXiv:2512.02012), one rung at a time:

    inputs           what it is told of guidance, the `guide`: a scale w (embedded as 1 − 1/w), an interval of times
    velocity head    the last blocks and the final layer are there twice, once for u, once for the velocity v̂(z, r, t)
    prefix           the inputs stand before the patches as tokens, instead of adaLN; t is then left out (nn/tokens.py)
    block            "modern": RMSNorm, turned queries and keys, SwiGLU, no biases, no table (nn/modern.py)

Given a `tangent` of z on the last rows, du/dt rides along through the same lines: there x and c are `Dual`s, a value
with its derivative. `through`, `add`, `modulate`, `gated`, … are the plain operations with a rule for such pairs. Given
other rows `beside`, each block computes them too, without gradient (both: nn/tangent.py). Above every such line stands
what it computes, as a DiT without tangents would write it.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alphaflow_cli.nn.blocks import PUBLISHED, Block, Design, Final
from alphaflow_cli.nn.layers import Modulation, PatchEmbed, TimeEmbedding, position_table
from alphaflow_cli.nn.modern import SPREAD, ModernAttention, SwiGlu, turns
from alphaflow_cli.nn.tangent import (
    Beside,
    Dual,
    Inputs,
    Stream,
    add,
    each,
    join_tokens,
    moving,
    part_of,
    recomputed,
    through,
)
from alphaflow_cli.nn.tokens import Prefix

Attend = Literal["fused", "math"]
Heads = Literal["u", "velocity", "both"]
Spot = tuple[Tensor, Tensor, Tensor | None]  # z, t and the tangent of some rows
Output = Tensor | Dual | Beside | tuple[Tensor, ...]


class DiT(nn.Module):
    """u(z, r, t | y). `label_rows` counts the null row, which is the last; 0 builds a network without labels."""

    def __init__(
        self,
        *,
        latent_size: int,
        channels: int,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        label_rows: int,
        qk_norm: bool,
        second_time: Literal["t-r", "r"],
        gradient_checkpointing: bool,
        design: Design = PUBLISHED,
    ) -> None:
        super().__init__()
        self.patch, self.channels, self.second_time = patch, channels, second_time
        self.gradient_checkpointing = gradient_checkpointing
        self.compiled = False  # whether the blocks were compiled (model/build.py)
        self.inputs = design.inputs  # which columns of the guide it takes; without any it takes no guide
        self.activation = nn.SiLU()
        self.patch_embed = PatchEmbed(latent_size, patch, channels, dim)
        self.grid = latent_size // patch
        self.pos_embed = None if design.block == "modern" else nn.Parameter(torch.empty(1, self.grid**2, dim))
        self.time_embed = None if design.prefix else TimeEmbedding(dim)
        self.second_embed = TimeEmbedding(dim)
        self.label_embed = nn.Embedding(label_rows, dim) if label_rows else None
        self.scale_embed = TimeEmbedding(dim) if "scale" in design.inputs else None
        self.low_embed, self.high_embed = (TimeEmbedding(dim) if "interval" in design.inputs else None for _ in "lh")
        self.prefix = Prefix(design.prefix, dim) if design.prefix else None
        block = partial(Block, dim, heads, int(dim * mlp_ratio), qk_norm=qk_norm, design=design)
        final = partial(Final, dim, patch * patch * channels, design=design)
        self.blocks = nn.ModuleList(block() for _ in range(depth))  # the shared ones, then u's own
        self.final = final()
        self.velocity_blocks = nn.ModuleList(block() for _ in range(design.velocity_head or 0))
        self.velocity_final = None if design.velocity_head is None else final()
        if not self.patch_embed.proj.weight.is_meta:  # else it has shapes, but no weights
            self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Set the weights as published: linear layers by Xavier, biases 0, embeddings from N(0, 0.02).

        Every modulation and the last linear layer start at 0: at first each block is the identity, and u is 0.
        The modern block and the embeddings of tokens have laws of their own, those of improved MeanFlow.
        """
        dim = self.patch_embed.proj.out_channels
        if self.pos_embed is not None:
            self.pos_embed.copy_(position_table(dim, self.grid))
        for linear in linears(self):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.proj.get_parameter("bias"))
        embedders = (self.time_embed, self.second_embed, self.scale_embed, self.low_embed, self.high_embed)
        for linear in (layer for embedder in embedders if embedder is not None for layer in linears(embedder)):
            nn.init.normal_(linear.weight, std=0.02 if self.prefix is None else linear.in_features**-0.5)
        for added in (self.scale_embed, self.low_embed, self.high_embed) if self.prefix is None else ():
            if added is not None:  # a trained DiT with these beside its own is still the same function
                nn.init.zeros_(linears(added)[-1].weight)
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, std=0.02 if self.prefix is None else dim**-0.5)
        if self.prefix is not None:
            nn.init.normal_(self.prefix.table, std=dim**-0.5)
        for module in self.modules():
            if isinstance(module, (ModernAttention, SwiGlu)):
                for linear in linears(module):
                    nn.init.normal_(linear.weight, std=SPREAD * linear.in_features**-0.5)
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
            if isinstance(module, Final):
                nn.init.zeros_(module.linear.weight)

    def condition(
        self, t: Tensor, r: Tensor, y: Tensor, guide: Tensor | None = None, moving_rows: int = 0
    ) -> Tensor | Dual:
        """The conditioning c = e(t) + e'(t − r) + label, (B, D), with the guide's embeddings where it has inputs.

        Of its inputs only t moves, on `moving_rows` rows.
        """
        assert self.time_embed is not None
        second = moving(t - r, moving_rows) if self.second_time == "t-r" else r
        # Both times are embedded and added.   c = time_embed(t) + second_embed(second)
        c = add(self.time_embed(moving(t, moving_rows)), self.second_embed(second))
        # The label's row of the table is added; it does not depend on t.   c = c + label_embed(y)
        c = c if self.label_embed is None else add(c, self.label_embed(y))
        # So are the embeddings of the guide.   c = c + scale_embed(1 - 1/w) + low_embed(low) + high_embed(high)
        for embedding in self.embed_guide(guide):
            c = add(c, embedding)
        return c

    def embed_guide(self, guide: Tensor | None) -> list[Tensor]:
        """The embeddings of the inputs of guidance, (B, D) each: of the scale w as 1 − 1/w, of the interval's ends."""
        assert (guide is not None) == bool(self.inputs), (self.inputs, None if guide is None else guide.shape)
        if guide is None:
            return []
        scale, low, high = guide.unbind(1)
        fed = ((self.scale_embed, 1 - 1 / scale), (self.low_embed, low), (self.high_embed, high))
        return [embedder(value) for embedder, value in fed if embedder is not None]

    def prefix_tokens(
        self, prefix: Prefix, t: Tensor, r: Tensor, y: Tensor, guide: Tensor | None, moving_rows: int
    ) -> Tensor | Dual:
        """The tokens before the patches (B, n, D): of the label, the guide, and t − r, which alone moves."""
        # Each input is embedded.   out = prefix([label_embed(y), scale_embed(1 - 1/w), ..., second_embed(t - r)])
        label = [] if self.label_embed is None else [self.label_embed(y)]
        out: Tensor | Dual = prefix([*label, *self.embed_guide(guide), self.second_embed(moving(t - r, moving_rows))])
        return out

    def patches(self, z: Tensor | Dual) -> Tensor | Dual:
        """Cut z (B, C, H, W) into tokens (B, N, D), and add the positional table."""
        # Each patch becomes a token, and its place is added.   x = patch_embed(z) + pos_embed
        x: Tensor | Dual = self.patch_embed(z)
        if self.pos_embed is None:  # the tokens' sums stay in the precision of the weights
            wide = self.patch_embed.proj.weight.dtype
            return each(lambda a: a.to(wide), x)
        return add(x, self.pos_embed)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Put the patches (B, N, P·P·C) together to (B, C, H, W)."""
        grid, patch = self.grid, self.patch
        pixels = tokens.reshape(-1, grid, grid, patch, patch, self.channels)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.channels, grid * patch, grid * patch)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        r: Tensor,
        y: Tensor,
        attend: Attend = "fused",
        tangent: Tensor | None = None,
        first: int = 0,
        beside: Inputs | None = None,
        guide: Tensor | None = None,
        heads: Heads = "u",
    ) -> Output:
        """The average velocity u of every row; of the `heads` "both" (u, v̂), of "velocity" v̂, or u without a head.

        `guide` (B, 3) has the columns w, low, high, of which a network takes those of its inputs. With the `tangent` dz
        of the rows `first:` du comes last: the derivative along (dz, dt, dr) = (tangent, 1, 0) on those rows. With
        other rows `beside` their velocity comes last, without gradient: v̂ where there is such a head, else u.
        """
        rows = 0 if tangent is None else len(tangent)
        assert tangent is None or (0 < rows == len(z) - first and beside is None), (rows, len(z), first)
        assert heads != "both" or self.velocity_final is not None, "both heads of a network that has one"
        assert heads != "velocity" or tangent is None, "the velocity carries no tangent"
        x: Stream
        c: Stream | None
        x, c = self.embed(z, t, r, y, guide, tangent)
        if beside is not None:
            with torch.no_grad():
                other_x, other_c = self.embed(*beside)
            x, c = _put_beside(x, other_x), None if c is None else _put_beside(c, other_c)
        here, there = (z, t, tangent), None if beside is None else (beside[0], beside[1], None)
        return self.ends(x, c, heads, (attend, *self.turns(x)), here, there)

    def ends(
        self, x: Stream, c: Stream | None, heads: Heads, where: tuple[Any, ...], here: Spot, there: Spot | None
    ) -> Output:
        """From the first tokens to what the heads give."""
        # The blocks work on the tokens one after the other, and the last layer's patches are put together.
        #   for block in blocks: x = block(x, c)
        #   u = unpatchify(final(x, c))
        shared = len(self.blocks) - len(self.velocity_blocks)
        own = list(self.blocks)[shared:]
        x = self.run(list(self.blocks)[:shared], x, c, where)
        if self.velocity_final is None:
            return self.end(own, self.final, x, c, where, here, there)
        # With a velocity head the last blocks and layers are there twice. A tangent goes to u only, rows beside to v.
        #   v = unpatchify(velocity_final(velocity_blocks(x, c), c))
        u = v = None
        velocity = partial(self.end, self.velocity_blocks, self.velocity_final)
        if heads != "velocity":
            u = self.end(own, self.final, _without(Beside, x), _without(Beside, c), where, here, there)
        if heads != "u":
            v = velocity(_without(Dual, x), _without(Dual, c), where, (*here[:2], None), there)
        elif there is not None:
            assert isinstance(x, Beside)
            with torch.no_grad():
                v = velocity(x.others, part_of(c, 1), where, there, None)
            return Beside(_tensor(u), _tensor(v))
        return _in_order(u, v)

    def run(self, blocks: Iterable[nn.Module], x: Stream, c: Stream | None, where: tuple[Any, ...]) -> Stream:
        """The tokens after some blocks. Checkpointed blocks are computed again for their gradient."""
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = recomputed(block, x, c, *where, once=not self.compiled)
            else:
                x = block(x, c, *where)
        return x

    def end(
        self,
        blocks: Iterable[nn.Module],
        final: nn.Module,
        x: Stream,
        c: Stream | None,
        where: tuple[Any, ...],
        here: Spot,
        there: Spot | None,
    ) -> Stream:
        """One end of the network: blocks of its own, the last layer without the prefix, read at the rows' z and t."""
        x = self.run(blocks, x, c, where)
        if self.prefix is not None:
            before = len(self.prefix.table)
            x = each(lambda a: a[:, before:], x)
        out: Stream = each(self.unpatchify, final(x, c))
        if isinstance(out, Beside):
            assert there is not None
            return Beside(_tensor(self.read(out.value, *here)), _tensor(self.read(out.others, *there)))
        return self.read(out, *here)

    def enter(self, z: Tensor, t: Tensor, tangent: Tensor | None) -> Tensor | Dual:
        """What the patches are cut from: z itself."""
        return z if tangent is None else Dual(z, tangent)

    def read(self, out: Tensor | Dual, z: Tensor, t: Tensor, tangent: Tensor | None) -> Tensor | Dual:
        """The velocity that the last layer's numbers mean: themselves."""
        return out

    def embed(
        self, z: Tensor, t: Tensor, r: Tensor, y: Tensor, guide: Tensor | None = None, tangent: Tensor | None = None
    ) -> tuple[Tensor | Dual, Tensor | Dual | None]:
        """What the blocks start from: the tokens x (B, N, D), and the activated conditioning c (B, D) of adaLN."""
        rows = 0 if tangent is None else len(tangent)
        x = self.patches(self.enter(z, t, tangent))
        # With a prefix: x = [prefix_tokens(t, r, y, guide), patches(z)], and c is None
        if self.prefix is not None:
            return join_tokens([self.prefix_tokens(self.prefix, t, r, y, guide, rows), x]), None
        # x = patches(z), c = silu(condition(t, r, y, guide))
        return x, through(self.activation, self.condition(t, r, y, guide, rows))

    def turns(self, x: Stream) -> tuple[Tensor, ...]:
        """By what the modern block turns queries and keys, the same for all blocks; nothing for the other block."""
        tokens = x if isinstance(x, Tensor) else x[0]
        attention = self.blocks[0].attn
        if not isinstance(attention, ModernAttention):
            return ()
        return (turns(tokens.shape[1], tokens.shape[2] // attention.heads, tokens),)


def _put_beside(value: Tensor | Dual, others: Tensor | Dual | None) -> Beside:
    assert isinstance(value, Tensor), "a tangent or rows beside"
    assert isinstance(others, Tensor), "rows beside have no tangent"
    return Beside(value, others)


def _without(kind: type[Dual] | type[Beside], x: Stream | None) -> Any:
    """The value alone of a pair of this kind; anything else as it is."""
    return x[0] if isinstance(x, kind) else x


def _tensor(x: Stream | None) -> Tensor:
    assert isinstance(x, Tensor), type(x)
    return x


def _in_order(u: Stream | None, v: Stream | None) -> Output:
    """The values of u and v̂, then what rides along with one of them, as far as they are there."""
    there = [x for x in (u, v) if x is not None]
    values = [x if isinstance(x, Tensor) else x[0] for x in there]
    riding = [x[1] for x in there if not isinstance(x, Tensor)]
    return there[0] if len(there) == 1 else (*values, *riding)


def linears(module: nn.Module) -> list[nn.Linear]:
    """List every linear layer inside a module, at any depth."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
