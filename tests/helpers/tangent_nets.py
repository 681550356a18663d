"""Small random networks in every form that carries tangents, and rows for them."""

import itertools

import torch

from alphaflow_cli.nn.dit import DiT

CONFIGS = [
    dict(zip(("patch", "qk_norm", "second_time", "label_rows", "gradient_checkpointing"), values, strict=True))
    for values in itertools.product((2, 4), (False, True), ("t-r", "r"), (0, 11), (False, True))
]


def random_net(dtype=torch.float64, *, dim=48, depth=3, **config):
    """No weight is zero: a zero would hide a wrong rule behind it."""
    plain = {"patch": 2, "qk_norm": False, "second_time": "t-r", "label_rows": 11, "gradient_checkpointing": False}
    torch.manual_seed(0)
    net = DiT(latent_size=8, channels=4, dim=dim, depth=depth, heads=4, mlp_ratio=4.0, **{**plain, **config})
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.15 * torch.randn_like(weight))
    return net.to(dtype)


def random_inputs(first, dtype=torch.float64, rows=6):
    torch.manual_seed(1)
    z, t, y = torch.randn(rows, 4, 8, 8, dtype=dtype), torch.rand(rows, dtype=dtype), torch.arange(rows)
    r = t * torch.rand(rows, dtype=dtype)
    r[: first + 1] = t[: first + 1]  # r = t rows, and a tie among those that have a tangent
    return z, t, r, y, torch.randn(rows - first, 4, 8, 8, dtype=dtype)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()
