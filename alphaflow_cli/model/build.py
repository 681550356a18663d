"""From a recipe to its network."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from alphaflow_cli.nn.blocks import Design
from alphaflow_cli.nn.clean import CleanDiT
from alphaflow_cli.nn.dit import DiT, linears
from alphaflow_cli.nn.noise import NoiseDiT
from alphaflow_cli.recipe.plan import label_rows, prefix_tokens
from alphaflow_cli.recipe.schema import Recipe

NETWORK_CLASSES: dict[str, type[DiT]] = {"velocity": DiT, "noise": NoiseDiT, "data": CleanDiT}
DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}  # of weights, targets and losses


def build_network(recipe: Recipe) -> DiT:
    """The recipe's network, initialised from the recipe's seed; global randomness stays as it was."""
    model, data = recipe.model, recipe.data
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.train.seed)  # torch.manual_seed seeds every GPU as well
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
            design=Design(
                block=model.block,
                inputs=model.inputs,
                prefix=tuple(prefix_tokens(recipe).values()),
                velocity_head=model.velocity_head,
            ),
        )
        if model.second_init == "xavier" and not net.final.linear.weight.is_meta:
            for linear in linears(net.second_embed):
                nn.init.xavier_uniform_(linear.weight)
    if net.pos_embed is not None:
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
