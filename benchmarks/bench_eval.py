"""Features of CIFAR-sized pictures: ours beside torch-fidelity's, same network, same pictures, in alternating blocks.

    python benchmarks/bench_eval.py WEIGHTS [--pictures 1000] [--blocks 10]

WEIGHTS is the Inception file (random weights of its shapes time the same). Each block of pictures goes through both,
in turns of who comes first; printed are seconds per 1,000 pictures, the ratios, and how far the features differ.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity import FeatureExtractorInceptionV3

from alphaflow_cli.nn.features import build_extractor

BATCH = 64


def main() -> None:
    """Prints one line per network and one of ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("weights", type=Path)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=10)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours = build_extractor("inception", device=device, weights=given.weights)
    theirs = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(given.weights)).to(device)
    tiny = build_extractor("tiny", device=device, weights=None)
    side = given.pictures // given.blocks
    images = torch.randint(0, 256, (given.pictures, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(0))
    spent: dict[str, list[float]] = {"ours": [], "torch-fidelity": [], "fd_haar192": []}
    gap = 0.0
    for i, block in enumerate(torch.split(images, side)):
        order: list[tuple[str, Callable[[Tensor], Tensor]]] = [
            ("ours", ours),
            ("torch-fidelity", lambda x: theirs(x)[0]),
        ]
        found = {}
        for name, net in [*order[:: 1 if i % 2 else -1], ("fd_haar192", tiny)]:
            start = time.perf_counter()
            with torch.no_grad():
                found[name] = torch.cat([net(part.to(device)).cpu() for part in torch.split(block, BATCH)])
            spent[name].append(time.perf_counter() - start)
        difference = (found["ours"] - found["torch-fidelity"]).abs().max() / found["torch-fidelity"].abs().mean()
        gap = max(gap, float(difference))
    for name, seconds in spent.items():
        print(f"{name:15} {sum(seconds) / given.pictures * 1000:8.2f} s per 1,000 pictures")
    ratios = [a / b for a, b in zip(spent["ours"], spent["torch-fidelity"], strict=True)]
    print(f"ours / torch-fidelity: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    print(f"largest difference of a feature / mean feature: {gap:.1e}")


if __name__ == "__main__":
    main()
