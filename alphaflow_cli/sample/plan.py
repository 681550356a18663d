"""What `alphaflow sample` will draw: the request of the command line, and the plan that its checkpoint makes of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.runtime.processes import Processes, check_same
from alphaflow_cli.runtime.progress import say
from alphaflow_cli.sample.generator import GROUP, DecoderChoice, Generator, open_generator, spans_of
from alphaflow_cli.sample.grid import grid_form
from alphaflow_cli.sample.walk import LazyLabels, Walk, choose_labels, plan_walk
from alphaflow_cli.text import counted

Record = dict[str, str]  # what decides a picture's bytes: sha256 of the checkpoint, walk, precision, …


@dataclass(frozen=True)
class SampleRequest:
    """What the command line requests, as it was typed; nothing is loaded yet."""

    checkpoint: str
    seeds: Sequence[int]
    classes: str
    nfe: Sequence[int]
    sampler: str
    times: Sequence[float] | None
    guidance: float | None
    guidance_channels: int | None
    interval: tuple[float, float] | None
    weights: str
    autoencoder: str
    decoder: DecoderChoice
    compiled: bool
    out: Path | None  # a folder, or an .npz
    grid: Path | None
    latents: Path | None
    batch: int


@dataclass(frozen=True)
class Plan:
    """A request as its checkpoint makes it."""

    request: SampleRequest
    generator: Generator
    walks: Sequence[Walk]
    labels: LazyLabels
    batch: int
    processes: Processes

    def spans(self) -> Iterator[tuple[int, slice]]:
        """All batches, walk by walk, in order."""
        for walk in range(len(self.walks)):
            yield from ((walk, span) for span in spans_of(len(self.request.seeds), self.batch))

    def record(self) -> Record:
        """What decides the bytes of a seed's picture."""
        generator = self.generator
        walks = [
            f"{walk.sampler} on {', '.join(map(repr, walk.grid))}, guidance {walk.guidance!r}"
            + (f" on {walk.guidance_channels} channels" if walk.guidance_channels else "")
            + (f", told {walk.guide!r}" if walk.guide else "")
            for walk in self.walks
        ]
        named = {"autoencoder": generator.named_decoder} if generator.named_decoder else {}
        return named | {
            "checkpoint": generator.digest,
            "weights": str(generator.origin.get("weights", "ema")),
            "walk": "; ".join(walks),
            "precision": generator.precision,
            "device": generator.device.type,
        }


def check_request(request: SampleRequest) -> None:
    """Check what can be checked before anything is loaded."""
    targets = [path for path in (request.out, request.grid, request.latents) if path is not None]
    if not targets:
        raise AlphaflowError("nothing to write: give --grid FILE.png, --out DIR or FILE.npz, or --latents FILE.npy.")
    if len(set(targets)) < len(targets):
        raise AlphaflowError(f"{targets[-1]}: is named twice. Give --out, --grid and --latents a file each.")
    if request.grid is not None:
        grid_form(request.grid)


def plan_sampling(request: SampleRequest, processes: Processes) -> Plan:
    """Load the checkpoint and settle what follows from it."""
    generator = open_generator(
        request.checkpoint, device=processes.device, weights=request.weights, decoder=request.decoder
    )
    check_same(processes, generator.digest, request.checkpoint)
    if request.compiled and not generator.has_decoder:
        raise AlphaflowError("--compile: this model makes pixels without a decoder; leave it out.")
    generator.expect(0, compiled=request.compiled, autoencoder=request.autoencoder)
    if request.compiled and not generator.decoder.compiled and processes.rank == 0:
        say("--compile: nothing is compiled; that takes a bf16 decoder, a GPU, Triton and a C compiler")
    plan = partial(
        plan_walk,
        generator.recipe,
        kind=request.sampler,
        times=request.times,
        guidance=request.guidance,
        guidance_channels=request.guidance_channels,
        interval=request.interval,
    )
    walks = [plan(nfe=nfe) for nfe in request.nfe]
    batch = request.batch
    if processes.device.type == "cpu":  # where batches change no bit, a few pictures are shared out too
        groups = -(-len(request.seeds) // (GROUP * processes.size))
        batch = min(batch, GROUP * groups)
    labels = choose_labels(generator.recipe, request.seeds, request.classes, generator.class_names)
    return Plan(request, generator, walks, labels, batch, processes)


def summary(plan: Plan) -> str:
    """What will be drawn, by which weights."""
    origin = plan.generator.origin
    what = f"{counted(len(plan.request.seeds), 'picture')} by {'; '.join(str(walk) for walk in plan.walks)}"
    return f"{what}; {origin.get('weights', 'ema')} weights of step {origin.get('step', 'unknown')}"
