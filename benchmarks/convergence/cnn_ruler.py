"""A ruler that sees class and shape: a small classifier of CIFAR-10 at 16 px, trained here and then frozen.

    python benchmarks/convergence/cnn_ruler.py runs/evidence > benchmarks/convergence/ladders.md    # trains it first

FD-tiny sees texture and colour, and hardly the class. This one is trained on the 50,000 training pictures and compares
with the 10,000 test pictures, which it has not seen: their features are not sharper than those of other pictures. Of a
set of pictures it gives

    fd_cnn               the Fréchet distance in its 256 features ("FD-cnn", not FID)
    as_asked             the share of pictures that it labels as they were asked for
    precision, recall    by balls of 3 neighbours in the same features, as `alphaflow eval` has them in others'

`fd_tiny` beside it is the package's FD-tiny, against the training pictures. Weights are made by this script from a
fixed seed and kept beside the runs: in 35 s on an H100, in 144 minutes on two cores beside other work. Stopped, it goes
on after its last whole epoch. Made anew on another machine they are rounded otherwise, so they are another ruler:
what the one has measured stands in no table of the other. The folder holds two stores of `alphaflow prep-latents --size
16 --autoencoder none`: `store` of the training pictures and `test`.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).parent.parent)]

import bench_ruler  # noqa: E402
from record import sha256_of  # noqa: E402

from alphaflow_cli.core.frechet import Moments, frechet_distance  # noqa: E402
from alphaflow_cli.core.scores import precision_recall  # noqa: E402
from alphaflow_cli.data.store import open_store  # noqa: E402
from alphaflow_cli.evaluate.tiny import Tiny  # noqa: E402
from alphaflow_cli.runtime.precision import tf32, true_float32  # noqa: E402

WIDTH, EPOCHS, BATCH, RATE, SEED = 64, 30, 512, 0.2, 0
CLASSES, SMOOTHING, SHIFT, HOLE, DECAY = 10, 0.1, 2, 5, 5e-4
NEIGHBOURS, KEPT = 3, 5_000  # of precision and recall; pictures of either side
PART = 1_000  # pictures at a time
Pictures = tuple[Tensor, Tensor]  # uint8 (N, 3, H, W), labels (N,)


class Residual(nn.Module):
    """x + two convolutions of x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*convolution(channels, channels), *convolution(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class Classifier(nn.Module):
    """A ResNet of eight layers, for pictures of 16 or 32 px."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *convolution(3, width),
            *convolution(width, 2 * width),
            nn.MaxPool2d(2),
            Residual(2 * width),
            *convolution(2 * width, 4 * width),
            nn.MaxPool2d(2),
            Residual(4 * width),
        )
        self.head = nn.Linear(4 * width, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """(N, 4·width) float32 of uint8 pictures."""
        x: Tensor = self.body(images.float() / 63.75 - 2)
        return x.mean((2, 3))

    def both_sides(self, images: Tensor) -> Tensor:
        """The same, in the mean over a picture and its mirror image: what the ruler measures with."""
        return (self.features(images) + self.features(images.flip(3))) / 2

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


def convolution(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def read_store(folder: Path, device: torch.device) -> Pictures:
    """All pictures and labels of a pixel store, on the device."""
    store = open_store(folder, "sizes")
    count = store.manifest.count
    pixels = np.empty((count, *store.plan.latent), np.uint8)
    store.shards.gather(store.plan.kind, np.arange(count), pixels, np.arange(count))
    return torch.from_numpy(pixels).to(device), torch.from_numpy(store.labels).to(device)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the pictures, shift each by up to SHIFT pixels, and hide a square of HOLE pixels in each."""
    count, side = len(images), images.shape[-1]
    draws = torch.rand((5, count), generator=generator).to(images.device)
    at = torch.arange(side, device=images.device)
    moved = (draws[:2] * (2 * SHIFT + 1)).long()[:, :, None] + at  # (2, N, side): rows, columns of the padded picture
    columns = torch.where(draws[2, :, None] < 0.5, moved[1], moved[1].flip(1))
    padded = F.pad(images.float(), [SHIFT] * 4, mode="reflect")
    rows = padded[torch.arange(count, device=images.device)[:, None, None], :, moved[0][:, :, None], columns[:, None]]
    corners = (draws[3:] * (side + HOLE)).long()[:, :, None] - HOLE  # a hole may lie beyond an edge in part
    down, across = ((at >= corner) & (at < corner + HOLE) for corner in corners)
    hidden = down[:, None, :, None] & across[:, None, None, :]
    return torch.where(hidden, rows.new_tensor(127.5), rows.permute(0, 3, 1, 2))


def train_classifier(pictures: Pictures, *, width: int, epochs: int, state: Path | None = None) -> Classifier:
    """SGD with momentum, one cycle; the same draws everywhere, TF32 where there is a GPU.

    `state` is written after each epoch, and the same call again goes on from it.
    """
    images, labels = pictures
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        net = Classifier(width).to(images.device, memory_format=torch.channels_last)
    batch = min(BATCH, max(2, len(images) // 10))
    steps = epochs * (len(images) // batch)
    optimiser = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9, nesterov=True, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.25)
    parts: dict[str, Any] = {"net": net, "optimiser": optimiser, "schedule": schedule}
    done, seconds = take_up(state, parts, generator)
    began = time.monotonic() - seconds
    with tf32(True):
        for epoch in range(done, epochs):
            order = torch.randperm(len(images), generator=generator).to(images.device)
            for rows in order[: len(images) // batch * batch].split(batch):
                loss = F.cross_entropy(net(augmented(images[rows], generator)), labels[rows], label_smoothing=SMOOTHING)
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
            if state:
                keep_state(state, parts, generator, (epoch + 1, time.monotonic() - began))
    return net.eval()


def keep_state(path: Path, parts: dict[str, Any], generator: torch.Generator, done: tuple[int, float]) -> None:
    temporary = path.with_suffix(".tmp")
    held = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**held, "generator": generator.get_state(), "done": done}, temporary)
    temporary.replace(path)


def take_up(path: Path | None, parts: dict[str, Any], generator: torch.Generator) -> tuple[int, float]:
    """What an earlier call has done: its epochs and seconds."""
    if path is None or not path.is_file():
        return 0, 0.0
    held = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(held[name])
    generator.set_state(held["generator"])
    epochs, seconds = held["done"]
    return epochs, seconds


def moments_of(features: Tensor) -> tuple[Tensor, Tensor]:
    moments = Moments(features.shape[1])
    moments.update(features.cpu())
    return moments.finalise()


@dataclass(frozen=True)
class Ruler:
    """The frozen classifier with its reference, and FD-tiny with its own."""

    net: Classifier
    digest: str  # the first twelve digits of the sha256 of the classifier's weights
    test: Pictures
    train: Pictures

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        with true_float32():
            return torch.cat([self.net.both_sides(part) for part in images.split(PART)])

    @cached_property
    def tiny(self) -> Tiny:
        return Tiny().to(self.test[0].device)

    def texture(self, images: Tensor) -> Tensor:
        """The features of FD-tiny."""
        return torch.cat([self.tiny(part) for part in images.split(PART)])

    @cached_property
    def real(self) -> Tensor:
        """The features of the test pictures."""
        return self.features(self.test[0])

    @cached_property
    def real_moments(self) -> tuple[Tensor, Tensor]:
        return moments_of(self.real)

    @cached_property
    def texture_moments(self) -> tuple[Tensor, Tensor]:
        return moments_of(self.texture(self.train[0]))

    @torch.no_grad()
    def scores(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Every figure of a set of pictures that were asked for with these labels."""
        features = self.features(images)
        logits = self.net.head(features)
        near = precision_recall(features[:KEPT], self.real[:KEPT], NEIGHBOURS, block=PART)
        return {
            "fd_tiny": frechet_distance(*moments_of(self.texture(images)), *self.texture_moments),
            "fd_cnn": frechet_distance(*moments_of(features), *self.real_moments),
            "as_asked": float((logits.argmax(1) == labels).double().mean()),
            "precision": near.precision,
            "recall": near.recall,
        }


def shuffled(pictures: Pictures) -> Pictures:
    """In an order of its own: a store has its pictures class by class, and the first KEPT are a sample of all."""
    order = torch.randperm(len(pictures[0]), generator=torch.Generator().manual_seed(SEED)).to(pictures[0].device)
    return pictures[0][order], pictures[1][order]


def open_ruler(out: Path, device: torch.device, *, width: int = WIDTH, epochs: int = EPOCHS) -> Ruler:
    """The ruler of a folder of runs; made there the first time."""
    path, state = out / "ruler.safetensors", out / "ruler.state"
    train, test = (shuffled(read_store(out / name, device)) for name in ("store", "test"))
    if not path.is_file():
        net = train_classifier(train, width=width, epochs=epochs, state=state)
        temporary = path.with_suffix(".tmp")
        save_file({name: value.contiguous().cpu() for name, value in net.state_dict().items()}, temporary)
        facts = facts_of(net, train, test) | {"weights_sha256": sha256_of(temporary)}
        facts["seconds"] = round(torch.load(state, weights_only=True)["done"][1], 1)
        path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
        state.unlink()
    weights = load_file(path)
    net = Classifier(len(weights["body.0.weight"])).to(device).eval()
    net.load_state_dict(weights)
    return Ruler(net, sha256_of(path)[:12], test, train)


@torch.no_grad()
def facts_of(net: Classifier, train: Pictures, test: Pictures) -> dict[str, Any]:
    """What the classifier reaches."""

    def share(pictures: Pictures) -> float:
        parts = zip(pictures[0].split(PART), pictures[1].split(PART), strict=True)
        return sum(int((net.head(net.both_sides(images)).argmax(1) == y).sum()) for images, y in parts) / len(
            pictures[0]
        )

    return {
        "parameters": sum(weight.numel() for weight in net.parameters()),
        "train_accuracy": round(share(train), 4),
        "test_accuracy": round(share(test), 4),
        "device": train[0].device.type,
    }


def ladders_at_16() -> dict[str, list[tuple[str, Callable[[Tensor], Tensor]]]]:
    """Those of FD-tiny's own table that mean something at 16 px, with their steps."""
    own = bench_ruler.ladders()
    for name in ("classes kept", "PCA, components", "shuffled patches, px"):
        del own[name]
    own["PCA, components"] = [(f"{k}", bench_ruler.pca(k)) for k in (512, 256, 128, 64, 16)]
    own["shuffled patches, px"] = [(f"{p}", bench_ruler.shuffle(p)) for p in (8, 4, 2)]
    return own


def print_ladders(ruler: Ruler) -> None:
    """Both rulers on spoilt test pictures, in units of clean ones; the others are the reference."""
    images, labels = (part.cpu() for part in ruler.test)
    half, size, device = len(images) // 2, 2 * len(images) // 5, ruler.test[0].device
    others = (ruler.test[0][half:], ruler.test[1][half:])
    judge = replace(ruler, test=others, train=others)

    def distances(x: Tensor) -> tuple[float, float]:
        found = judge.scores(x.to(device), labels[: len(x)].to(device))
        return found["fd_cnn"], found["fd_tiny"]

    def line(name: str, sets: list[tuple[str, Tensor]], clean: Tensor) -> str:
        floors, found = distances(clean), [(step, distances(x)) for step, x in sets]
        columns = []
        for at, floor in enumerate(floors):
            values = [1.0, *(pair[at] / floor for _, pair in found)]
            shown = ", ".join(f"{step}: {value:.3g}" for (step, _), value in zip(found, values[1:], strict=True))
            columns.append(f"{shown} | {'yes' if all(a < b for a, b in pairwise(values)) else 'no'}")
        return f"| {name} | {' | '.join(columns)} |"

    print("| ladder | FD-cnn, in units of clean pictures | rises | FD-tiny, the same | rises |\n|---|---|---|---|---|")
    clean = images[:size]
    for name, steps in ladders_at_16().items():
        print(line(name, [(step, change(clean)) for step, change in steps], clean), flush=True)
    few = half // CLASSES
    floors = ", ".join(f"{value:.3g}" for value in distances(clean))
    kept = [(f"{k}", images[:half][labels[:half] < k][:few]) for k in (7, 5, 3, 2, 1)]
    print(line(f"classes kept, {few} pictures", kept, images[:few]), flush=True)
    print(f"\nFD-cnn and FD-tiny of {size:,} clean test pictures against {len(images) - half:,} others: {floors}.")


def accuracy_text(facts: dict[str, Any]) -> str:
    test, train = facts["test_accuracy"], facts["train_accuracy"]
    made = f"{facts['parameters']:,} parameters, made in {facts['seconds']:.0f} s ({facts['device']})"
    return (
        f"The classifier labels {test:.1%} of the test pictures rightly, and {train:.1%} of the training pictures:\n"
        f"{made}, ruler {facts['weights_sha256'][:12]}. It ranks spoilt test pictures:\n"
    )


if __name__ == "__main__":
    opened = open_ruler(Path(sys.argv[1]), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(accuracy_text(json.loads(Path(sys.argv[1]).joinpath("ruler.json").read_text(encoding="utf-8"))))
    print_ladders(opened)
