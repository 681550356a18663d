"""For programs and notebooks: load a checkpoint, draw pictures, look at them.

    import alphaflow_cli

    model = alphaflow_cli.load("runs/quickstart")  # a file, a run folder, or user/repo on the Hub
    pictures = model.sample(8, classes=["heart", "star"])
    pictures  # a notebook shows the grid
    pictures.save("hearts.png")

docs/python.md goes through it step by step. `train` and `evaluate` are in doors.py.
"""

import math
import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, SupportsIndex, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import make_folder, user_path, write_whole
from alphaflow_cli.model.find import find_class
from alphaflow_cli.recipe import Recipe
from alphaflow_cli.recipe.plan import (
    draws_scale,
    effective_scale,
    has_null_label,
    is_guided,
    label_rows,
    parameter_count,
)
from alphaflow_cli.recipe.schema import SamplerChoice
from alphaflow_cli.runtime.processes import choose_device
from alphaflow_cli.runtime.progress import Progress
from alphaflow_cli.sample.generator import DecoderChoice, Generator, open_generator, spans_of
from alphaflow_cli.sample.grid import even_columns, grid_form, grid_in_rows, picture_png
from alphaflow_cli.sample.walk import Walk, draw_labels, plan_walk
from alphaflow_cli.text import counted

COLUMNS = 8  # of a grid
MOST_DISPLAYED = 64  # pictures that a notebook shows; `save` writes all of them
ChosenClasses = Sequence[int | str] | int | str


@dataclass(frozen=True, repr=False, eq=False)
class Pictures:
    """What `Model.sample` drew: pictures with their seeds and classes. A notebook shows them as a grid.

    `len(pictures)`, `pictures[3]` and `for picture in pictures` work on the PIL images.
    """

    tensor: Tensor  # uint8 (n, 3, H, W) on the CPU
    seeds: list[int]  # one per picture: the same seed and class give the same picture again
    labels: list[int]  # one per picture: the number of its class
    names: list[str]  # one per picture: the name of its class, its number without one; empty without classes

    @property
    def array(self) -> np.ndarray:
        """The pictures as numpy has them: uint8 (n, H, W, 3)."""
        return np.ascontiguousarray(self.tensor.permute(0, 2, 3, 1).numpy())

    @cached_property
    def images(self) -> list[Image.Image]:
        """The pictures as a list of PIL images."""
        return [Image.fromarray(each) for each in self.array]

    def save(self, path: str | Path) -> Path:
        """Write one grid of all pictures (.png, .jpg or .webp), or with a folder's name each picture as a PNG in it.

        A folder is made where it is missing; its files are named like those of `alphaflow sample --out`.
        """
        path = user_path(path)
        if path.suffix and not path.is_dir():
            write_whole(path, self._grid(len(self), path))
            return path
        make_folder(path)
        for seed, label, name, picture in zip(self.seeds, self.labels, self.names, self.array, strict=True):
            write_whole(path / (f"seed-{seed:06d}" + f"-class-{label}" * bool(name) + ".png"), picture_png(picture))
        return path

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, place: int) -> Image.Image:
        return self.images[place]

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(self.images)

    def __repr__(self) -> str:
        height, width = self.tensor.shape[-2:]
        classes = list(dict.fromkeys(name for name in self.names if name))
        shown = f": {', '.join(classes[:4])}{', …' * (len(classes) > 4)}" if classes else ""
        return f"<{counted(len(self), 'picture')} of {width} × {height} px{shown}>"

    def _repr_png_(self) -> bytes:
        """The grid that a notebook shows."""
        return self._grid(MOST_DISPLAYED, Path("grid.png"))

    def _grid(self, count: int, path: Path) -> bytes:
        """The first `count` pictures as one, in the form that the path's suffix says."""
        shown = list(self.array[:count])
        return grid_in_rows(shown, even_columns(len(shown), COLUMNS), self.names[:count], grid_form(path))


class Model:
    """A checkpoint, ready to sample. `alphaflow_cli.load` makes one; printing it says what it is."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    @property
    def recipe(self) -> Recipe:
        """The recipe it was trained by, such as `model.recipe.train.steps`."""
        return self._generator.recipe

    @property
    def device(self) -> torch.device:
        """The device that computes its pictures: a GPU, or the CPU."""
        return self._generator.device

    @property
    def origin(self) -> dict[str, Any]:
        """Where the weights come from: step, kind of average, versions of the software, the autoencoder."""
        return dict(self._generator.origin)

    @property
    def classes(self) -> list[str]:
        """The classes that `sample` takes, by their names; their numbers as text where they have none."""
        known = self.recipe.data.classes if label_rows(self.recipe) else 0
        return [_name_of(label, self._generator.class_names) for label in range(known)]

    def __repr__(self) -> str:
        model, data, names = self.recipe.model, self.recipe.data, self.classes
        shown = f" ({', '.join(names[:3])}{', …' * (len(names) > 3)})" if self._generator.class_names else ""
        step = self.origin.get("step")
        return (
            f"<Model {self.recipe.name}: DiT of {model.depth} blocks × {model.dim}, patch {model.patch}, "
            f"{parameter_count(self.recipe):,} parameters; {data.image_size} × {data.image_size} px, "
            f"{counted(len(names), 'class', 'classes') if names else 'no classes'}{shown}; {_guidance(self.recipe)}; "
            f"{self.origin.get('weights', 'ema')} weights{f' of step {step:,}' if isinstance(step, int) else ''}; "
            f"on {self._generator.device}>"
        )

    def sample(
        self,
        count: int | None = None,
        *,
        classes: ChosenClasses | None = None,
        seeds: Iterable[int] | None = None,
        nfe: int = 1,
        sampler: SamplerChoice = "auto",
        times: Sequence[float] | None = None,
        guidance: float | None = None,
        guidance_channels: int | None = None,
        interval: tuple[float, float] | None = None,
        batch: int = 64,
        progress: bool = False,
    ) -> Pictures:
        """Draw `count` pictures (default 16), from the seeds 0, 1, 2, …, or from `seeds`.

        A seed and a class give the same picture every time, whatever is drawn with it.

        classes: names or numbers, taken in turn (`["cat", "dog"]`), or a single one. Default: one drawn per seed.
        nfe: evaluations of the network per picture. 1 is one step; more of them take longer and may look better.
        sampler, times: another way from noise to picture than the recipe's; docs/sample.md lists them.
        guidance: the scale, for a model that takes it as an input, or was trained without guidance.
        interval: the times between which guidance acts, (0.4, 0.65), for a model that takes them as an input.
        guidance_channels: guide the first so many channels only; for models trained without guidance.
        batch: pictures at once; a smaller number takes less memory.
        progress: show how far it is, on stderr.
        """
        seeds = _seeds(count, seeds)
        _check_walk(nfe, times, sampler, batch)
        _check_guidance(guidance, guidance_channels, interval)
        walk = plan_walk(
            self.recipe, nfe=nfe, kind=sampler, times=times, guidance=guidance, interval=interval,
            guidance_channels=guidance_channels,
        )  # fmt: skip
        labels = self._labels(seeds, classes)
        images = self._draw(seeds, labels, walk, batch=batch, progress=progress)
        labelled, known = label_rows(self.recipe), self._generator.class_names
        return Pictures(images, seeds, labels, [_name_of(label, known) if labelled else "" for label in labels])

    def _draw(self, seeds: list[int], labels: list[int], walk: Walk, *, batch: int, progress: bool) -> Tensor:
        drawn = []
        with Progress("sampling", len(seeds), unit="img", shown=progress) as bar:
            for part in self._generator.stream(seeds, labels, walk, spans_of(len(seeds), batch)):
                assert part.images is not None
                drawn.append(part.images.cpu())
                bar.advance(len(part.seeds))
        return torch.cat(drawn)

    def _labels(self, seeds: Sequence[int], classes: ChosenClasses | None) -> list[int]:
        """The class of each seed, by number."""
        known = self.recipe.data.classes
        if classes is None:
            return draw_labels(seeds, known, "random")
        given = [classes] if isinstance(classes, str) else list(np.atleast_1d(np.asarray(classes, object)))
        if not given or not label_rows(self.recipe):
            raise AlphaflowError(f"sample: {'classes is empty' if not given else 'this model has no classes'}.")
        chosen = [find_class(str(each), self._generator.class_names, known, where="classes") for each in given]
        return [chosen[i % len(chosen)] for i in range(len(seeds))]


def _check_walk(nfe: int, times: Sequence[float] | None, sampler: str, batch: int) -> None:
    if not isinstance(nfe, Integral) or not isinstance(batch, Integral):
        raise AlphaflowError("sample: nfe and batch are whole numbers; call it once for each nfe.")
    if times is not None and not (isinstance(times, Collection) and all(map(is_number, times))):
        raise AlphaflowError(f"sample: times {times!r}: they are a list of numbers from 1 to 0, such as [1, 0.55, 0].")
    if times is not None and nfe != 1:
        raise AlphaflowError("sample: give nfe or times, not both; the times say how many evaluations there are.")
    if batch < 1:
        raise AlphaflowError(f"sample: batch {batch}: at least one picture at a time is needed.")
    if sampler not in get_args(SamplerChoice):
        raise AlphaflowError(f"sample: sampler {sampler!r}: there are {', '.join(get_args(SamplerChoice))}.")


def _check_guidance(scale: float | None, channels: int | None, interval: tuple[float, float] | None) -> None:
    if scale is not None and not is_number(scale):
        raise AlphaflowError(f"sample: guidance {scale}: it is a number, 1 for none.")
    if not isinstance(channels, Integral | None):
        raise AlphaflowError(f"sample: guidance_channels {channels!r}: it is a whole number.")
    ends = interval if interval is None or isinstance(interval, Collection) else ()
    if ends is not None and not (len(ends) == 2 and all(map(is_number, ends))):
        raise AlphaflowError(f"sample: interval {interval!r}: it is two times, such as (0.4, 0.65).")


def is_number(value: Any) -> bool:
    """Whether it is one finite number of any library; a text is none."""
    try:
        return math.isfinite(value)
    except (TypeError, ValueError):
        return False


def _seeds(count: int | None, seeds: Iterable[int] | None) -> list[int]:
    """The seeds that a call means: the first `count`, or those that it lists."""
    if not isinstance(count, Integral | None) or isinstance(seeds, Integral | str):
        raise AlphaflowError("sample: the first value is a number of pictures; seeds are a list: sample(seeds=[3, 7]).")
    if seeds is None:
        seeds = range(16 if count is None else count)
    elif count is not None:
        raise AlphaflowError("sample: give a number of pictures or their seeds, not both.")
    listed = [_seed(each) for each in seeds]
    if not listed:
        raise AlphaflowError("sample: at least one picture is needed, such as sample(8) or sample(seeds=[0]).")
    return listed


def _seed(value: SupportsIndex) -> int:
    try:
        seed = operator.index(value)
    except TypeError:  # a fraction, which would be cut off
        seed = -1
    if not 0 <= seed < 2**64:
        raise AlphaflowError(f"sample: seed {value}: a seed is a whole number from 0 to 2^64 − 1.")
    return seed


def _name_of(label: int, names: Sequence[str]) -> str:
    return names[label] if label < len(names) else str(label)


def _guidance(recipe: Recipe) -> str:
    mix = recipe.guidance
    if draws_scale(recipe):
        return f"guidance 1 to {mix.scale_max:g} as an input"
    if is_guided(mix.omega, mix.kappa):
        return f"guidance {effective_scale(mix.omega, mix.kappa):g} built in"
    return "trained without guidance" + (", can be guided" if has_null_label(recipe) else "")


def load(
    address: str | Path,
    *,
    device: str | torch.device | None = None,
    weights: Literal["ema", "raw"] = "ema",
    decoder: DecoderChoice = "auto",
) -> Model:
    """Load a model: from a file, a run folder (its newest checkpoint), or user/repo[@revision] on the Hub.

    device: "cpu", "cuda" (or "cuda:1"), or "mps". Default: a GPU where there is one.
    weights: "ema" are averaged over the last part of the training and give the better pictures; "raw" are not.
    decoder: precision of the autoencoder's decoder; auto is bf16 on a GPU that has it, else fp32.
    """
    if weights not in ("ema", "raw"):
        raise AlphaflowError(f"load: weights {weights!r}: there are ema and raw.")
    return Model(open_generator(str(address), device=choose_device(device), weights=weights, decoder=decoder))
