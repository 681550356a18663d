"""The golden vectors, read once: what the published system computes, in float64 (see tests/golden/README.md)."""

import json
from functools import cache
from typing import Any

import numpy as np
import torch
from places import ROOT
from torch import Tensor

from alphaflow_cli.convert.shape import from_published
from alphaflow_cli.nn.dit import DiT
from alphaflow_cli.recipe.schema import Guidance, Loss
from alphaflow_cli.train.step import Objective, Rows

FOLDER = ROOT / "tests" / "golden"
LOSS_META = json.loads((FOLDER / "loss_meta_f64.json").read_text())
LABEL_ROWS = {"M": 11, "N": 10}  # M has a null row; in N "null" is row 9


@cache
def arrays(file: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / file) as data:
        return {name: data[name] for name in data.files}


def tensor(file: str, name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """An array without its singleton frame axis; floats in `dtype`, labels −1 left as they are."""
    value = torch.tensor(arrays(file)[name])
    value = value.squeeze(1) if value.ndim == 5 else value
    return value.to(dtype) if value.is_floating_point() else value


def network(which: str, dtype: torch.dtype = torch.float64) -> DiT:
    """Model M or N with its golden weights."""
    net = DiT(
        latent_size=8, channels=4, patch=2, dim=64, depth=2, heads=4, mlp_ratio=4.0,
        label_rows=LABEL_ROWS[which], qk_norm=False, second_time="t-r", gradient_checkpointing=False,
    ).to(dtype)  # fmt: skip
    state: dict[str, Any] = arrays(f"state_{which}.npz")
    net.load_state_dict({from_published(k.removeprefix("model.")): torch.tensor(v) for k, v in state.items()})
    return net


def labels(y: Tensor, which: str) -> Tensor:
    """−1 means the null label, the last row."""
    return torch.where(y < 0, LABEL_ROWS[which] - 1, y)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def golden_case(case):
    """Rows and objective of a golden loss case."""
    meta = LOSS_META[case]
    which = meta["model"]
    pure, isclose = "t_pure_fm" if meta["pure_fm"] else "t", case.endswith("isclose")
    t = tensor("loss_inputs.npz", "t_isclose" if isclose else pure)
    r = t if meta["pure_fm"] else tensor("loss_inputs.npz", "r_isclose" if isclose else "r")
    x, noise, uniforms = (tensor("loss_inputs.npz", name) for name in ("x", "noise", "label_rand"))
    y = labels(torch.tensor(arrays("loss_inputs.npz")["label"]), which)
    mix = Guidance(**meta["cfg_params"], label_dropout=meta["label_dropout"])
    objective = Objective(
        loss=Loss(clamp=meta["clamp_utgt"]), guidance=mix, y_null=LABEL_ROWS[which] - 1, has_labels=True, bf16=False
    )
    rows = Rows(x=x, noise=noise, t=t, r=r, y=y, uniforms=uniforms, n_equal=meta["n_fm"])
    return which, meta, rows, objective
