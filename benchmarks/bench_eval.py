"""What an evaluation's time is made of; and our Inception features beside torch-fidelity's.

    python benchmarks/bench_eval.py parts --size B/2 --images 5000 --device cuda
    python benchmarks/bench_eval.py parts --size XL/2 --images 50000 --nfe 2 --decoder bf16 --device cuda
    python benchmarks/bench_eval.py parts --size tiny --autoencoder tiny --metrics fd-tiny --images 8 --warm-up 0
    python benchmarks/bench_eval.py features WEIGHTS --pictures 1000 --blocks 10

parts: pictures of a checkpoint, measured as `alphaflow eval` does it, by networks of the published shapes with random
weights (the distances mean nothing), which are written to a temporary folder first and loaded from there. Wall time;
on a GPU, whose work is queued, the parts of the network, the decoder and the features are the device's own time.
Before the clock starts, --warm-up pictures go through the networks. The noise is drawn on the CPU: there it is a part
of the network's time, on a GPU it is drawn beside the device's work.

features: WEIGHTS is the Inception file (random weights of its shapes time the same). Each block of pictures of CIFAR's
size goes through both, in rotated order; block 0 is dropped from the times. On the CPU a time is the process's own CPU
time, on a GPU wall time. Both compute in true float32; on a GPU torch-fidelity is timed as it comes, too: with TF32.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import torch
from bench_data import spread
from bench_step import Work, paired, ratio
from evaluation_parts import time_parts
from random_networks import AUTOENCODERS
from record import record
from torch import Tensor
from torch_fidelity import FeatureExtractorInceptionV3
from workload import SIZES

from alphaflow_cli.evaluate.measure import CHUNK, usual_batch
from alphaflow_cli.evaluate.networks import build_extractor
from alphaflow_cli.files import sha256_of
from alphaflow_cli.runtime.precision import true_float32
from alphaflow_cli.sample.generator import DecoderChoice

OURS, THEIRS, AS_IT_COMES, TINY = "ours", "torch-fidelity", "torch-fidelity as it comes", "fd_haar192"
SIDE = 32  # pixels of the pictures that features are compared on


def compare_features(options: argparse.Namespace) -> dict[str, object]:
    """Measure the times, their ratios, and how far the features differ."""
    device, side = torch.device(options.device), options.pictures // options.blocks
    networks = feature_networks(options.weights, device)
    shape = ((options.blocks + 1) * side, 3, SIDE, SIDE)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(options.seed))
    blocks = torch.split(images, side)
    found: dict[str, dict[int, Tensor]] = {name: {} for name in networks}

    def maker(name: str) -> Callable[[int], Work]:
        def make(turn: int) -> Work:
            def work() -> None:
                parts = torch.split(blocks[turn], options.batch or usual_batch("inception", device))
                found[name][turn] = torch.cat([networks[name](part.to(device)).cpu() for part in parts])

            return work

        return make

    table = paired({name: maker(name) for name in networks}, options.blocks, options.device)
    return {
        "pictures": side * options.blocks,
        "blocks": options.blocks,
        "batch": options.batch or usual_batch("inception", device),
        "weights_sha256": sha256_of(options.weights),
        "seconds_per_1000": {name: spread(1000 * each[name] / side for each in table) for name in networks},
        "ours_over": {name: ratio(table, OURS, name) for name in networks if name.startswith(THEIRS)},
        "largest_gap_over_mean_feature": max(gap(found[OURS][i], found[THEIRS][i]) for i in range(len(blocks))),
    }


def feature_networks(weights: Path, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Give each way from uint8 pictures to features, by name."""
    theirs = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(weights)).to(device)

    @torch.inference_mode()
    def as_it_comes(images: Tensor) -> Tensor:
        features: Tensor = theirs(images)[0]
        return features

    def exact(images: Tensor) -> Tensor:
        with true_float32():
            return as_it_comes(images)

    return {
        OURS: build_extractor("inception", device=device, weights=weights),
        THEIRS: exact,
        **({AS_IT_COMES: as_it_comes} if device.type == "cuda" else {}),
        TINY: build_extractor("tiny", device=device, weights=None),
    }


def gap(ours: Tensor, theirs: Tensor) -> float:
    """Give the largest difference of a feature, divided by the mean size of a feature."""
    return float((ours - theirs).abs().max() / theirs.abs().mean())


JOBS = {"features": compare_features, "parts": time_parts}


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--batch", type=int, default=0, help="pictures at a time through a feature network")
    shared.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    shared.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    shared.add_argument("--seed", type=int, default=0)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    features = jobs.add_parser("features", parents=[shared], help="ours beside torch-fidelity's")
    features.add_argument("weights", metavar="WEIGHTS", type=Path)
    features.add_argument("--pictures", type=int, default=1000)
    features.add_argument("--blocks", type=int, default=10, help="kept blocks, which the pictures are cut into")
    parts = jobs.add_parser("parts", parents=[shared], help="an evaluation, timed by part")
    parts.add_argument("--size", choices=sorted(SIZES), default="B/2", help="of the DiT")
    parts.add_argument("--autoencoder", choices=sorted(AUTOENCODERS), default="sd-vae")
    parts.add_argument("--image-size", type=int, default=0, help="pixels; default: eight times the size's latents")
    parts.add_argument("--images", type=int, default=5000)
    parts.add_argument("--nfe", type=int, default=1)
    parts.add_argument("--decoder", choices=get_args(DecoderChoice), default="auto")
    parts.add_argument("--metrics", nargs="+", choices=["fid", "fd-tiny"], default=["fid"])
    parts.add_argument("--chunk", type=int, default=CHUNK, help="pictures at a time through the network and to a file")
    parts.add_argument("--warm-up", type=int, default=CHUNK, help="pictures; the decoder is compiled by them, too")
    options = parser.parse_args(words)
    if options.job == "features" and not 0 < options.blocks <= options.pictures:
        features.error("--blocks: from one up to one per picture")
    return options


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and print one JSON line."""
    options = arguments(words)
    torch.set_num_threads(options.threads)
    clock = "wall" if options.job == "parts" or options.device == "cuda" else "CPU"
    record(f"eval {options.job}", options.device, clock=clock, **JOBS[options.job](options))


if __name__ == "__main__":
    main()
