"""One evaluation, from pictures to rows; one reference, from pictures to a file: the pass, then what is made of it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from alphaflow_cli.engine.lock import hold
from alphaflow_cli.engine.measure import (
    CHUNK,
    Clock,
    Content,
    Pass,
    content_of,
    evaluation_id,
    gather_moments,
    run_pass,
    told_seconds,
)
from alphaflow_cli.engine.pictures import ImageSource
from alphaflow_cli.engine.processes import Processes
from alphaflow_cli.engine.protocol import NEEDS_MOMENTS, NETWORK
from alphaflow_cli.engine.reference import KEPT, Reference, build_reference, load_reference, save_reference
from alphaflow_cli.engine.results import Evaluation
from alphaflow_cli.engine.score import Measured, check_request, score
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.nn.features import Extractor, build_extractor
from alphaflow_cli.nn.weights import FILES, missing_weights
from alphaflow_cli.recipe.schema import Eval, Metric

FEWEST = 100  # pictures; below it nothing is printed that looks like a score


@dataclass(frozen=True)
class Ruler:
    """What measures: networks, their batch, the processes, and the folder that keeps unfinished work."""

    extractors: dict[str, Extractor]
    processes: Processes
    folder: Path
    batch: int
    chunk: int = CHUNK

    def start(self, source: ImageSource) -> Pass:
        """The pass over these pictures, in a folder of its own."""
        name = evaluation_id(source, self.extractors, self.chunk)
        return Pass(source, self.extractors, self.folder / name, self.chunk)

    def holds(self, work: Pass) -> AbstractContextManager[None]:
        """The pass's folder is ours while it is filled; the first process holds it for all."""
        return nullcontext() if self.processes.rank else hold(work.folder, "eval or reference")


def build_extractors(
    metrics: tuple[Metric, ...], device: torch.device, weights: dict[str, Path]
) -> dict[str, Extractor]:
    """One network per feature space asked for."""
    names = sorted({NETWORK[metric] for metric in metrics})
    unused = sorted(weights.keys() - set(names))
    if unused:
        raise AlphaflowError(f"--weights {unused[0]}=…: the metrics asked for use {', '.join(names)} only")
    return {name: build_extractor(name, device=device, weights=weights.get(name)) for name in names}


def evaluate(
    source: ImageSource, metrics: tuple[Metric, ...], ruler: Ruler, *, reference: Reference | None
) -> Evaluation | None:
    """Rows and warnings; None on all processes but the first."""
    check_count(source)
    work, clock = ruler.start(source), Clock()
    check_request(metrics, reference, ruler.extractors, work)
    with ruler.holds(work):
        run_pass(work, ruler.processes, batch=ruler.batch, clock=clock)
        moments = gather_moments(work, ruler.processes)  # also the moment when all chunks are there
    if ruler.processes.rank:
        return None
    content = content_of(work)
    with clock.part("distances"):
        rows = score(Measured(work, moments, reference, ruler.processes.device), metrics)
    warnings = _warnings(content, source, rows[0].notes if rows else ())
    seconds = told_seconds({**source.seconds, **clock.seconds})
    return Evaluation(work.folder.name, rows, content.sha256, warnings, seconds, ruler.processes.size)


def _warnings(content: Content, source: ImageSource, notes: tuple[str, ...]) -> list[str]:
    warnings = [note for note in notes if note.startswith("weights are not")]
    if content.copies:
        warnings.append(f"{content.copies:,} of {source.count:,} pictures are exact copies of others")
    return warnings


def make_reference(
    source: ImageSource, ruler: Ruler, path: Path, *, name: str, kept: int = KEPT
) -> tuple[Reference, list[str]] | None:
    """Measures and saves; None on all processes but the first."""
    check_count(source)
    work = ruler.start(source)
    with ruler.holds(work):
        run_pass(work, ruler.processes, batch=ruler.batch, clock=Clock())
        moments = gather_moments(work, ruler.processes)
    if ruler.processes.rank:
        return None
    content = content_of(work)
    save_reference(build_reference(work, moments, content, name=name, kept=kept), path)
    return load_reference(path), _warnings(content, source, ())


def find_reference(
    text: str, size: tuple[int, int], ruler: Ruler, *, opened: Callable[[int], ImageSource]
) -> Reference:
    """A file of statistics, or pictures measured once and kept in the ruler's folder under their own name."""
    from alphaflow_cli.engine.foreign import holds_statistics  # numpy's reader, needed for one kind only

    path = Path(text)
    if path.suffix in (".safetensors", ".pkl", ".pickle", ".pt") or (path.suffix == ".npz" and holds_statistics(path)):
        return load_reference(path)
    if size[0] != size[1]:
        raise AlphaflowError(f"{text}: pictures of {size[0]}×{size[1]} px are not square; build the reference by hand")
    source = opened(size[0])
    kept = ruler.folder / f"reference-{ruler.start(source).folder.name}.safetensors"
    if not kept.is_file():
        make_reference(source, ruler, kept, name="")
        ruler.processes.wait()
    return load_reference(kept)


def check_count(source: ImageSource) -> None:
    """Too few pictures to be worth a reference."""
    if source.count < FEWEST:
        raise AlphaflowError(
            f"{source.label}: {source.count} pictures; a score needs at least {FEWEST} "
            "(and 50,000 to be compared with published ones)"
        )


def default_metrics(reference: str | None) -> tuple[Metric, ...]:
    """The Fréchet distances that a reference file has statistics for; the recipe's defaults otherwise."""
    if reference is None or Path(reference).suffix != ".safetensors":
        return Eval().metrics
    there = load_reference(Path(reference)).stats
    return tuple(metric for metric in NEEDS_MOMENTS if NETWORK[metric] in there)


def available_metrics(weights: dict[str, Path]) -> tuple[Metric, ...]:
    """One Fréchet distance for each network whose weights are here."""
    return tuple(
        metric
        for metric in NEEDS_MOMENTS
        if NETWORK[metric] not in FILES or NETWORK[metric] in weights or missing_weights(FILES[NETWORK[metric]]) is None
    )
