"""What a published snapshot says beside its weights: cfg, stats and the optimiser, as values of a recipe.

Known places: cfg.model and cfg.dataset (sizes), cfg.loss.cfg_params (guidance), cfg.sampling, stats.cur_step,
optimizer.param_groups. A schedule of alpha, or of the share of r = t rows, is known by its form (scheduler,
initial_value, …) and by alpha or ratio_fm in its name. The number of steps is known by its name, max_steps. What is
found twice with two values, or has no place in a recipe, is listed as not read.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, cast, get_args

from alphaflow_cli.convert.imported import step_in_file
from alphaflow_cli.convert.source import as_table, in_brief
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe import Recipe
from alphaflow_cli.recipe.plan import is_guided
from alphaflow_cli.recipe.schema import Schedule, ScheduleKind, resolve_step

SCHEDULES = {"alpha": "alpha", "times.equal_share": "ratio_fm"}  # field of the recipe → part of the name in cfg
MIX = ("omega", "kappa", "t_min", "t_max")
SHAPES = {  # read by published.py, which compares them with the weights
    "model.dim", "model.num_blocks", "model.num_heads", "model.mlp_ratio", "model.label_dropout",
    "model.tokenizer.resolution", "dataset.label_shape",
}  # fmt: skip
PREDICTION = ("prediction", "prediction_type", "pred_type", "parameterization", "parametrization")
NO_VELOCITY = {"x", "x0", "x_0", "x_prediction", "x_pred", "data", "sample", "eps", "epsilon", "noise", "score"}
X_SWITCHES = ("x_prediction", "x_pred", "predict_x", "predict_x0")
NO_PRECOND = {"", "none", "null", "identity", "false", "recflow", "rf", "flow", "velocity", "v"}
COMPARED = ("guidance.omega", "guidance.kappa", "guidance.t_min", "guidance.t_max", "alpha", "times.equal_share")
INTERVAL = ("sampling.cfg.t_min", "sampling.cfg.t_max")
MOST_UNREAD = 40  # names
MOST_ENTRIES = 100_000  # of cfg: a real one has a few hundred


@dataclass
class Training:
    """What a snapshot says of its training: recipe values by dotted name, and which keys were read and which not."""

    facts: dict[str, Any] = field(default_factory=dict)
    read: dict[str, Any] = field(default_factory=dict)  # place in the file → its value, as it is told
    unread: list[str] = field(default_factory=list)
    step: int | None = None


def read_training(tree: Mapping[str, Any], where: str) -> Training:
    """Read everything that a snapshot's cfg says, but for the sizes of the network."""
    leaves = dict(walk_cfg(as_table(tree.get("cfg"))))
    _refuse_other_networks(leaves, where)
    training = Training()
    _mix(leaves, training, where)
    _schedules(leaves, training, where)
    _sampling(leaves, training, where)
    _sampling_guidance(leaves, training)
    _optimiser(tree.get("optimizer"), training)
    training.step = step_in_file(as_table(tree.get("stats")).get("cur_step"))
    if training.step is not None:
        training.read["stats.cur_step"] = training.step
    training.unread += _unread(leaves, training.read.keys() | SHAPES)
    return training


def check_against(training: Training, dropout: float | None, recipe: Recipe, named: str, where: str) -> None:
    """Refuse a recipe, named on the command line or by the file's name, that contradicts the file."""
    theirs, ours = dict(training.facts), {key: attrgetter(key)(recipe) for key in COMPARED}
    others = [
        (key, _in_words(theirs[key]), _in_words(ours[key]))
        for key in COMPARED
        if key in theirs and not _same(key, theirs, ours[key], recipe)
    ]
    dropped = recipe.guidance.label_dropout
    if dropout is not None and (dropout > 0) != (dropped > 0):
        others.append(("label_dropout", f"{dropout:g}", f"{dropped:g}"))
    if others:
        key, stated, value = others[0]
        raise AlphaflowError(
            f"{where}: its configuration says {key} {stated}, {named} says {value}. One of the two is wrong: "
            "name the recipe it was trained by, or none, and call the file something else."
        )


def _same(key: str, theirs: Mapping[str, Any], ours: Any, recipe: Recipe) -> bool:
    if isinstance(ours, Schedule):
        steps = recipe.train.steps
        return _essence(theirs[key], theirs.get("train.steps", steps)) == _essence(ours, steps)
    if key in ("guidance.t_min", "guidance.t_max") and _is_plain(theirs):
        return True
    return math.isclose(theirs[key], ours, rel_tol=1e-6, abs_tol=1e-9)


def _is_plain(values: Mapping[str, Any]) -> bool:
    """Whether a configuration says that no guidance was trained in; False where it says nothing about it."""
    omega, kappa = values.get("guidance.omega"), values.get("guidance.kappa")
    return omega is not None and kappa is not None and not is_guided(omega, kappa)


def _essence(schedule: Schedule, steps: int) -> tuple[Any, ...]:
    """What a schedule does, in a form that is equal for equal schedules, however they are written."""
    if schedule.kind == "constant":
        return ("constant", schedule.initial)
    start, end = resolve_step(schedule.start, steps), resolve_step(schedule.end, steps)
    ends = (schedule.initial, schedule.final, start, schedule.clamp)
    if schedule.kind == "step":
        return ("step", *ends)
    gamma = schedule.gamma if schedule.kind in ("sigmoid", "exponential") else 0
    return (schedule.kind, *ends, end, gamma)


def _in_words(value: object) -> str:
    if not isinstance(value, Schedule):
        return str(value)
    if value.kind == "constant":
        return f"constant {value.initial:g}"
    return f"{value.kind} {value.initial:g} to {value.final:g} on [{value.start}, {value.end}]"


def _row(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def walk_cfg(tree: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of every node of cfg, ten levels down.

    A table that holds itself is walked once.
    """
    stack: list[tuple[str, dict[Any, Any]]] = [("", tree)]
    seen, count = {id(tree)}, 0
    while stack:
        prefix, table = stack.pop()
        for key, value in table.items():
            name = f"{prefix}{in_brief(key)}"
            yield name, value
            count += 1
            if count >= MOST_ENTRIES:
                return
            if isinstance(value, dict) and id(value) not in seen and name.count(".") < 10:
                seen.add(id(value))
                stack.append((f"{name}.", value))


def _named(leaves: Mapping[str, Any], names: tuple[str, ...], under: str = "") -> Iterator[tuple[str, Any]]:
    return ((k, v) for k, v in leaves.items() if k.rpartition(".")[2] in names and k.startswith(under))


def _refuse_other_networks(leaves: Mapping[str, Any], where: str) -> None:
    """Refuse a network that is not u of unit noise on the straight path, with nothing around it: ours is only that."""
    for name, value in _named(leaves, ("sigma_noise",)):
        if value is not None and not (_is_number(value) and value == 1):
            raise AlphaflowError(f"{where}: its cfg.{name} is {in_brief(value)}; only noise of deviation 1 is read.")
    for name, value in _named(leaves, ("precond", "preconditioning")):
        kind = in_brief(value.get("name", value.get("type", "")) if isinstance(value, dict) else value)
        if kind.lower() not in NO_PRECOND:
            raise AlphaflowError(
                f"{where}: its cfg.{name} is {kind!r}: a network with a preconditioning around it, which the "
                "networks here do not have."
            )
    for name, value in _named(leaves, PREDICTION):
        if in_brief(value).lower() in NO_VELOCITY:
            raise AlphaflowError(f"{where}: its cfg.{name} is {in_brief(value)!r}; only a velocity is read.")
    for name, value in _named(leaves, X_SWITCHES):
        if value is True:
            raise AlphaflowError(f"{where}: its cfg.{name} is on: it predicts x; only a velocity is read.")


def _mix(leaves: Mapping[str, Any], training: Training, where: str) -> None:
    """Read omega, kappa and their interval, as they stand in cfg.loss.cfg_params."""
    mix: dict[str, float] = {}
    places: dict[str, float] = {}
    for name, value in _named(leaves, ("cfg_params",), "loss."):
        for key in MIX:
            if (stated := as_table(value).get(key)) is not None:
                mix[key] = _number(stated, f"{name}.{key}", where)
                places[f"{name}.{key}"] = mix[key]
    if "omega" not in mix or "kappa" not in mix:
        return
    training.read |= places
    if not is_guided(mix["omega"], mix["kappa"]) or mix.get("t_max", 1.0) <= mix.get("t_min", 0.0):
        mix = {"omega": 1.0, "kappa": 0.0}  # no guidance, or no time for it: an interval has no meaning
    training.facts |= {f"guidance.{key}": value for key, value in mix.items()}


def _schedules(leaves: Mapping[str, Any], training: Training, where: str) -> None:
    """Read the schedules of alpha and of the share of r = t rows, and the number of steps in which they end."""
    for field_, places in schedule_places(leaves).items():
        schedules = {place: _schedule(leaves[place], f"cfg.{place}", where) for place in places}
        if len(set(schedules.values())) == 1:
            training.facts[field_] = next(iter(schedules.values()))
            training.read |= {place: _in_words(schedule) for place, schedule in schedules.items()}
    lengths = {n: v for n, v in _named(leaves, ("max_steps",)) if _is_number(v) and 0 < v < 10**12 and v == int(v)}
    if len(set(lengths.values())) == 1:
        training.facts["train.steps"] = int(next(iter(lengths.values())))
        training.read |= lengths
    ends = [schedule.end for schedule in training.facts.values() if isinstance(schedule, Schedule)]
    longest = max((end for end in ends if isinstance(end, int)), default=0)
    if longest > training.facts.get("train.steps", 0):  # a schedule must end within the run
        training.facts["train.steps"] = longest
    if _is_flow(training):
        training.facts["alpha"] = Schedule(initial=1.0, final=1.0, clamp=0.0)  # no row has r < t: alpha does nothing


def _is_flow(training: Training) -> bool:
    """Tell whether the training was plain flow matching: every row has r = t."""
    share = training.facts.get("times.equal_share")
    return share is not None and share.kind == "constant" and share.initial == 1


def schedule_places(leaves: Mapping[str, Any]) -> dict[str, list[str]]:
    """Find where cfg keeps each schedule of the recipe: as tables of that form, else as a bare number in cfg.loss."""
    places = {}
    for field_, word in SCHEDULES.items():
        tables = [name for name, value in leaves.items() if word in name.rpartition(".")[2] and _is_schedule(value)]
        numbers = [name for name, value in _named(leaves, (word,), "loss.") if _is_number(value)]
        places[field_] = tables or numbers
    return places


def _is_schedule(value: object) -> bool:
    return isinstance(value, dict) and {"scheduler", "initial_value"} <= value.keys()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e300


def _schedule(value: Any, name: str, where: str) -> Schedule:
    """Read a schedule: a number, or their table of scheduler, initial_value, end_value, change_init_steps, …"""
    if not isinstance(value, dict):
        constant = _number(value, name, where)
        return Schedule(initial=constant, final=constant, clamp=0.0)
    kind = in_brief(value.get("scheduler"))
    if kind not in get_args(ScheduleKind):
        raise AlphaflowError(f"{where}: its {name} is a schedule of kind {kind!r}, which no recipe here has.")
    if value.get("up_clamp_value") is not None or value.get("discrete_training", False) is not False:
        raise AlphaflowError(f"{where}: its {name} has up_clamp_value or discrete_training, which no recipe here has.")

    def part(key: str, default: float) -> float:
        return default if value.get(key) is None else _number(value[key], f"{name}.{key}", where)

    initial = part("initial_value", 0.0)
    if kind == "constant":
        return Schedule(initial=initial, final=initial, clamp=0.0)
    start, end = int(part("change_init_steps", 0)), int(part("change_end_steps", 0))
    return Schedule(
        kind=cast(ScheduleKind, kind), initial=initial, final=part("end_value", 0.0), start=start,
        end=start if kind == "step" else end, gamma=part("gamma", 1.0), clamp=part("clamp_value", 0.0),
    )  # fmt: skip


def _sampling(leaves: Mapping[str, Any], training: Training, where: str) -> None:
    """Read sampler and grid: one step needs none, two steps have a published one, more have a grid of their own."""
    stated, flow = as_table(leaves.get("sampling")), _is_flow(training)
    if flow:
        training.facts |= {"sample.sampler": "flow", "sample.two_step_sampler": "flow", "sample.nfe": 100}
    consistent = stated.get("enable_consistency_sampling") is True
    if not (flow or consistent or stated.get("enable_trajectory_sampling") is True):
        return
    kind = "flow" if flow else "consistency" if consistent else "trajectory"
    times, steps = stated.get("custom_t_steps"), stated.get("num_steps")
    times = times if isinstance(times, (list, tuple)) else ()
    grid = tuple(_number(time, "sampling.custom_t_steps", where) for time in times[:1002])
    count = len(grid) - 1 if grid else steps
    if not isinstance(count, int) or not 1 <= count <= 1000:
        return
    if count == 2 and not flow:
        training.facts |= {"sample.two_step_sampler": kind, "sample.two_step_times": grid or (1.0, 0.5, 0.0)}
    elif count > 1 or kind != "consistency":  # one step of a consistency sampler is one step of a trajectory
        own = grid if count > 1 and grid else None
        training.facts |= {"sample.sampler": kind, "sample.nfe": count, "sample.times": own}
    read = ("enable_consistency_sampling", "enable_trajectory_sampling", "num_steps", "sigma_noise")
    known = {f"sampling.{key}": stated[key] for key in read if isinstance(stated.get(key), (bool, int, float))}
    training.read |= known | ({"sampling.custom_t_steps": _row(grid)} if grid else {})


def _sampling_guidance(leaves: Mapping[str, Any], training: Training) -> None:
    """Read the guidance at sampling of a network that was trained without and knows the null label."""
    scale, dropout = leaves.get("sampling.cfg.scale", 0), leaves.get("model.label_dropout", 0)
    ends = [leaves.get(place, default) for place, default in zip(INTERVAL, (0, 1), strict=True)]
    whole = all(map(_is_number, ends)) and ends == [0, 1]
    if whole and _is_plain(training.facts) and all(_is_number(value) and value > 0 for value in (scale, dropout)):
        training.facts["sample.guidance"] = training.read["sampling.cfg.scale"] = float(scale)
        training.read |= {place: leaves[place] for place in INTERVAL if place in leaves}


def _optimiser(state: object, training: Training) -> None:
    """Read Adam's constants, and the learning rate before the schedule scaled it, as torch keeps them."""
    groups = as_table(state).get("param_groups")
    group = as_table(groups[0]) if isinstance(groups, list) and groups else {}
    for key, ours in (("initial_lr", "lr"), ("eps", "eps"), ("weight_decay", "weight_decay")):
        value = group.get(key)
        if value is not None and _is_number(value):
            training.facts[f"optim.{ours}"] = training.read[f"optimizer.{key}"] = float(value)
    betas = group.get("betas")
    if isinstance(betas, (list, tuple)) and len(betas) == 2 and all(isinstance(b, float) for b in betas):
        training.facts["optim.betas"] = tuple(betas)
        training.read["optimizer.betas"] = _row(betas)


def _unread(leaves: Mapping[str, Any], read: set[str]) -> list[str]:
    """List the names of what was not read; a table of which nothing was read stands for all in it."""
    above = {name.rsplit(".", i)[0] for name in read for i in range(1, name.count(".") + 1)}
    below = [n for n in leaves if n not in read and n not in above and not _inside(n, read)]
    names = sorted(name for name in below if name.rpartition(".")[0] in above or "." not in name)
    more = [f"and {len(names) - MOST_UNREAD} more"] if len(names) > MOST_UNREAD else []
    return [f"cfg.{name}" for name in names[:MOST_UNREAD]] + more


def _inside(name: str, read: set[str]) -> bool:
    """Tell whether a node is part of a table that was read as a whole, such as a schedule."""
    return any(name.rsplit(".", i)[0] in read for i in range(1, name.count(".") + 1))


def _number(value: object, name: str, where: str) -> float:
    if not _is_number(value):
        raise AlphaflowError(f"{where}: its configuration says {name} {in_brief(value)}, not a finite number.")
    return float(cast(float, value))
