"""The plan of a recipe as plain values for `--json`, and as lines for people."""

from dataclasses import asdict
from typing import Any

from alphaflow_cli.core.alpha import equal_rows
from alphaflow_cli.recipe import plan, speed
from alphaflow_cli.recipe.schema import Recipe, Schedule, resolve_step
from alphaflow_cli.text import counted

PHASE_WORDS = {
    "flow": ("α = 1", "trajectory flow matching"),
    "between": ("0 < α < 1", "one more forward per step"),
    "shortcut": ("0 < α < 1", "Shortcut, two more forwards per step"),
    "derivative": ("α = 0", "MeanFlow, a derivative (JVP) per step"),
}
MANY = 8  # H100s of one machine that the speed is shown for, beside one


def facts(recipe: Recipe) -> dict[str, Any]:
    """Everything that `recipe show` derives, machine-readable."""
    steps, batch, share = recipe.train.steps, recipe.train.batch, plan.equal_share_at(recipe)
    cut = [plan.Phase("flow", 0, steps)] if _only_flow(recipe) else plan.phases(recipe)
    jvp = [phase for phase in cut if phase.kind == "derivative"]
    return {
        "parameters": plan.parameter_count(recipe),
        "tokens": plan.tokens(recipe),
        "label_rows": plan.label_rows(recipe),
        "images_seen": steps * batch,
        "phases": [asdict(phase) for phase in cut],
        "alpha_one_until": cut[0].until if cut[0].kind == "flow" else 0,
        "jvp_from": jvp[0].first if jvp else None,
        "jvp_steps": sum(phase.until - phase.first for phase in jvp),
        "equal_rows": {"first": equal_rows(batch, share(0)), "last": equal_rows(batch, share(steps - 1))},
        "effective_guidance": _effective(recipe),
        "warmup_steps": recipe.optim.warmup_steps,
        "bytes": {
            "state": plan.state_bytes(recipe),
            "activations_per_row": plan.activation_bytes(recipe),
            "checkpoint": plan.checkpoint_bytes(recipe),
            "saved_state": plan.saved_state_bytes(recipe),
            "checkpoints_kept": plan.kept_checkpoints(recipe),
            "weights": 4 * plan.parameter_count(recipe),
            "latents_per_image": plan.latent_bytes(recipe),
        },
        "speed": {card: asdict(pace) for card, pace in _paces(recipe).items() if pace is not None},
        "warnings": plan.warnings_of(recipe),
    }


def _only_flow(recipe: Recipe) -> bool:
    """Whether no step has a row with r < t, so that alpha does nothing."""
    share = plan.equal_share_at(recipe)
    return share(0) == share(recipe.train.steps - 1) == 1


def lines(recipe: Recipe) -> list[tuple[str, str]]:
    """(what, in words) for people; a continued entry has an empty first part."""
    f, only_flow = facts(recipe), _only_flow(recipe)
    rows = [("network", _network(recipe, f)), ("latents", _latents(recipe)), ("run", _run(recipe, f))]
    rows.append(("alpha", "no r < t rows: plain flow matching" if only_flow else _schedule(recipe.alpha, recipe)))
    rows += [("", text) for text in ([] if only_flow else _phases(recipe, f))]
    rows += [("r = t rows", _equal(recipe, f)), ("guidance", _guidance(recipe, f)), ("optimiser", _optimiser(recipe))]
    rows += [("memory", _memory(recipe, f)), ("disk", _disk(recipe, f))]
    rows += [("speed", text) for text in _speed(recipe)]
    return rows + [("beware", text) for text in f["warnings"]]


def human(count: float) -> str:
    """1.2 kB, 3.4 GB, by powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _network(recipe: Recipe, f: dict[str, Any]) -> str:
    m = recipe.model
    size = f"DiT dim {m.dim}, depth {m.depth}, heads {m.heads}, patch {m.patch}"
    parts = [size, *_rungs(recipe)]
    return f"{', '.join(parts)}: {f['parameters']:,} parameters, {f['tokens']:,} tokens per image"


def _rungs(recipe: Recipe) -> list[str]:
    """What the network has beyond the published DiT, in words."""
    m, words = recipe.model, {"scale": "guidance scale", "interval": "guidance interval"}
    rungs = ["modern blocks"] if m.block == "modern" else []
    rungs += [f"inputs as {sum(plan.prefix_tokens(recipe).values())} more tokens"] if m.conditioning == "tokens" else []
    rungs += [f"given the {' and the '.join(words[name] for name in m.inputs)}"] if m.inputs else []
    if m.velocity_head is not None:
        rungs.append(f"a velocity head with {counted(m.velocity_head, 'block')} of its own")
    return rungs


def _latents(recipe: Recipe) -> str:
    d = recipe.data
    shape = f"{d.channels}×{d.latent_size}×{d.latent_size}"
    what = "pixels" if d.autoencoder == "none" else f"latents of {d.image_size} px by {d.autoencoder}"
    return f"{shape} {what}, {counted(d.classes, 'class', 'classes') if d.classes else 'no labels'}"


def _run(recipe: Recipe, f: dict[str, Any]) -> str:
    seen = f["images_seen"]
    short = f"{seen / 1e6:,.1f} M" if seen >= 1e6 else f"{seen:,}"
    return f"{recipe.train.steps:,} steps × batch {recipe.train.batch:,} = {short} images seen"


def _schedule(schedule: Schedule, recipe: Recipe) -> str:
    if schedule.kind == "constant":
        return f"{schedule.initial:g} throughout"
    start, end = (resolve_step(s, recipe.train.steps) for s in (schedule.start, schedule.end))
    when = f"at step {start:,}" if schedule.kind == "step" else f"over steps {start:,} to {end:,}"
    words = f"{schedule.kind} {schedule.initial:g} → {schedule.final:g} {when}"
    if schedule.kind == "step" or not schedule.clamp:
        return words
    return f"{words}, and exactly 0 or 1 where it is within {schedule.clamp:g} of them"


def _phases(recipe: Recipe, f: dict[str, Any]) -> list[str]:
    """One line per phase, by the step where it ends, or for the last by the step from which it holds."""
    steps, texts = recipe.train.steps, []
    for phase in f["phases"]:
        kind, first, until = phase["kind"], phase["first"], phase["until"]
        shortcut = kind == "between" and recipe.loss.velocity == "network"
        when = f"until step {until:,}" if until < steps else f"from step {first:,}"
        state, what = PHASE_WORDS["shortcut" if shortcut else kind]
        if recipe.loss.tangent == "network" and kind != "flow":
            what += ", along the network's own velocity"
        if kind == "between" and recipe.train.precise_below:
            what += f", in {'TF32' if recipe.train.tf32 else 'fp32'} where alpha < {recipe.train.precise_below:g}"
        texts.append(f"{state} {when} ({(until - first) / steps:.1%} of the run): {what}")
    return texts


def _equal(recipe: Recipe, f: dict[str, Any]) -> str:
    first, last, batch = f["equal_rows"]["first"], f["equal_rows"]["last"], recipe.train.batch
    change = "" if first == last else f" at first, {last:,} at last"
    return f"{first:,} of {batch:,} per batch{change}"


def _effective(recipe: Recipe) -> float | None:
    """The scale that is built in; None where each row draws one."""
    return None if plan.draws_scale(recipe) else plan.effective_scale(recipe.guidance.omega, recipe.guidance.kappa)


def _guidance(recipe: Recipe, f: dict[str, Any]) -> str:
    g = recipe.guidance
    if plan.draws_scale(recipe):
        where = "with an interval" if g.interval == "drawn" else f"for {g.t_min:g} < t < {g.t_max:g}"
        rows = ", all on r = t rows" if g.drop == "equal" else ""
        return (
            f"an input of the network: each row draws a scale from 1 to {g.scale_max:g} (density w^-{g.scale_beta:g}) "
            f"{where}; labels dropped with probability {g.label_dropout:g}{rows}"
        )
    if not plan.is_guided(g.omega, g.kappa):
        return "none"
    faded = f"fading above t = {g.fade_from:g}" if g.fade_from is not None else f"for {g.t_min:g} < t < {g.t_max:g}"
    plain = ", which then learn no guidance" if g.dropped == "plain" else ""
    return (
        f"omega {g.omega:g}, kappa {g.kappa:g} {faded}: effective scale {f['effective_guidance']:g}, built into the "
        f"weights; labels dropped with probability {g.label_dropout:g}{plain}"
    )


def _optimiser(recipe: Recipe) -> str:
    o, e = recipe.optim, recipe.ema
    decay = "then constant" if o.final_lr is None else f"then cosine to {o.final_lr:g}"
    lives = ", ".join(f"{life:g}" for life in e.half_lives)
    warm = f"after {o.warmup_steps:,} warm-up steps, {decay}" if o.warmup_steps else decay.removeprefix("then ")
    every = f", moved every {e.every:,} steps" if e.every > 1 else ""
    kind = {"adam": "Adam", "radam": "RAdam"}[o.kind]
    return f"{kind}, lr {o.lr:g} {warm}; EMA half-life {lives} steps{every}"


def _memory(recipe: Recipe, f: dict[str, Any]) -> str:
    b, batch = f["bytes"], recipe.train.batch
    whole = human(b["state"] + batch * b["activations_per_row"])
    per_row = human(b["activations_per_row"])
    return f"about {human(b['state'])} + {per_row} per row of a micro-batch ({whole} with all {batch:,} rows at once)"


def _disk(recipe: Recipe, f: dict[str, Any]) -> str:
    b = f["bytes"]
    kept = f"{counted(b['checkpoints_kept'], 'checkpoint')} of {human(b['checkpoint'])}"
    kept += f" and the newest state of {human(b['saved_state'])}"
    store = f"{human(b['latents_per_image'])} per image in the store"
    if recipe.data.classes == 1000:
        store += f" ({human(b['latents_per_image'] * plan.IMAGENET_TRAIN)} for ImageNet)"
    return f"weights {human(b['weights'])}; {kept}; {store}"


def _speed(recipe: Recipe) -> list[str]:
    """One line: the hours on one H100 from measured figures, and on one H200 and on eight H100s by arithmetic."""
    one, newer, many = _paces(recipe).values()
    if one is None or newer is None or many is None:
        return []
    source = "steps measured once there" if one.measured else "by arithmetic from measured steps of another network"
    form = "compiled" if one.compiled else "not compiled"
    return [
        f"one H100, {form}: about {one.images_per_second:,.0f} images/s, {_hours(one.hours)} ({source}); "
        f"one H200: {newer.images_per_second:,.0f} images/s, {_hours(newer.hours)}, and {MANY} H100s in one machine: "
        f"{many.images_per_second:,.0f} images/s, {_hours(many.hours)} (arithmetic)"
    ]


def _paces(recipe: Recipe) -> dict[str, speed.Pace | None]:
    newer = speed.pace(recipe, h200=True)
    return {"1 x H100": speed.pace(recipe), "1 x H200": newer, f"{MANY} x H100": speed.pace(recipe, MANY)}


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours < 10 else f"{hours:,.0f} h"
