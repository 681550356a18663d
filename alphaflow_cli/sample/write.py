"""`alphaflow sample`: pictures, grids and latents in files, by one process or several."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import write_by, write_whole
from alphaflow_cli.runtime.crew import run_crew
from alphaflow_cli.runtime.processes import device_of, processes_here, smaller_batch_if_full
from alphaflow_cli.runtime.progress import Progress, say
from alphaflow_cli.sample.generator import DecoderChoice, Generator, has_labels, open_generator
from alphaflow_cli.sample.grid import grid_by_walk, grid_in_rows, picture_png
from alphaflow_cli.sample.walk import Walk, draw_labels, plan_walk
from alphaflow_cli.text import shorten

COLUMNS = 10  # of a grid


@dataclass(frozen=True)
class SampleRequest:
    """What the command line asks for."""

    checkpoint: str
    seeds: Sequence[int]
    classes: str
    nfe: Sequence[int]
    sampler: str
    times: Sequence[float] | None
    guidance: float | None
    guidance_channels: int | None
    weights: str
    autoencoder: str
    decoder: DecoderChoice
    out: Path | None
    grid: Path | None
    latents: Path | None
    batch: int
    processes: int  # 0: one per GPU


@dataclass(frozen=True)
class SampleShare:
    """One process's part of the seeds, and where it leaves what it made."""

    request: SampleRequest
    rank: int
    seeds: Sequence[int]
    labels: Sequence[int]
    walks: Sequence[Walk]
    folder: Path


def sample_to_files(request: SampleRequest) -> list[Path]:
    """Draw everything; returns what was written, the folder or file a user looks at first last."""
    if request.out is None and request.grid is None and request.latents is None:
        raise AlphaflowError("nothing to write: give --grid FILE.png, --out DIR or --latents FILE.npy.")
    for path in (request.grid, request.latents):
        if path is not None and not path.parent.is_dir():
            raise AlphaflowError(f"{path}: the folder {path.parent} does not exist.")
    processes = processes_here(request.processes)
    # where others draw, this process needs what the checkpoint says, and no GPU's memory
    generator = make_generator(request, device_of(0) if processes == 1 else torch.device("cpu"))
    plan = partial(plan_walk, generator.recipe, kind=request.sampler, times=request.times)
    walks = [plan(nfe=n, guidance=request.guidance, guidance_channels=request.guidance_channels) for n in request.nfe]
    labels = choose_labels(request, generator)
    said = f"{len(request.seeds)} pictures by {'; '.join(str(walk) for walk in walks)}"
    say(f"{said}; {generator.origin.get('weights', 'ema')} weights of step {generator.origin.get('step', 'unknown')}")
    drawn = draw(request, generator, walks, labels, processes)
    return write(request, generator, walks, labels, drawn)


def make_generator(request: SampleRequest, device: torch.device) -> Generator:
    """On that device, decoding as requested."""
    generator = open_generator(request.checkpoint, device=device, weights=request.weights, decoder=request.decoder)
    generator.expect(len(request.seeds))
    if request.autoencoder:
        generator.use_autoencoder(request.autoencoder)
    return generator


def choose_labels(request: SampleRequest, generator: Generator) -> list[int]:
    """The asked classes in turn, or one drawn per seed."""
    count = generator.recipe.data.classes
    if not request.classes:
        return draw_labels(request.seeds, count, "random")
    if not has_labels(generator.recipe):
        raise AlphaflowError("--classes: this model was trained without labels.")
    chosen = [find_class(part.strip(), generator.class_names, count) for part in request.classes.split(",")]
    return [chosen[i % len(chosen)] for i in range(len(request.seeds))]


def find_class(text: str, names: Sequence[str], count: int) -> int:
    """A class by number or name."""
    if text.isdecimal() and len(text) < 20 and int(text) < count:
        return int(text)
    matches = [i for i, name in enumerate(names) if text.lower() in (part.strip().lower() for part in name.split(","))]
    if len(matches) == 1:
        return matches[0]
    known = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    raise AlphaflowError(
        f"--classes {shorten(text, 100)}: not a class of this model: 0 to {count - 1}" + (f", {known}" if names else "")
    )


def draw(
    request: SampleRequest, generator: Generator, walks: Sequence[Walk], labels: Sequence[int], processes: int
) -> list[list[dict[str, Any]]]:
    """walk → sample → {image, latent}; here, or shared out over processes."""
    with Progress("sample", len(request.seeds) * len(walks), unit="img") as bar:
        if processes == 1:
            return draw_here(request, generator, walks, request.seeds, labels, bar.advance)
        return draw_shared(request, walks, labels, processes, bar.advance)


def draw_here(
    request: SampleRequest,
    generator: Generator,
    walks: Sequence[Walk],
    seeds: Sequence[int],
    labels: Sequence[int],
    tell: Callable[[int], None],
) -> list[list[dict[str, Any]]]:
    """Batch by batch in this process."""
    found, only_latents = [], request.out is None and request.grid is None
    for walk in walks:
        rows: list[dict[str, Any]] = []
        for i in range(0, len(seeds), request.batch):
            part = slice(i, i + request.batch)
            with smaller_batch_if_full(request.batch):
                latents = generator.latents(seeds[part], labels[part], walk)
                images = [None] * len(latents) if only_latents else to_pictures(generator, latents)
            rows += [{"image": im, "latent": z} for im, z in zip(images, latents.cpu().numpy(), strict=True)]
            tell(len(latents))
        found.append(rows)
    return found


def to_pictures(generator: Generator, latents: torch.Tensor) -> list[np.ndarray]:
    """(H, W, 3) uint8 each."""
    return list(generator.decode(latents).permute(0, 2, 3, 1).cpu().numpy())


def draw_shared(
    request: SampleRequest, walks: Sequence[Walk], labels: Sequence[int], processes: int, tell: Callable[[int], None]
) -> list[list[dict[str, Any]]]:
    """Each process draws every N-th sample and leaves it in a folder beside what is being made."""
    target = request.out or (request.grid or request.latents or Path()).parent
    target.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".sample-parts-", suffix=".tmp", dir=target))  # two commands mix nothing
    seeds, plain = list(request.seeds), replace(request, seeds=list(request.seeds))
    shares = [
        SampleShare(plain, rank, seeds[rank::processes], labels[rank::processes], walks, folder)
        for rank in range(processes)
    ]
    try:
        run_crew(draw_share, [share for share in shares if share.seeds], tell)
        parts = [np.load(folder / f"{rank}.npy", allow_pickle=False) for rank in range(min(processes, len(seeds)))]
        pictures = [np.load(folder / f"{rank}-images.npy", allow_pickle=False) for rank in range(len(parts))]
    finally:
        shutil.rmtree(folder)
    return [
        [
            {"image": pictures[i % processes][w, i // processes], "latent": parts[i % processes][w, i // processes]}
            for i in range(len(seeds))
        ]
        for w in range(len(walks))
    ]


def draw_share(share: SampleShare, tell: Callable[[int], None]) -> None:
    """One process's part."""
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    generator = make_generator(share.request, device_of(share.rank))
    request = replace(share.request, out=share.folder)
    rows = draw_here(request, generator, share.walks, share.seeds, share.labels, tell)
    np.save(share.folder / f"{share.rank}.npy", np.array([[row["latent"] for row in walk] for walk in rows]))
    np.save(share.folder / f"{share.rank}-images.npy", np.array([[row["image"] for row in walk] for walk in rows]))


def write(
    request: SampleRequest,
    generator: Generator,
    walks: Sequence[Walk],
    labels: Sequence[int],
    drawn: list[list[dict[str, Any]]],
) -> list[Path]:
    """Latents, single pictures, the grid."""
    made: list[Path] = []
    if request.latents is not None:
        array = np.stack([row["latent"] for row in drawn[0]])
        write_by(request.latents, partial(_save_array, array=array))
        made.append(request.latents)
    if request.out is not None:
        request.out.mkdir(parents=True, exist_ok=True)
        for walk, rows in zip(walks, drawn, strict=True):
            write_files(request, generator, walk, labels, rows)
        made.append(request.out)
    if request.grid is not None:
        data = grid(request, generator, walks, labels, drawn)
        write_whole(request.grid, data)
        made.append(request.grid)
    return made


def write_files(
    request: SampleRequest, generator: Generator, walk: Walk, labels: Sequence[int], rows: list[dict[str, Any]]
) -> None:
    """seed-000012-class-3.png; the NFE in front where there are several."""
    assert request.out is not None
    for seed, label, row in zip(request.seeds, labels, rows, strict=True):
        name = f"seed-{seed:06d}" + (f"-class-{label}" if has_labels(generator.recipe) else "")
        name = f"nfe-{walk.nfe}-{name}" if len(request.nfe) > 1 else name
        write_whole(request.out / f"{name}.png", picture_png(row["image"]))


def grid(
    request: SampleRequest,
    generator: Generator,
    walks: Sequence[Walk],
    labels: Sequence[int],
    drawn: list[list[dict[str, Any]]],
) -> bytes:
    """One NFE: pictures in reading order. Several: the same seeds in rows, an NFE per row."""
    names = [generator.class_names[label] if label < len(generator.class_names) else str(label) for label in labels]
    shown = names if has_labels(generator.recipe) else [""] * len(names)
    pictures = [[row["image"] for row in rows] for rows in drawn]
    if len(walks) == 1:
        return grid_in_rows(pictures[0], COLUMNS, shown)
    return grid_by_walk(
        [(f"{walk.nfe} NFE", each) for walk, each in zip(walks, pictures, strict=True)], 2 * COLUMNS, shown
    )


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)
