"""Does FD-tiny order degraded pictures as it should? The ranking table of docs/evaluation.md.

    tar xf cifar10.tar.xz -C DIR && python benchmarks/bench_ruler.py DIR

Reference: 10,000 training pictures; sets of 2,000 made from other training pictures; the floor is the mean over six
disjoint clean sets. Each ladder is printed in units of the floor and should rise at each step. Takes half a minute.
"""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alphaflow_cli.core.frechet import Moments, frechet_distance
from alphaflow_cli.evaluate.tiny import Tiny

Ladder = list[tuple[str, Callable[[Tensor], Tensor]]]
SET = 2_000


def read(folder: Path, per_class: slice) -> Tensor:
    """Pictures of every class in turn, uint8 (N, 3, 32, 32): picture i is of class i mod 10."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [sorted(each.glob("*.jpg"))[per_class] for each in classes]
    pictures = [np.asarray(Image.open(path).convert("RGB")) for row in zip(*files, strict=True) for path in row]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def to_bytes(x: Tensor) -> Tensor:
    """Round floats of 0–255 to uint8."""
    return x.round().clamp(0, 255).byte()


def noise(sigma: float) -> Callable[[Tensor], Tensor]:
    """Add Gaussian noise to the pixels."""
    return lambda x: to_bytes(x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))


def blur(sigma: float) -> Callable[[Tensor], Tensor]:
    """Blur with a Gaussian."""
    offsets = torch.arange(-6, 7).float()
    line = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=0)
    kernel = torch.outer(line, line).expand(3, 1, 13, 13)
    pad = torch.nn.ReflectionPad2d(6)
    return lambda x: to_bytes(torch.nn.functional.conv2d(pad(x.float()), kernel, groups=3))


def pca(kept: int) -> Callable[[Tensor], Tensor]:
    """Project the pictures on the leading principal components of the set."""

    def degrade(x: Tensor) -> Tensor:
        flat = x.flatten(1).float()
        mean = flat.mean(0)
        basis = torch.linalg.eigh((flat - mean).T @ (flat - mean)).eigenvectors[:, -kept:]
        return to_bytes(((flat - mean) @ basis @ basis.T + mean).view_as(x))

    return degrade


def jpeg(quality: int) -> Callable[[Tensor], Tensor]:
    """Save as JPEG and read again."""

    def once(picture: Tensor) -> Tensor:
        buffer = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "jpeg", quality=quality)
        return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)

    return lambda x: torch.stack([once(picture) for picture in x])


def unique(count: int) -> Callable[[Tensor], Tensor]:
    """Repeat a few pictures, so that the set has only that many different ones."""
    return lambda x: x[torch.arange(len(x)) % count]


def ghost(share: float) -> Callable[[Tensor], Tensor]:
    """Mix every picture with another one."""
    return lambda x: to_bytes((1 - share) * x.float() + share * x.float().roll(7, 0))


def shuffle(patch: int) -> Callable[[Tensor], Tensor]:
    """Shuffle the patches of each picture."""

    def degrade(x: Tensor) -> Tensor:
        n = x.shape[-1] // patch
        order = torch.randperm(n * n, generator=torch.Generator().manual_seed(2))
        tiles = x.view(-1, 3, n, patch, n, patch).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, order]
        return tiles.unflatten(1, (n, n)).permute(0, 3, 1, 4, 2, 5).reshape(x.shape).contiguous()

    return degrade


def grid(height: int) -> Callable[[Tensor], Tensor]:
    """Make every fourth row and column brighter, like an artefact of a decoder."""

    def degrade(x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[-2:])
        mask[::4] = mask[:, ::4] = 1
        return to_bytes(x + height * mask)

    return degrade


def saturation(factor: float) -> Callable[[Tensor], Tensor]:
    """Pull the colours towards their mean, or away from it."""
    return lambda x: to_bytes(x.float().mean(1, keepdim=True) * (1 - factor) + factor * x)


def ladders() -> dict[str, Ladder]:
    """Eleven ways to spoil pictures, each from harmless to gross; class ladders are made from the order of classes."""
    brighter: Ladder = [(f"+{k}", lambda x, k=k: to_bytes(x.float() + k)) for k in (5, 10, 20, 40)]  # type: ignore[misc]
    classes: Ladder = [(f"{k}", unique_classes(k)) for k in (7, 5, 3, 2, 1)]
    return {
        "noise, σ of 255": [(f"{s}", noise(s)) for s in (2, 4, 8, 16, 32)],
        "blur, σ px": [(f"{s}", blur(s)) for s in (0.4, 0.6, 0.8, 1.2, 2.0)],
        "PCA, components": [(f"{k}", pca(k)) for k in (1024, 512, 256, 128, 32)],
        "JPEG, quality": [(f"{q}", jpeg(q)) for q in (75, 50, 30, 15, 5)],
        "classes kept": classes,
        "different pictures": [(f"{k}", unique(k)) for k in (1000, 500, 200, 100)],
        "ghost, share": [(f"{s}", ghost(s)) for s in (0.1, 0.2, 0.3, 0.5)],
        "shuffled patches, px": [(f"{p}", shuffle(p)) for p in (16, 8, 4, 2)],
        "brightness": brighter,
        "grid, of 255": [(f"{h}", grid(h)) for h in (4, 8, 16, 32)],
        "saturation": [(f"{f}", saturation(f)) for f in (0.9, 0.75, 0.5, 0.25, 0.0)],
    }


def unique_classes(kept: int) -> Callable[[Tensor], Tensor]:
    """Marks a set of so many classes; picked from a larger pool by `main`, because a set of 2,000 has 200 of each."""

    def degrade(pool: Tensor) -> Tensor:
        return pool[torch.arange(len(pool)) % 10 < kept][:SET]

    degrade.__name__ = "pool"
    return degrade


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Give the mean and the covariance of the pictures' features."""
    sums = Moments(features.shape[1])
    sums.update(features)
    return sums.finalise()


def main() -> None:
    """Prints the table as Markdown."""
    root = Path(sys.argv[1])
    tiny = Tiny()
    reference = moments(tiny(read(root / "train", slice(0, 1000))))
    pool = read(root / "train", slice(1000, 4200))
    clean = pool[:SET]

    def distance(x: Tensor) -> float:
        return frechet_distance(*moments(tiny(x)), *reference)

    floors = torch.tensor([distance(pool[i * SET : (i + 1) * SET]) for i in range(6)])
    floor = float(floors.mean())
    test = distance(read(root / "test", slice(0, 200)))
    print(f"floor {floor:.4f}, spread {float(floors.std()) / floor:.1%}; test pictures {test / floor:.2f} × floor\n")
    print("| ladder | steps, in units of the floor | rising |\n|---|---|---|")
    rising = 0
    for name, steps in ladders().items():
        base = pool[: SET * 16] if name == "classes kept" else clean
        values = [distance(step(base)) / floor for _, step in steps]
        falls = [b for a, b in zip([distance(clean) / floor, *values], values, strict=False) if b <= a]
        rising += not falls
        told = ", ".join(f"{label}: {value:.2f}" for (label, _), value in zip(steps, values, strict=True))
        print(f"| {name} | {told} | {'yes' if not falls else 'no'} |")
    print(f"\n{rising} of {len(ladders())} ladders rise at every step")


if __name__ == "__main__":
    main()
