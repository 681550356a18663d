"""Measure how many one-step samples of a quickstart run are recognised as the requested class.

    python benchmarks/quickstart_classes.py runs/quickstart

A small convolutional network is trained on pictures of the run's embedded set that the run never saw, tested on others,
and then labels the samples. One JSON line; `real` is its share on real pictures, the ceiling of what a generator can
reach by this ruler. A ruler below CEILING is refused.
"""

import sys

import numpy as np
import torch
from PIL import Image
from record import record
from torch import Tensor, nn
from torch.nn import functional as F

from alphaflow_cli.data.glyphs import GLYPHS
from alphaflow_cli.data.sources import DRAWERS
from alphaflow_cli.sample.generator import open_generator
from alphaflow_cli.sample.walk import draw_labels, plan_walk

FIRST_UNSEEN = 1_000_000  # picture numbers far beyond any quickstart's training set
TRAIN, TEST, SAMPLES, STEPS, BATCH = 6_000, 2_000, 2_000, 600, 64
CEILING = 0.99


def real_pictures(kind: str, first: int, count: int, side: int) -> tuple[Tensor, Tensor]:
    """uint8 (n, 3, side, side) and labels; made smaller as prep-latents does it."""
    drawn = (DRAWERS[kind](first + i).resize((side, side), Image.Resampling.LANCZOS) for i in range(count))
    pictures = np.stack([np.asarray(picture) for picture in drawn])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2), torch.arange(first, first + count) % len(GLYPHS)


def to_input(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def build_classifier() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 96)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96 * 4, len(GLYPHS)))


def train_classifier(images: Tensor, labels: Tensor) -> nn.Sequential:
    net, generator = build_classifier(), torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    for _ in range(STEPS):
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        optimiser.zero_grad()
        F.cross_entropy(net(to_input(images[rows])), labels[rows]).backward()
        optimiser.step()
    return net.eval()


@torch.no_grad()
def share(net: nn.Sequential, images: Tensor, labels: Tensor) -> float:
    """Give the share of pictures that the classifier labels as requested."""
    found = torch.cat([net(to_input(part)).argmax(1) for part in images.split(250)])
    return float((found == labels).double().mean())


def main() -> None:
    torch.manual_seed(0)
    generator = open_generator(sys.argv[1])
    side = generator.recipe.data.image_size
    kind = generator.recipe.data.source.partition(":")[0]
    net = train_classifier(*real_pictures(kind, FIRST_UNSEEN, TRAIN, side))
    shares = {"real": share(net, *real_pictures(kind, 2 * FIRST_UNSEEN, TEST, side))}
    assert shares["real"] >= CEILING, shares
    seeds = list(range(SAMPLES))
    labels = draw_labels(seeds, len(GLYPHS), "balanced")
    for nfe in (1, 2):
        walk = plan_walk(generator.recipe, nfe=nfe)
        parts = [slice(i, i + 250) for i in range(0, SAMPLES, 250)]
        images = torch.cat([generator.images(seeds[part], labels[part], walk) for part in parts])
        shares[f"nfe_{nfe}"] = share(net, images, torch.tensor(labels))
    record("quickstart_classes", generator.device.type, step=generator.origin["step"], samples=SAMPLES, **shares)


if __name__ == "__main__":
    main()
