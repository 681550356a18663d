"""The way back: a checkpoint of ours becomes a `.pt` of the published form (`convert --to alphaflow`)."""

from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphaflow_cli.convert.imported import AUTOENCODER_FILE, check_out
from alphaflow_cli.convert.published import AUTOENCODER, STATISTICS
from alphaflow_cli.convert.shape import to_published
from alphaflow_cli.convert.snapshot_cfg import schedule_places, walk_cfg
from alphaflow_cli.convert.source import read_source
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import write_by
from alphaflow_cli.model.build import network_shapes
from alphaflow_cli.model.checkpoint import Checkpoint, check_autoencoder, load_checkpoint
from alphaflow_cli.nn.autoencoder import load_autoencoder
from alphaflow_cli.recipe import Recipe
from alphaflow_cli.recipe.schema import Schedule, resolve_step
from alphaflow_cli.runtime.progress import say

NO_PLACE = (  # what a recipe says of the training and of two steps, and our cfg of the published form does not
    *("guidance.fade_from", "guidance.dropped", "times.second", "times.equal", "times.gap", "loss.tangent"),
    *("loss.power", "loss.later", "loss.short_first", "model.positions", "optim.kind", "ema.every"),
    *("loss.velocity", "loss.weight", "sample.two_step_sampler", "sample.two_step_times"),
)

RUNGS = ("velocity_head", "inputs", "conditioning", "block")  # of model, of which the published network has none


def export(source: Path, out: Path, *, autoencoder: str = "", template: Path | None = None) -> Path:
    """Write a checkpoint of ours as a published snapshot, and say on stderr what is not in it.

    It gets the published names, the statistics, the autoencoder and a cfg.
    """
    check_out(out)
    checkpoint = load_checkpoint(source)
    _check_form(source, checkpoint.recipe)
    cfg = _published_cfg(checkpoint.recipe, template)
    if lost := [name for name in NO_PLACE if attrgetter(name)(checkpoint.recipe) != attrgetter(name)(Recipe())]:
        say(f"its cfg has no place for {', '.join(lost)}: who goes on from it does not learn of them")
    inside = _autoencoder(checkpoint, source, autoencoder)
    order = network_shapes(checkpoint.recipe)  # safetensors sorts the names
    state = _state({name: checkpoint.weights[name] for name in order}, checkpoint, inside)
    write_by(out, partial(torch.save, {"net": state, "ema": state, "cfg": cfg}))
    return out


def _check_form(source: Path, recipe: Recipe) -> None:
    """Refuse a network that the published system cannot build."""
    model = recipe.model
    if model.prediction != "velocity" or model.second_time != "t-r":
        raise AlphaflowError(
            f"{source}: the published system knows networks that give u from t and t − r only; this one has "
            f"prediction {model.prediction}, second_time {model.second_time}."
        )
    if model.qk_norm:
        raise AlphaflowError(
            f"{source}: the published network has no norm of queries and keys; this one has (qk_norm)."
        )
    if rungs := [name for name in RUNGS if getattr(model, name) != getattr(Recipe().model, name)]:
        raise AlphaflowError(
            f"{source}: has another network than the published system's ({', '.join(f'model.{n}' for n in rungs)}): it "
            "has no place there."
        )
    if recipe.data.autoencoder == "none":
        raise AlphaflowError(f"{source}: makes pixels without an autoencoder; the published form is of latents only.")


def _autoencoder(checkpoint: Checkpoint, source: Path, name: str) -> dict[str, Tensor]:
    """Load the weights of the autoencoder named on the command line, else of the folder beside the checkpoint.

    Where there is none, a line on stderr says so.
    """
    if name:
        loaded = load_autoencoder(name, device=torch.device("cpu"))
        if loaded.kind != "kl" or loaded.module is None:
            raise AlphaflowError(
                f"--autoencoder {name}: the published form holds an AutoencoderKL, not a {loaded.kind}."
            )
        check_autoencoder(loaded, checkpoint.origin.get("autoencoder") or {})
        return dict(loaded.module.state_dict())
    beside = source.parent / checkpoint.recipe.data.autoencoder / AUTOENCODER_FILE
    if beside.is_file():
        return read_source(beside)
    say(
        f"no autoencoder is in it: {checkpoint.recipe.data.autoencoder} does not lie beside {source.name}. "
        "To put it in: --autoencoder ID|DIR"
    )
    return {}


def _state(weights: dict[str, Tensor], checkpoint: Checkpoint, autoencoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the statistics, the autoencoder and our weights into one table, under the published names."""
    data = checkpoint.recipe.data
    size = (1, data.channels, data.latent_size, data.latent_size)
    state = {
        STATISTICS[0]: checkpoint.mean.double().expand(size).contiguous(),
        STATISTICS[1]: checkpoint.std.double().square().expand(size).contiguous(),
        STATISTICS[2]: torch.tensor(1.0),
    }
    state |= {AUTOENCODER + name: value for name, value in autoencoder.items()}
    return state | {"model." + to_published(name): value for name, value in weights.items()}


def _published_cfg(recipe: Recipe, template: Path | None) -> dict[str, Any]:
    """Put our values into the whole cfg of a published snapshot.

    Without a snapshot the cfg is our values alone, and a line on stderr says so.
    """
    ours = _described(recipe)
    if template is None:
        say(
            "its cfg holds what this recipe says; the published loader also wants the names of its own classes "
            "(target_class), which only its own snapshots know: --cfg-from SNAPSHOT.pt takes them over"
        )
        return ours
    theirs = _plain_cfg(template)
    for field, places in schedule_places(dict(walk_cfg(theirs))).items():
        key = {"alpha": "alpha_cfg", "times.equal_share": "ratio_fm_cfg"}[field]
        schedule = ours["loss"].pop(key) if places else None
        for place in places:  # theirs stand where they stand; ours must not stand beside them
            _put(theirs, place, schedule)
    return _merged(theirs, ours)


def _described(recipe: Recipe) -> dict[str, Any]:
    """Lay out what our recipe says at the places where published snapshots keep it."""
    model, mix, sample = recipe.model, recipe.guidance, recipe.sample
    one_jump = sample.sampler == "consistency"
    guided: dict[str, Any] = {"scale": sample.guidance, "t_min": 0.0, "t_max": 1.0} if sample.guidance != 1.0 else {}
    return {
        "model": {
            "dim": model.dim,
            "num_blocks": model.depth,
            "num_heads": model.heads,
            "mlp_ratio": model.mlp_ratio,
            "label_dropout": mix.label_dropout,
            "tokenizer": {"resolution": [1, model.patch, model.patch]},
        },
        "dataset": {"label_shape": [recipe.data.classes]},
        "loss": {
            "cfg_params": {"omega": mix.omega, "kappa": mix.kappa, "t_min": mix.t_min, "t_max": mix.t_max},
            "alpha_cfg": _schedule(recipe.alpha, recipe.train.steps),
            "ratio_fm_cfg": _schedule(recipe.times.equal_share, recipe.train.steps),
        },
        "sampling": {
            "num_steps": sample.nfe,
            "sigma_noise": 1.0,
            "custom_t_steps": None if sample.times is None else list(sample.times),
            "enable_trajectory_sampling": sample.sampler == "trajectory" or one_jump,
            "enable_consistency_sampling": one_jump,
            **({"cfg": guided} if guided else {}),
        },
    }


def _schedule(schedule: Schedule, steps: int) -> dict[str, Any]:
    return {
        "scheduler": schedule.kind,
        "initial_value": schedule.initial,
        "end_value": schedule.final,
        "change_init_steps": resolve_step(schedule.start, steps),
        "change_end_steps": resolve_step(schedule.end, steps),
        "gamma": schedule.gamma,
        "clamp_value": schedule.clamp,
        "discrete_training": False,
        "up_clamp_value": None,
    }


def _plain_cfg(template: Path) -> dict[str, Any]:
    """Copy a snapshot's cfg, whose tables are a class of the published code, as plain dicts."""
    cfg = read_source(template).get("cfg")
    if not isinstance(cfg, dict) or not isinstance(cfg.get("model"), dict):
        raise AlphaflowError(f"{template}: has no cfg with a model in it; name a snapshot of the published system.")
    try:
        plain: dict[str, Any] = _plain(cfg)
    except RecursionError as error:
        raise AlphaflowError(f"{template}: its cfg is nested without end, as in no snapshot.") from error
    return plain


def _plain(tree: Any) -> Any:
    """Copy a tree as plain dicts and lists, so that the file can be read without the code of its classes."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, list) else tree


def _put(tree: dict[str, Any], place: str, schedule: dict[str, Any] | None) -> None:
    """Put our schedule into their table at a dotted place. Its other keys stay; a bare number is replaced."""
    *above, last = place.split(".")
    for key in above:
        tree = tree.get(key) or {}
    if last not in tree:
        raise AlphaflowError(f"its cfg.{place} is no place of a published snapshot's; name another with --cfg-from.")
    inside = tree[last] if isinstance(tree[last], dict) else {}
    tree[last] = inside | (schedule or {})


def _merged(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Put our values into their tree, table by table."""
    for key, value in ours.items():
        inside = theirs.get(key)
        theirs[key] = _merged(inside, value) if isinstance(inside, dict) and isinstance(value, dict) else value
    return theirs
