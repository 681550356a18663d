"""The published α-Flow and MeanFlow snapshots: a `.pt` of net, ema and cfg with the autoencoder inside."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from alphaflow_cli.convert.imported import ForeignFile, Imported, Latents, parse_latents, statistics, with_facts
from alphaflow_cli.convert.shape import NetworkShape, read_shape, to_our_names
from alphaflow_cli.convert.snapshot_cfg import Training, check_against, read_training
from alphaflow_cli.convert.source import as_table, in_brief, state_dict
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe import Recipe

TABLES = {"ema": ("ema",), "raw": ("net",)}
STATISTICS = ("autoencoder_mean", "autoencoder_var", "are_ldm_stats_inited")
AUTOENCODER = "autoencoder.model.model."
RECIPES = {  # the released files → the recipes they were trained by
    "meanflow-b-2": "meanflow-b2",
    "meanflow-b-2-cfg": "meanflow-b2-cfg",
    "alphaflow-b-2": "b2",
    "alphaflow-b-2-cfg": "b2-cfg",
    "meanflow-xl-2-cfg": "meanflow-xl2-cfg",
    "alphaflow-xl-2-cfg": "xl2-cfg",
    "alphaflow-xl-2-plus-cfg": "xl2-plus-cfg",
}


def looks_published(table: dict[str, Tensor]) -> bool:
    """Tell whether a table is a published network: it lies under `model.` and has two time embedders."""
    return "model.noise_labels_next_embedder.mlp.0.weight" in table


def read_published(file: ForeignFile) -> Imported:
    """Translate a published snapshot: network, statistics, autoencoder, and what its cfg says of the training.

    The cfg is checked against the shapes of the weights.
    """
    table, which = file.pick(TABLES)
    state = state_dict(table, file.name)
    weights = to_our_names(_under(state, "model."), file.name, second=None)
    shape = read_shape(weights, file.name)
    stated = _configuration(file.tree.get("cfg"), shape, file.name)
    training = read_training(file.tree, file.name)
    base = _base(file, stated, training, shape.label_rows)
    return Imported(
        file,
        "alphaflow",
        weights,
        which,
        shape,
        heads=file.heads(shape.dim, stated.get("num_heads")),
        latents=_latents(file, state),
        base=base,
        autoencoder=_under(state, AUTOENCODER),
        step=training.step,
        stated=stated | training.read,
        unread=tuple(training.unread),
    )


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def _configuration(cfg: object, shape: NetworkShape, where: str) -> dict[str, Any]:
    """Read what cfg says of the network. A contradiction with the shapes is refused, and both sides are named."""
    model, dataset = (as_table(as_table(cfg).get(name)) for name in ("model", "dataset"))
    resolution = as_table(model.get("tokenizer")).get("resolution")
    keys = ("dim", "num_blocks", "num_heads", "mlp_ratio", "label_dropout")
    stated: dict[str, Any] = {key: model[key] for key in keys if key in model}
    if isinstance(resolution, (list, tuple)) and resolution:
        stated["patch"] = resolution[-1]
    labels = dataset.get("label_shape")
    if isinstance(labels, (list, tuple)) and labels:
        stated["classes"] = labels[0]
    _check(stated, shape, where)
    return stated


def _check(stated: dict[str, Any], shape: NetworkShape, where: str) -> None:
    for key, value in stated.items():
        if not isinstance(value, (int, float)) or not abs(value) < 1e15:
            raise AlphaflowError(f"{where}: its configuration says {key} {in_brief(value)}; it is not one of numbers.")
    seen: dict[str, float] = {
        "dim": shape.dim,
        "num_blocks": shape.depth,
        "mlp_ratio": shape.mlp_ratio,
        "patch": shape.patch,
    }
    if "classes" in stated:
        seen["classes"] = max(shape.label_rows - (stated.get("label_dropout", 0) > 0), 0)
    for key, value in seen.items():
        if key in stated and int(stated[key] * 1000) != int(value * 1000):
            raise AlphaflowError(f"{where}: its configuration says {key} {stated[key]}, its weights say {value:g}.")


def _base(file: ForeignFile, stated: dict[str, Any], training: Training, rows: int) -> Recipe:
    """The recipe of the file's name or of the command line, checked against the file, with what the file says put in.
    Guidance is baked in: where the file does not say it, it is asked for, unless there is no null row."""
    options, published = file.options, RECIPES.get(file.path.stem.lower())
    answered = options.names_guidance or "guidance.omega" in training.facts
    if stated.get("label_dropout", 0) > 0 and not published and not answered:
        raise AlphaflowError(
            f"{file.name}: was trained with guidance (it drops labels), but does not say which, and the name is none "
            "of the released files'. Say it: --recipe b2-cfg (or another), or --set guidance.omega=… and kappa=…"
        )
    dropout = stated.get("label_dropout")
    dropped = options.values_of("guidance.label_dropout")
    if rows and dropout is None and not (published or options.recipe or dropped):
        raise AlphaflowError(
            f"{file.name}: has {rows} rows of labels, and no configuration that says what they are: {rows} classes, or "
            f"{rows - 1} and the null label of a guided model. Say it: --recipe b2 or b2-cfg (or another), or --set "
            "guidance.label_dropout=0 (all are classes) or 0.1 (the last is the null label; omega and kappa as well)"
        )
    base = file.base_recipe("b2", published)
    if options.recipe or published:
        named = f"--recipe {options.recipe}" if options.recipe else f"recipe {published}, which the file's name means,"
        check_against(training, dropout, base, named, file.name)
    base = with_facts(base, training.facts)
    if dropout is None:
        null = (options.number("guidance.label_dropout") if dropped else base.guidance.label_dropout) or 0.0
        file.filled["labels"] = f"{rows} rows read as {max(rows - (null > 0), 0)} classes, label_dropout {null}"
        return base
    return replace(base, guidance=replace(base.guidance, label_dropout=float(dropout)))


def _latents(file: ForeignFile, state: dict[str, Tensor]) -> Latents:
    """The latents' statistics. The file holds mean and VARIANCE, [1, C, h, w] in float64."""
    if file.options.latents:
        return parse_latents(file.options.latents)
    mean, variance, ready = (state.get(name) for name in STATISTICS)
    if mean is None or variance is None or (ready is not None and not bool((ready > 0).any())):
        raise AlphaflowError(
            f"{file.name}: holds no latents' statistics (autoencoder_mean, autoencoder_var, filled in). "
            "Give them: --latents FILE.safetensors with mean and std, or --latents scale:0.18215"
        )
    latents = statistics(mean, variance.double().sqrt(), f"{file.name} (autoencoder_mean, autoencoder_var)")
    return replace(latents, inside=True)
