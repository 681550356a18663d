"""What follows from a recipe, by arithmetic alone: phases in steps, rows, images, parameters, memory, disk. No torch.

The parameter count is exact. Memory is an estimate: the bytes kept for the backward pass were counted on this
project's DiT (autograd's saved tensors, 256 tokens) and grow with tokens · blocks · dim; kernels add their workspace.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from alphaflow_cli.core.alpha import clamped, equal_rows, schedule_value
from alphaflow_cli.core.rates import learning_rate
from alphaflow_cli.recipe.schema import Guidance, Recipe, Schedule, resolve_step

TIME_FEATURES = 256  # sines and cosines that a time embedder is fed
KEPT_BYTES = {  # per token · block · dim: (apart from the MLP, per unit of mlp_ratio)
    ("dit", "bf16"): (32, 4),
    ("dit", "fp32"): (48, 8),
    ("dit", "fp64"): (96, 16),
    ("modern", "bf16"): (54, 8),
    ("modern", "fp32"): (68, 16),
    ("modern", "fp64"): (136, 32),
}
KEPT_OUTSIDE = 13  # the same, outside the blocks, per token · dim
KEPT_CHECKPOINT = 4  # the same, per block, with gradient_checkpointing: the block's fp32 input
IMAGENET_TRAIN = 1_281_167  # pictures
FEWEST_PICTURES = 100  # below it nothing is printed that looks like a score

BF16_ON_CPU = "bf16 is slower than fp32 on most CPUs: --set train.precision=fp32"
EVERY_TIME = (-1.0, 2.0)  # an interval whose ends no time reaches
COARSE_BELOW = 0.05  # the α below which bf16 makes more than a tenth of a batch's gradient (docs/understanding.md)
PhaseKind = Literal["flow", "between", "derivative"]


@dataclass(frozen=True)
class Phase:
    """The steps `first` ≤ step < `until` in which the r < t rows have one kind of target."""

    kind: PhaseKind
    first: int
    until: int


def value_at(schedule: Schedule, steps: int) -> Callable[[int], float]:
    """The schedule of a run of `steps` steps, as a function of the 0-based step."""
    start, end = resolve_step(schedule.start, steps), resolve_step(schedule.end, steps)

    def at(step: int) -> float:
        return schedule_value(
            step,
            kind=schedule.kind,
            initial=schedule.initial,
            final=schedule.final,
            start=start,
            end=end,
            gamma=schedule.gamma,
            clamp=schedule.clamp,
        )

    return at


def schedules_of(recipe: Recipe) -> tuple[tuple[str, Schedule], ...]:
    """The schedules of a recipe by the names of their fields."""
    return (("alpha", recipe.alpha), ("times.equal_share", recipe.times.equal_share))


def end_values(schedule: Schedule) -> tuple[float, ...]:
    """The values a schedule begins and ends with, as they are written; one where it is constant."""
    return (schedule.initial,) if schedule.kind == "constant" else (schedule.initial, schedule.final)


def alpha_at(recipe: Recipe) -> Callable[[int], float]:
    return value_at(recipe.alpha, recipe.train.steps)


def equal_share_at(recipe: Recipe) -> Callable[[int], float]:
    return value_at(recipe.times.equal_share, recipe.train.steps)


def learning_rate_at(recipe: Recipe) -> Callable[[int], float]:
    optim, steps = recipe.optim, recipe.train.steps

    def at(step: int) -> float:
        return learning_rate(
            step,
            lr=optim.lr,
            final_lr=optim.final_lr,
            warmup_steps=optim.warmup_steps,
            warmup_from=optim.warmup_from,
            steps=steps,
        )

    return at


def phase_kind(alpha: float) -> PhaseKind:
    """What a value of alpha costs: 1 nothing more than flow matching, 0 a derivative, between them a forward."""
    return "flow" if alpha == 1 else "derivative" if alpha == 0 else "between"


def is_small(alpha: float, below: float) -> bool:
    """Whether 0 < α < `below`: there a target is u and α times a difference, whose gradient bf16 would round away."""
    return 0.0 < alpha < below


def is_precise(recipe: Recipe, alpha: float) -> bool:
    """Whether a run in bf16 computes its steps at this alpha in fp32."""
    return recipe.train.precision == "bf16" and is_small(alpha, recipe.train.precise_below)


def phases(recipe: Recipe) -> list[Phase]:
    """The run cut where the kind of target changes."""
    return _cut(recipe, phase_kind)


def stretches(recipe: Recipe) -> list[Phase]:
    """The phases, cut once more where the precision changes: steps of one stretch take the same time and memory."""
    return _cut(recipe, lambda alpha: (phase_kind(alpha), is_precise(recipe, alpha)))


def _cut(recipe: Recipe, kind_of: Callable[[float], object]) -> list[Phase]:
    """The run cut where this changes with alpha; schedules are monotone, so each cut is found by bisection."""
    at, steps = alpha_at(recipe), recipe.train.steps
    cut: list[Phase] = []
    first = 0
    while first < steps:
        kind = kind_of(at(first))
        low, high = first, steps  # at(low) has this kind, high has not (or is the end)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if kind_of(at(middle)) == kind else (low, middle)
        cut.append(Phase(phase_kind(at(first)), first, high))
        first = high
    return cut


def tokens(recipe: Recipe) -> int:
    """The patches of one picture, each of which is a token."""
    return int(recipe.data.latent_size // recipe.model.patch) ** 2


def all_tokens(recipe: Recipe) -> int:
    """The tokens of one row inside the blocks: the patches, and those before them."""
    return tokens(recipe) + sum(prefix_tokens(recipe).values())


def prefix_tokens(recipe: Recipe) -> dict[str, int]:
    """How many tokens stand before the patches for each input, in their order; empty with adaLN."""
    model, counts = recipe.model, recipe.model.tokens
    if model.conditioning == "adaln":
        return {}
    inputs = {"label": counts.label} if label_rows(recipe) else {}
    inputs |= {"scale": counts.scale} if "scale" in model.inputs else {}
    inputs |= {"low": counts.interval, "high": counts.interval} if "interval" in model.inputs else {}
    return inputs | {"time": counts.time}


def has_null_label(recipe: Recipe) -> bool:
    """Whether the network learns what "no label" means: guidance at sampling needs it."""
    return recipe.data.classes > 0 and recipe.guidance.label_dropout > 0


def label_rows(recipe: Recipe) -> int:
    """Rows of the label table: the classes, then the null row when labels are dropped in training."""
    return recipe.data.classes + has_null_label(recipe)


def null_label(recipe: Recipe) -> int:
    """The number of the null label: the last row of the table, 0 for a network without labels."""
    return max(label_rows(recipe) - 1, 0)


def is_guided(omega: float, kappa: float) -> bool:
    """Whether these weights of ṽ build guidance into the network."""
    return (omega, kappa) != (1.0, 0.0)


def draws_scale(recipe: Recipe) -> bool:
    """Whether each row of a batch draws a guidance scale, which the network is told: then sampling chooses it."""
    return recipe.guidance.scale == "drawn"


def needs_velocities(mix: Guidance) -> tuple[bool, bool]:
    """Whether ṽ needs the network's own velocities for y, and for ∅; rounding noise of a weight counts as zero."""
    drawn = mix.scale == "drawn"
    return drawn or mix.kappa != 0.0, drawn or abs(1.0 - mix.omega - mix.kappa) >= 1e-12


def guided_times(mix: Guidance) -> tuple[float, float]:
    """The times between which guidance acts, both ends left out: all times where guidance fades."""
    return (mix.t_min, mix.t_max) if mix.fade_from is None else EVERY_TIME


def dropout_times(mix: Guidance) -> tuple[float, float]:
    """The times between which labels are dropped: those of guidance, or all where it has no one interval."""
    return EVERY_TIME if mix.drop == "equal" or mix.interval == "drawn" else guided_times(mix)


def effective_scale(omega: float, kappa: float) -> float:
    """ω / (1 − κ), the guidance scale that training builds in; 1 is none."""
    return omega / (1.0 - kappa)


def needs_many_steps(recipe: Recipe) -> bool:
    """Whether the network is published as a plain velocity field, which a few steps cannot follow."""
    return recipe.sample.sampler in ("flow", "heun")


def parameter_count(recipe: Recipe) -> int:
    """Parameters of the network, the positional table and the velocity's blocks included."""
    model, dim = recipe.model, recipe.model.dim
    patch_values, adaln = model.patch**2 * recipe.data.channels, model.conditioning == "adaln"
    embed = _linear(patch_values, dim) + label_rows(recipe) * dim + sum(prefix_tokens(recipe).values()) * dim
    embed += tokens(recipe) * dim if model.block == "dit" else 0
    embedders = (2 if adaln else 1) + ("scale" in model.inputs) + 2 * ("interval" in model.inputs)
    embed += embedders * (_linear(TIME_FEATURES, dim) + _linear(dim, dim))
    final = _linear(dim, patch_values) + (_linear(dim, 2 * dim) if adaln else dim)
    head = 0 if model.velocity_head is None else final + model.velocity_head * _block_parameters(recipe)
    return embed + model.depth * _block_parameters(recipe) + final + head


def _block_parameters(recipe: Recipe) -> int:
    model, dim, hidden = recipe.model, recipe.model.dim, hidden_channels(recipe)
    block = _linear(dim, 6 * dim) if model.conditioning == "adaln" else 4 * dim  # or two norms and two gates
    if model.block == "modern":
        return block + 4 * dim * dim + 3 * dim * hidden + 2 * (dim // model.heads)
    block += _linear(dim, 3 * dim) + _linear(dim, dim) + _linear(dim, hidden) + _linear(hidden, dim)
    return block + (4 * (dim // model.heads) if model.qk_norm else 0)


def hidden_channels(recipe: Recipe) -> int:
    """Channels inside a block's MLP."""
    return int(recipe.model.dim * recipe.model.mlp_ratio)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def state_bytes(recipe: Recipe) -> int:
    """Weights, gradient, Adam's two moments and the averages, plus the bf16 copy that autocast keeps."""
    copies, precision = 4 + len(recipe.ema.half_lives), recipe.train.precision
    each = 8 if precision == "fp64" else 4
    return parameter_count(recipe) * (each * copies + (2 if precision == "bf16" else 0))


def activation_bytes(recipe: Recipe) -> int:
    """Kept for the backward pass, for one row of the batch; in a run in bf16 with steps in fp32, as in these."""
    model, at = recipe.model, alpha_at(recipe)
    wide = any(is_precise(recipe, at(part.first)) for part in stretches(recipe))
    base, per_ratio = KEPT_BYTES[model.block, "fp32" if wide else recipe.train.precision]
    block, blocks = base + per_ratio * model.mlp_ratio, model.depth + (model.velocity_head or 0)
    inside = block + KEPT_CHECKPOINT * blocks if recipe.train.gradient_checkpointing else block * blocks
    return int((inside + KEPT_OUTSIDE) * all_tokens(recipe) * model.dim)


def latent_bytes(recipe: Recipe) -> int:
    """One picture in the store: the pixels as bytes, or mean and std in fp16, twice with its mirror image.

    Pixels are mirrored when they are read.
    """
    data = recipe.data
    values = data.channels * data.latent_size**2
    return values if data.autoencoder == "none" else 4 * values * (2 if data.flips else 1)


def checkpoint_bytes(recipe: Recipe) -> int:
    """One kept checkpoint: raw weights and the averages, each a file to sample from."""
    return 4 * parameter_count(recipe) * (1 + len(recipe.ema.half_lives))


def saved_state_bytes(recipe: Recipe) -> int:
    """What a run goes on from, of which it keeps the newest: a checkpoint and Adam's two moments."""
    return checkpoint_bytes(recipe) + 8 * parameter_count(recipe)


def kept_checkpoints(recipe: Recipe) -> int:
    """Checkpoints on disk at the end: the newest, and the milestones."""
    train = recipe.train
    milestones = train.steps // train.milestone_every if train.milestone_every else 0
    return milestones + min(train.keep, -(-train.steps // train.save_every))


def warnings_of(recipe: Recipe, *, on_cpu: bool = False) -> list[str]:
    """What is allowed, but might not be meant; `on_cpu`: of a run on a machine without a GPU."""
    warnings, steps = [], recipe.train.steps
    if recipe.optim.warmup_steps >= steps:
        reached = learning_rate_at(recipe)(steps - 1)
        warnings.append(f"the warm-up ({recipe.optim.warmup_steps:,} steps) outlasts the run: lr reaches {reached:.3g}")
    if recipe.alpha.unfinished:
        warnings.append(f"alpha ends the run at {alpha_at(recipe)(steps - 1):.4g}, not at {recipe.alpha.final:g}")
    warnings += _skipped_phases(recipe)
    last = clamped(recipe.times.equal_share.final, recipe.times.equal_share.clamp)
    if recipe.times.equal_share.kind != "constant" and equal_rows(recipe.train.batch, last) == 0:
        warnings.append("equal_share ends with no r = t row at all")
    ramped = recipe.ema.ramp * steps
    what = f"ema.ramp shortens it to {ramped:,.3g}" if ramped else "much of it stays what the run began with"
    warnings += [
        f"the average of half-life {life:,g} steps outlasts the run of {steps:,}: {what}"
        for life in recipe.ema.half_lives
        if life >= steps
    ]
    embedded, _, count = recipe.eval.reference.partition(":")
    if embedded and count.isdecimal() and int(count) < recipe.eval.images:
        images = f"{recipe.eval.images:,} pictures"
        warnings.append(f"eval compares {images} with the {int(count):,} of {recipe.eval.reference}: make it larger")
    lowest = _lowest_rounded(recipe)
    if lowest is not None and lowest < COARSE_BELOW:
        warnings.append(
            f"bf16 while alpha falls to {lowest:.3g}: below about {COARSE_BELOW:g} rounding eats much of the gradient; "
            f"--set train.precise_below={COARSE_BELOW:g} computes these steps in fp32"
        )
    if on_cpu and recipe.train.precision == "bf16":
        warnings.append(BF16_ON_CPU)
    return warnings


def _lowest_rounded(recipe: Recipe) -> float | None:
    """The least α > 0 at which a run's products are in bf16; None where there is none."""
    if recipe.train.precision != "bf16":
        return None
    at, between = alpha_at(recipe), [phase for phase in phases(recipe) if phase.kind == "between"]
    ends = [at(step) for phase in between for step in (phase.first, phase.until - 1)]
    if not ends or max(ends) < recipe.train.precise_below:
        return None
    return max(min(ends), recipe.train.precise_below)


def _skipped_phases(recipe: Recipe) -> list[str]:
    """The kinds of target that a schedule of alpha passes through, and for which this run has no step."""
    alpha, there = recipe.alpha, {phase.kind for phase in phases(recipe)}
    if alpha.kind == "constant" or alpha.unfinished:
        return []
    between: list[PhaseKind] = [] if alpha.kind == "step" else ["between"]
    ends = [phase_kind(clamped(value, alpha.clamp)) for value in (alpha.initial, alpha.final)]
    words = {"flow": "α = 1", "between": "0 < α < 1", "derivative": "α = 0"}
    missing = [words[kind] for kind in dict.fromkeys([ends[0], *between, ends[1]]) if kind not in there]
    steps = f"{recipe.train.steps:,} step{'s' * (recipe.train.steps > 1)}"
    return [f"none of the {steps} has {what}: alpha's schedule leaves that phase out" for what in missing]
