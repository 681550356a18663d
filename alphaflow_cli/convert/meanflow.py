"""Three PyTorch relatives: zhuyu-cs/MeanFlow, the DiT of NVlabs/FastGen, SoFlow. Their networks are ours, renamed.

In all t = 1 is noise, u is the average of noise − x, and the second embedder is fed t − r.

zhuyu-cs   t_embedder, r_embedder; SiT's names. Its training arguments lie in the checkpoint.
FastGen    t_embedder.proj_net, blocks.N.attention, …, and a logvar_linear that sampling does not use. Its checkpoint
    says nothing of times: its MeanFlow configurations feed t unscaled (scale_t false) and t − r (time_cond_type diff),
    which is what is assumed, and printed. A FastGen without r_embedder may scale its times by 1000, so it is refused.
SoFlow     t_embedder, s_embedder (fed t − r), under `network.`; model, ema_model. The file says nothing of training:
    a table of 1001 label rows is guided, as in its published B/4, one of 1000 is not. Its positional table is fixed.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from alphaflow_cli.convert.arguments import check_classes, number, plain_arguments, recipe_facts
from alphaflow_cli.convert.imported import (
    SD_SCALE,
    ZHUYU_SCALE,
    ConvertOptions,
    Imported,
    Latents,
    base_recipe,
    is_set,
    note_heads,
    number_set,
    parse_latents,
    pick,
    scaled,
    step_in_file,
    with_facts,
)
from alphaflow_cli.convert.shape import heads_of, read_shape, to_our_names, without_variance
from alphaflow_cli.convert.sit import DROPOUT, TABLES
from alphaflow_cli.convert.source import bare_name, state_dict
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe import Recipe
from alphaflow_cli.recipe.schema import Guidance

MIX = {"omega": "cfg_omega", "kappa": "cfg_kappa", "t_min": "cfg_min_t", "t_max": "cfg_max_t"}
STATED = ("path_type", *MIX.values(), "cfg_prob", "model", "num_classes")
FASTGEN = "t_embedder.proj_net.0.weight"  # a table that nobody else has
SOFLOW = "s_embedder.mlp.0.weight"  # the same
SOFLOW_TABLES = {"ema": ("ema_model",), "raw": ("model",)}
SOFLOW_GUIDED = {1001: True, 1000: False}  # rows of ImageNet's label table → trained with guidance, and a null row
SOFLOW_RECIPES = {(768, 4): "soflow-b4", (768, 2): "soflow-b2", (1152, 2): "soflow-xl2"}  # (dim, patch) → its recipe
FASTGEN_NAMES = {  # theirs → SiT's
    "_embedder.proj_net.": "_embedder.mlp.",
    "y_embedder.class_embeddings.": "y_embedder.embedding_table.",
    ".attention.": ".attn.",
    ".feed_forward.": ".mlp.",
    ".conditioning_net.": ".adaLN_modulation.",
    "final_layer.projection.": "final_layer.linear.",
    "final_layer.adaptive_params.": "final_layer.adaLN_modulation.",
}


def read_meanflow(tree: dict[str, Any], path: Path, options: ConvertOptions) -> Imported:
    """Translate a checkpoint of zhuyu-cs/MeanFlow."""
    filled: dict[str, str] = {}
    table, which = pick(tree, TABLES, options, path.name, filled=filled)
    arguments = plain_arguments(tree)
    if arguments.get("path_type", "linear") != "linear":
        raise AlphaflowError(
            f"{path.name}: a meanflow with path_type {str(arguments['path_type'])[:60]!r}; only 'linear' is a velocity "
            "on the straight path."
        )
    foreign = _imported(state_dict(table, path.name), which, path, options, filled)
    facts, read = recipe_facts(arguments, path.name, meanflow=True)
    base = with_facts(_meanflow_base(arguments, options, path, filled), facts)
    if foreign.shape.label_rows:
        check_classes(arguments, foreign.shape.label_rows, path.name)
    steps = tree.get("steps")
    return replace(
        foreign,
        family="meanflow",
        base=base if foreign.shape.label_rows else replace(base, guidance=Guidance()),
        latents=_latents(
            options, ZHUYU_SCALE, "its trainer's scale since 28 May 2025, written so (before: --latents meanflow)"
        ),
        step=step_in_file(steps),
        stated={key: value for key, value in arguments.items() if key in STATED or key in read},
        unread=tuple(sorted(arguments.keys() - read - set(STATED))),
    )


def fastgen_tables(tree: dict[str, Any]) -> dict[str, Any]:
    """The tables of a FastGen checkpoint by name (net, ema, ema_9999, …); empty for any other file."""
    inner = tree.get("model")
    inner = inner if isinstance(inner, dict) else {}
    tables = {key: table for key, table in inner.items() if isinstance(table, dict)}
    return tables if any(FASTGEN in map(bare_name, table) for table in tables.values()) else {}


def read_fastgen(tree: dict[str, Any], path: Path, options: ConvertOptions) -> Imported:
    """Translate a MeanFlow DiT of FastGen: net and its averages under `model`, or a bare table."""
    filled: dict[str, str] = {}
    tables = fastgen_tables(tree)
    averages = sorted((k for k in tables if k.startswith("ema")), key=lambda k: (k != "ema", k != "ema_9999", k))
    table, which = pick(tables or tree, {"ema": tuple(averages), "raw": ("net",)}, options, path.name, filled=filled)
    if which == "ema" and tables:
        filled["weights"] = f"{averages[0]} (of {', '.join(averages)})"
    state = {_sit_name(name): value for name, value in state_dict(table, path.name).items()}
    if "t_embedder.mlp.0.weight" in state and "r_embedder.mlp.0.weight" not in state:
        raise AlphaflowError(
            f"{path.name}: a FastGen DiT without r_embedder: no MeanFlow, and the file does not say whether its times "
            "run to 1 or to 1000 and what it predicts. Only FastGen's MeanFlow DiTs are read."
        )
    foreign = _imported(state, which, path, options, filled)
    filled["times"] = "t unscaled, the second embedder fed t − r, as FastGen's MeanFlow configurations say (scale_t "
    filled["times"] += "false, time_cond_type diff); --set model.second_time=r for abs; another scale is not read"
    filled["labels"] = f"the last row is the null label, dropped with probability {DROPOUT}"
    base = _meanflow_base({}, options, path, filled)
    if not options.autoencoder:
        base = replace(base, data=replace(base.data, autoencoder="stabilityai/sd-vae-ft-mse"))
    step = tree.get("iteration")
    return replace(
        foreign,
        family="fastgen",
        base=base if foreign.shape.label_rows else replace(base, guidance=Guidance()),
        latents=_latents(options, SD_SCALE, "the Stable Diffusion convention, which FastGen's SDVAE follows"),
        step=step_in_file(step),
    )


def read_soflow(tree: dict[str, Any], path: Path, options: ConvertOptions) -> Imported:
    """Translate a SoFlow DiT: model and ema_model, or a bare table."""
    filled: dict[str, str] = {}
    table, which = pick(tree, SOFLOW_TABLES, options, path.name, filled=filled)
    state = {name.removeprefix("network."): value for name, value in state_dict(table, path.name).items()}
    foreign = _imported(state, which, path, options, filled, second="s_embedder.")
    size = (foreign.shape.dim, foreign.shape.patch)
    base = base_recipe(options, SOFLOW_RECIPES.get(size), filled, default="soflow-b2")
    if not options.recipe:
        filled["recipe"] = filled["recipe"].replace("the file's name", "the network's size")
    latents = parse_latents(options.latents) if options.latents else scaled(SD_SCALE, f"latent · {SD_SCALE}: SoFlow's")
    return replace(
        foreign,
        family="soflow",
        base=_soflow_guidance(base, foreign.shape.label_rows, options, path.name, filled),
        latents=latents,
        step=step_in_file(tree.get("finished_steps")),
        unread=tuple(sorted({"finished_epochs", "optimizer"} & tree.keys())),
    )


def _soflow_guidance(base: Recipe, rows: int, options: ConvertOptions, where: str, filled: dict[str, str]) -> Recipe:
    """Decide by the label table's rows whether guidance was built in; where they do not say it, it is asked for."""
    dropout = number_set(options, "guidance.label_dropout")
    if not options.recipe and dropout is None and rows and rows not in SOFLOW_GUIDED:
        raise AlphaflowError(
            f"{where}: has {rows} rows of labels, and SoFlow's files do not say what they are: {rows} classes, or "
            f"{rows - 1} and the null label of a guided model. Say it: --recipe soflow-b2 (guided) or another, or "
            "--set guidance.label_dropout=0 (all are classes) or 0.1 (the last is the null label)"
        )
    guided = options.recipe or SOFLOW_GUIDED.get(rows, bool(dropout))
    if rows and guided:
        filled["guidance"] = f"omega {base.guidance.omega:g}, kappa {base.guidance.kappa:g}: those of {base.name}"
        return base
    filled["guidance"] = (
        f"none: the label table has {rows} rows, none for the null label" if rows else "none: no labels"
    )
    return replace(base, guidance=Guidance())


def _sit_name(name: str) -> str:
    for theirs, common in FASTGEN_NAMES.items():
        name = name.replace(theirs, common)
    return name


def _imported(
    state: dict[str, Tensor],
    which: str,
    path: Path,
    options: ConvertOptions,
    filled: dict[str, str],
    *,
    second: str = "r_embedder.",
) -> Imported:
    """Translate the network, which all of them share; the recipe and the latents are still to come."""
    state = {name: value for name, value in state.items() if not name.startswith("logvar_linear.")}
    weights = to_our_names(state, path.name, second=second)
    shape = read_shape(weights, path.name)
    heads = heads_of(shape.dim, path.name, number_set(options, "model.heads"))
    note_heads(heads, shape.dim, options, filled)
    return Imported(
        family="meanflow",
        weights=without_variance(weights, shape, path.name),
        which=which,
        shape=shape,
        heads=heads,
        latents=scaled(1.0, ""),
        base=Recipe(),
        filled=filled,
    )


def _meanflow_base(arguments: dict[str, Any], options: ConvertOptions, path: Path, filled: dict[str, str]) -> Recipe:
    """The base recipe, with the guidance that the network was trained with.

    Guidance is baked into the weights: it comes from the file's arguments, else from --recipe or --set, else the file
    is refused.
    """
    mix = _mix(arguments, options, path.name, filled)
    answered = options.recipe or any(text.startswith("guidance.") for text in options.sets)
    if not mix and not answered:
        raise AlphaflowError(
            f"{path.name}: does not say with which guidance it was trained. Say it: --recipe meanflow-xl2-cfg "
            "(or another), or --set guidance.omega=… --set guidance.kappa=… (1 and 0: none)"
        )
    base = base_recipe(options, None, filled, default="meanflow-b2")
    share = number(arguments, "cfg_prob", path.name) if arguments.get("cfg_prob") else DROPOUT
    if not 0 < share < 1:
        raise AlphaflowError(f"{path.name}: its argument cfg_prob is {share:g}; a share of dropped labels is below 1.")
    if not arguments.get("cfg_prob"):
        filled["labels"] = f"the last row is the null label, dropped with probability {DROPOUT}"
    guidance = replace(base.guidance, label_dropout=share)  # its null row is always there
    return replace(base, guidance=replace(guidance, **mix))


def _mix(arguments: dict[str, Any], options: ConvertOptions, where: str, filled: dict[str, str]) -> dict[str, Any]:
    """Read omega, kappa and their times from the arguments. Where --set gives one, the file's does not matter."""
    mix = {ours: number(arguments, theirs, where) for ours, theirs in MIX.items() if theirs in arguments}
    if mix.get("t_max", 1.0) <= mix.get("t_min", 0.0):  # no time lies between: trained without guidance
        filled["guidance"] = f"none: cfg_max_t {mix.get('t_max', 1.0):g} leaves no time for it; omega 1, kappa 0"
        return {"omega": 1.0, "kappa": 0.0, "t_min": 0.0, "t_max": 1.0}
    mix = {ours: value for ours, value in mix.items() if not is_set(options, f"guidance.{ours}")}
    for ours, value in mix.items():
        low, high = {"omega": (1e-12, math.inf), "kappa": (0.0, 1 - 1e-12)}.get(ours, (0.0, 1.0))
        if not low <= value <= high:
            raise AlphaflowError(
                f"{where}: its argument {MIX[ours]} is {value:g}, which no guidance of ours has (omega above 0, kappa "
                f"from 0 to below 1, times within [0, 1]). Say what was meant: --set guidance.{ours}=…"
            )
    return mix


def _latents(options: ConvertOptions, scale: float, why: str) -> Latents:
    return parse_latents(options.latents) if options.latents else scaled(scale, f"latent · {scale}: {why}")
