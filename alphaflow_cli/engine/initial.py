"""--init-from: begin with another checkpoint's weights, and say what was taken and what was not."""

import torch

from alphaflow_cli.engine.checkpoint import load_checkpoint
from alphaflow_cli.engine.generate import find_checkpoint
from alphaflow_cli.engine.run import Run
from alphaflow_cli.errors import AlphaflowError


@torch.no_grad()
def start_from(run: Run, address: str) -> list[str]:
    """Copy every weight of the same name and shape; a label table of another size keeps its fresh start."""
    checkpoint = load_checkpoint(find_checkpoint(address))
    ours = dict(zip(run.optimiser.names, run.optimiser.weights, strict=True))
    matched = [n for n, w in ours.items() if n in checkpoint.weights and checkpoint.weights[n].shape == w.shape]
    fresh = [name for name in ours if name not in matched]
    left_out = [name for name in checkpoint.weights if name not in ours]
    misfits = [name for name in fresh if name in checkpoint.weights and name != "label_embed.weight"]
    if misfits or not matched:
        shapes = [f"{n}: {tuple(checkpoint.weights[n].shape)} there, {tuple(ours[n].shape)} here" for n in misfits[:4]]
        raise AlphaflowError(f"{address}: another architecture. " + "; ".join(shapes or ["no weight has a name we know"]))
    for name in matched:
        ours[name].copy_(checkpoint.weights[name])
    run.optimiser.restart_averages()
    lines = [f"{address}: {len(matched)} of {len(ours)} tensors taken (step {checkpoint.origin.get('step', 'unknown')})"]
    if fresh:
        lines.append(f"freshly initialised: {', '.join(fresh)}")
    if left_out:
        lines.append(f"left out of the checkpoint: {', '.join(left_out)}")
    return lines
