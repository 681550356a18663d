"""SiT, DiT and the PyTorch MeanFlow of zhuyu-cs: one architecture and one set of names, three meanings.

MeanFlow (t_embedder, r_embedder)   ours already: t = 1 is noise, u the average of noise − x, the second embedder
                                    gets t − r.
SiT      (t_embedder)               t = 0 is noise, the velocity is x − noise. With t' = 1 − t:
    cos(f t') = cos f cos(f t) + sin f sin(f t),  sin(f t') = sin f cos(f t) − cos f sin(f t)
    which is a linear map of our features: it goes into the first linear layer of the embedder. v = −v_SiT goes into
    the last linear layer. Both exact, up to rounding.
DiT      (t_embedder)               predicts noise at DDPM's 1000 times: nn/noise.py computes the velocity from it.
Both predict a variance too (twice the channels): dropped. Both get a second time embedder whose last layer is zero, so
that u does not depend on r until it is trained to.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from alphaflow_cli.convert.imported import (
    Imported,
    Latents,
    Options,
    base_recipe,
    is_set,
    note_heads,
    number_set,
    pick,
)
from alphaflow_cli.convert.latents import SD_SCALE, meanflow, parse_latents, scaled
from alphaflow_cli.convert.shape import Shape, heads_of, read_shape, to_our_names
from alphaflow_cli.convert.source import state_dict
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.nn.layers import FREQUENCIES, frequencies
from alphaflow_cli.recipe import Recipe
from alphaflow_cli.recipe.schema import Data, Guidance, Sample, Schedule, Times

Kind = Literal["sit", "dit", "meanflow"]
TABLES = {"ema": ("ema",), "raw": ("model", "net")}
DROPOUT = 0.1  # of labels, in every released SiT, DiT and MeanFlow; the table then has a null row
EXPECTED = {  # what the file's own arguments must say
    "path_type": ("Linear", "linear"),
    "prediction": ("velocity", "v"),  # of a SiT; its descendants abbreviate
}
MODELS: dict[str, Kind] = {"SiT": "sit", "DiT": "dit"}  # how the argument `model` begins
MIX = {"omega": "cfg_omega", "kappa": "cfg_kappa", "t_min": "cfg_min_t", "t_max": "cfg_max_t"}


def looks_like(table: dict[str, Tensor], arguments: dict[str, Any]) -> Kind | None:
    """By names; SiT and DiT have the same ones, and differ in their training arguments, where those are kept."""
    if "r_embedder.mlp.0.weight" in table:
        return "meanflow"
    if "t_embedder.mlp.0.weight" not in table:
        return None
    if "path_type" in arguments:
        return "sit"
    return MODELS.get(str(arguments.get("model"))[:3])


def read_sit(tree: dict[str, Any], path: Path, options: Options, kind: Kind) -> Imported:
    """Our names, our time, our sign."""
    filled: dict[str, str] = {}
    table, which = pick(tree, TABLES, options, path.name, filled=filled)
    state = state_dict(table, path.name)
    weights = to_our_names(state, path.name, second="r_embedder." if kind == "meanflow" else None)
    shape = read_shape(weights, path.name)
    arguments = fields(tree)
    weights = _keep_prediction(weights, shape, path.name)
    _check_path(arguments, path.name, kind)
    base = _meanflow_base(arguments, options, path, filled) if kind == "meanflow" else _flow_base(kind, filled)
    heads = heads_of(shape.dim, path.name, number_set(options, "model.heads"))
    note_heads(heads, shape.dim, options, filled)
    steps = tree.get("steps", tree.get("train_steps"))
    return Imported(
        family=kind,
        weights=weights,
        which=which,
        shape=shape,
        heads=heads,
        latents=_latents(kind, options),
        base=_labels(base, shape),
        step=steps if isinstance(steps, int) else None,
        said={key: arguments[key] for key in (*EXPECTED, *MIX.values(), "cfg_prob", "model") if key in arguments},
        filled=filled,
    )


def fields(tree: dict[str, Any]) -> dict[str, Any]:
    """The training arguments kept in a checkpoint: plain values only."""
    kept = tree.get("args")
    found = kept if isinstance(kept, dict) else getattr(kept, "__dict__", {})
    return {str(key): value for key, value in found.items() if isinstance(value, (str, int, float))}


def _check_path(arguments: dict[str, Any], where: str, kind: Kind) -> None:
    """A SiT's path and prediction, a MeanFlow's path; a DiT has neither argument."""
    keys = {"sit": ("path_type", "prediction"), "meanflow": ("path_type",), "dit": ()}[kind]
    for key in keys:
        if key in arguments and arguments[key] not in EXPECTED[key]:
            raise AlphaflowError(
                f"{where}: a {kind} with {key} {arguments[key]!r}; only {EXPECTED[key][0]!r} is a velocity on the "
                "straight path."
            )


def _keep_prediction(weights: dict[str, Tensor], shape: Shape, where: str) -> dict[str, Tensor]:
    """The last linear layer without the variance: of every pixel's 2C numbers the first C."""
    if shape.out == shape.channels:
        return weights
    if shape.out != 2 * shape.channels:
        raise AlphaflowError(f"{where}: {shape.channels} channels in and {shape.out} out; wanted as many, or twice.")
    kept = {}
    for name in ("final.linear.weight", "final.linear.bias"):
        value = weights.get(name, torch.zeros(0))
        if len(value) != shape.patch**2 * shape.out:
            raise AlphaflowError(f"{where}: not the weights of the network it describes ({name} is missing or short).")
        pixels = value.reshape(shape.patch**2, shape.out, *value.shape[1:])
        kept[name] = pixels[:, : shape.channels].reshape(-1, *value.shape[1:])
    return weights | kept


def turn_time(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network of (1 − t, −v) from one of (t, v), or back: twice gives the first."""
    first, last = "time_embed.mlp.0.weight", ("final.linear.weight", "final.linear.bias")
    f = frequencies(torch.zeros(0, dtype=torch.float64))
    weight = weights[first].double()
    of_cos, of_sin = weight[:, :FREQUENCIES], weight[:, FREQUENCIES:]
    turned = torch.cat([of_cos * f.cos() + of_sin * f.sin(), of_cos * f.sin() - of_sin * f.cos()], dim=1)
    return weights | {first: turned} | {name: -weights[name] for name in last}


def add_second_embedder(weights: dict[str, Tensor], fresh: dict[str, Tensor]) -> dict[str, Tensor]:
    """The missing embedder: first layer as freshly initialised, last layer zero."""
    added = {name: value for name, value in fresh.items() if name.startswith("second_embed.")}
    return weights | {n: torch.zeros_like(v) if n.startswith("second_embed.mlp.2.") else v for n, v in added.items()}


def _labels(base: Recipe, shape: Shape) -> Recipe:
    """No label table, no dropout."""
    return base if shape.label_rows else replace(base, guidance=Guidance())


def _flow_base(kind: Kind, filled: dict[str, str]) -> Recipe:
    """SiT and DiT: plain velocity, uniform times, guidance only when sampling, many steps."""
    filled["recipe"] = f"plain flow matching, as a {kind} trains; optimiser and steps are not known"
    filled["sampler"] = "flow, 100 steps; both are usually sampled with 250 and guidance 1.5 to 4 (sample --guidance)"
    filled["labels"] = f"the last row is the null label, dropped with probability {DROPOUT}"
    return Recipe(
        data=Data(scale=SD_SCALE, normalise="scale"),
        times=Times(law="uniform", equal_share=Schedule(initial=1.0, final=1.0, clamp=0.0)),
        guidance=Guidance(label_dropout=DROPOUT),
        sample=Sample(sampler="flow", nfe=100, two_step_sampler="flow"),
    )


def _meanflow_base(arguments: dict[str, Any], options: Options, path: Path, filled: dict[str, str]) -> Recipe:
    """Guidance is baked in: from the file's arguments, else from --recipe or --set, else asked for."""
    said = _mix(arguments, options, path.name, filled)
    asked = options.recipe or any(text.startswith("guidance.") for text in options.sets)
    if not said and not asked:
        raise AlphaflowError(
            f"{path.name}: does not say with which guidance it was trained. Say it: --recipe meanflow-xl2-cfg "
            "(or another), or --set guidance.omega=… --set guidance.kappa=… (1 and 0: none)"
        )
    base = base_recipe(options, None, filled, default="meanflow-b2")
    share = _number(arguments, "cfg_prob", path.name) if arguments.get("cfg_prob") else DROPOUT
    if not 0 < share < 1:
        raise AlphaflowError(f"{path.name}: its argument cfg_prob is {share:g}; a share of dropped labels is below 1.")
    if not arguments.get("cfg_prob"):
        filled["labels"] = f"the last row is the null label, dropped with probability {DROPOUT}"
    mix = replace(base.guidance, label_dropout=share)  # its null row is always there
    return replace(base, guidance=replace(mix, **said) if said else mix)


def _mix(arguments: dict[str, Any], options: Options, where: str, filled: dict[str, str]) -> dict[str, float]:
    """omega, kappa and their times from the arguments; where --set says one, the file's does not matter."""
    said = {ours: _number(arguments, theirs, where) for ours, theirs in MIX.items() if theirs in arguments}
    if said.get("t_max", 1.0) <= said.get("t_min", 0.0):  # no time lies between: trained without guidance
        filled["guidance"] = f"none: cfg_max_t {said.get('t_max', 1.0):g} leaves no time for it; omega 1, kappa 0"
        return {"omega": 1.0, "kappa": 0.0, "t_min": 0.0, "t_max": 1.0}
    said = {ours: value for ours, value in said.items() if not is_set(options, f"guidance.{ours}")}
    for ours, value in said.items():
        low, high = {"omega": (1e-12, math.inf), "kappa": (0.0, 1 - 1e-12)}.get(ours, (0.0, 1.0))
        if not low <= value <= high:
            raise AlphaflowError(
                f"{where}: its argument {MIX[ours]} is {value:g}, which no guidance of ours has (omega above 0, kappa "
                f"from 0 to below 1, times within [0, 1]). Say what was meant: --set guidance.{ours}=…"
            )
    return said


def _number(arguments: dict[str, Any], key: str, where: str) -> float:
    try:
        value = float(arguments[key])
    except ValueError as error:
        raise AlphaflowError(f"{where}: its argument {key} is {arguments[key]!r}, not a number.") from error
    if not math.isfinite(value):
        raise AlphaflowError(f"{where}: its argument {key} is {value}, not a finite number.")
    return value


def _latents(kind: Kind, options: Options) -> Latents:
    if options.latents:
        return parse_latents(options.latents)
    if kind == "meanflow":
        return meanflow("the per-channel numbers of zhuyu-cs/MeanFlow's evaluation (later versions: --latents scale:…)")
    return scaled(SD_SCALE, f"latent · {SD_SCALE}, the Stable Diffusion convention")
