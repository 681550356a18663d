"""From a recipe to its network, and torch.compile for it, block by block.

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

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from alphaflow_cli.nn.clean import CleanDiT
from alphaflow_cli.nn.dit import DiT, linears
from alphaflow_cli.nn.noise import NoiseDiT
from alphaflow_cli.recipe.plan import label_rows
from alphaflow_cli.recipe.schema import Recipe

NETWORK_CLASSES: dict[str, type[DiT]] = {"velocity": DiT, "noise": NoiseDiT, "data": CleanDiT}
DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}  # of weights, targets and losses


def build_network(recipe: Recipe, *, seed: int | None = None) -> DiT:
    """The recipe's network, initialised from `seed` (None: the recipe's own); global randomness stays as it was."""
    model, data = recipe.model, recipe.data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed if seed is None else seed)
        net = NETWORK_CLASSES[model.prediction](
            latent_size=data.latent_size,
            channels=data.channels,
            patch=model.patch,
            dim=model.dim,
            depth=model.depth,
            heads=model.heads,
            mlp_ratio=model.mlp_ratio,
            label_rows=label_rows(recipe),
            qk_norm=model.qk_norm,
            second_time=model.second_time,
            gradient_checkpointing=recipe.train.gradient_checkpointing,
        )
        if model.second_init == "xavier":
            for linear in linears(net.second_embed):
                nn.init.xavier_uniform_(linear.weight)
    net.pos_embed.requires_grad_(model.positions == "trained")
    if isinstance(net, CleanDiT):
        net.t_floor = model.t_floor
    return net


def network_shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of the recipe's network, in its order, without memory for the tensors."""
    with torch.device("meta"), _NoInitialisation():
        return {name: tuple(value.shape) for name, value in build_network(recipe).state_dict().items()}


class _NoInitialisation(TorchFunctionMode):
    """Layers are made without drawing weights: on the meta device, torch would import its compiler for it (1 s)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        drawn = getattr(func, "__module__", None) == "torch.nn.init"
        return None if drawn else func(*args, **(kwargs or {}))


def compile_blocks(net: DiT, backend: str = "inductor") -> DiT:
    """Compile in place: names in the state dict stay what they are, and nothing is compiled before the first call."""
    parts: list[nn.Module] = [*net.blocks, net.final]
    for part in parts:
        part.compile(dynamic=False, backend=backend)
    net.compiled = True
    return net
