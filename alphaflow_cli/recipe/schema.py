"""What a recipe may say, and every default. A recipe is a frozen tree of these dataclasses.

Times run from 0 (data) to 1 (noise). A field's comment gives its unit and meaning. Nothing here imports torch.
A field that is renamed, moved or removed needs a migration (recipe/migrations.py): older recipes are read for ever.
"""

from dataclasses import dataclass, field
from typing import Literal

ScheduleKind = Literal["constant", "step", "linear", "exponential", "log", "sigmoid"]
TimeLaw = Literal["logit_normal", "uniform"]
TimeOrder = Literal["minmax", "min", "r_in_t_range"]
SecondTime = Literal["t-r", "r"]
Prediction = Literal["velocity", "noise", "data"]
Positions = Literal["trained", "fixed"]
GuideInput = Literal["scale", "interval"]
Conditioning = Literal["adaln", "tokens"]
BlockKind = Literal["dit", "modern"]
SecondInit = Literal["normal", "xavier"]
Normalise = Literal["position", "channel", "scale"]
Posterior = Literal["sample", "mean"]
PictureCrop = Literal["square", "adm"]
PixelRule = Literal["truncate", "round"]
Velocity = Literal["data", "network"]
Tangent = Literal["data", "network"]
Dropped = Literal["guided", "plain"]
EqualDraw = Literal["own", "max"]
FixedOrDrawn = Literal["fixed", "drawn"]
DropRule = Literal["interval", "equal"]
WarmupFrom = Literal["step", "zero"]
OptimiserKind = Literal["adam", "radam"]
Weight = Literal["adaptive", "converging", "none"]
Reduction = Literal["mean", "sum"]
Precision = Literal["fp32", "bf16", "fp64"]
NonFinite = Literal["skip", "rollback", "stop", "replace"]
Sampler = Literal["trajectory", "consistency", "flow", "heun"]
SamplerChoice = Literal["auto", Sampler]  # where a recipe is sampled; auto: its own
LabelDraw = Literal["random", "balanced"]
Metric = Literal["fid", "fdd", "fcd", "fd-tiny", "kid", "is", "pr"]
Tracker = Literal["tensorboard", "wandb", "trackio"]
Strategy = Literal["ddp", "fsdp2"]
MOST_NFE = 10_000  # network evaluations per picture: ten times what the slowest published sampler takes
Auto = bool | Literal["auto"]  # auto: where it pays
StepOrShare = int | str  # an optimiser step, or a percentage of the run: "50%"


@dataclass(frozen=True)
class Schedule:
    """A value over the steps; before `start` it is `initial`, after `end` it is `final`."""

    kind: ScheduleKind = "constant"
    initial: float = 1.0  # value before start; the value itself where kind is constant
    final: float = 0.0  # value after end; unused where kind is constant
    start: StepOrShare = 0  # first step of the change, a step or a percentage of train.steps
    end: StepOrShare = "100%"  # last step of the change; start = end jumps there
    gamma: float = 25.0  # steepness of sigmoid; exponent on progress of exponential (1 is the plain one)
    clamp: float = 0.005  # values below it become 0, values above 1 - it become 1; 0 switches it off
    unfinished: bool = False  # true accepts a schedule that does not reach `final` within train.steps


@dataclass(frozen=True)
class Tokens:
    """How many tokens stand before the patches for each input that the network has."""

    label: int = 8
    scale: int = 4  # the guidance scale
    interval: int = 2  # each of the two ends of the guidance interval
    time: int = 4  # t - r


@dataclass(frozen=True)
class Model:
    """The DiT. Sizes: S 384/12/6, B 768/12/12, L 1024/24/16, XL 1152/28/16 (dim/depth/heads)."""

    dim: int = 768  # channels of a token
    depth: int = 12  # blocks
    heads: int = 12  # attention heads; divides dim
    patch: int = 2  # side of a patch, in latent pixels; divides data.latent_size
    mlp_ratio: float = 4.0  # hidden channels of the MLP / dim
    qk_norm: bool = False  # LayerNorm on queries and keys (off in every published recipe)
    second_time: SecondTime = "t-r"  # what the second time embedder is fed: the interval (published) or r
    prediction: Prediction = "velocity"  # what the last layer gives: u itself; or the noise of a converted DiT (then
    #                                      u is computed from it, and t is embedded as DDPM's discrete time); or the
    #                                      data x̂, u = (z - x̂) / max(t, t_floor)
    t_floor: float = 0.05  # only with prediction: data
    positions: Positions = "trained"  # the positional table of sines and cosines: trained (published), or as it is
    second_init: SecondInit = "normal"  # the second time embedder's first weights: N(0, 0.02) (published), or xavier
    velocity_head: int | None = None  # a second output, the velocity: so many last blocks of its own and a final layer
    #                                   (improved MeanFlow: 8); 0 = the final layer only; null = none
    inputs: tuple[GuideInput, ...] = ()  # what the network is given of guidance: its scale, its interval of times
    conditioning: Conditioning = "adaln"  # how it is given its inputs: they modulate every block, or stand before the
    #                                       patches as tokens; t itself is then left out, only t - r is given
    tokens: Tokens = field(default_factory=Tokens)  # only with conditioning: tokens
    block: BlockKind = "dit"  # modern: RMSNorm, also on queries and keys, rotary positions, SwiGLU, no biases


@dataclass(frozen=True)
class Data:
    """What the latents are. `train` refuses a store that says otherwise."""

    store: str = ""  # folder made by prep-latents; --data overrides it; empty: with a source the run's own latents/
    source: str = ""  # an embedded set ("shapes:4000") that train prepares itself when the store is missing
    autoencoder: str = "stabilityai/sd-vae-ft-ema"  # Hub id or folder; "none" trains on pixels
    image_size: int = 256  # pixels, side of the square picture
    channels: int = 4  # of a latent (3 for pixels)
    latent_size: int = 32  # side of a latent (image_size for pixels)
    classes: int = 1000  # labels 0 … classes-1; 0 trains without labels
    flips: bool = False  # each access shows the picture or its mirror image (a store made with --flips)
    posterior: Posterior = "sample"  # draw the latent from the encoder's posterior at each access, or take its mean
    normalise: Normalise = "position"  # x = (latent - mean) / std, per channel and position, or per channel; or
    #                                    x = (latent - shift) · scale with the two numbers below
    scale: float = 1.0  # only with normalise: scale (SD-VAE convention 0.18215)
    shift: float = 0.0  # only with normalise: scale
    channel_mean: tuple[float, ...] | None = None  # only with normalise: channel; given numbers, one per channel;
    channel_std: tuple[float, ...] | None = None  # null = estimated on the store
    stats_images: int = 2048  # latents that the mean and std are estimated on (published: 2048); 0 = all
    pixels: PixelRule = "truncate"  # float → uint8 of a generated picture: (x+1)·127.5 truncated, or rounded
    crop: PictureCrop | None = None  # how the pictures became square (prep-latents --crop); null = either will do


@dataclass(frozen=True)
class TimeDraw:
    """The law of one draw of a time; what is null is that of the first draw."""

    law: TimeLaw | None = None
    mean: float | None = None
    std: float | None = None


@dataclass(frozen=True)
class Times:
    """How r ≤ t are drawn, and the share of rows with r = t (plain flow matching)."""

    law: TimeLaw = "logit_normal"  # of one draw: the first of an r < t row, and those below that do not say otherwise
    mean: float = -0.4  # of the normal under the logistic function
    std: float = 1.0  # of the same
    order: TimeOrder = "minmax"  # minmax: t, r = max, min of two draws; min: t = first, r = min of both;
    #                              r_in_t_range: t = first, r = t · second
    equal_share: Schedule = field(  # share of the global batch with r = t; a bare number means constant
        default_factory=lambda: Schedule(initial=0.5, final=0.5, clamp=0.0)
    )
    second: TimeDraw = field(default_factory=TimeDraw)  # the second draw of an r < t row
    equal: TimeDraw = field(default_factory=TimeDraw)  # the draw of an r = t row
    equal_draw: EqualDraw = "own"  # t of an r = t row: a draw of its own (published), or the max of the two draws of an
    #                                r < t row (improved MeanFlow)
    gap: float = 0.0  # r < t rows keep t ≥ gap, r ≤ t - gap and s ≤ t - gap (SoFlow: 1e-4); 0 = off


@dataclass(frozen=True)
class Guidance:
    """Guidance built into the target: ṽ = ω v + κ u⁻(z,t,t|y) + (1-ω-κ) u⁻(z,t,t|∅) where t_min < t < t_max."""

    omega: float = 1.0  # weight of the data's velocity; 1 and kappa 0 = no guidance
    kappa: float = 0.0  # weight of the network's own conditional velocity; effective scale ω / (1 - κ)
    t_min: float = 0.0  # guidance and label dropout act strictly inside (t_min, t_max)
    t_max: float = 1.0
    label_dropout: float = 0.0  # probability that a label becomes the null label; > 0 adds the null row
    dropped: Dropped = "guided"  # what a row without label learns: the guided velocity (published), or plainly v
    fade_from: float | None = None  # instead of an interval: above this t the null velocity's weight fades to 0 at
    #                                 t = 1, kappa stays and omega takes up the rest; null = no fade
    fade_rate: float = 0.025  # k of what is left, 1 - exp(-k τ / (1 - τ)), τ = (1 - t) / (1 - fade_from)
    scale: FixedOrDrawn = "fixed"  # fixed: by omega and kappa; drawn: a scale w for each row, told to the network
    #                                (model.inputs has scale): omega 1, kappa 1 - 1/w on that row
    scale_max: float = 8.0  # only with scale: drawn; w lies in [1, scale_max] with the density w^-scale_beta
    scale_beta: float = 1.0
    interval: FixedOrDrawn = "fixed"  # fixed: t_min < t < t_max; drawn: t_lo ≤ t ≤ t_hi, drawn for each r < t row from
    #                                   [0, 1/2] and [1/2, 1] and told to the network (model.inputs has interval)
    drop: DropRule = "interval"  # which labels are dropped: of all rows inside the interval (published); or, as often
    #                              in all, of r = t rows only, at label_dropout / equal_share (improved MeanFlow)


@dataclass(frozen=True)
class Loss:
    """From a target to a number."""

    velocity: Velocity = "data"  # ṽ on the first part of the step: the data's v, or u⁻(z_t, s, t) (Shortcut)
    tangent: Tangent = "data"  # along what z moves in an r < t row's target, in du/dt at α = 0 and from z_t to z_s
    #                            above: ṽ (published), or the network's own u⁻(z_t, t, t | y) (improved MeanFlow)
    weight: Weight = "adaptive"  # a / (l + c) with a = α on r < t rows while α > 0 (published); converging:
    #                              α / (l + α² c), whose gradient tends to MeanFlow's as α → 0; none: 1 (1/α on r < t)
    power: float = 1.0  # p of the weight: a / (l + c)^p, or α^(2p-1) / (l + α² c)^p
    c: float = 1e-3  # the weight's floor; it belongs to the reduction (sum: 1e-2 in MeanFlow's own code)
    reduction: Reduction = "mean"  # of the squared error over C·H·W
    clamp: float = 4.0  # bound of the target of r < t rows while α > 0; 0 = no bound
    later: float = 1.0  # factor on the weight of r < t rows
    short_first: bool = False  # r < t rows with a short interval t - r count more at the start of the run, all alike at
    #                            its end: times 1 - p + λ p (1 - (t - r)), p = 1 - step/steps (arXiv:2511.19065)


@dataclass(frozen=True)
class Optim:
    """Adam, its learning rate over the steps, and what happens to a gradient that is not finite."""

    kind: OptimiserKind = "adam"  # adam, or radam (rectified; on a GPU the host waits for each of its steps)
    lr: float = 1e-4  # after the warm-up
    final_lr: float | None = None  # cosine decay to this at the last step; null = constant
    warmup_steps: int = 10_000  # linear, from the rate that warmup_from says
    warmup_from: WarmupFrom = "step"  # of the first step: lr / warmup_steps (published), or zero (improved MeanFlow)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0  # decoupled (AdamW) when > 0
    clip_norm: float = 16.0  # of the gradient of the whole network; 0 = no clipping
    nonfinite: NonFinite = "skip"  # a gradient that is not finite: skip the step, roll back to the last save, stop,
    #                                or replace (NaN → 0, ±inf → ±1e5, as published); each is counted and shown
    nonfinite_limit: int = 10  # so many bad steps in a row end the run


@dataclass(frozen=True)
class Ema:
    """Running averages of the weights; the first is the one that is sampled, evaluated and published."""

    half_lives: tuple[float, ...] = (6931.0,)  # steps; each makes one average
    ramp: float = 0.05  # half-life ≤ ramp · step, so that the early average is short; 0 = no ramp
    every: int = 1  # the averages move at every so many steps, by as much as in all of them together


@dataclass(frozen=True)
class Train:
    """How long the run is, in what precision and with which seed, and what it saves and logs on the way."""

    steps: int = 400_000  # optimiser steps
    batch: int = 256  # global batch: rows per step over all processes and micro-batches
    seed: int = 0  # of the weights, the data order, the noise, the times and the label dropout
    precision: Precision = "bf16"  # of the network's products; weights, targets and loss stay fp32. fp64: for proofs
    precise_below: float = 0.0  # with bf16: steps with 0 < alpha < this compute in fp32 (tf32: in TF32); 0 = off
    tf32: bool = False  # lets fp32 matrix products use TF32
    compile: Auto = "auto"  # torch.compile, block by block; auto: on a GPU, in a run so long that it pays
    graphs: Auto = "auto"  # each step as one CUDA graph; auto: on one GPU, for a network so small that it pays
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, about 30% slower
    strategy: Strategy = "ddp"  # how several processes share the work
    save_every: int = 5_000  # steps between checkpoints
    keep: int = 2  # newest checkpoints kept in checkpoints/
    milestone_every: int = 100_000  # a checkpoint at a multiple of it is never deleted; 0 = none
    log_every: int = 100  # steps between rows of metrics.jsonl
    sample_every: int = 10_000  # steps between sample grids; 0 = none
    conflict_every: int = 0  # steps between measurements of the gradient conflict; 0 = none
    trackers: tuple[Tracker, ...] = ()  # besides metrics.jsonl


@dataclass(frozen=True)
class Sample:
    """How a published checkpoint is meant to be sampled."""

    sampler: Sampler = "trajectory"
    nfe: int = 1  # network evaluations per image
    times: tuple[float, ...] | None = None  # own grid from 1 to 0; null = nfe equal steps
    two_step_sampler: Sampler = "trajectory"  # the published setting at 2 NFE
    two_step_times: tuple[float, float, float] = (1.0, 0.5, 0.0)
    guidance: float = 1.0  # at sampling; must stay 1 where guidance was built in by training
    scale: float | None = None  # what a network is told that takes the guidance scale as an input; null = 1, unguided
    interval: tuple[float, float] | None = None  # the same of t_lo and t_hi; null = [0, 1]


@dataclass(frozen=True)
class Eval:
    """What `alphaflow eval` measures when nothing else is asked."""

    metrics: tuple[Metric, ...] = ("fid", "fdd")
    images: int = 50_000
    draw: LabelDraw = "random"  # labels: uniform per seed (published), or the same number of each
    nfe: tuple[int, ...] = (1, 2)
    reference: str = ""  # reference statistics or a picture source; empty: asked for on the command line
    every: int = 0  # steps between scores while training, each with a checkpoint; 0 = none
    quick_metrics: tuple[Metric, ...] = ("fd-tiny",)  # of those scores
    quick_images: int = 2_000  # pictures of those scores
    quick_nfe: tuple[int, ...] = (1, 2)  # of those scores; each keeps its best checkpoint, best-nfeN.safetensors
    best_by: Metric | None = None  # the score that chooses it; null = the first of quick_metrics


@dataclass(frozen=True)
class ExpectedScore:
    """A score that this recipe is known to reach at a step; the report draws it under the run's own curve."""

    step: int = 0
    metric: Metric = "fid"
    nfe: int = 1
    value: float = 0.0
    images: int = 50_000  # it was measured on
    source: str = "published"  # or another word: measured, a paper's number


@dataclass(frozen=True)
class Recipe:
    """All that one run depends on, except the machine it runs on and the folder it is written to."""

    name: str = ""  # the file's name without .yaml when empty
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    times: Times = field(default_factory=Times)
    alpha: Schedule = field(default_factory=Schedule)
    guidance: Guidance = field(default_factory=Guidance)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    ema: Ema = field(default_factory=Ema)
    train: Train = field(default_factory=Train)
    sample: Sample = field(default_factory=Sample)
    eval: Eval = field(default_factory=Eval)
    expected: tuple[ExpectedScore, ...] = ()


def resolve_step(step: StepOrShare, total: int) -> int:
    """The optimiser step meant by a step or a percentage of `total` steps, rounded to the nearest."""
    return step if isinstance(step, int) else round(float(step.removesuffix("%")) / 100 * total)
