"""One checkpoint, measured at several numbers of evaluations by one ruler."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from alphaflow_cli.charts.chart import BLUE, GREEN, ORANGE, RED, Chart, Line, Panel
from alphaflow_cli.charts.draw import to_png
from alphaflow_cli.engine import evaluate as engine
from alphaflow_cli.engine.decoder import DecoderChoice
from alphaflow_cli.engine.files import write_atomically
from alphaflow_cli.engine.generate import Generator, find_checkpoint, open_generator, run_folder
from alphaflow_cli.engine.generated import GeneratedImages
from alphaflow_cli.engine.pictures import open_pictures
from alphaflow_cli.engine.processes import Processes
from alphaflow_cli.engine.reference import Reference
from alphaflow_cli.engine.results import Evaluation, save_results
from alphaflow_cli.engine.walk import Walk, plan_walk
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.nn.weights import sha256_of
from alphaflow_cli.recipe.schema import LabelDraw, Metric

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
    """Every walk asked for; None on all processes but the first."""
    generator = open_generator(request.checkpoint, device=processes.device, decoder=request.decoder)
    said = generator.recipe.eval
    walks = choose_walks(request, generator)
    count, draw = request.images or said.images, request.draw or said.draw
    generator.expect(count)
    if request.autoencoder:
        generator.use_autoencoder(request.autoencoder)
    metrics = request.metrics or said.metrics
    folder = results_folder(request)
    extractors = engine.build_extractors(metrics, processes.device, request.weights)
    ruler = engine.Ruler(extractors, processes, folder, request.batch)
    reference = requested_reference(request, generator, metrics, ruler)
    digest = sha256_of(find_checkpoint(request.checkpoint))
    found = []
    for walk in walks:
        source = GeneratedImages(generator, walk, count=count, draw=draw, digest=digest)
        evaluation = engine.evaluate(source, metrics, ruler, reference=reference)
        if evaluation is not None:
            found.append(evaluation)
    return write_evaluation(request, found, folder, digest) if found else None


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
    request: EvalRequest, generator: Generator, metrics: tuple[Metric, ...], ruler: engine.Ruler
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
    return engine.find_reference(
        text, (side, side), ruler, opened=lambda size: open_pictures(text, size=size, limit=None)
    )


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
    write_atomically(picture, lambda temporary: _write(temporary, data))
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


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
