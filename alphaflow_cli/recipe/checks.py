"""What a recipe may not say although each value has the right type: bounds, and values that contradict each other.

Each check yields (field, what is wrong and what to do). The limits are those of the method (docs/method.md) or of the
arithmetic; a rule that only saves the user from a silent surprise says which.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from operator import attrgetter

from alphaflow_cli.recipe.guidance_checks import Fault, check_guidance
from alphaflow_cli.recipe.plan import end_values, schedules_of
from alphaflow_cli.recipe.schema import MOST_NFE, Loss, Model, Recipe, TimeDraw, Tokens, resolve_step
from alphaflow_cli.recipe.source import Faults

AT_LEAST = {  # field: smallest value
    1: "model.dim model.depth model.heads model.patch data.image_size data.channels data.latent_size train.steps "
    "model.tokens.label model.tokens.scale model.tokens.interval model.tokens.time guidance.scale_max sample.scale "
    "ema.every train.batch train.save_every train.keep train.log_every optim.nonfinite_limit sample.nfe eval.images",
    0: "model.velocity_head data.classes data.stats_images optim.warmup_steps optim.weight_decay optim.clip_norm "
    "loss.clamp loss.c guidance.scale_beta ema.ramp train.seed train.milestone_every train.sample_every "
    "train.conflict_every eval.every",
    100: "eval.quick_images",  # below it nothing is printed that looks like a score
}
AT_MOST = {  # field: largest value, far beyond use: what passes it is a slip of the hand that would fill the memory
    1_000: "model.mlp_ratio model.tokens.label model.tokens.scale model.tokens.interval model.tokens.time",
    8_192: "model.patch data.image_size data.latent_size data.channels",
    MOST_NFE: "model.depth sample.nfe",
    65_536: "model.dim model.heads",
    10_000_000: "data.classes",
    16_777_216: "train.batch",
    100_000_000: "eval.images eval.quick_images",
}
POSITIVE = (
    "model.mlp_ratio data.scale times.std times.second.std times.equal.std guidance.omega guidance.fade_rate optim.lr "
    "optim.eps loss.power loss.later sample.guidance"
)
SHARES = "model.t_floor train.precise_below guidance.t_min guidance.t_max guidance.fade_from"  # within [0, 1]
BELOW_ONE = "guidance.label_dropout guidance.kappa times.gap"  # within [0, 1)
NO_REPEATS = "model.inputs ema.half_lives train.trackers eval.metrics eval.nfe eval.quick_metrics eval.quick_nfe"


def check(recipe: Recipe, place: Callable[[str], str], faults: Faults) -> None:
    """Add every fault of a recipe; `place` says where a field stands."""
    for path, what in _bounds(recipe):
        faults.add(place(path), what)
    if not faults.listed:  # contradictions are between sound values; a default standing in would make up some
        for rule in (
            _model,
            _rungs,
            _tokens,
            _data,
            _constants,
            _schedules,
            _equal_share,
            _gap,
            _equal_draw,
            check_guidance,
            _loss,
            _optim,
            _sample,
            _eval,
            _quick,
            _expected,
        ):
            for path, what in rule(recipe):
                faults.add(place(path), what)


def _bounds(recipe: Recipe) -> Iterator[Fault]:
    for low, paths in AT_LEAST.items():
        yield from _each(recipe, paths, lambda v, low=low: v >= low, f"must be {low} or more")  # type: ignore[misc]
    for high, paths in AT_MOST.items():
        yield from _each(recipe, paths, lambda v, high=high: v <= high, f"must be {high:,} or less")  # type: ignore[misc]
    yield from _each(recipe, POSITIVE, lambda v: v > 0, "must be more than 0")
    yield from _each(recipe, SHARES, lambda v: 0 <= v <= 1, "must lie between 0 and 1")
    yield from _each(recipe, BELOW_ONE, lambda v: 0 <= v < 1, "must be 0 or more and less than 1")
    for path in NO_REPEATS.split():
        values = attrgetter(path)(recipe)
        repeated = [value for value, count in Counter(values).items() if count > 1]
        if repeated:
            yield path, f"{path} names {sorted(repeated, key=str)[0]} twice"
    for path, schedule in schedules_of(recipe):
        ends = f"{path}.initial" if schedule.kind == "constant" else f"{path}.initial {path}.final"
        yield from _each(recipe, ends, lambda v: 0 <= v <= 1, "must lie between 0 and 1")
        yield from _each(recipe, f"{path}.gamma", lambda v: v > 0, "must be more than 0")
        yield from _each(recipe, f"{path}.clamp", lambda v: 0 <= v < 0.5, "must be 0 or more and less than 0.5")
        yield from _each(recipe, f"{path}.start {path}.end", _not_negative, "must be 0 or more")
        if schedule.kind == "exponential" and 0 in (schedule.initial, schedule.final):
            yield f"{path}.kind", f"{path}: an exponential cannot start or end at 0: use 0.001, and clamp"


def _each(recipe: Recipe, paths: str, good: Callable[[float], bool], what: str) -> Iterator[Fault]:
    for path in paths.split():
        value = attrgetter(path)(recipe)
        if value is not None and not good(value):
            yield path, f"{path} {what}, got {value}"


def _not_negative(step: float | str) -> bool:
    return isinstance(step, str) or step >= 0


def _model(recipe: Recipe) -> Iterator[Fault]:
    model, data = recipe.model, recipe.data
    if model.dim % model.heads:
        yield "model.heads", f"model.heads {model.heads} does not divide model.dim {model.dim}"
    if model.dim % 4 and model.block == "dit":
        yield "model.dim", f"model.dim {model.dim} must be a multiple of 4: the positional table has four parts"
    if data.latent_size % model.patch:
        fits = max(size for size in range(1, model.patch) if data.latent_size % size == 0)
        what = f"model.patch {model.patch} does not divide data.latent_size {data.latent_size}"
        yield "model.patch", f"{what}: set model.patch: {fits} (--set model.patch={fits})"
    if int(model.dim * model.mlp_ratio) < 1:
        yield "model.mlp_ratio", f"model.mlp_ratio {model.mlp_ratio} leaves the MLP no channel"
    if model.prediction == "data" and model.t_floor in (0, 1):
        yield "model.t_floor", f"model.t_floor must lie between 0 and 1, got {model.t_floor:g}: it divides z - x̂"
    if model.prediction != "data" and model.t_floor != Model.t_floor:
        yield "model.t_floor", f"model.t_floor acts with prediction: data only, not {model.prediction}: leave it out"
    if recipe.name in (".", "..") or re.search(r"[/\\]", recipe.name) or not recipe.name.isprintable():
        what = f"name {recipe.name!r} names a folder: write one without / and \\ and signs that cannot be seen"
        yield "name", f"{what} (name: …; a recipe without it has its file's)"


def _rungs(recipe: Recipe) -> Iterator[Fault]:
    """The rungs of improved MeanFlow's ladder, where they lack what they stand on, or another key says it already."""
    model = recipe.model
    if model.velocity_head is not None and model.velocity_head > model.depth:
        yield (
            "model.velocity_head",
            f"model.velocity_head {model.velocity_head} is more than model.depth {model.depth}: it says how many of "
            "the last blocks are there twice",
        )
    if "interval" in model.inputs and "scale" not in model.inputs:
        yield (
            "model.inputs",
            "model.inputs interval says at which times the guidance scale acts: write inputs: [scale, interval]",
        )
    if model.inputs and recipe.data.classes == 0:
        yield "model.inputs", "model.inputs is about guidance, which needs labels, and data.classes is 0: leave it out"
    if model.block == "modern" and model.qk_norm:
        yield "model.qk_norm", "model.qk_norm: block modern has a norm of queries and keys already: leave it out"
    if model.block == "modern" and model.positions == "fixed":
        yield "model.positions", "model.positions is about the table of positions, and block modern has none"
    if model.block == "modern" and model.dim % model.heads == 0 and model.dim // model.heads % 2:
        yield (
            "model.heads",
            f"model.heads {model.heads} gives each head {model.dim // model.heads} channels, and block modern turns "
            "them in pairs: choose heads that leave an even number",
        )


def _tokens(recipe: Recipe) -> Iterator[Fault]:
    model, plain = recipe.model, Tokens()
    if model.conditioning == "adaln":
        if model.tokens != plain:
            yield "model.tokens", "model.tokens counts the tokens of conditioning: tokens, not of adaln: leave it out"
        return
    if model.second_time != "t-r":
        yield (
            "model.second_time",
            f"model.second_time {model.second_time}: with conditioning: tokens the network is given t - r only",
        )
    if model.prediction == "noise":
        yield "model.conditioning", "model.conditioning tokens leaves t out, and prediction: noise needs it: use adaln"
    there = {"label": recipe.data.classes > 0, **{name: name in model.inputs for name in ("scale", "interval")}}
    for name, is_input in there.items():
        if not is_input and getattr(model.tokens, name) != getattr(plain, name):
            what = "data.classes is 0" if name == "label" else f"model.inputs has no {name}"
            yield f"model.tokens.{name}", f"model.tokens.{name} counts tokens of an input that is not there: {what}"


def _data(recipe: Recipe) -> Iterator[Fault]:
    data = recipe.data
    if data.autoencoder == "none":
        if data.latent_size != data.image_size:
            yield "data.latent_size", f"autoencoder none trains on pixels: data.latent_size must be {data.image_size}"
        if data.channels != 3:
            yield "data.channels", f"autoencoder none trains on pixels: data.channels must be 3, got {data.channels}"
    elif not data.autoencoder:
        yield "data.autoencoder", "data.autoencoder is empty: a Hub id, a folder, or none for pixels"
    elif data.image_size % data.latent_size:
        yield "data.latent_size", f"data.latent_size {data.latent_size} does not divide {data.image_size} pixels"
    if data.normalise != "scale" and (data.scale, data.shift) != (1.0, 0.0):
        yield "data.scale", f"data.scale and data.shift act with normalise: scale only, not {data.normalise}"
    if data.source and not re.fullmatch(r"(glyphs|shapes):[1-9][0-9]*", data.source):
        yield "data.source", f"data.source {data.source!r} is no embedded set: the form is shapes:4000"


def _constants(recipe: Recipe) -> Iterator[Fault]:
    """Given constants per channel: both or none, one for each channel, and only where x is made of them."""
    data = recipe.data
    given = {"data.channel_mean": data.channel_mean, "data.channel_std": data.channel_std}
    for path, values in given.items():
        if values is None and None in given.values() and any(other is not None for other in given.values()):
            yield path, "data.channel_mean and data.channel_std belong together: give both, or neither"
        if values is not None and data.normalise != "channel":
            yield path, f"{path} acts with normalise: channel only, not {data.normalise}"
        elif values is not None and len(values) != data.channels:
            yield path, f"{path} has {len(values)} numbers, and a latent has {data.channels} channels (data.channels)"
    if data.channel_std is not None and not all(std > 0 for std in data.channel_std):
        yield "data.channel_std", f"data.channel_std must be more than 0, got {list(data.channel_std)}"


def _schedules(recipe: Recipe) -> Iterator[Fault]:
    """A schedule copied from a longer run would keep its first value for the whole of a shorter one, silently."""
    steps = recipe.train.steps
    for path, schedule in schedules_of(recipe):
        if schedule.kind == "constant":
            continue
        line, share = ("start", 50) if schedule.kind == "step" else ("end", 100)
        start, end = resolve_step(schedule.start, steps), resolve_step(getattr(schedule, line), steps)
        if start > end:
            yield f"{path}.start", f"{path} starts at step {start:,}, after its end at {end:,}"
        elif (end > steps or start >= steps) and not schedule.unfinished:
            yield (
                f"{path}.{line}",
                f"{path} reaches its final value at step {end:,}, but the run has {steps:,} steps: "
                f'write {line}: "{share}%" or another share, or unfinished: true if it is meant',
            )


def _equal_share(recipe: Recipe) -> Iterator[Fault]:
    schedule, batch, path = recipe.times.equal_share, recipe.train.batch, "times.equal_share"
    constant = schedule.kind == "constant"
    for share in (schedule.initial,) if constant else (schedule.initial, schedule.final):
        if share > 0 and int(batch * share) == 0:
            yield path, f"{path} {share:g} of a batch of {batch} is no row at all: write 0, or a larger batch"
    only_equal = schedule.initial == 1 and (constant or schedule.final == 1)
    if only_equal and not (recipe.alpha.kind == "constant" and recipe.alpha.initial == 1):
        yield path, f"{path} 1 leaves no row with r < t, so alpha would do nothing: write alpha: 1, or a smaller share"


def _equal_draw(recipe: Recipe) -> Iterator[Fault]:
    times = recipe.times
    if times.equal_draw == "max" and times.equal != TimeDraw():
        yield (
            "times.equal",
            "times.equal is the law of a draw of its own, with equal_draw max there is none: choose one",
        )
    if times.equal_draw == "max" and times.order == "r_in_t_range":
        yield (
            "times.equal_draw",
            "times.equal_draw max wants two draws of times, order r_in_t_range has a time and a share: write own",
        )


def _gap(recipe: Recipe) -> Iterator[Fault]:
    if recipe.times.gap > 0 and any(value < recipe.alpha.clamp or value == 0 for value in end_values(recipe.alpha)):
        yield (
            "times.gap",
            f"times.gap {recipe.times.gap:g} keeps s away from t, but alpha reaches 0, where s is t: write gap: 0, or "
            "an alpha that stays above 0 with clamp: 0",
        )


def _loss(recipe: Recipe) -> Iterator[Fault]:
    if recipe.loss.weight != "none" and recipe.loss.c == 0:
        yield "loss.c", f"loss.c 0 lets the {recipe.loss.weight} weight grow without bound: published is 0.001"
    if recipe.loss.weight == "none" and recipe.loss.power != 1:
        yield (
            "loss.power",
            "loss.power is an exponent in the weights adaptive and converging: with none it does nothing",
        )
    if recipe.loss.tangent == "network" and recipe.loss.velocity == "network":
        yield (
            "loss.tangent",
            "loss.tangent network says along what z moves, loss.velocity network replaces ṽ there already: choose one",
        )
    if recipe.model.velocity_head is not None and recipe.loss.velocity == "network":
        yield (
            "model.velocity_head",
            "model.velocity_head gives the network's velocity at (t, t), loss.velocity network takes that at (s, t) "
            "from u: leave one out",
        )
    share = recipe.times.equal_share
    for name in ("later", "short_first", "tangent"):
        if min(end_values(share)) == 1 and getattr(recipe.loss, name) != getattr(Loss(), name):
            yield f"loss.{name}", f"loss.{name} is about r < t rows, and times.equal_share 1 leaves none: leave it out"
    alpha = recipe.alpha
    for value in end_values(alpha) if recipe.loss.velocity == "network" else ():
        if value < alpha.clamp or value > 1 - alpha.clamp or value in (0, 1):
            yield (
                "loss.velocity",
                f"loss.velocity network needs alpha strictly between 0 and 1, it reaches {value:g}: "
                "the Shortcut loss is alpha: 0.5",
            )


def _optim(recipe: Recipe) -> Iterator[Fault]:
    optim = recipe.optim
    if not all(0 <= beta < 1 for beta in optim.betas):
        yield "optim.betas", f"optim.betas must be 0 or more and less than 1, got {list(optim.betas)}"
    if optim.warmup_from == "zero" and optim.warmup_steps == 0:
        yield "optim.warmup_from", "optim.warmup_from zero without warm-up (warmup_steps 0) does nothing: leave it out"
    if optim.final_lr is not None and not 0 <= optim.final_lr <= optim.lr:
        yield "optim.final_lr", f"optim.final_lr must lie between 0 and optim.lr, got {optim.final_lr}"
    if not recipe.ema.half_lives or any(steps <= 0 for steps in recipe.ema.half_lives):
        yield "ema.half_lives", "ema.half_lives wants at least one half-life, each more than 0 steps"


def _sample(recipe: Recipe) -> Iterator[Fault]:
    sample = recipe.sample
    if sample.times is not None:
        yield from _grid("sample.times", sample.times)
        if len(sample.times) != sample.nfe + 1 and sample.sampler != "heun":
            yield "sample.times", f"sample.times has {len(sample.times)} times, nfe {sample.nfe} wants one more than it"
    yield from _grid("sample.two_step_times", sample.two_step_times)
    if sample.sampler == "heun" and sample.nfe % 2 == 0:
        yield (
            "sample.nfe",
            f"heun takes two evaluations per step and one on the last: nfe 1, 3, 5, …, got {sample.nfe}",
        )


def _grid(path: str, times: tuple[float, ...]) -> Iterator[Fault]:
    falling = all(a > b for a, b in itertools.pairwise(times))
    if len(times) < 2 or times[0] != 1 or times[-1] != 0 or not falling:
        yield path, f"{path} must fall from 1 to 0, got {list(times)}"


def _eval(recipe: Recipe) -> Iterator[Fault]:
    for name in ("nfe", "quick_nfe"):
        counts = getattr(recipe.eval, name)
        if not counts or not all(1 <= nfe <= MOST_NFE for nfe in counts):
            wanted = f"at least one number of evaluations, each from 1 to {MOST_NFE:,}"
            yield f"eval.{name}", f"eval.{name} wants {wanted}, got {list(counts)}"
    for name in ("metrics", "quick_metrics"):
        if not getattr(recipe.eval, name):
            yield f"eval.{name}", f"eval.{name} is empty"
    if recipe.eval.draw == "balanced" and recipe.data.classes == 0:
        yield "eval.draw", "eval.draw balanced without labels (data.classes is 0): write random"


def _quick(recipe: Recipe) -> Iterator[Fault]:
    """The scores of a run while it trains."""
    chosen = recipe.eval.best_by
    if chosen is not None and chosen not in recipe.eval.quick_metrics:
        listed = ", ".join(recipe.eval.quick_metrics)
        yield "eval.best_by", f"eval.best_by {chosen} is not among eval.quick_metrics ({listed}): add it there"
    if (chosen or (recipe.eval.quick_metrics or ("",))[0]) == "pr":
        yield "eval.best_by", "eval.best_by pr is four numbers, and one has to choose: name another of quick_metrics"
    if recipe.eval.every and not recipe.eval.reference and set(recipe.eval.quick_metrics) != {"is"}:
        yield (
            "eval.every",
            "eval.every compares with eval.reference, which is empty: give a reference file or a source of pictures, "
            "such as --set eval.reference=FILE, or leave eval.every out",
        )


def _expected(recipe: Recipe) -> Iterator[Fault]:
    for i, point in enumerate(recipe.expected):
        for name in ("step", "nfe", "images"):
            if getattr(point, name) < 1:
                yield f"expected[{i}].{name}", f"expected[{i}].{name} must be 1 or more"
