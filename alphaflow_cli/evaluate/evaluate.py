"""One evaluation, from pictures to rows; one reference, from pictures to a file: the pass, then what is made of it.

One checkpoint, measured at several numbers of evaluations by one ruler.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alphaflow_cli.charts.chart import BLUE, GREEN, ORANGE, RED, Chart, Line, Panel
from alphaflow_cli.charts.draw import to_png
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.evaluate.features import Extractor, build_extractor
from alphaflow_cli.evaluate.measure import (
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
from alphaflow_cli.evaluate.pictures import GeneratedImages, ImageSource, open_pictures
from alphaflow_cli.evaluate.reference import KEPT, Reference, build_reference, load_reference, save_reference
from alphaflow_cli.evaluate.results import NEEDS_MOMENTS, NETWORK, Evaluation, save_results
from alphaflow_cli.evaluate.score import Measured, check_request, score
from alphaflow_cli.files import sha256_of, write_whole
from alphaflow_cli.model.find import run_folder
from alphaflow_cli.nn.weights import FILES, missing_weights
from alphaflow_cli.recipe.schema import Eval, LabelDraw, Metric
from alphaflow_cli.runtime.lock import hold
from alphaflow_cli.runtime.processes import Processes, check_same
from alphaflow_cli.sample.generator import DecoderChoice, Generator, open_generator
from alphaflow_cli.sample.walk import Walk, plan_walk

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
    from alphaflow_cli.evaluate.reference import holds_statistics  # numpy's reader, needed for one kind only

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


MIDPOINTS = tuple(round(0.1 * i, 1) for i in range(1, 10))  # of --sweep-midpoint
COLOURS = (BLUE, ORANGE, GREEN, RED)


@dataclass(frozen=True)
class EvalRequest:
    """What the command line asks for; empty or None: as the recipe says."""

    checkpoint: str
    nfe: Sequence[int]
    sampler: str
    times: Sequence[float] | None
    guidance: float | None
    guidance_channels: int | None
    sweep_midpoint: bool
    metrics: tuple[Metric, ...]
    reference: str | None
    images: int | None
    draw: LabelDraw | None
    autoencoder: str
    decoder: DecoderChoice
    batch: int
    weights: dict[str, Path]
    out: Path | None


@dataclass(frozen=True)
class Report:
    """What was measured, and where it was written."""

    evaluations: Sequence[Evaluation]
    results: Path
    picture: Path | None  # scores against evaluations per picture, where there are several


def is_checkpoint(text: str) -> bool:
    """A weights file, a run folder or a model on the Hub; anything else is a source of pictures."""
    path = Path(text).expanduser()
    if path.is_dir():
        return (path / "model.safetensors").is_file() or (path / "checkpoints").is_dir()
    if text.startswith("hf://"):
        return not text.startswith("hf://datasets/")
    if path.exists() or ":" in text:
        return path.suffix == ".safetensors"
    return path.suffix == ".safetensors" or (text.count("/") == 1 and not text.startswith((".", "/", "~")))


def evaluate_checkpoint(request: EvalRequest, processes: Processes) -> Report | None:
    """Measure every walk that was requested; None on all processes but the first."""
    generator = open_generator(request.checkpoint, device=processes.device, decoder=request.decoder)
    check_same(processes, generator.digest, request.checkpoint)
    published = generator.recipe.eval
    walks = choose_walks(request, generator)
    count, draw = request.images or published.images, request.draw or published.draw
    generator.expect(count)
    if request.autoencoder:
        generator.use_autoencoder(request.autoencoder)
    metrics = request.metrics or published.metrics
    folder = results_folder(request)
    extractors = build_extractors(metrics, processes.device, request.weights)
    ruler = Ruler(extractors, processes, folder, request.batch)
    reference = requested_reference(request, generator, metrics, ruler)
    evaluations = []
    for walk in walks:
        source = GeneratedImages(generator, walk, count=count, draw=draw)
        evaluation = evaluate(source, metrics, ruler, reference=reference)
        if evaluation is not None:
            evaluations.append(evaluation)
    return write_evaluation(request, evaluations, folder, generator.digest) if evaluations else None


def choose_walks(request: EvalRequest, generator: Generator) -> list[Walk]:
    """One per --nfe, the grid of --times, or the midpoints of a sweep."""
    recipe = generator.recipe
    plan = partial(plan_walk, recipe, guidance=request.guidance, guidance_channels=request.guidance_channels)
    if request.sweep_midpoint:
        kind = recipe.sample.two_step_sampler if request.sampler == "auto" else request.sampler
        return [plan(nfe=2, kind=kind, times=(1.0, middle, 0.0)) for middle in MIDPOINTS]
    counts = request.nfe or recipe.eval.nfe
    if request.times is not None:
        counts = (1,)
    return [plan(nfe=nfe, kind=request.sampler, times=request.times) for nfe in counts]


def requested_reference(
    request: EvalRequest, generator: Generator, metrics: tuple[Metric, ...], ruler: Ruler
) -> Reference | None:
    """The reference asked for, else the recipe's; metrics that compare nothing need none."""
    text = request.reference or generator.recipe.eval.reference
    if not text:
        if set(metrics) == {"is"}:
            return None
        raise AlphaflowError(
            f"{request.checkpoint}: nothing to compare with. Give --reference FILE|SOURCE (alphaflow reference makes "
            "a file), or set eval.reference in the recipe."
        )
    side = generator.recipe.data.image_size
    return find_reference(text, (side, side), ruler, opened=lambda size: open_pictures(text, size=size, limit=None))


def results_folder(request: EvalRequest) -> Path:
    """Where unfinished work and history go: in the run, or beside."""
    run = run_folder(request.checkpoint)
    return request.out or (run / "evals" if run else Path("evals"))


def write_evaluation(request: EvalRequest, evaluations: list[Evaluation], folder: Path, digest: str) -> Report:
    """results.json in the run folder where the run's own model was measured, else beside; the history, the picture."""
    run = run_folder(request.checkpoint)
    own = run is not None and request.out is None and is_model_of(run, digest)
    place = run if run is not None and own else folder / evaluations[0].id
    path = place / "results.json"
    save_results(path, folder / "history.jsonl", evaluations)
    chart = score_chart(evaluations, sweep=request.sweep_midpoint)
    if chart is None:
        return Report(evaluations, path, None)
    picture = place / ("midpoints.png" if request.sweep_midpoint else "scores.png")
    data = to_png(chart)
    write_whole(picture, data)
    return Report(evaluations, path, picture)


def is_model_of(run: Path, digest: str) -> bool:
    """Whether the run's newest model has this checksum: numbers of other weights must not stand as the run's."""
    model = run / "model.safetensors"
    return model.is_file() and sha256_of(model) == digest


def score_chart(evaluations: Sequence[Evaluation], *, sweep: bool) -> Chart | None:
    """Each distance against evaluations per picture, or against the midpoint; None where there is one point."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for evaluation in evaluations:
        for row in evaluation.rows:
            if row.spread is None and row.reference is not None:
                at = _midpoint(row.pictures) if sweep else float(row.pictures["nfe"])
                curves.setdefault(row.name, []).append((at, row.value))
    longest = max((len(points) for points in curves.values()), default=0)
    if longest < 2:
        return None
    panels = [
        Panel(name, [Line(name, points, COLOURS[i % len(COLOURS)], markers=True)])
        for i, (name, points) in enumerate(curves.items())
    ]
    ticks = sorted({x for points in curves.values() for x, _ in points})
    label = "midpoint of a two-step grid" if sweep else "network evaluations per picture"
    return Chart(title="Scores", panels=panels, x_label=label, log_x=not sweep, x_ticks=ticks)


def _midpoint(pictures: dict[str, Any]) -> float:
    return float(pictures["times"][1])
