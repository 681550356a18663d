"""How fast a run is on one H100, and whether torch.compile pays: measured figures, and arithmetic from them. No torch.

Measured once, on one H100 80 GB with torch 2.11 in bf16: B/2 with batch 256 and XL/2 with batch 96, compiled, as shares
of the card's 989 TFLOP/s; DiT-S/2 on 32 px, not compiled. A network of another size is taken as the nearest of these.
Nothing was measured on an H200: it has the same arithmetic, and what waits for memory is as much faster as its memory.
Nothing was measured on several GPUs: they share the rows, and then exchange the gradients over the link, which may
take place beside the backward pass, but is counted in full.

The arithmetic of a step, in units of one row's forward: 3 of a graded row (forward and backward), 1 of a row of an
extra call, 1.05 of a riding tangent. A velocity head's own blocks count on the graded rows only.
"""

from dataclasses import dataclass

from alphaflow_cli.core.alpha import equal_rows
from alphaflow_cli.recipe.plan import (
    PhaseKind,
    all_tokens,
    alpha_at,
    equal_share_at,
    hidden_channels,
    is_precise,
    needs_velocities,
    parameter_count,
    phase_kind,
    stretches,
    tokens,
)
from alphaflow_cli.recipe.schema import Recipe

TANGENT = 1.05  # forwards of a row that a riding tangent costs
PEAK = 989e12  # FLOP/s of an H100 (SXM) in bf16, by its data sheet
WAITING = 0.37  # of a compiled step's time: kernels that wait for memory (B/2 at α = 1: 37 of 101 ms, measured)
TF32 = 2.0  # times that a step in TF32 takes one in bf16: half the products per second, twice the bytes, by the sheet
FP32 = (1 - WAITING) * 989 / 67 + WAITING * 2  # the same of float32 without TF32
BANDWIDTH = 4.8 / 3.35  # of an H200 over an H100, by the data sheets; their arithmetic is the same
LINK = 450e9  # bytes/s in one direction between the H100s of one machine, by the same sheet
TRAINER = 1.02  # what the trainer takes, over the bare step (measured)
SAVED = 0.046 / 35.3e12  # seconds per FLOP that compiling saves: a step of B/2, .147 s before and .101 after (measured)
SAVED_LAUNCHES = 0.0036  # seconds per step, at least: a tiny network's step, 10.4 ms before and 6.8 after (measured)
SAVED_REPLAYED = 0.0003  # the same where the step is a CUDA graph: 1.28 ms before and .95 after (measured)
GRAPH_FLOPS = 2e12  # of a step: from here on any GPU computes for longer than the host takes to launch it
COMPILING = 20.0  # seconds per phase at most (measured: 3 to 20)
WORTH = 2  # times the cost that must be saved: the probe of memory compiles too, and a run may end early
SMALL, LARGE = 60_000_000, 600_000_000  # parameters: below, S/2 is the nearest measured network; from there on, XL/2
UTILISATION: dict[str, dict[tuple[PhaseKind, bool], float]] = {  # (phase, guided) → share of the peak
    "B/2": {
        ("flow", False): 0.357,
        ("between", False): 0.365,
        ("derivative", False): 0.314,
        ("flow", True): 0.367,
        ("between", True): 0.373,
        ("derivative", True): 0.336,
    },
    "XL/2": {("flow", True): 0.405, ("derivative", True): 0.382},
}
NOT_COMPILED = 0.202  # the same of DiT-S/2, in every phase: `cifar10` makes 13 steps per second (measured)
NETWORKS = {"B/2": (768, 12, 256), "XL/2": (1152, 28, 256), "S/2": (384, 12, 256)}  # channels, blocks, tokens


def forward_flops(recipe: Recipe) -> float:
    """Floating-point operations of one row's forward: the products of blocks and final layer, 2 per multiply-add.

    It is that of u; the velocity of a network with such a head takes as much, by other blocks.
    """
    model, d = recipe.model, recipe.model.dim
    modulations = 2 * 6 * model.depth * d * d if model.conditioning == "adaln" else 0
    patches = 2 * tokens(recipe) * d * model.patch**2 * recipe.data.channels
    return model.depth * _block_flops(recipe) + modulations + patches + _final_flops(recipe)


def velocity_flops(recipe: Recipe) -> float:
    """The same of the velocity's own blocks and final layer, which a row that is learnt from goes through as well."""
    model, d = recipe.model, recipe.model.dim
    if model.velocity_head is None:
        return 0.0
    modulations = 2 * 6 * d * d if model.conditioning == "adaln" else 0
    return model.velocity_head * (_block_flops(recipe) + modulations) + _final_flops(recipe)


def _block_flops(recipe: Recipe) -> float:
    n, d = all_tokens(recipe), recipe.model.dim
    layers = 3 if recipe.model.block == "modern" else 2  # of the MLP
    return n * (2 * (4 * d * d + layers * d * hidden_channels(recipe)) + 4 * n * d)  # qkv, proj, MLP; q kᵀ and p v


def _final_flops(recipe: Recipe) -> float:
    model, d = recipe.model, recipe.model.dim
    modulations = 2 * 2 * d * d if model.conditioning == "adaln" else 0
    return modulations + 2 * tokens(recipe) * d * model.patch**2 * recipe.data.channels


def is_guided_run(recipe: Recipe) -> bool:
    """Whether guidance takes part in training: then a step asks the network about more rows."""
    return recipe.data.classes > 0 and any(needs_velocities(recipe.guidance))


def asks_tangent(recipe: Recipe, alpha: float) -> bool:
    """Whether z moves along the network's own velocity at this α: then a step asks for it on every r < t row."""
    return recipe.loss.tangent == "network" and phase_kind(alpha) != "flow"


def most_asked_rows(recipe: Recipe, n_equal: int, *, tangent: bool) -> int:
    """The rows that guidance and the tangent could need in a step: ∅ of all rows, y of the r < t rows.

    Compiled blocks see them all.
    """
    batch, (own, null) = recipe.train.batch, needs_velocities(recipe.guidance)
    return batch * null + (batch - n_equal) * (own or tangent)


def step_flops(recipe: Recipe, alpha: float, n_equal: int, extra_rows: float) -> float:
    """Floating-point operations of one step on the global batch; `extra_rows` rows go to guidance and the tangent."""
    batch, kind = recipe.train.batch, phase_kind(alpha)
    later, units = batch - n_equal, 3.0 * batch
    if is_guided_run(recipe) or asks_tangent(recipe, alpha):
        units += extra_rows
    if kind == "between":
        units += later * (2 if recipe.loss.velocity == "network" else 1)
    elif kind == "derivative":
        units += TANGENT * later
    return units * forward_flops(recipe) + 3.0 * batch * velocity_flops(recipe)


def phase_flops(recipe: Recipe) -> list[tuple[PhaseKind, bool, int, float]]:
    """Every phase, or its part of one precision: its kind, whether it is in fp32 in a run in bf16, its steps, and the
    operations of a step in its middle, all of guidance's rows included."""
    listed: list[tuple[PhaseKind, bool, int, float]] = []
    for phase in stretches(recipe):
        middle = (phase.first + phase.until) // 2
        n_equal = equal_rows(recipe.train.batch, equal_share_at(recipe)(middle))
        alpha = alpha_at(recipe)(middle)
        extra_rows = most_asked_rows(recipe, n_equal, tangent=asks_tangent(recipe, alpha))
        flops = step_flops(recipe, alpha, n_equal, extra_rows)
        listed.append((phase.kind, is_precise(recipe, alpha), phase.until - phase.first, flops))
    return listed


def compiling_pays(recipe: Recipe, processes: int) -> bool:
    """Whether a run of these processes saves, on an H100, more than compiling takes; other GPUs save more per step.

    Where the share of r = t rows follows a schedule, it does not: every new number of rows would be compiled anew.
    """
    share, steps = equal_share_at(recipe), recipe.train.steps
    if recipe.train.precision == "fp64" or share(0) != share(steps - 1):
        return False
    listed = phase_flops(recipe)
    least = SAVED_REPLAYED if recipe.train.graphs and graphs_may_pay(recipe, processes) else SAVED_LAUNCHES
    saved = sum(count * max(flops / processes * SAVED, least) for *_, count, flops in listed)
    return saved > WORTH * COMPILING * len(listed)


def graphs_may_pay(recipe: Recipe, processes: int) -> bool:
    """Whether launches may be most of a step of one process, so that replaying it as a CUDA graph is worth a try."""
    most = max(flops for *_, flops in phase_flops(recipe))
    return processes == 1 and recipe.optim.kind == "adam" and most < GRAPH_FLOPS


def will_compile(recipe: Recipe, processes: int = 1) -> bool:
    """Whether a run on GPUs that can compile does so: as the recipe says, or if it leaves that open, where it pays."""
    choice = recipe.train.compile
    return compiling_pays(recipe, processes) if choice == "auto" else choice


@dataclass(frozen=True)
class Pace:
    """How fast a run is on so many GPUs of one machine."""

    images_per_second: float
    hours: float
    compiled: bool
    measured: bool  # whether the steps of this network were measured; otherwise the nearest one's utilisation is taken


def pace(recipe: Recipe, gpus: int = 1, *, h200: bool = False) -> Pace | None:
    """The pace of the whole run on H100s, or on H200s; None where nothing measured comes near (not in bf16)."""
    if recipe.train.precision != "bf16":
        return None
    size, guided = nearest_network(recipe), is_guided_run(recipe)
    compiled = size in UTILISATION and will_compile(recipe, gpus)
    exchange = 0.0 if gpus == 1 else 4 * parameter_count(recipe) * 2 * (gpus - 1) / gpus / LINK
    seconds, measured = 0.0, _is_network(recipe, size) and gpus == 1 and not h200 and (compiled or size == "S/2")
    card = 1 - WAITING * (1 - 1 / BANDWIDTH) if h200 else 1.0  # its time over that of an H100
    for kind, precise, steps, flops in phase_flops(recipe):
        slower = (TF32 if recipe.train.tf32 else FP32) if precise else 1.0
        share = UTILISATION[size].get((kind, guided)) if compiled else NOT_COMPILED
        measured = measured and share is not None and not precise
        share = share or min(UTILISATION[size].values())
        seconds += steps * (flops / (share * PEAK) / gpus * TRAINER * card * slower + exchange)
    return Pace(recipe.train.steps * recipe.train.batch / seconds, seconds / 3600, compiled, measured)


def nearest_network(recipe: Recipe) -> str:
    """The measured network that comes nearest, by parameters."""
    count = parameter_count(recipe)
    return "S/2" if count < SMALL else "XL/2" if count >= LARGE else "B/2"


def _is_network(recipe: Recipe, size: str) -> bool:
    model = recipe.model
    plain = (model.block, model.conditioning, model.velocity_head) == ("dit", "adaln", None)
    return plain and (model.dim, model.depth, tokens(recipe)) == NETWORKS[size]
