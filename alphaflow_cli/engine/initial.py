"""--init-from: begin with another checkpoint's weights, and say what was taken and what was not."""

import torch

from alphaflow_cli.engine.checkpoint import load_checkpoint
from alphaflow_cli.engine.generate import find_checkpoint
from alphaflow_cli.engine.run import Run
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe import diff_recipes
from alphaflow_cli.recipe.schema import Recipe

MEANINGS = ("model.second_time", "model.prediction", "data.autoencoder", "data.normalise", "data.scale", "data.shift")


@torch.no_grad()
def start_from(run: Run, address: str) -> list[str]:
    """Copy every weight of the same name and shape; a label table of another size keeps its fresh start."""
    checkpoint = load_checkpoint(find_checkpoint(address))
    ours = run.optimiser.parameters
    matched = [n for n, w in ours.items() if n in checkpoint.weights and checkpoint.weights[n].shape == w.shape]
    fresh = [name for name in ours if name not in matched]
    left_out = [name for name in checkpoint.weights if name not in ours]
    misfits = [name for name in fresh if name in checkpoint.weights and name != "label_embed.weight"]
    if misfits or not matched:
        shapes = [f"{n}: {tuple(checkpoint.weights[n].shape)} there, {tuple(ours[n].shape)} here" for n in misfits[:4]]
        raise AlphaflowError(
            f"{address}: another architecture. " + "; ".join(shapes or ["no weight has a name we know"])
        )
    run.optimiser.start_from({name: checkpoint.weights[name] for name in matched})
    run.init_from = address
    lines = [
        f"{address}: {len(matched)} of {len(ours)} tensors taken (step {checkpoint.origin.get('step', 'unknown')})"
    ]
    if fresh:
        lines.append(f"freshly initialised: {', '.join(fresh)}")
    if left_out:
        lines.append(f"left out of the checkpoint: {', '.join(left_out)}")
    return [*lines, *_other_meanings(checkpoint.recipe, run.recipe)]


def _other_meanings(theirs: Recipe, ours: Recipe) -> list[str]:
    """What the same weights were fed or asked for there, and are not here."""
    return [
        f"beware: {field}: {there} there, {here} here; training has to bridge it"
        for field, there, here in diff_recipes(theirs, ours)
        if field.startswith(MEANINGS)
    ]
