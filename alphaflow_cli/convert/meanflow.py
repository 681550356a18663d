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
from typing import Any

from torch import Tensor

from alphaflow_cli.convert.arguments import number, recipe_facts
from alphaflow_cli.convert.imported import (
    SD_SCALE,
    ZHUYU_SCALE,
    Family,
    ForeignFile,
    Imported,
    step_in_file,
    with_facts,
)
from alphaflow_cli.convert.sit import TABLES, check_straight, label_dropout, note_arguments, read_network
from alphaflow_cli.convert.source import as_table, bare_name, state_dict
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


def read_meanflow(file: ForeignFile) -> Imported:
    """Translate a checkpoint of zhuyu-cs/MeanFlow."""
    table, which = file.pick(TABLES)
    check_straight(file, "meanflow", "path_type", "linear")
    facts, read = recipe_facts(file.arguments, file.name, meanflow=True)
    base = with_facts(_meanflow_base(file), facts)
    foreign = _imported(file, "meanflow", which, state_dict(table, file.name), base)
    foreign.latents = file.scaled_latents(
        ZHUYU_SCALE, ": its trainer's scale since 28 May 2025, written so (before: --latents meanflow)"
    )
    foreign.step = step_in_file(file.tree.get("steps"))
    note_arguments(foreign, read | set(STATED))
    return foreign


def fastgen_tables(tree: dict[str, Any]) -> dict[str, Any]:
    """The tables of a FastGen checkpoint by name (net, ema, ema_9999, …); empty for any other file."""
    tables = {key: table for key, table in as_table(tree.get("model")).items() if isinstance(table, dict)}
    return tables if any(FASTGEN in map(bare_name, table) for table in tables.values()) else {}


def read_fastgen(file: ForeignFile) -> Imported:
    """Translate a MeanFlow DiT of FastGen: net and its averages under `model`, or a bare table."""
    tables = fastgen_tables(file.tree)
    averages = sorted((k for k in tables if k.startswith("ema")), key=lambda k: (k != "ema", k != "ema_9999", k))
    table, which = file.pick({"ema": tuple(averages), "raw": ("net",)}, tables or file.tree)
    if which == "ema" and tables:
        file.filled["weights"] = f"{averages[0]} (of {', '.join(averages)})"
    state = {_sit_name(name): value for name, value in state_dict(table, file.name).items()}
    if "t_embedder.mlp.0.weight" in state and "r_embedder.mlp.0.weight" not in state:
        raise AlphaflowError(
            f"{file.name}: a FastGen DiT without r_embedder: no MeanFlow, and the file does not say whether its times "
            "run to 1 or to 1000 and what it predicts. Only FastGen's MeanFlow DiTs are read."
        )
    file.filled["times"] = (
        "t unscaled, the second embedder fed t − r, as FastGen's MeanFlow configurations say (scale_t false, "
        "time_cond_type diff); --set model.second_time=r for abs; another scale is not read"
    )
    base = _meanflow_base(file)
    base = replace(base, data=replace(base.data, autoencoder="stabilityai/sd-vae-ft-mse"))
    foreign = _imported(file, "fastgen", which, state, base)
    foreign.latents = file.scaled_latents(SD_SCALE, ": the Stable Diffusion convention, which FastGen's SDVAE follows")
    foreign.step = step_in_file(file.tree.get("iteration"))
    return foreign


def read_soflow(file: ForeignFile) -> Imported:
    """Translate a SoFlow DiT: model and ema_model, or a bare table."""
    table, which = file.pick(SOFLOW_TABLES)
    state = {name.removeprefix("network."): value for name, value in state_dict(table, file.name).items()}
    foreign = read_network(file, "soflow", which, state, base=Recipe(), second="s_embedder.")
    size = (foreign.shape.dim, foreign.shape.patch)
    base = file.base_recipe("soflow-b2", SOFLOW_RECIPES.get(size))
    file.filled["recipe"] = file.filled["recipe"].replace("the file's name", "the network's size")
    foreign.base = _soflow_guidance(file, base, foreign.shape.label_rows)
    foreign.latents = file.scaled_latents(SD_SCALE, ": SoFlow's")
    foreign.step = step_in_file(file.tree.get("finished_steps"))
    foreign.unread = tuple(sorted({"finished_epochs", "optimizer"} & file.tree.keys()))
    return foreign


def _soflow_guidance(file: ForeignFile, base: Recipe, rows: int) -> Recipe:
    """Decide by the label table's rows whether guidance was built in; where they do not say it, it is asked for."""
    dropout = file.options.number("guidance.label_dropout")
    if not file.options.recipe and dropout is None and rows and rows not in SOFLOW_GUIDED:
        raise AlphaflowError(
            f"{file.name}: has {rows} rows of labels, and SoFlow's files do not say what they are: {rows} classes, or "
            f"{rows - 1} and the null label of a guided model. Say it: --recipe soflow-b2 (guided) or another, or "
            "--set guidance.label_dropout=0 (all are classes) or 0.1 (the last is the null label)"
        )
    if rows and (file.options.recipe or SOFLOW_GUIDED.get(rows, bool(dropout))):
        mix = base.guidance
        file.filled["guidance"] = f"omega {mix.omega:g}, kappa {mix.kappa:g}: those of {base.name}"
        return base
    rest = f"the label table has {rows} rows, none for the null label" if rows else "no labels"
    file.filled["guidance"] = f"none: {rest}"
    return replace(base, guidance=Guidance(), expected=())


def _sit_name(name: str) -> str:
    for theirs, common in FASTGEN_NAMES.items():
        name = name.replace(theirs, common)
    return name


def _imported(file: ForeignFile, family: Family, which: str, state: dict[str, Tensor], base: Recipe) -> Imported:
    """Translate the network, which both systems share; what FastGen learns besides is dropped."""
    state = {name: value for name, value in state.items() if not name.startswith("logvar_linear.")}
    return read_network(file, family, which, state, base=base, second="r_embedder.")


def _meanflow_base(file: ForeignFile) -> Recipe:
    """The base recipe, with the guidance that the network was trained with.

    Guidance is baked into the weights: it comes from the file's arguments, else from --recipe or --set, else the file
    is refused.
    """
    mix = _mix(file)
    if not mix and not file.options.names_guidance:
        raise AlphaflowError(
            f"{file.name}: does not say with which guidance it was trained. Say it: --recipe meanflow-xl2-cfg "
            "(or another), or --set guidance.omega=… --set guidance.kappa=… (1 and 0: none)"
        )
    base = file.base_recipe("meanflow-b2")
    guidance = replace(base.guidance, label_dropout=label_dropout(file))  # its null row is always there
    return replace(base, guidance=replace(guidance, **mix))


def _mix(file: ForeignFile) -> dict[str, Any]:
    """Read omega, kappa and their times from the arguments. Where --set gives one, the file's does not matter."""
    mix = {ours: number(file.arguments, theirs, file.name) for ours, theirs in MIX.items() if theirs in file.arguments}
    if mix.get("t_max", 1.0) <= mix.get("t_min", 0.0):  # no time lies between: trained without guidance
        file.filled["guidance"] = f"none: cfg_max_t {mix.get('t_max', 1.0):g} leaves no time for it; omega 1, kappa 0"
        return {"omega": 1.0, "kappa": 0.0, "t_min": 0.0, "t_max": 1.0}
    mix = {ours: value for ours, value in mix.items() if not file.options.values_of(f"guidance.{ours}")}
    for ours, value in mix.items():
        low, high = {"omega": (1e-12, math.inf), "kappa": (0.0, 1 - 1e-12)}.get(ours, (0.0, 1.0))
        if not low <= value <= high:
            raise AlphaflowError(
                f"{file.name}: its argument {MIX[ours]} is {value:g}, which no guidance of ours has (omega above 0, "
                f"kappa from 0 to below 1, times within [0, 1]). Say what was meant: --set guidance.{ours}=…"
            )
    return mix
