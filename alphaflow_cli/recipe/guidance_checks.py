"""What a recipe may not say of guidance: keys that contradict each other, or do nothing beside the others."""

from collections.abc import Iterator

from alphaflow_cli.recipe.plan import draws_scale, end_values, is_guided
from alphaflow_cli.recipe.schema import Guidance, Recipe

Fault = tuple[str, str]  # the field, and what is wrong and what to do


def check_guidance(recipe: Recipe) -> Iterator[Fault]:
    """Yield every fault of the section guidance, and of what `sample` says about guidance."""
    yield from _drawn(recipe) if draws_scale(recipe) else (*_guidance(recipe), *_fading(recipe), *_not_drawn(recipe))
    yield from _drop(recipe)
    yield from _inputs(recipe)


def _guidance(recipe: Recipe) -> Iterator[Fault]:
    guidance, labels = recipe.guidance, recipe.data.classes > 0
    active = is_guided(guidance.omega, guidance.kappa)
    if guidance.t_min >= guidance.t_max:
        yield "guidance.t_min", f"guidance.t_min {guidance.t_min} is not below guidance.t_max {guidance.t_max}"
    if not labels and guidance.label_dropout > 0:
        yield "guidance.label_dropout", "guidance.label_dropout without labels (data.classes is 0): write 0"
    if not labels and active:
        yield "guidance.omega", "guidance without labels (data.classes is 0): write omega: 1 and kappa: 0"
    null_share = 1 - guidance.omega - guidance.kappa
    if labels and active and abs(null_share) > 1e-9 and guidance.label_dropout == 0:
        yield (
            "guidance.label_dropout",
            f"guidance needs the null label (1 - omega - kappa = {null_share:g}), which only label_dropout trains: "
            "published is 0.1",
        )
    if recipe.sample.guidance != 1 and active:
        yield "sample.guidance", "guidance is built in by training (omega, kappa): sample.guidance must be 1"
    elif recipe.sample.guidance != 1 and guidance.label_dropout == 0:
        yield (
            "sample.guidance",
            "sample.guidance needs a network that knows the null label: guidance.label_dropout is 0",
        )


def _fading(recipe: Recipe) -> Iterator[Fault]:
    """Keys that change how guidance acts, where there is none, or where another key says the opposite."""
    guidance = recipe.guidance
    active = is_guided(guidance.omega, guidance.kappa)
    if guidance.fade_from is not None and not active:
        yield "guidance.fade_from", "guidance.fade_from without guidance (omega 1, kappa 0) does nothing: leave it out"
    elif guidance.fade_from is not None and (guidance.t_min, guidance.t_max) != (0.0, 1.0):
        yield (
            "guidance.fade_from",
            f"guidance.fade_from fades guidance out towards t = 1, the interval ({guidance.t_min:g}, "
            f"{guidance.t_max:g}) cuts it off: write t_min: 0 and t_max: 1, or leave fade_from out",
        )
    if guidance.dropped == "plain" and not (active and guidance.label_dropout > 0):
        yield (
            "guidance.dropped",
            "guidance.dropped plain says what rows without label learn instead of the guided velocity: without "
            "label_dropout, or without guidance (omega 1, kappa 0), it does nothing",
        )


def _drawn(recipe: Recipe) -> Iterator[Fault]:
    """A scale for each row decides what the keys of one fixed guidance would say."""
    mix, sample = recipe.guidance, recipe.sample
    if recipe.data.classes == 0:
        yield "guidance.scale", "guidance without labels (data.classes is 0): write scale: fixed"
    if mix.label_dropout == 0:
        yield (
            "guidance.label_dropout",
            "a drawn scale needs the null label, which only label_dropout trains: published is 0.1",
        )
    if is_guided(mix.omega, mix.kappa):
        yield "guidance.omega", "guidance.omega and kappa follow from the scale that each row draws: leave them out"
    if mix.fade_from is not None:
        yield "guidance.fade_from", "guidance.fade_from fades one fixed guidance, scale drawn has many: leave it out"
    if mix.dropped == "plain":
        yield "guidance.dropped", "with a drawn scale a row without label learns v in any case: leave dropped out"
    if mix.scale_max == 1:
        yield "guidance.scale_max", "guidance.scale_max must be more than 1: scales are drawn from 1 to it"
    if mix.interval == "drawn" and (mix.t_min, mix.t_max) != (0.0, 1.0):
        yield "guidance.t_min", "guidance.t_min and t_max are one interval, interval drawn has many: leave them out"
    elif mix.t_min >= mix.t_max:
        yield "guidance.t_min", f"guidance.t_min {mix.t_min} is not below guidance.t_max {mix.t_max}"
    if sample.guidance != 1:
        yield "sample.guidance", "the network takes the scale as an input, and is asked once: write sample.scale"
    if sample.interval is not None and mix.interval == "fixed":
        yield (
            "sample.interval",
            "sample.interval acts where guidance.interval is drawn: here t_min and t_max are built in",
        )
    elif sample.interval is not None and not 0 <= sample.interval[0] < sample.interval[1] <= 1:
        yield "sample.interval", f"sample.interval must rise within 0 to 1, got {list(sample.interval)}"


def _not_drawn(recipe: Recipe) -> Iterator[Fault]:
    """Keys that act only where the scale is drawn."""
    mix, sample = recipe.guidance, recipe.sample
    if mix.interval == "drawn":
        yield "guidance.interval", "guidance.interval drawn needs a scale to draw too: write scale: drawn"
    for name in ("scale_max", "scale_beta"):
        if getattr(mix, name) != getattr(Guidance(), name):
            yield f"guidance.{name}", f"guidance.{name} acts with scale: drawn only: leave it out"
    for name in ("scale", "interval"):
        if getattr(sample, name) is not None:
            yield (
                f"sample.{name}",
                f"sample.{name} is what a network is told that was trained with guidance.scale drawn: leave it out",
            )


def _drop(recipe: Recipe) -> Iterator[Fault]:
    """Labels of r = t rows only: there must be enough of them."""
    mix, share = recipe.guidance, min(end_values(recipe.times.equal_share))
    if mix.drop == "equal" and mix.label_dropout == 0:
        yield "guidance.drop", "guidance.drop equal says whose labels are dropped, label_dropout 0 drops none"
    elif mix.drop == "equal" and mix.label_dropout >= share:
        yield (
            "guidance.drop",
            f"guidance.drop equal drops labels of r = t rows only: label_dropout {mix.label_dropout:g} must be less "
            f"than their share {share:g} (times.equal_share)",
        )


def _inputs(recipe: Recipe) -> Iterator[Fault]:
    """What the network is given of guidance must be what is drawn."""
    mix, inputs = recipe.guidance, recipe.model.inputs
    for name, kind in (("scale", mix.scale), ("interval", mix.interval)):
        if name in inputs and kind == "fixed":
            yield "model.inputs", f"model.inputs has {name}, but each row has the same: write guidance.{name}: drawn"
        if name not in inputs and kind == "drawn":
            yield (
                f"guidance.{name}",
                f"guidance.{name} is drawn, but the network is not told: add {name} to model.inputs",
            )
