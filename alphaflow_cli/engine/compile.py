"""torch.compile, block by block.

All blocks share one piece of code, so each form below is compiled once, not once per block:

    graded, value alone       α > 0 without guidance   (B rows)
    graded, others beside     α > 0 with guidance      (B rows, and those that guidance asks about)
    graded, with tangents     α = 0                    (B rows, B' of them with a tangent)
    no gradient               u⁻(z_s, r, s); guidance at α = 0  (their own numbers of rows)
    math attention            the forward-mode reference only

α never enters a block, so its schedule compiles nothing. Static shapes: a new number of rows is a new form, up to
torch's limit of 8 for one piece of code; beyond it torch runs eagerly, and says so. The rest of the step stays eager:
it is under 2% of the arithmetic, and double backward or torch.func.jvp cannot be traced anyway.
"""

from torch import nn

from alphaflow_cli.nn.dit import DiT


def compile_blocks(net: DiT, backend: str = "inductor") -> DiT:
    """In place, so names in the state dict stay what they are. Nothing is compiled before the first call."""
    parts: list[nn.Module] = [*net.blocks, net.final]
    for part in parts:
        part.compile(dynamic=False, backend=backend)
    net.compiled = True
    return net
