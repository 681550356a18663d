"""An evaluation of a checkpoint, step by step as `alphaflow eval` takes them, with a clock at each."""

import argparse
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from random_networks import AUTOENCODERS, DOWNSCALE, random_inception, save_dit
from torch import Tensor
from workload import SIZES

from alphaflow_cli.evaluate.evaluate import Ruler, build_extractors
from alphaflow_cli.evaluate.features import Extractor
from alphaflow_cli.evaluate.measure import Clock, content_of, gather_moments, run_pass, usual_batch
from alphaflow_cli.evaluate.pictures import GeneratedImages
from alphaflow_cli.evaluate.reference import Reference, Stats
from alphaflow_cli.evaluate.results import space_of
from alphaflow_cli.evaluate.score import Measured, score
from alphaflow_cli.runtime.processes import Processes
from alphaflow_cli.sample.generator import Generator, decoder_pays, open_generator
from alphaflow_cli.sample.walk import plan_walk

MODEL, INCEPTION = "model.safetensors", "inception.pth"


def time_parts(options: argparse.Namespace) -> dict[str, object]:
    """Writes the networks, loads them, warms them up, and clocks one evaluation."""
    clock, options.batch = Clock(), options.batch or usual_batch("inception", torch.device(options.device))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_networks(folder, options)
        with clock.part("load"):
            loaded = load(folder, options)
        if options.warm_up:
            with clock.part("warm-up"):  # in a folder of its own: finished chunks would not be computed again
                evaluate(loaded, options, folder / "warm-up", options.warm_up, distances=False)
        seconds, found = evaluate(loaded, options, folder / "evals", options.images, distances=True)
    return {
        **told(loaded.generator, options),
        "seconds_before": clock.seconds,
        "seconds": seconds,
        "shares": {part: spent / seconds["total"] for part, spent in seconds.items() if part != "total"},
        "images_per_second": options.images / seconds["total"],
        "distances": found,
    }


def write_networks(folder: Path, options: argparse.Namespace) -> None:
    """A checkpoint, its autoencoder beside it, and Inception where it is asked for: all of them random."""
    size = SIZES[options.size]
    AUTOENCODERS[options.autoencoder](folder / options.autoencoder)
    side = options.image_size or size.latent * DOWNSCALE
    save_dit(folder / MODEL, size, image_size=side, autoencoder=options.autoencoder, seed=options.seed)
    if "fid" in options.metrics:
        random_inception(folder / INCEPTION)


@dataclass(frozen=True)
class Loaded:
    """What an evaluation works with."""

    generator: Generator
    extractors: dict[str, Extractor]
    reference: Reference


def load(folder: Path, options: argparse.Namespace) -> Loaded:
    """All weights on the device; the autoencoder now, not with the first picture."""
    device = torch.device(options.device)
    generator = open_generator(str(folder / MODEL), device=device, decoder=options.decoder)
    generator.expect(options.images, compiled=decoder_pays(generator.recipe, options.images), autoencoder="")
    assert generator.autoencoder.module is not None, options.autoencoder
    weights = {"inception": folder / INCEPTION} if "fid" in options.metrics else {}
    extractors = build_extractors(tuple(options.metrics), device, weights)[0]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Loaded(generator, extractors, random_reference(extractors))


def random_reference(extractors: Mapping[str, Extractor]) -> Reference:
    """Statistics of Gaussian features; a covariance of full rank, as that of many pictures is."""
    generator, stats = torch.Generator().manual_seed(0), {}
    for name, extractor in extractors.items():
        rows = torch.randn(extractor.dim, extractor.dim, generator=generator, dtype=torch.float64)
        stats[name] = Stats(space_of(extractor), rows.mean(0), rows.T @ rows / len(rows), None)
    return Reference(stats, {"name": "random", "kind": "random", "size": None})


def evaluate(
    loaded: Loaded, options: argparse.Namespace, folder: Path, images: int, *, distances: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by part and in total, and the distances by their names."""
    generator, clock = loaded.generator, Clock()
    walk = plan_walk(generator.recipe, nfe=options.nfe)
    source = GeneratedImages(generator, walk, count=images, draw="random")
    alone = Processes(generator.device)
    start, found = time.perf_counter(), {}
    work = Ruler(loaded.extractors, alone, folder, options.batch, options.chunk).start(source)
    with clock.part("pass"):
        run_pass(work, alone, batch=options.batch, clock=clock)
    if distances:
        with clock.part("moments"):
            moments = gather_moments(work, alone)
        with clock.part("content"):
            content_of(work)
        with clock.part("distances"):
            rows = score(Measured(work, moments, loaded.reference, generator.device), tuple(options.metrics))
        found = {row.name: row.value for row in rows}
    total = time.perf_counter() - start
    return {**disjoint(clock.seconds, source.seconds), "total": total}, found


def disjoint(clock: Mapping[str, float], source: Mapping[str, float]) -> dict[str, float]:
    """Parts that do not overlap: a pass contains its pictures, and those the network and the decoder.

    On a GPU the parts of a pass are the device's own time; what remains is the time in which it waits for the host.
    """
    features = {part: spent for part, spent in clock.items() if part.startswith("features ")}
    return {
        "labels": clock["pictures"] - source["network"] - source["decoder"],
        **source,
        **features,
        "files and waiting": clock["pass"] - clock["pictures"] - sum(features.values()),
        **{part: clock[part] for part in ("moments", "content", "distances") if part in clock},
    }


def told(generator: Generator, options: argparse.Namespace) -> dict[str, object]:
    """Describe what was evaluated."""
    asked = ("size", "images", "nfe", "autoencoder", "batch", "chunk", "warm_up")
    module = generator.autoencoder.module
    assert module is not None, options.autoencoder
    return {
        **{name: getattr(options, name) for name in asked},
        "image_size": generator.recipe.data.image_size,
        "sampler": str(plan_walk(generator.recipe, nfe=options.nfe)),
        "precision": generator.precision,
        "decoder_compiled": generator.decoder.compiled,
        "parameters": {
            "network": count(generator.net.parameters()),
            "decoder": count(module.decoder.parameters()),  # type: ignore[union-attr]
        },
        "threads": torch.get_num_threads(),
    }


def count(weights: Iterable[Tensor]) -> int:
    """Count the numbers in a network's tensors."""
    return sum(weight.numel() for weight in weights)
