"""SiT, DiT and REPA: one architecture and one set of names, three meanings.

SiT   t = 0 is noise, the velocity is x − noise. With t' = 1 − t:
    cos(f t') = cos f cos(f t) + sin f sin(f t),  sin(f t') = sin f cos(f t) − cos f sin(f t)
    which is a linear map of our features: it goes into the first linear layer of the embedder. v = −v_SiT goes into
    the last linear layer. Both exact, up to rounding.
DiT   predicts noise at DDPM's 1000 times: nn/noise.py computes the velocity from it.
REPA  a SiT in which t = 1 is noise and the velocity is noise − x: ours already. Its projectors, which compare hidden
    states with those of an encoder in training, are dropped. It spells its arguments `linear` and `v`, SiT `Linear`
    and `velocity`; this tells the two apart.
SiT and DiT predict a variance too (twice the channels): dropped. All get a second time embedder whose last layer is
zero, so that u does not depend on r until it is trained to.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from alphaflow_cli.convert.arguments import check_classes, number, plain_arguments, recipe_facts
from alphaflow_cli.convert.imported import (
    SD_SCALE,
    ConvertOptions,
    Imported,
    Latents,
    note_heads,
    number_set,
    parse_latents,
    pick,
    scaled,
    step_in_file,
    with_facts,
)
from alphaflow_cli.convert.shape import heads_of, read_shape, to_our_names, without_variance
from alphaflow_cli.convert.source import state_dict
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.nn.layers import FREQUENCIES, frequencies
from alphaflow_cli.recipe import Recipe
from alphaflow_cli.recipe.schema import Data, Guidance, Sample, Schedule, Times

SiTKind = Literal["sit", "dit", "repa"]
TABLES = {"ema": ("ema",), "raw": ("model", "net")}
DROPOUT = 0.1  # of labels, in every released SiT, DiT, REPA and MeanFlow; the table then has a null row
SPELLINGS: dict[str, dict[str, tuple[str, ...]]] = {  # argument → who writes it so
    "path_type": {"sit": ("Linear", "GVP", "VP"), "repa": ("linear", "cosine")},
    "prediction": {"sit": ("velocity", "score", "noise"), "repa": ("v", "x", "eps")},
}
STRAIGHT = {
    "sit": {"path_type": "Linear", "prediction": "velocity"},
    "repa": {"path_type": "linear", "prediction": "v"},
}
MODELS: dict[str, SiTKind] = {"SiT": "sit", "DiT": "dit"}  # how the argument `model` begins
PROJECTORS = "projectors."
STATED = ("path_type", "prediction", "model", "cfg_prob", "num_classes")


def looks_like_sit(table: dict[str, Any], arguments: dict[str, Any]) -> SiTKind | None:
    """Tell SiT, DiT and REPA apart: by REPA's projectors, else by how the training arguments are spelled.

    None where the table is none of them, or no arguments are kept.
    """
    if "t_embedder.mlp.0.weight" not in table:
        return None
    if any(name.startswith(PROJECTORS) for name in table):
        return "repa"
    spelled = {
        kind for key, kinds in SPELLINGS.items() for kind, words in kinds.items() if str(arguments.get(key)) in words
    }
    if spelled == {"repa"}:
        return "repa"
    if "path_type" in arguments or spelled:
        return "sit"
    return MODELS.get(str(arguments.get("model"))[:3])


def read_sit(tree: dict[str, Any], path: Path, options: ConvertOptions, kind: SiTKind) -> Imported:
    """Translate a SiT, DiT or REPA to our names; time and sign are turned later, when the network is known to fit."""
    filled: dict[str, str] = {}
    table, which = pick(tree, TABLES, options, path.name, filled=filled)
    state = state_dict(table, path.name)
    if kind == "repa":
        state = {name: value for name, value in state.items() if not name.startswith(PROJECTORS)}
    weights = to_our_names(state, path.name, second=None)
    shape = read_shape(weights, path.name)
    arguments = plain_arguments(tree)
    weights = without_variance(weights, shape, path.name)
    _check_path(arguments, path.name, kind)
    facts, read = recipe_facts(arguments, path.name, meanflow=False) if kind == "repa" else ({}, set())
    heads = heads_of(shape.dim, path.name, number_set(options, "model.heads"))
    note_heads(heads, shape.dim, options, filled)
    if kind == "sit" and shape.out == shape.channels and "path_type" not in arguments:
        filled["time"] = (
            "t = 0 is noise (--from sit); in a REPA, which learns no variance either, t = 1 is: --from repa"
        )
    base = with_facts(_flow_base(kind, arguments, path.name, filled), facts)
    if shape.label_rows:
        check_classes(arguments, shape.label_rows, path.name)
    steps = tree.get("steps", tree.get("train_steps"))
    return Imported(
        family=kind,
        weights=weights,
        which=which,
        shape=shape,
        heads=heads,
        latents=_latents(options),
        base=base if shape.label_rows else replace(base, guidance=Guidance()),
        step=step_in_file(steps),
        stated={key: value for key, value in arguments.items() if key in STATED or key in read},
        filled=filled,
        unread=tuple(sorted(arguments.keys() - read - set(STATED))),
    )


def _check_path(arguments: dict[str, Any], where: str, kind: SiTKind) -> None:
    """Refuse a file that is no velocity on the straight path; a DiT has neither of these arguments."""
    for key, straight in STRAIGHT.get(kind, {}).items():
        if key in arguments and arguments[key] != straight:
            raise AlphaflowError(
                f"{where}: a {kind} with {key} {str(arguments[key])[:60]!r}; only {straight!r} is a velocity on the "
                "straight path."
            )


def turn_time(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make a network of (1 − t, −v) from one of (t, v), or the other way round: done twice, it gives the first."""
    first, last = "time_embed.mlp.0.weight", ("final.linear.weight", "final.linear.bias")
    f = frequencies(torch.zeros(0, dtype=torch.float64))
    weight = weights[first].double()
    of_cos, of_sin = weight[:, :FREQUENCIES], weight[:, FREQUENCIES:]
    turned = torch.cat([of_cos * f.cos() + of_sin * f.sin(), of_cos * f.sin() - of_sin * f.cos()], dim=1)
    return weights | {first: turned} | {name: -weights[name] for name in last}


def add_second_embedder(weights: dict[str, Tensor], fresh: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the missing second time embedder: its first layer as freshly initialised, its last layer zero."""
    added = {name: value for name, value in fresh.items() if name.startswith("second_embed.")}
    return weights | {n: torch.zeros_like(v) if n.startswith("second_embed.mlp.2.") else v for n, v in added.items()}


def _flow_base(kind: SiTKind, arguments: dict[str, Any], where: str, filled: dict[str, str]) -> Recipe:
    """The recipe of plain flow matching: uniform times, guidance only when sampling, many steps."""
    filled["recipe"] = f"plain flow matching, as a {kind} trains; what is not listed as said is not known"
    filled["sampler"] = "flow, 100 steps; 250 and guidance 1.5 to 4 are usual (sample --guidance)"
    dropout = number(arguments, "cfg_prob", where) if arguments.get("cfg_prob") else DROPOUT
    if not 0 < dropout < 1:
        raise AlphaflowError(f"{where}: its argument cfg_prob is {dropout:g}; a share of dropped labels is below 1.")
    if "cfg_prob" not in arguments:
        filled["labels"] = f"the last row is the null label, dropped with probability {DROPOUT}"
    elif not arguments["cfg_prob"]:
        filled["labels"] = "the last row is the null label, which was never trained (cfg_prob 0): do not guide with it"
    autoencoder = "stabilityai/sd-vae-ft-mse" if kind == "repa" else Data().autoencoder
    return Recipe(
        data=Data(autoencoder=autoencoder, scale=SD_SCALE, normalise="scale"),
        times=Times(law="uniform", equal_share=Schedule(initial=1.0, final=1.0, clamp=0.0)),
        guidance=Guidance(label_dropout=dropout),
        sample=Sample(sampler="flow", nfe=100, two_step_sampler="flow"),
    )


def _latents(options: ConvertOptions) -> Latents:
    if options.latents:
        return parse_latents(options.latents)
    return scaled(SD_SCALE, f"latent · {SD_SCALE}, the Stable Diffusion convention")
