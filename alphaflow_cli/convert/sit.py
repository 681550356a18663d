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
from typing import Any, Literal

import torch
from torch import Tensor

from alphaflow_cli.convert.arguments import check_classes, number, recipe_facts
from alphaflow_cli.convert.imported import SD_SCALE, Family, ForeignFile, Imported, scaled, step_in_file, with_facts
from alphaflow_cli.convert.shape import read_shape, to_our_names, without_variance
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


def read_sit(file: ForeignFile, kind: SiTKind) -> Imported:
    """Translate a SiT, DiT or REPA to our names; time and sign are turned later, when the network is known to fit."""
    table, which = file.pick(TABLES)
    for key, straight in STRAIGHT.get(kind, {}).items():  # a DiT has neither of these arguments
        check_straight(file, kind, key, straight)
    facts, read = recipe_facts(file.arguments, file.name, meanflow=False) if kind == "repa" else ({}, set())
    state = state_dict(table, file.name)
    if kind == "repa":
        state = {name: value for name, value in state.items() if not name.startswith(PROJECTORS)}
    foreign = read_network(file, kind, which, state, base=with_facts(_flow_base(file, kind), facts))
    if kind == "sit" and foreign.shape.out == foreign.shape.channels and "path_type" not in file.arguments:
        file.filled["time"] = (
            "t = 0 is noise (--from sit); in a REPA, which learns no variance either, t = 1 is: --from repa"
        )
    foreign.latents = file.scaled_latents(SD_SCALE, ", the Stable Diffusion convention")
    foreign.step = step_in_file(file.tree.get("steps", file.tree.get("train_steps")))
    note_arguments(foreign, read | set(STATED))
    return foreign


def read_network(
    file: ForeignFile, family: Family, which: str, state: dict[str, Tensor], *, base: Recipe, second: str | None = None
) -> Imported:
    """Translate the network, which SiT and its children share; `second` is how they spell a second time embedder."""
    weights = to_our_names(state, file.name, second=second)
    shape = read_shape(weights, file.name)
    heads = file.heads(shape.dim)
    weights = without_variance(weights, shape, file.name)
    if shape.label_rows:
        check_classes(file.arguments, shape.label_rows, file.name)
    else:
        base = replace(base, guidance=Guidance())
    return Imported(file, family, weights, which, shape, heads, scaled(1.0, ""), base)


def note_arguments(foreign: Imported, read: set[str]) -> None:
    """List the training arguments that were read, and the names of those that nothing here has a place for."""
    arguments = foreign.file.arguments
    foreign.stated = {key: value for key, value in arguments.items() if key in read}
    foreign.unread = tuple(sorted(arguments.keys() - read))


def check_straight(file: ForeignFile, kind: str, key: str, straight: str) -> None:
    """Refuse a file whose argument says that it is no velocity on the straight path."""
    if file.arguments.get(key, straight) != straight:
        raise AlphaflowError(
            f"{file.name}: a {kind} with {key} {str(file.arguments[key])[:60]!r}; only {straight!r} is a velocity on "
            "the straight path."
        )


def label_dropout(file: ForeignFile) -> float:
    """The share of labels that were dropped, by the argument cfg_prob, else as in every released network."""
    stated = file.arguments.get("cfg_prob")
    dropout = number(file.arguments, "cfg_prob", file.name) if stated else DROPOUT
    if not 0 < dropout < 1:
        raise AlphaflowError(
            f"{file.name}: its argument cfg_prob is {dropout:g}; a share of dropped labels is below 1."
        )
    if stated is None:
        file.filled["labels"] = f"the last row is the null label, dropped with probability {DROPOUT}"
    elif not stated:
        file.filled["labels"] = (
            "the last row is the null label, which was never trained (cfg_prob 0): do not guide with it"
        )
    return dropout


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


def _flow_base(file: ForeignFile, kind: SiTKind) -> Recipe:
    """The recipe of plain flow matching: uniform times, guidance only when sampling, many steps."""
    file.filled["recipe"] = f"plain flow matching, as a {kind} trains; what the file does not say is unknown"
    file.filled["sampler"] = "flow, 100 steps; 250 and guidance 1.5 to 4 are usual (sample --guidance)"
    autoencoder = "stabilityai/sd-vae-ft-mse" if kind == "repa" else Data().autoencoder
    return Recipe(
        data=Data(autoencoder=autoencoder, scale=SD_SCALE, normalise="scale"),
        times=Times(law="uniform", equal_share=Schedule(initial=1.0, final=1.0, clamp=0.0)),
        guidance=Guidance(label_dropout=label_dropout(file)),
        sample=Sample(sampler="flow", nfe=100, two_step_sampler="flow"),
    )
