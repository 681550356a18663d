"""`eval` and `reference`: pictures are measured in one pass, and rows or a reference file are made of it.

`evaluate_checkpoint` measures a checkpoint at several numbers of network evaluations, `evaluate_pictures` pictures from
anywhere; both go through `evaluate`, with one `Ruler`. `measure_reference` measures real pictures once. All of them are
called by every process that shares the work; the first one returns the result.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from alphaflow_cli.charts.draw import to_png
from alphaflow_cli.core.frechet import Moments
from alphaflow_cli.core.pixels import FAR
from alphaflow_cli.data.manifest import Crop
from alphaflow_cli.data.pictures import Bad
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.evaluate.features import Extractor
from alphaflow_cli.evaluate.measure import (
    CHUNK,
    Clock,
    Pass,
    content_of,
    evaluation_id,
    gather_moments,
    oddities_of,
    run_pass,
)
from alphaflow_cli.evaluate.networks import build_extractor
from alphaflow_cli.evaluate.pictures import GeneratedImages, ImageSource, open_pictures
from alphaflow_cli.evaluate.reference import (
    KEPT_FEATURES,
    Reference,
    build_reference,
    check_crop,
    holds_statistics,
    kept_reference,
    load_reference,
    save_reference,
)
from alphaflow_cli.evaluate.results import (
    NEEDS_MOMENTS,
    NETWORK,
    TITLE,
    Evaluation,
    mean_of_sets,
    save_results,
    score_chart,
)
from alphaflow_cli.evaluate.score import Measured, check_reference, score
from alphaflow_cli.files import make_folder, sha256_of, user_path, write_whole
from alphaflow_cli.model.find import model_name, run_folder
from alphaflow_cli.nn.weights import FILES, MissingWeights, missing_weights
from alphaflow_cli.recipe.plan import FEWEST_PICTURES
from alphaflow_cli.recipe.schema import Eval, LabelDraw, Metric
from alphaflow_cli.runtime.lock import NAME as LOCK
from alphaflow_cli.runtime.lock import hold
from alphaflow_cli.runtime.processes import Processes, all_or_none, check_same, check_seen
from alphaflow_cli.runtime.progress import say
from alphaflow_cli.sample.generator import DecoderChoice, Generator, decoder_pays, open_generator
from alphaflow_cli.sample.walk import Walk, plan_walk
from alphaflow_cli.text import counted

MOST_FAR = 0.01  # of the values; more is said
MIDPOINTS = tuple(round(0.1 * i, 1) for i in range(1, 10))  # of --sweep-midpoint


@dataclass(frozen=True)
class EvalRequest:
    """What the command line says about an evaluation; empty or None: as the recipe says."""

    checkpoint: str
    nfe: Sequence[int] = ()
    sampler: str = "auto"
    times: Sequence[float] | None = None
    guidance: float | None = None
    guidance_channels: int | None = None
    interval: tuple[float, float] | None = None
    sweep_midpoint: bool = False
    metrics: tuple[Metric, ...] = ()
    reference: str | None = None
    images: int | None = None
    draw: LabelDraw | None = None
    autoencoder: str = ""
    decoder: DecoderChoice = "auto"
    batch: int | None = None  # None: by the network and the device
    weights: dict[str, Path] = field(default_factory=dict)
    out: Path | None = None
    image_column: str = ""  # of pictures in parquet files
    repeat: int = 1  # sets of pictures, each of its own seeds


@dataclass(frozen=True)
class ReferenceRequest:
    """What the command line says about a reference to make."""

    source: str
    path: Path  # the file to write
    metrics: tuple[Metric, ...]  # empty: one for each network whose weights are here
    weights: dict[str, Path]
    work: Path  # folder for unfinished work
    size: int | None
    limit: int | None
    name: str
    kept: int  # features kept one by one
    batch: int | None
    crop: Crop = "square"
    image_column: str = ""  # of pictures in parquet files
    bad: Bad = "stop"  # what is done about a bad picture


@dataclass(frozen=True)
class Report:
    """What was measured, and where it was written."""

    evaluations: Sequence[Evaluation]
    results: Path
    picture: Path | None  # scores against evaluations per picture, where there are several


@dataclass(frozen=True)
class Ruler:
    """What measures: networks, their batch, the processes, and the folder that keeps unfinished work."""

    extractors: dict[str, Extractor]
    processes: Processes
    folder: Path
    batch: int | None  # None: by the network and the device
    chunk: int = CHUNK

    def start(self, source: ImageSource) -> Pass:
        """The pass over these pictures, in a folder that belongs to them and to these networks."""
        name = evaluation_id(source, self.extractors, self.chunk, self.processes.device)
        return Pass(source, self.extractors, self.folder / name, self.chunk)

    def measure(self, source: ImageSource, clock: Clock, task: str) -> tuple[Pass, dict[str, Moments]]:
        """Pass over the pictures; the first process holds the folder that is filled for all.

        The moments can be summed up only when all chunks are there, so all processes end together.
        """
        work, processes = self.start(source), self.processes
        needed = "this folder, and the pictures under one path,"
        with ExitStack() as held:
            mine = hold(work.folder, "eval or reference") if not processes.rank else nullcontext()
            all_or_none(processes, lambda: held.enter_context(mine))
            all_or_none(processes, lambda: check_seen(work.folder / LOCK, processes, needed))
            run_pass(work, self.processes, batch=self.batch, clock=clock, task=task)
            return work, gather_moments(work, self.processes)


def build_extractors(
    metrics: tuple[Metric, ...], device: torch.device, weights: dict[str, Path]
) -> tuple[dict[str, Extractor], dict[str, MissingWeights]]:
    """Make the networks that the metrics need, by their names, and say for each that lacks its weights how to get them.

    Where the weights of all are missing, that is the error.
    """
    names = sorted({NETWORK[metric] for metric in metrics})
    unused = sorted(weights.keys() - set(names))
    if unused:
        raise AlphaflowError(f"--weights {unused[0]}=…: the requested metrics use {', '.join(names)} only")
    extractors: dict[str, Extractor] = {}
    lacking: dict[str, MissingWeights] = {}
    for name in names:
        try:
            extractors[name] = build_extractor(name, device=device, weights=weights.get(name))
        except MissingWeights as fault:
            lacking[name] = fault
    if lacking and not extractors:
        raise next(iter(lacking.values()))
    return extractors, lacking


def evaluate(
    source: ImageSource, metrics: tuple[Metric, ...], ruler: Ruler, *, reference: Reference | None
) -> Evaluation | None:
    """Measure pictures: rows and warnings on the first process, None on the others."""
    check_count(source)
    check_reference(metrics, reference, ruler.extractors, source.size)
    check_crop(reference, source.crop, source.size)
    clock = Clock()
    work, moments = ruler.measure(source, clock, source.task)
    if ruler.processes.rank:
        return None
    digest, copies = content_of(work)
    titles = ", ".join(TITLE.get(metric, "precision and recall") for metric in metrics)
    say(f"computing {titles} of {source.count:,} pictures: {source.label}")
    with clock.part("distances"):
        rows = score(Measured(work, moments, reference, ruler.processes.device), metrics)
    warnings = _warnings(copies, source.count, work, dict.fromkeys(note for row in rows for note in row.notes))
    seconds = {part: round(spent, 2) for part, spent in {**source.seconds, **clock.seconds}.items()}
    processes = ruler.processes
    return Evaluation(work.folder.name, digest, rows, warnings, seconds, processes.size, processes.device.type)


def _warnings(copies: int, count: int, work: Pass, notes: Iterable[str]) -> list[str]:
    """What makes the scores of a finished pass over so many pictures doubtful, a line each."""
    warnings = [note for note in notes if note.startswith("weights are not")]
    far, plain = oddities_of(work)
    share = far / (count * 3 * work.source.size[0] * work.source.size[1])
    if copies:
        warnings.append(f"{copies:,} of {count:,} pictures are exact copies of others")
    if plain:
        warnings.append(f"{plain:,} of {count:,} pictures are of one colour throughout")
    if share > MOST_FAR:
        warnings.append(
            f"{share:.1%} of the values lay beyond ±{FAR} and were cut to [−1, 1]: the guidance is too strong, or the "
            "network hardly trained"
        )
    return warnings


def measure_reference(request: ReferenceRequest, processes: Processes) -> tuple[Reference, list[str]] | None:
    """Measure the requested pictures and save the reference, as `make_reference` does."""
    pictures = open_pictures(
        request.source, size=request.size, limit=request.limit, crop=request.crop,
        image_column=request.image_column, bad=request.bad,
    )  # fmt: skip
    metrics = request.metrics or available_metrics(request.weights)
    extractors, lacking = build_extractors(metrics, processes.device, request.weights)
    if lacking:  # a reference must have all that it was asked for
        raise next(iter(lacking.values()))
    ruler = Ruler(extractors, processes, request.work, request.batch)
    return make_reference(pictures, ruler, request.path, name=request.name, kept=request.kept)


def make_reference(
    source: ImageSource, ruler: Ruler, path: Path, *, name: str, kept: int = KEPT_FEATURES
) -> tuple[Reference, list[str]] | None:
    """Measure real pictures and save the reference; it and warnings on the first process, None on the others."""
    check_count(source)
    work, moments = ruler.measure(source, Clock(), f"reference {source.count:,}")
    if ruler.processes.rank:
        return None
    built = build_reference(work, moments, name=name, kept=kept)
    count, left_out = built.facts["count"], built.facts.get("left_out")
    check_count(source, count)
    save_reference(built, path)
    warnings = _warnings(built.facts["copies"], count, work, ())
    if left_out:
        first = left_out["first"][0]
        warnings.append(
            f"left out: {counted(left_out['count'], 'picture')}, the first {first['name']!r}: {first['why']}"
        )
    return load_reference(path), warnings


def find_reference(text: str, size: tuple[int, int], ruler: Ruler, crop: Crop | None = None) -> Reference:
    """Read a file of statistics, or measure the source of pictures once and keep what was measured beside the work."""
    path = user_path(text)
    if path.suffix in (".safetensors", ".pkl", ".pickle", ".pt") or (path.suffix == ".npz" and holds_statistics(path)):
        return load_reference(path)
    if size[0] != size[1]:
        raise AlphaflowError(
            f"{text}: would be cropped to squares, and the measured pictures have {size[0]}×{size[1]} px. Make all of "
            "one size; then alphaflow reference SOURCE -o FILE measures the real ones as they are"
        )
    source = open_pictures(text, size=size[0], limit=None, crop=crop or "square", bad="stop")
    kept = ruler.folder / f"reference-{ruler.start(source).folder.name}.safetensors"
    there = kept_reference(kept, shown=ruler.processes.rank == 0)
    if there is None:
        make_reference(source, ruler, kept, name="")
        ruler.processes.wait()
    return there or load_reference(kept)


def check_count(source: ImageSource, count: int | None = None) -> None:
    """Refuse a set of pictures that is too small for any score; `count`: of those that were not left out."""
    count = source.count if count is None else count
    if count < FEWEST_PICTURES:
        raise AlphaflowError(
            f"{source.label}: {counted(count, 'picture')}; a score needs at least {FEWEST_PICTURES} "
            "(and 50,000 to be compared with published ones)"
        )


def default_metrics(reference: str | None) -> tuple[Metric, ...]:
    """The metrics of pictures where none are named: the distances that a reference file has statistics for, else the
    recipe's defaults."""
    if reference is None or Path(reference).suffix != ".safetensors":
        return Eval().metrics
    there = load_reference(user_path(reference)).stats
    return tuple(metric for metric in NEEDS_MOMENTS if NETWORK[metric] in there)


def available_metrics(weights: dict[str, Path]) -> tuple[Metric, ...]:
    """One Fréchet distance for each network whose weights are on this machine."""
    return tuple(
        metric
        for metric in NEEDS_MOMENTS
        if NETWORK[metric] not in FILES or NETWORK[metric] in weights or missing_weights(FILES[NETWORK[metric]]) is None
    )


def evaluate_checkpoint(request: EvalRequest, processes: Processes) -> Report | None:
    """Measure a checkpoint, once for every requested walk; the report on the first process, None on the others."""
    generator = open_generator(request.checkpoint, device=processes.device, decoder=request.decoder)
    check_same(processes, generator.digest, request.checkpoint)
    published = generator.recipe.eval
    walks = choose_walks(request, generator)
    count, draw = request.images or published.images, request.draw or published.draw
    generator.expect(count, compiled=decoder_pays(generator.recipe, count), autoencoder=request.autoencoder)
    metrics, reference = request.metrics or published.metrics, request.reference or published.reference
    if not reference and set(metrics) != {"is"}:
        raise AlphaflowError(
            f"{request.checkpoint}: nothing to compare with. Give --reference FILE|SOURCE (alphaflow reference makes "
            "a file), or set eval.reference in the recipe."
        )
    name = model_name(request.checkpoint, generator.recipe)
    drawn = partial(GeneratedImages, generator, count=count, draw=draw, name=name)
    sources = [drawn(walk, first=count * number) for walk in walks for number in range(request.repeat)]
    run = run_folder(request.checkpoint)
    folder = request.out or (run / "evals" if run else Path("evals"))
    evaluations = mean_of_sets(evaluate_all(request, processes, sources, metrics, reference, folder), request.repeat)
    return write_evaluation(request, evaluations, folder, generator.digest) if evaluations else None


def evaluate_pictures(request: EvalRequest, processes: Processes) -> Report | None:
    """Measure pictures from anywhere; the report on the first process, None on the others."""
    source = open_pictures(request.checkpoint, size=None, limit=request.images, image_column=request.image_column)
    folder = request.out or Path("evals")
    check_count(source)
    metrics = request.metrics or default_metrics(request.reference)
    evaluations = evaluate_all(request, processes, [source], metrics, request.reference, folder)
    return write_evaluation(request, evaluations, folder, "") if evaluations else None


def evaluate_all(
    request: EvalRequest,
    processes: Processes,
    sources: Sequence[ImageSource],
    metrics: tuple[Metric, ...],
    reference: str | None,
    folder: Path,
) -> list[Evaluation]:
    """Measure each set of pictures by one ruler; empty on all processes but the first."""
    extractors, lacking = build_extractors(metrics, processes.device, request.weights)
    for how_to_get in lacking.values() if processes.rank == 0 else ():
        say(f"warning: not measured: {how_to_get}")
    left_out = ", ".join(metric for metric in metrics if NETWORK[metric] in lacking)
    again = [f"not measured, for want of weights: {left_out}"] if left_out else []
    metrics = tuple(metric for metric in metrics if NETWORK[metric] in extractors)
    ruler = Ruler(extractors, processes, folder, request.batch)
    compared = find_reference(reference, sources[0].size, ruler, sources[0].crop) if reference else None
    real, images = (compared.facts.get("count") if compared else None), sources[0].count
    if real and real < images and not processes.rank:
        say(f"beware: {images:,} pictures are compared with {real:,} real ones, which decide the error: take more")
    measured = [evaluate(source, metrics, ruler, reference=compared) for source in sources]
    done = [evaluation for evaluation in measured if evaluation is not None]
    return [replace(evaluation, warnings=[*evaluation.warnings, *again]) for evaluation in done]


def choose_walks(request: EvalRequest, generator: Generator) -> list[Walk]:
    """The walks to measure: one per --nfe, or the grid of --times, or one per midpoint of a sweep."""
    recipe = generator.recipe
    plan = partial(
        plan_walk,
        recipe,
        guidance=request.guidance,
        guidance_channels=request.guidance_channels,
        interval=request.interval,
    )
    if request.sweep_midpoint:
        kind = recipe.sample.two_step_sampler if request.sampler == "auto" else request.sampler
        return [plan(nfe=2, kind=kind, times=(1.0, middle, 0.0)) for middle in MIDPOINTS]
    counts = dict.fromkeys(request.nfe or recipe.eval.nfe) if request.times is None else (1,)  # each of them once
    return [plan(nfe=nfe, kind=request.sampler, times=request.times) for nfe in counts]


def write_evaluation(request: EvalRequest, evaluations: list[Evaluation], folder: Path, digest: str) -> Report:
    """Write results.json, the history and the picture: in the run folder if its own model was measured, else beside.

    Its own model has this checksum still: numbers of other weights must not stand as the run's.
    """
    run, place = run_folder(request.checkpoint), folder / evaluations[0].id
    if run is not None and request.out is None and digest:
        model = run / "model.safetensors"
        place = run if model.is_file() and sha256_of(model) == digest else place
    path = place / "results.json"
    kept = save_results(path, folder / "history.jsonl", evaluations)
    most = max(row.count for each in evaluations for row in each.rows)
    if any(row["count"] > most for each in kept for row in each["rows"]):  # their picture stays the run's
        place = folder / evaluations[0].id
    chart = score_chart(evaluations, sweep=request.sweep_midpoint) if len(evaluations) > 1 else None
    if chart is None:
        return Report(evaluations, path, None)
    picture = place / ("midpoints.png" if request.sweep_midpoint else "scores.png")
    make_folder(place)
    write_whole(picture, to_png(chart))
    return Report(evaluations, path, picture)
