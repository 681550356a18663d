"""`alphaflow sample`: pictures, grids and latents in files, by one process or several.

    batch b of the pictures  →  every sink that lacks them   (process r of w draws the batches with b % w == r)

A batch that is there is not drawn again, so the same command goes on where it stopped; memory holds one batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.runtime.lock import check_lock, hold
from alphaflow_cli.runtime.processes import Processes, check_same, smaller_batch_if_full
from alphaflow_cli.runtime.progress import Progress, say
from alphaflow_cli.sample.generator import GROUP, DecoderChoice, Generator, has_labels, open_generator
from alphaflow_cli.sample.grid import grid_by_walk, grid_in_rows
from alphaflow_cli.sample.sinks import GridFile, LatentsFile, NpzFile, PictureFolder, Record, Sink, Spans
from alphaflow_cli.sample.walk import LazyLabels, Walk, draw_labels, plan_walk
from alphaflow_cli.text import shorten

COLUMNS = 10  # of a grid
MOST_SHOWN = 1000  # pictures of a grid, which is laid out in memory


@dataclass(frozen=True)
class SampleRequest:
    """What the command line asks for."""

    checkpoint: str
    seeds: Sequence[int]
    classes: str
    nfe: Sequence[int]
    sampler: str
    times: Sequence[float] | None
    guidance: float | None
    guidance_channels: int | None
    weights: str
    autoencoder: str
    decoder: DecoderChoice
    compiled: bool
    out: Path | None  # a folder, or an .npz
    grid: Path | None
    latents: Path | None
    batch: int

    @property
    def folder(self) -> Path | None:
        """Where single pictures go, if they do."""
        return None if self.out is None or self.out.suffix == ".npz" else self.out

    @property
    def files(self) -> list[Path]:
        """Everything that is one file."""
        array = self.out if self.folder is None else None
        return [path for path in (self.latents, array, self.grid) if path is not None]

    @property
    def places(self) -> list[tuple[Path, bool]]:
        """All that is written, and whether it is a file: nobody else may write there meanwhile."""
        return [*([(self.folder, False)] if self.folder else []), *((file, True) for file in self.files)]


@dataclass(frozen=True)
class Plan:
    """A request as its checkpoint makes it."""

    request: SampleRequest
    generator: Generator
    walks: Sequence[Walk]
    spans: Spans
    processes: Processes


def check_request(request: SampleRequest) -> None:
    """What can be seen before anything is loaded."""
    if request.folder is None and not request.files:
        raise AlphaflowError("nothing to write: give --grid FILE.png, --out DIR or FILE.npz, or --latents FILE.npy.")
    if len(set(request.files)) < len(request.files):
        raise AlphaflowError(f"{request.files[0]}: is named twice. Give --out, --grid and --latents a file each.")
    for path in request.files:
        if not path.parent.is_dir():
            raise AlphaflowError(f"{path}: the folder {path.parent} does not exist.")


def sample_to_files(request: SampleRequest, processes: Processes) -> list[Path]:
    """Draw what is missing; returns what was written, the file or folder a user looks at first last.

    The first process holds the places and says what there is to say; the others have nothing to return.
    """
    check_request(request)
    plan = plan_sampling(request, processes)
    sinks, first = make_sinks(plan), processes.rank == 0
    with ExitStack() as held:
        begun = False
        if first:
            say(summary(plan))
            for place, is_file in request.places:
                held.enter_context(hold(place, "sample", is_file=is_file))
            begun = True in [sink.begin() for sink in sinks]
        processes.wait()
        try:
            draw_missing(plan, sinks, begun)
        except (KeyboardInterrupt, SystemExit):
            if first:
                say("interrupted; what is drawn is kept, the same command goes on from there")
            raise
        if first:
            for sink in sinks:
                sink.finish()
    written = (request.latents, request.out, request.grid)
    return [path for path in written if path is not None] if first else []


def plan_sampling(request: SampleRequest, processes: Processes) -> Plan:
    """Load the checkpoint and settle what follows from it."""
    generator = open_generator(
        request.checkpoint, device=processes.device, weights=request.weights, decoder=request.decoder
    )
    check_same(processes, generator.digest, request.checkpoint)
    generator.expect(0, compiled=request.compiled, autoencoder=request.autoencoder)
    plan = partial(plan_walk, generator.recipe, kind=request.sampler, times=request.times)
    walks = [plan(nfe=n, guidance=request.guidance, guidance_channels=request.guidance_channels) for n in request.nfe]
    batch = request.batch
    if processes.device.type == "cpu":  # where batches change no bit, a few pictures are shared out too
        groups = -(-len(request.seeds) // (GROUP * processes.size))
        batch = min(batch, GROUP * groups)
    spans = Spans(request.seeds, choose_labels(request, generator), walks=len(walks), batch=batch)
    return Plan(request, generator, walks, spans, processes)


def summary(plan: Plan) -> str:
    """What will be drawn, by which weights."""
    origin = plan.generator.origin
    what = f"{len(plan.request.seeds):,} pictures by {'; '.join(str(walk) for walk in plan.walks)}"
    return f"{what}; {origin.get('weights', 'ema')} weights of step {origin.get('step', 'unknown')}"


def choose_labels(request: SampleRequest, generator: Generator) -> LazyLabels:
    """The named classes in turn, or one drawn per seed."""
    count = generator.recipe.data.classes
    if not request.classes:
        return LazyLabels(request.seeds, lambda places, seeds: draw_labels(seeds, count, "random"))
    if not has_labels(generator.recipe):
        raise AlphaflowError("--classes: this model was trained without labels.")
    chosen = [find_class(part.strip(), generator.class_names, count) for part in request.classes.split(",")]
    return LazyLabels(request.seeds, lambda places, seeds: [chosen[at % len(chosen)] for at in places])


def find_class(text: str, names: Sequence[str], count: int) -> int:
    """A class by its number, or by its name or one of its names."""
    if text.isdecimal() and len(text) < 20 and int(text) < count:
        return int(text)
    matches = [i for i, name in enumerate(names) if text.lower() in (part.strip().lower() for part in name.split(","))]
    if len(matches) == 1:
        return matches[0]
    known = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    raise AlphaflowError(
        f"--classes {shorten(text, 100)}: not a class of this model: 0 to {count - 1}" + (f", {known}" if names else "")
    )


def record_of(plan: Plan) -> Record:
    """What decides the bytes of a seed's picture."""
    generator = plan.generator
    walks = [
        f"{walk.sampler} on {', '.join(map(repr, walk.grid))}, guidance {walk.guidance!r}"
        + (f" on {walk.guidance_channels} channels" if walk.guidance_channels else "")
        for walk in plan.walks
    ]
    return {
        "checkpoint": generator.digest,
        "weights": str(generator.origin.get("weights", "ema")),
        "walk": "; ".join(walks),
        "precision": generator.precision,
        "device": generator.device.type,
    }


def make_sinks(plan: Plan) -> list[Sink]:
    """Everything that is to be written. A file of rows must also know whose rows they are; a picture's name says it."""
    request, count, side = plan.request, len(plan.request.seeds), plan.generator.recipe.data.image_size
    record = record_of(plan)
    of_rows = {**record, "seeds": f"{count:,}: {request.seeds}", "classes": request.classes or "drawn per seed"}
    sinks: list[Sink] = []
    if request.latents is not None:
        sinks.append(LatentsFile(request.latents, of_rows, (count, *plan.generator.shape), "<f8"))
    if request.folder is not None:
        sinks.append(PictureFolder(request.folder, record, partial(picture_name, plan), plan.spans))
    elif request.out is not None:
        sinks.append(NpzFile(request.out, of_rows, (count, side, side, 3), "|u1"))
    if request.grid is not None:
        shown = min(count, MOST_SHOWN if len(plan.walks) == 1 else 2 * COLUMNS)
        if len(plan.walks) == 1 and shown < count and plan.processes.rank == 0:
            say(f"{request.grid}: shows the first {shown:,} of {count:,} pictures")
        shape = (shown * len(plan.walks), side, side, 3)
        sinks.append(GridFile(request.grid, of_rows, shape, shown=shown, compose=partial(compose_grid, plan)))
    return sinks


def picture_name(plan: Plan, walk: int, seed: int, label: int) -> str:
    """seed-000012-class-3.png; the NFE in front where there are several."""
    name = f"seed-{seed:06d}" + (f"-class-{label}" if has_labels(plan.generator.recipe) else "")
    return f"nfe-{plan.walks[walk].nfe}-{name}.png" if len(plan.walks) > 1 else f"{name}.png"


def compose_grid(plan: Plan, pictures: np.ndarray) -> bytes:
    """One walk: pictures in reading order. Several: the same seeds in rows, a walk per row."""
    rows = pictures.reshape(len(plan.walks), -1, *pictures.shape[1:])
    known, labels = plan.generator.class_names, plan.spans.labels[: rows.shape[1]]
    names = [known[label] if label < len(known) else str(label) for label in labels]
    shown = names if has_labels(plan.generator.recipe) else [""] * len(names)
    if len(plan.walks) == 1:
        return grid_in_rows(list(rows[0]), COLUMNS, shown)
    drawn = [(f"{walk.nfe} NFE", list(each)) for walk, each in zip(plan.walks, rows, strict=True)]
    return grid_by_walk(drawn, 2 * COLUMNS, shown)


def draw_missing(plan: Plan, sinks: Sequence[Sink], begun: bool) -> None:
    """Draw this process's batches that a sink lacks; the first process shows the progress of all."""
    request, processes = plan.request, plan.processes
    total = len(request.seeds) * len(plan.walks)
    done = sum(span.stop - span.start for walk, span in plan.spans if _is_done(sinks, walk, span)) if begun else 0
    if done:
        say(f"{done:,} of {total:,} pictures were drawn before: going on")
    decoded = request.out is not None or request.grid is not None
    with Progress("sample", total, unit="img", done=done, shown=processes.rank == 0) as bar:
        for number, walk in enumerate(plan.walks):
            with smaller_batch_if_full(request.batch):
                labels, mine = plan.spans.labels, _missing_spans(plan, sinks, number)
                for drawn in plan.generator.stream(request.seeds, labels, walk, mine, decoded=decoded):
                    for place, is_file in request.places:
                        check_lock(place, is_file=is_file)
                    for sink in sinks:
                        sink.put(number, drawn)
                    bar.advance(min(len(drawn.seeds) * processes.size, total - bar.done))
        processes.wait()
        bar.advance(total - bar.done)


def _missing_spans(plan: Plan, sinks: Sequence[Sink], number: int) -> Iterator[slice]:
    """This process's batches of a walk that are not whole in every sink."""
    shares = islice(plan.spans, plan.processes.rank, None, plan.processes.size)
    return (span for walk, span in shares if walk == number and not _is_done(sinks, walk, span))


def _is_done(sinks: Sequence[Sink], walk: int, span: slice) -> bool:
    return all(sink.has(walk, span) for sink in sinks)
