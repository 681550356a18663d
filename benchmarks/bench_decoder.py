"""What bf16 does to a decoder's pictures and to its speed: the same latents decoded in float32 and in bf16.

    python benchmarks/bench_decoder.py DIR
    python benchmarks/bench_decoder.py DIR --autoencoder stabilityai/sd-vae-ft-ema --size 256 --compile --fid

The latents are the posterior means of --images pictures, spread over DIR; the reference of every distance is --others
pictures of DIR that are not decoded. Without --autoencoder a small one is trained on those first. float32 and bf16
(channels_last; compiled too with --compile) are what `alphaflow eval --decoder` does. Each round decodes another block
of latents by every variant, in rotated order; round 0 is dropped from the times, the pictures of all blocks count.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence

import torch
from bench_ruler import moments
from bench_step import Work, paired, ratio
from record import record
from small_autoencoder import train_small
from torch import Tensor

from alphaflow_cli.core.frechet import frechet_distance
from alphaflow_cli.core.pixels import from_uint8, to_uint8
from alphaflow_cli.evaluate.evaluate import build_extractors
from alphaflow_cli.evaluate.features import Extractor
from alphaflow_cli.evaluate.pictures import open_pictures
from alphaflow_cli.evaluate.results import name_of
from alphaflow_cli.nn.autoencoder import Autoencoder
from alphaflow_cli.nn.weights import FILES, missing_weights
from alphaflow_cli.sample.generator import GROUP, Decoder, decode_in_groups

PLAIN, COMPILED = {"fp32": Decoder("fp32"), "bf16": Decoder("bf16")}, {"bf16 compiled": Decoder("bf16", compiled=True)}
TITLES = {"tiny": "FD-tiny", "inception": "FID"}
BATCH = 250  # pictures at a time through an extractor


def read(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Load pictures to decode and other ones to compare with: uint8 (n, 3, H, W)."""
    source = open_pictures(options.pictures, size=options.size, limit=options.images + options.others)
    if source.count <= options.images:
        raise SystemExit(f"{source.label}: {source.count} pictures; more than --images {options.images} are needed")
    every = source.images(0, source.count)
    chosen = torch.zeros(source.count, dtype=torch.bool)
    chosen[torch.arange(options.images) * source.count // options.images] = True
    return every[chosen], every[~chosen]


def encode(autoencoder: Autoencoder, pictures: Tensor, device: torch.device) -> Tensor:
    """Encode pictures to their posterior means, float32."""
    parts = torch.split(pictures, GROUP)
    return torch.cat([autoencoder.encode(from_uint8(part.to(device)))[0] for part in parts])


def decode_all(
    loaded: dict[str, Autoencoder], latents: Tensor, options: argparse.Namespace
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Pictures by variant, and the times of the rounds."""
    blocks = torch.tensor_split(latents, options.rounds + 1)
    made: dict[str, dict[int, Tensor]] = {name: {} for name in loaded}

    def maker(name: str) -> Callable[[int], Work]:
        def make(turn: int) -> Work:
            def work() -> None:
                made[name][turn] = to_uint8(decode_in_groups(loaded[name], blocks[turn]), "round")

            return work

        return make

    table = paired({name: maker(name) for name in loaded}, options.rounds, options.device)
    return {name: torch.cat([parts[i] for i in range(len(blocks))]).cpu() for name, parts in made.items()}, table


def difference(one: Tensor, other: Tensor) -> dict[str, float | int | None]:
    """Compare two sets of bytes; PSNR is in dB over the whole set, None where they are equal."""
    gap = (one.int() - other.int()).abs()
    error = float(gap.double().square().mean())
    return {
        "bytes_that_differ": float((gap > 0).double().mean()),
        "largest_difference": int(gap.max()),
        "psnr": 10 * float(torch.tensor(255.0**2 / error, dtype=torch.float64).log10()) if error else None,
    }


def distances(
    extractor: Extractor, sets: dict[str, Tensor], others: Tensor, device: torch.device
) -> dict[str, float | dict[str, float]]:
    """Measure how far each set is from other pictures, and each decoded set from the float32 one (Fréchet)."""

    def measure(pictures: Tensor) -> tuple[Tensor, Tensor]:
        return moments(torch.cat([extractor(part.to(device)).cpu() for part in torch.split(pictures, BATCH)]))

    found, reference = {name: measure(pictures) for name, pictures in sets.items()}, measure(others)
    decoded = [name for name in found if name.startswith("bf16")]
    return {
        "to_other_pictures": {name: frechet_distance(*each, *reference) for name, each in found.items()},
        "to_the_pictures_decoded": {
            name: frechet_distance(*found[name], *found["pictures"]) for name in ("fp32", *decoded)
        },
        "to_fp32": {name: frechet_distance(*found[name], *found["fp32"]) for name in decoded},
    }


def figures(options: argparse.Namespace, pictures: Tensor, others: Tensor, name: str) -> dict[str, object]:
    """Decode, time and compare everything for one autoencoder."""
    device = torch.device(options.device)
    variants = PLAIN | (COMPILED if options.compile else {})
    loaded = {variant: decoder.load(name, device) for variant, decoder in variants.items()}
    exact = loaded["fp32"]
    made, table = decode_all(loaded, encode(exact, pictures, device), options)
    extractors = build_extractors(("fd-tiny", "fid") if options.fid else ("fd-tiny",), device, {})[0]
    sets = {"pictures": pictures, **made}
    assert exact.module is not None, name
    weights: list[Tensor] = list(exact.module.decoder.parameters())  # type: ignore[union-attr,operator]
    return {
        "autoencoder": {"id": exact.id if options.autoencoder else "small", "weights_sha256": exact.weights_sha256},
        "decoder_parameters": sum(weight.numel() for weight in weights),
        "distances": {
            name_of(TITLES[key], extractor, len(pictures)): distances(extractor, sets, others, device)
            for key, extractor in extractors.items()
        },
        "from_the_pictures": {name: difference(each, pictures) for name, each in made.items()},
        "from_fp32": {name: difference(each, made["fp32"]) for name, each in made.items() if name != "fp32"},
        "fp32_over": {name: ratio(table, "fp32", name) for name in made if name != "fp32"},
    }


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", metavar="PICTURES", help="as `alphaflow reference` takes them")
    parser.add_argument("--autoencoder", default="", help="folder or Hub id; default: train a small one")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--images", type=int, default=2000, help="to decode")
    parser.add_argument("--others", type=int, default=10_000, help="to hold them against, and to train on")
    parser.add_argument("--steps", type=int, default=1500, help="of training")
    parser.add_argument("--rounds", type=int, default=11, help="kept rounds")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="adds the compiled bf16 decoder")
    parser.add_argument("--fid", action="store_true", help="also FID, where Inception's weights are here")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and print one JSON line."""
    options = arguments(words)
    torch.set_num_threads(options.threads)
    missing = missing_weights(FILES["inception"]) if options.fid else None
    if missing:
        sys.stderr.write(f"without FID: {missing}\n")
        options.fid = False
    pictures, others = read(options)
    setup: dict[str, object] = {"images": len(pictures), "others": len(others), "size": options.size}
    with tempfile.TemporaryDirectory() as folder:
        if not options.autoencoder:
            setup |= {"trained_steps": options.steps}
            train_small(others, folder, steps=options.steps, seed=options.seed, device=options.device)
        found = figures(options, pictures, others, options.autoencoder or folder)
    record("decoder", options.device, **setup, rounds=options.rounds, **found)


if __name__ == "__main__":
    main()
