"""For a run on few pictures: samples beside the training pictures that are nearest to them.

A distance is the root mean square over all values of two pictures: in grey levels where the network makes pixels, else
between latents, in units of their deviation. The mirror images that a run trains on count as training pictures. Beside
the samples' distances stand those that a new picture of the same kind would have: each of some training pictures to its
nearest other one.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alphaflow_cli.core.pixels import from_uint8
from alphaflow_cli.data.manifest import read_manifest
from alphaflow_cli.data.store import Store, open_store
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe.schema import Recipe
from alphaflow_cli.runtime.processes import choose_device, smaller_batch_if_full
from alphaflow_cli.sample.generator import Generator, open_generator, spans_of
from alphaflow_cli.sample.grid import grid_png
from alphaflow_cli.sample.walk import draw_labels, plan_walk
from alphaflow_cli.train.store import store_of

FEW = 5_000  # training pictures: of more, a glance at the nearest says little, and it takes long
MOST_VALUES = 100_000_000  # of all of them together
DRAWN = 64  # samples, and training pictures, whose distances are taken
SHOWN = 8  # of the samples
ROWS = ("sample", "nearest", "second", "third")


@dataclass(frozen=True)
class NearestPictures:
    """What the page shows: sentences, and the address of a grid, empty where there is none."""

    texts: Sequence[str]
    picture: str = ""


def nearest_of(run: Path, recipe: Recipe) -> NearestPictures | None:
    """Compare samples of a run's model with the few pictures it is trained on; None where they are many or not here."""
    model = run / "model.safetensors"
    if not model.is_file() or not (recipe.data.store or recipe.data.source):
        return None
    store = store_of(recipe, data=None, out=run)
    if not (store / "manifest.json").is_file():
        return None
    try:
        manifest = read_manifest(store)
        values = manifest.count * int(np.prod(manifest.plan.latent))
        if not len(ROWS) <= manifest.count <= FEW or values > MOST_VALUES:
            return None
        device = choose_device(None)
        if manifest.plan.kind != "pixels" and device.type == "cpu":
            return NearestPictures(["The nearest training pictures of latents are looked for on a GPU only."])
        with smaller_batch_if_full(1):  # the run may have the GPU for itself
            return _compare(open_generator(str(model), device=device), open_store(store, "sizes"), recipe)
    except AlphaflowError as fault:  # the rest of the page is worth having
        return NearestPictures([f"The training pictures could not be compared: {fault}"])


@torch.no_grad()
def _compare(generator: Generator, store: Store, recipe: Recipe) -> NearestPictures:
    pixels = store.plan.kind == "pixels"
    real = training_latents(store, mirrored=recipe.data.flips)
    seeds = list(range(DRAWN))
    labels = draw_labels(seeds, recipe.data.classes, "balanced")
    walk = plan_walk(recipe, nfe=recipe.sample.nfe)
    (drawn,) = generator.stream(seeds, labels, walk, spans_of(DRAWN, DRAWN))
    assert drawn.images is not None
    images = drawn.images.cpu()
    mean, std = generator.mean.float().cpu(), generator.std.float().cpu()
    x = from_uint8(images) * 127.5 if pixels else drawn.latents.float().cpu()
    known = real * 127.5 if pixels else (real - mean) / std
    distances, places = nearest(x, known, len(ROWS) - 1)
    count, spread = store.manifest.count, min(DRAWN, store.manifest.count)
    chosen = torch.arange(spread) * count // spread
    others = nearest(known[chosen], known, 1, but=chosen, period=count)[0][:, 0]

    def shown(latents: Tensor) -> np.ndarray:
        decoded = generator.decode(((latents - mean) / std).double().to(generator.exact))
        return np.ascontiguousarray(decoded.permute(0, 2, 3, 1).cpu().numpy())

    grid = [list(images[:SHOWN].permute(0, 2, 3, 1).numpy())]
    grid += [list(shown(real[places[:SHOWN, i]])) for i in range(places.shape[1])]
    below = [[""] * SHOWN, *([f"{d:.3g}" for d in distances[:SHOWN, i].tolist()] for i in range(places.shape[1]))]
    picture = grid_png(grid, row_names=ROWS, names=below, form=".webp")
    texts = _sentences(distances[:, 0], others, count, "grey levels of 255" if pixels else "deviations of the latents")
    return NearestPictures(texts, "data:image/webp;base64," + base64.b64encode(picture).decode())


def _sentences(samples: Tensor, others: Tensor, count: int, unit: str) -> list[str]:
    close = float(others.quantile(0.05))
    copies = int((samples < close).sum())
    return [
        f"A model of few pictures may repeat some. The first line shows samples of seeds 0 to {SHOWN - 1}. Below each "
        f"are the nearest of the {count:,} training pictures, with the distance in {unit}.",
        f"Of {len(samples)} samples, the nearest training picture is {float(samples.median()):.3g} away (median), and "
        f"{float(samples.min()):.3g} at least. Of {len(others)} training pictures, the nearest other one is "
        f"{float(others.median()):.3g} away (median), and {float(others.min()):.3g} at least. New pictures of the same "
        "kind would be as far away as these.",
        f"{copies} of {len(samples)} samples are nearer to a training picture than 95 of 100 training pictures are to "
        f"another one ({close:.3g}). About 5 in 100 are expected by chance. Many more mean that the model repeats "
        "training pictures.",
        "Blurred pictures are near to everything by this measure. Look at the pictures, too.",
    ]


def training_latents(store: Store, *, mirrored: bool) -> Tensor:
    """All pictures of a store as latents (n, C, h, w), the mean of each posterior; then their mirror images."""
    plan, rows = store.plan, np.arange(store.manifest.count)

    def read(name: str) -> Tensor:
        stored = np.empty((len(rows), plan.rows, *plan.latent[1:]), plan.dtype)
        store.shards.gather(name, rows, stored, rows)
        values = torch.from_numpy(stored)
        return from_uint8(values) if plan.kind == "pixels" else values.float()[:, : plan.latent[0]]

    there = read(plan.kind)
    if not mirrored:
        return there
    return torch.cat([there, read(f"{plan.kind}_flip") if plan.stores_flips else there.flip(-1)])


def nearest(
    x: Tensor, known: Tensor, most: int, *, but: Tensor | None = None, period: int = 0
) -> tuple[Tensor, Tensor]:
    """Distances and places (n, most) of the nearest in `known`, without those that are picture `but` or its mirror."""
    flat, others = x.flatten(1), known.flatten(1)
    distances = torch.cdist(flat, others, compute_mode="donot_use_mm_for_euclid_dist") / flat.shape[1] ** 0.5
    if but is not None:
        distances[torch.arange(len(known))[None] % period == but[:, None]] = torch.inf
    smallest = distances.topk(most, dim=1, largest=False)
    return smallest.values, smallest.indices
