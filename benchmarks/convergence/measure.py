"""What a finished run is worth: both rulers at 1, 2 and 4 NFE, a strip of pictures, and the conflict along the way."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from cnn_ruler import Ruler
from torch import Tensor

from alphaflow_cli.sample.generator import Generator, open_generator, spans_of
from alphaflow_cli.sample.grid import picture_png
from alphaflow_cli.sample.walk import draw_labels, plan_walk
from alphaflow_cli.train.conflict import conflict_rows, measure_conflict, prepare_rows
from alphaflow_cli.train.start import recipe_stream
from alphaflow_cli.train.step import Objective

NFE = (1, 2, 4)
PART = 1_000  # pictures drawn at a time
COLUMNS = 10  # of a strip: one picture of each class
CONFLICT = ("alpha", "cos_tfm_tc", "cos_tfm_fm", "norm_tfm", "norm_tc")
BATCHES = ((32, 64), (8, 512))  # of the conflict at rest: their number, and the rows of each


def draw(generator: Generator, seeds: list[int], labels: list[int], *, nfe: int, scale: float) -> Tensor:
    """uint8 (N, 3, H, W) on the device; `scale` is that of guidance, 1 for none."""
    walk = plan_walk(generator.recipe, nfe=nfe, guidance=scale)
    drawn = generator.stream(seeds, labels, walk, spans_of(len(seeds), PART))
    return torch.cat([part.images for part in drawn if part.images is not None])


def scores_of(run: Path, ruler: Ruler, device: torch.device, *, images: int, scale: float) -> dict[str, Any]:
    """NFE → every figure of both rulers, of the averaged weights."""
    generator = open_generator(str(run), device=device)
    seeds = list(range(images))
    labels = draw_labels(seeds, generator.recipe.data.classes, "random")
    wanted = torch.tensor(labels, device=device)
    found = {nfe: ruler.scores(draw(generator, seeds, labels, nfe=nfe, scale=scale), wanted) for nfe in NFE}
    return {str(nfe): {name: float(f"{value:.6g}") for name, value in each.items()} for nfe, each in found.items()}


def strip_of(run: Path, device: torch.device, *, scale: float) -> bytes:
    """A PNG of one picture of each class at 1 NFE, and below it the same seeds at 2 NFE."""
    generator = open_generator(str(run), device=device)
    seeds = list(range(COLUMNS))
    rows = [draw(generator, seeds, seeds, nfe=nfe, scale=scale) for nfe in (1, 2)]
    pictures = torch.stack(rows).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (2·H, 10·W, 3)
    return picture_png(pictures.cpu().contiguous().numpy())


def journal_of(run: Path) -> dict[str, Any]:
    """Seconds, velocity loss, and the conflict at every point of the journal that has it."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ends = [0, *(row["step"] for row in rows)]
    losses = [row["v_loss"] for row in rows[-10:] if row["v_loss"] is not None]  # none without r = t rows
    conflicts = [{"alpha": row["alpha"], **row["conflict"], "step": row["step"]} for row in rows if row.get("conflict")]
    return {
        "images_seen": rows[-1]["images_seen"],
        "train_seconds": round(
            sum(row["seconds_per_step"] * (b - a) for row, a, b in zip(rows, ends, ends[1:], strict=False)), 1
        ),
        "velocity_loss": round(mean(losses), 5) if losses else None,
        "nonfinite": sum(row["nonfinite"] for row in rows),
        "conflict": [[row["step"], *(rounded(row.get(name)) for name in CONFLICT)] for row in conflicts],
    }


def rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def at_rest(
    run: Path, store: Path, device: torch.device, sizes: Sequence[tuple[int, int]] = BATCHES
) -> list[dict[str, Any]]:
    """The conflict at the last checkpoint, averaged weights, for small and for large batches."""
    generator = open_generator(str(run), device=device)
    recipe, found = generator.recipe, []
    for batches, rows in sizes:
        stream = recipe_stream(recipe, store, batch=rows, seed=0, device=device, resident=False, verify="sizes")
        cosines: dict[str, list[float]] = {"tfm.tc": [], "tfm.fm": []}
        for index in range(batches):
            batch = stream.batch_at(index, slice(0, rows))
            drawn = conflict_rows(recipe, batch.latents, batch.y, seed=0, index=index)
            objective = Objective.of(recipe)
            measured = measure_conflict(generator.net, prepare_rows(generator.net, drawn, objective), objective)
            dots = {name: sum(groups.values()) for name, groups in measured["products"].items()}
            for name, values in cosines.items():
                a, b = name.split(".")
                values.append(dots[name] / max((dots[f"{a}.{a}"] * dots[f"{b}.{b}"]) ** 0.5, 1e-30))
        stream.close()
        below = mean(value < -0.4 for value in cosines["tfm.tc"])
        spreads = {
            name: dict(zip(("p5", "p50", "p95"), percentiles(values), strict=True)) for name, values in cosines.items()
        }
        found.append({"batches": batches, "rows": rows, "cosines": spreads, "below": below})
    return found


def percentiles(values: list[float]) -> list[float]:
    """The 5th, 50th and 95th percentile."""
    wanted = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    return [round(float(value), 4) for value in torch.tensor(values, dtype=torch.float64).quantile(wanted)]
