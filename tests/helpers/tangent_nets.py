"""Small random networks in every form that carries tangents, and rows for them."""

import itertools

import torch

from alphaflow_cli.nn.blocks import PUBLISHED, Design
from alphaflow_cli.nn.dit import DiT

CONFIGS = [
    dict(zip(("patch", "qk_norm", "second_time", "label_rows", "gradient_checkpointing"), values, strict=True))
    for values in itertools.product((2, 4), (False, True), ("t-r", "r"), (0, 11), (False, True))
]


PREFIX = {"label": 3, "scale": 2, "interval": 1, "time": 2}
DESIGNS = {
    f"{'+'.join(inputs) or 'no inputs'}, {conditioning}, {block}, head {head}": (inputs, conditioning, block, head)
    for inputs, conditioning, block, head in itertools.product(
        ((), ("scale",), ("scale", "interval")), ("adaln", "tokens"), ("dit", "modern"), (None, 0, 2, 3)
    )
}  # every combination of the rungs; a head of 3 shares no block
CORNERS = ["no inputs, adaln, dit, head 2", "scale, tokens, dit, head 0", "scale+interval, tokens, modern, head 2",
           "no inputs, adaln, modern, head 3"]  # fmt: skip


def design(name, label_rows=11):
    """A design of DESIGNS; its prefix has the tokens of the inputs that are there."""
    inputs, conditioning, block, head = DESIGNS[name]
    label = [PREFIX["label"]] if label_rows else []
    guide = [PREFIX["scale"]] * ("scale" in inputs) + [PREFIX["interval"]] * 2 * ("interval" in inputs)
    prefix = (*label, *guide, PREFIX["time"]) if conditioning == "tokens" else ()
    return Design(block=block, inputs=inputs, prefix=prefix, velocity_head=head)


def random_net(dtype=torch.float64, *, dim=48, depth=3, kind=DiT, design=PUBLISHED, **config):
    """No weight is zero: a zero would hide a wrong rule behind it."""
    plain = {"patch": 2, "qk_norm": False, "second_time": "t-r", "label_rows": 11, "gradient_checkpointing": False}
    torch.manual_seed(0)
    net = kind(
        latent_size=8, channels=4, dim=dim, depth=depth, heads=4, mlp_ratio=4.0, design=design, **{**plain, **config}
    )
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.15 * torch.randn_like(weight))
    return net.to(dtype)


def random_guide(net, dtype=torch.float64, rows=6):
    """Scales and intervals for a network that takes them, else None."""
    if not net.inputs:
        return None
    torch.manual_seed(5)
    scale, low, high = 1 + 7 * torch.rand(rows), torch.rand(rows) / 2, 0.5 + torch.rand(rows) / 2
    return torch.stack([scale, low, high], 1).to(dtype)


def random_inputs(first, dtype=torch.float64, rows=6):
    torch.manual_seed(1)
    z, t, y = torch.randn(rows, 4, 8, 8, dtype=dtype), torch.rand(rows, dtype=dtype), torch.arange(rows)
    r = t * torch.rand(rows, dtype=dtype)
    r[: first + 1] = t[: first + 1]  # r = t rows, and a tie among those that have a tangent
    return z, t, r, y, torch.randn(rows - first, 4, 8, 8, dtype=dtype)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()
