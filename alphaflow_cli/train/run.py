"""A run in memory: everything the loop changes or reads, made from a recipe, saved, and put back from a saved state.

`build_run` makes one at step 0, `Run.save` and `Run.restore` carry it over to the next start of the program, and
`start_from` (--init-from) lets it begin with another checkpoint's weights.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from alphaflow_cli import __version__
from alphaflow_cli.core.draws import mix_seed
from alphaflow_cli.data.batches import LatentStream
from alphaflow_cli.data.manifest import record_to_dict
from alphaflow_cli.data.store import class_names
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.model.build import DTYPES, build_network
from alphaflow_cli.model.checkpoint import Checkpoint, load_checkpoint
from alphaflow_cli.model.compiling import compile_blocks
from alphaflow_cli.model.find import find_checkpoint, step_of
from alphaflow_cli.recipe import diff_recipes
from alphaflow_cli.recipe.plan import alpha_at, equal_share_at
from alphaflow_cli.recipe.schema import Recipe
from alphaflow_cli.runtime.lock import check_lock
from alphaflow_cli.runtime.processes import World
from alphaflow_cli.runtime.threads import Threads
from alphaflow_cli.train import state
from alphaflow_cli.train.graphs import StepGraphs
from alphaflow_cli.train.journal import Sums
from alphaflow_cli.train.optimise import MOMENTS, Optimiser
from alphaflow_cli.train.parallel import Split, has_buckets, wrap_network
from alphaflow_cli.train.step import Objective

SAME_MEANING = (
    "model.heads",
    "model.second_time",
    "model.prediction",
    "model.t_floor",
    "model.tokens",
    "data.autoencoder",
    "data.normalise",
    "data.scale",
    "data.shift",
    "data.channel_",
)


@dataclass
class Run:
    """What the steps change, and what they read. All methods that say so must be called by every process."""

    recipe: Recipe
    folder: Path
    world: World
    stream: LatentStream
    split: Split
    net: nn.Module  # bare: targets see it
    wrapped: nn.Module  # the loss sees it
    optimiser: Optimiser
    sums: Sums
    objective: Objective
    class_names: list[str]
    init_from: str = ""  # whose weights it began with
    threads: Threads | None = None  # that compute on a CPU; None on a GPU
    graphed: bool | None = False  # whether its steps are to be CUDA graphs; None: as is measured at the start
    graphs: StepGraphs | None = None  # those graphs; None: every step is launched
    may_shrink: bool = False  # whether micro-batches become smaller when the memory runs out
    step: int = 0  # steps done
    retries: int = 0  # rolls back so far; each gives the steps after it other draws
    checked: bool = False  # whether the processes' gradients were compared

    def __post_init__(self) -> None:
        self.alpha_at, self.equal_share_at = alpha_at(self.recipe), equal_share_at(self.recipe)
        self.dtype = DTYPES[self.recipe.train.precision]

    @property
    def compiled(self) -> bool:
        """Whether the network's blocks are compiled."""
        return bool(self.net.compiled)

    @property
    def seed(self) -> int:
        """The seed of the draws: the recipe's, until a roll back wants other draws."""
        seed = self.recipe.train.seed
        return mix_seed(seed, self.retries) if self.retries else seed

    def facts(self) -> state.StateFacts:
        """What a saved state records beside its tensors."""
        return state.StateFacts(
            step=self.step,
            retries=self.retries,
            accumulation=self.split.accumulation,
            processes=self.world.size,
            store=self.stream.store.manifest.digest,
            init_from=self.init_from,
            compiled=self.compiled if self.recipe.train.compile == "auto" else None,
            graphs=self.graphs is not None if self.recipe.train.graphs == "auto" else None,
            threads=self.threads.count if self.threads else None,
        )

    def model(self, which: int = 0) -> Checkpoint:
        """A running average, ready to be saved or sampled by the first process. All processes must call it."""
        values = self.optimiser.average(which, keep=self.world.is_main)
        return self._checkpoint(values, weights="ema", half_life=self.recipe.ema.half_lives[which])

    def models(self) -> dict[str, Checkpoint]:
        """The files of a checkpoint: the first average, the others, the raw weights. All processes must call it."""
        lives = self.recipe.ema.half_lives
        names = ["model.safetensors", *(f"ema-{text}.safetensors" for text in texts_apart(lives[1:]))]
        averages = {name: self.model(i) for i, name in enumerate(names)}
        raw = self.optimiser.raw(keep=self.world.is_main)
        return averages | {"raw.safetensors": self._checkpoint(raw, weights="raw", half_life=0.0)}

    def _checkpoint(self, values: dict[str, torch.Tensor], *, weights: str, half_life: float) -> Checkpoint:
        store = self.stream.store
        origin = {
            "step": self.step,
            "images_seen": self.step * self.recipe.train.batch,
            "weights": weights,
            "half_life": half_life,
            "init_from": self.init_from,
            "autoencoder": record_to_dict(store.plan.autoencoder),
            "crop": store.plan.crop,
            "class_names": self.class_names,
            "versions": {
                "alphaflow": __version__,
                "torch": version("torch"),
                "python": platform.python_version(),
            },
        }
        ready = {name: value.detach().float() for name, value in values.items()}
        return Checkpoint(ready, self.recipe, self.stream.mean, self.stream.std, origin)

    def save(self) -> None:
        """Write the checkpoint, then the state that counts on it, then remove older ones. All processes call it."""
        sums, models = self.world.gather(self.sums.values), self.models()
        tensors = self.optimiser.tensors(keep=self.world.is_main) | {"sums": sums}
        if self.world.is_main:
            self._write(models, tensors)
        self.world.wait()

    def _write(self, models: dict[str, Checkpoint], tensors: dict[str, torch.Tensor]) -> None:
        train = self.recipe.train
        check_lock(self.folder)
        try:
            state.save_models(self.folder, self.step, models)
            state.save_state(self.folder, tensors, self.facts())
            state.prune(self.folder, self.step, keep=train.keep, milestone_every=train.milestone_every)
        except OSError as error:
            where = error.filename or self.folder
            raise AlphaflowError(f"{where}: cannot be written: {error.strerror}. What was there is kept.") from error

    def restore(self, path: Path) -> None:
        """Put weights, optimiser, counters and step back as a saved state has them, after checking that it fits."""
        facts, tensors = state.read_facts(path), state.read_tensors(path)
        self._check_store(path, facts.store)
        self._check_tensors(path, tensors)
        self.optimiser.load(tensors)
        sums = tensors["sums"].to(self.world.device)  # (processes, n)
        mine = sums[self.world.rank] if len(sums) == self.world.size else sums.sum(0) * self.world.is_main
        self.sums.values.copy_(mine)
        self.step, self.retries = facts.step, max(facts.retries, self.retries)
        self.init_from = facts.init_from

    def _check_tensors(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Refuse a state whose tensors are not this run's: a copy would silently stretch one of another shape."""
        shapes = {name: parameter.shape for name, parameter in self.optimiser.parameters.items()}
        kinds = ["raw", *(f"ema{i}" for i in range(len(self.recipe.ema.half_lives)))]
        wanted = {f"{kind}.{name}": shape for kind in kinds for name, shape in shapes.items()}
        if any(name.startswith("adam.step.") for name in tensors):
            trained = [name for name, parameter in self.optimiser.parameters.items() if parameter.requires_grad]
            wanted |= {f"adam.{kind}.{name}": shapes[name] for kind in MOMENTS for name in trained}
        wrong = [name for name, shape in wanted.items() if name not in tensors or tensors[name].shape != shape]
        wrong += [name for name in ("counters", "sums") if name not in tensors]
        if wrong:
            raise AlphaflowError(
                f"{path}: not a state of this recipe: {wrong[0]} is missing or of another shape. Go on from the "
                f"weights: --init-from {self.folder} with another --out."
            )

    def _check_store(self, path: Path, digest: str) -> None:
        """Refuse to go on with other latents than the run was trained on: that would be another run."""
        store = self.stream.store
        if digest != store.manifest.digest:
            raise AlphaflowError(
                f"{path}: this run was trained on a latent store with the digest {digest[:12]}, {store.path} has "
                f"{store.manifest.digest[:12]}. Give the same data (--data DIR), or begin another run from these "
                f"weights: --init-from {self.folder} --out RUN"
            )


def texts_apart(numbers: Sequence[float]) -> list[str]:
    """Write numbers for file names: `50`, `0.5`; with every digit where two short texts would be the same."""
    short = [f"{number:g}" for number in numbers]
    return [text if short.count(text) == 1 else repr(number) for text, number in zip(short, numbers, strict=True)]


def newest_for_all(folder: Path, world: World) -> Path | None:
    """The saved state to go on from, the same on every process (the first one looks); None before the first save."""
    newest = state.newest_state(folder) if world.is_main else None
    step = int(world.largest(step_of(newest) if newest else -1))
    return state.state_file(folder, step) if step >= 0 else None


def build_run(recipe: Recipe, folder: Path, *, world: World, stream: LatentStream, split: Split, compiled: bool) -> Run:
    """Make the network, its wrapped form, the optimiser and the rest of a run at step 0."""
    net = build_network(recipe).to(world.device, DTYPES[recipe.train.precision])
    if compiled:
        compile_blocks(net)
    wrapped = wrap_network(net, world, recipe.train.strategy)
    return Run(
        recipe=recipe,
        folder=folder,
        world=world,
        stream=stream,
        split=split,
        net=net,
        wrapped=wrapped,
        optimiser=Optimiser(net, recipe, in_buckets=has_buckets(recipe.train.strategy, world.size)),
        sums=Sums(world.device, has_head=recipe.model.velocity_head is not None),
        objective=Objective.of(recipe),
        class_names=class_names(stream.store.path),
    )


def check_start(recipe: Recipe, address: str) -> None:
    """Refuse a checkpoint that the run cannot begin with, before anything is made for it."""
    checkpoint = load_checkpoint(find_checkpoint(address))
    with torch.device("meta"):  # shapes without memory
        net = build_network(recipe)
    _matched(checkpoint, dict(net.named_parameters()), address)


def _matched(checkpoint: Checkpoint, ours: Mapping[str, torch.Tensor], address: str) -> list[str]:
    """The names of the weights to take; only a label table may be of another size."""
    matched = [n for n, w in ours.items() if n in checkpoint.weights and checkpoint.weights[n].shape == w.shape]
    fresh = [name for name in ours if name not in matched]
    misfits = [name for name in fresh if name in checkpoint.weights and name != "label_embed.weight"]
    if misfits or not matched:
        shapes = [f"{n}: {tuple(checkpoint.weights[n].shape)} there, {tuple(ours[n].shape)} here" for n in misfits[:4]]
        raise AlphaflowError(
            f"{address}: another architecture. " + "; ".join(shapes or ["no weight has a name we know"])
        )
    return matched


@torch.no_grad()
def start_from(run: Run, address: str) -> list[str]:
    """Begin with a checkpoint's weights, a label table of another size excepted; returns lines about what was taken."""
    checkpoint, ours = load_checkpoint(find_checkpoint(address)), run.optimiser.parameters
    copied = _velocity_of_u(checkpoint, run.recipe)
    matched = _matched(checkpoint, ours, address)
    fresh = [name for name in ours if name not in matched]
    left_out = [name for name in checkpoint.weights if name not in ours]
    run.optimiser.start_from({name: checkpoint.weights[name] for name in matched})
    run.init_from = address
    lines = [
        f"{address}: {len(matched) - copied} of {len(ours)} tensors taken "
        f"(step {checkpoint.origin.get('step', 'unknown')})"
    ]
    if fresh:
        lines.append(f"freshly initialised: {', '.join(fresh)}")
    if copied:
        lines.append(f"the velocity, which is not in the checkpoint, begins as u: {copied} tensors copied")
    if left_out:
        lines.append(f"left out of the checkpoint: {', '.join(left_out)}")
    return [*lines, *_other_meanings(checkpoint.recipe, run.recipe)]


def _velocity_of_u(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """Put copies of u's last blocks and layer into weights without a velocity head, for a network that has one.

    So a network whose velocity's blocks were not kept, as in released files, goes on with v̂ = u. Returns their number.
    """
    weights, head = checkpoint.weights, recipe.model.velocity_head
    if head is None or any(name.startswith("velocity_final.") for name in weights):
        return 0
    shared, copies = recipe.model.depth - head, {}
    for name, value in weights.items():
        stack, _, rest = name.partition(".")
        number, _, inner = rest.partition(".")
        if stack == "final":
            copies[f"velocity_final.{rest}"] = value
        elif stack == "blocks" and int(number) >= shared:
            copies[f"velocity_blocks.{int(number) - shared}.{inner}"] = value
    weights.update(copies)
    return len(copies)


def _other_meanings(theirs: Recipe, ours: Recipe) -> list[str]:
    """Settings that give the same weights another meaning there than here."""
    return [
        f"beware: {field}: {there} in the checkpoint, {here} in this run; training has to adapt"
        for field, there, here in diff_recipes(theirs, ours)
        if field.startswith(SAME_MEANING)
    ]
