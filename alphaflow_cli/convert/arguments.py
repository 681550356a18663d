"""The training arguments that REPA and its children (zhuyu-cs/MeanFlow) keep beside their weights, as recipe values.

Their trainers share one command line. What it says of times, loss and optimiser goes into the recipe, so that training
goes on as it began; what has no place in a recipe is listed by name.
"""

import math
from typing import Any

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe.schema import Schedule

NUMBERS = {  # argument → the field of the recipe that means the same
    "learning_rate": "optim.lr",
    "adam_epsilon": "optim.eps",
    "max_grad_norm": "optim.clip_norm",
    "time_mu": "times.mean",
    "time_sigma": "times.std",
}
COUNTS = {"batch_size": "train.batch", "max_train_steps": "train.steps"}
WORDS: dict[str, dict[object, dict[str, Any]]] = {  # argument → its value → what the recipe says then
    "mixed_precision": {"bf16": {"train.precision": "bf16"}, "no": {"train.precision": "fp32"}},
    "time_sampler": {"uniform": {"times.law": "uniform"}, "logit_normal": {"times.law": "logit_normal"}},
    "allow_tf32": {True: {"train.tf32": True}, False: {"train.tf32": False}},
}
# of zhuyu-cs: the squared error is summed over C·H·W; REPA has another loss
WEIGHTING: dict[object, dict[str, Any]] = {
    "adaptive": {"loss.weight": "adaptive", "loss.reduction": "sum", "loss.c": 1e-3},
    "uniform": {"loss.weight": "none", "loss.reduction": "sum"},
}


def plain_arguments(tree: dict[str, Any]) -> dict[str, Any]:
    """Take the training arguments out of a checkpoint: only plain values of a reasonable length."""
    kept = tree.get("args")
    table = kept if isinstance(kept, dict) else getattr(kept, "__dict__", {})
    return {str(key)[:80]: value for key, value in list(table.items())[:1000] if _is_plain(value)}


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= 200
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 10**15)


def number(arguments: dict[str, Any], key: str, where: str) -> float:
    """Read one argument as a finite number, or refuse the file."""
    try:
        value = float(arguments[key])
    except (ValueError, OverflowError) as error:
        raise AlphaflowError(f"{where}: its argument {key} is {str(arguments[key])[:60]!r}, not a number.") from error
    if not math.isfinite(value):
        raise AlphaflowError(f"{where}: its argument {key} is {value}, not a finite number.")
    return value


def recipe_facts(arguments: dict[str, Any], where: str, *, meanflow: bool) -> tuple[dict[str, Any], set[str]]:
    """Translate the arguments to recipe values by dotted name. Also gives the names of the arguments that were read."""
    facts: dict[str, Any] = {}
    read: set[str] = set()
    for key, field in NUMBERS.items():
        if key in arguments:
            facts[field] = number(arguments, key, where)
            read.add(key)
    for key, field in COUNTS.items():
        if isinstance(arguments.get(key), int) and arguments[key] > 0:
            facts[field] = arguments[key]
            read.add(key)
    for key, meanings in (WORDS | ({"weighting": WEIGHTING} if meanflow else {})).items():
        if key in arguments and arguments[key] in meanings:
            facts |= meanings[arguments[key]]
            read.add(key)
    if {"adam_beta1", "adam_beta2"} <= arguments.keys():
        facts["optim.betas"] = (number(arguments, "adam_beta1", where), number(arguments, "adam_beta2", where))
        read |= {"adam_beta1", "adam_beta2"}
    if "ratio_r_not_equal_t" in arguments:
        facts["times.equal_share"] = _equal_share(number(arguments, "ratio_r_not_equal_t", where), where)
        read.add("ratio_r_not_equal_t")
    if arguments.get("adaptive_p") == 1.0:  # the only exponent that a recipe has
        read.add("adaptive_p")
    if "adam_weight_decay" in arguments and not (meanflow and arguments["adam_weight_decay"]):  # Adam's is not AdamW's
        facts["optim.weight_decay"] = number(arguments, "adam_weight_decay", where)
        read.add("adam_weight_decay")
    return facts, read


def _equal_share(unequal: float, where: str) -> Schedule:
    """Turn the share of r < t rows into the share of r = t rows, which are the rest.

    Their code computes 1 − ratio, though a comment beside it says the opposite.
    """
    if not 0 <= unequal <= 1:
        raise AlphaflowError(f"{where}: its argument ratio_r_not_equal_t is {unequal:g}; a share lies within [0, 1].")
    return Schedule(initial=1 - unequal, final=1 - unequal, clamp=0.0)


def check_classes(arguments: dict[str, Any], rows: int, where: str) -> None:
    """Refuse a file whose label table does not have one row more than classes, as in all of this lineage."""
    classes = arguments.get("num_classes")
    if isinstance(classes, int) and classes != rows - 1:
        raise AlphaflowError(
            f"{where}: its argument num_classes is {classes}, its label table has {rows} rows; wanted {classes} and "
            "the null label."
        )
