"""The format of recipes, and the migrations by which every older format can be read for ever.

A resolved recipe (recipe.yaml of a run or a published model, the recipe in a checkpoint) begins with `format: N`. A
file without it has format 1. Whoever renames, moves or removes a key of the schema adds one entry to MIGRATIONS: a
function from the parsed mapping of that format to the mapping of the next one. That entry raises the format that is
written.

A migration gets text as it was parsed, not checked values: a section may be anything. It keeps the `where` of what it
moves, so that a fault is still shown at the line of the old file.
"""

import re
from collections.abc import Callable
from dataclasses import replace

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe.source import Faults, Mapping, Scalar

FORMAT_KEY = "format"
MIGRATIONS: dict[int, Callable[[Mapping], Mapping]] = {}  # format → what makes a recipe of the next format out of it


def current_format() -> int:
    """The format that this version writes, and the newest that it reads."""
    return len(MIGRATIONS) + 1


def refuse_newer(number: int, newest: int, where: str) -> None:
    """Refuse what a newer version wrote, before anything of it is called a fault; also of checkpoints."""
    if number > newest:
        raise AlphaflowError(
            f"{where}: made by a newer alphaflow (format {number}, this one reads up to {newest}): update it"
        )


def migrate(tree: Mapping, faults: Faults) -> Mapping:
    """The mapping of a recipe of any format, brought to the current one and without the `format` key itself."""
    if FORMAT_KEY not in tree.items:
        return _upwards(tree, 1)
    stated = tree.items[FORMAT_KEY]
    rest = replace(tree, items={key: value for key, value in tree.items.items() if key != FORMAT_KEY})
    if not isinstance(stated, Scalar) or stated.quoted or not re.fullmatch(r"[1-9][0-9]{0,8}", stated.text):
        shown = f", got {stated.text[:60]!r}" if isinstance(stated, Scalar) else ""
        faults.add(stated.where, f"{FORMAT_KEY} wants the number of a recipe's format, 1 to {current_format()}{shown}")
        return rest
    refuse_newer(int(stated.text), current_format(), stated.where)
    return _upwards(rest, int(stated.text))


def _upwards(tree: Mapping, number: int) -> Mapping:
    for each in range(number, current_format()):
        tree = MIGRATIONS[each](tree)
    return tree
