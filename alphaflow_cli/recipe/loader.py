"""Recipes in and out: read by name or file and checked in full, written as YAML, compared.

Reading lists every fault with its place before anything runs. What is written loads back to the same recipe: every
default is spelt out, so it means the same under the defaults of a later version, and it names its format.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import is_there, user_path
from alphaflow_cli.recipe.build import EMPTY, build, suggest, text_of, with_value
from alphaflow_cli.recipe.checks import check
from alphaflow_cli.recipe.migrations import FORMAT_KEY, current_format, migrate
from alphaflow_cli.recipe.schema import Recipe, Schedule
from alphaflow_cli.recipe.source import (
    MAX_INSIDE,
    MAX_LEVELS,
    Faults,
    Items,
    Mapping,
    Scalar,
    Tree,
    parse,
    parse_value,
    read_text,
)
from alphaflow_cli.text import for_terminal

MAX_SETS = 1000  # the schema has about 100 values


def shipped() -> dict[str, Path]:
    """The recipes that come with the program, by name: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_recipes", package.parent / "recipes"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}
    raise AlphaflowError(f"{package}: the shipped recipes are missing. Install alphaflow again")


def find_recipe(name_or_path: str) -> Path:
    """The file meant by RECIPE: a shipped name first, else a path."""
    known = shipped()
    if name_or_path in known:
        return known[name_or_path]
    path = user_path(name_or_path)
    if name_or_path.endswith((".yaml", ".yml")) or len(path.parts) > 1 or is_there(path):
        return path
    raise AlphaflowError(
        f"{name_or_path!r} is neither a file nor a shipped recipe{suggest(name_or_path, known) or '.'} "
        "List them: alphaflow recipe ls"
    )


def check_sets(sets: Sequence[str]) -> None:
    """Refuse what a program may give in place of a list of assignments."""
    if isinstance(sets, str | dict):
        raise AlphaflowError('sets is a list: sets=["train.steps=2000"].')


def load_recipe(name_or_path: str | Path, sets: Sequence[str] = ()) -> Recipe:
    """The recipe, complete and checked; AlphaflowError lists every fault with its file and line."""
    check_sets(sets)
    path = find_recipe(str(name_or_path))
    return recipe_from_text(read_text(path), str(path), sets, name=_name_of(path))


def load_for_data(
    name_or_path: str, sets: Sequence[str], given: Callable[[Recipe], dict[str, Any]], giver: str
) -> tuple[Recipe, list[tuple[str, Any, Any]]]:
    """The recipe for other data than it was written for, and what they changed: (field, before, now).

    `given` makes of the recipe as it stands the values that `giver` has, by dotted name. A shipped recipe yields to all
    of them, a file where it says nothing; `--set` holds.
    """
    path = find_recipe(name_or_path)
    where, faults, yields = str(path), Faults(), path in shipped().values()
    tree = migrate(parse(read_text(path), where, faults), faults)
    before, _ = build(_assigned(tree, sets, Faults()), Faults())
    for field, value in given(before).items():
        keys = field.split(".")
        if yields or not _says(tree, keys):
            new = parse_value(_value(value), giver, faults)
            tree = tree if new is None else with_value(tree, keys, new, giver)
    recipe = _checked(_assigned(tree, sets, faults), where, faults, name=_name_of(path))
    return recipe, [row for row in diff_recipes(before, recipe) if row[0] != "name"]


def _name_of(path: Path) -> str:
    """The name of a recipe that does not say its own: its file's, with _ for signs that no folder should have."""
    return "".join(sign if sign.isprintable() and sign not in "/\\" else "_" for sign in path.stem)


def _says(tree: Tree, keys: Sequence[str]) -> bool:
    """Whether a tree has a value of its own there, or one at fault on the way."""
    if not keys or not isinstance(tree, Mapping):
        return True
    return keys[0] in tree.items and _says(tree.items[keys[0]], keys[1:])


def recipe_from_text(text: str, where: str, sets: Sequence[str] = (), *, name: str = "") -> Recipe:
    """A recipe from its text, as inside a checkpoint; `where` stands before the line in a fault."""
    if len(text) > MAX_INSIDE:
        raise AlphaflowError(f"{where}: larger than {MAX_INSIDE // 1024} KiB, so it is not a recipe")
    faults = Faults()
    tree = migrate(parse(text, where, faults), faults)
    return _checked(_assigned(tree, sets, faults), where, faults, name=name)


def _checked(tree: Mapping, where: str, faults: Faults, *, name: str) -> Recipe:
    recipe, places = build(tree, faults)
    recipe = recipe if recipe.name else replace(recipe, name=name)
    check(recipe, lambda path: _place(path, places, where), faults)
    faults.stop(where)
    return recipe


def _assigned(tree: Mapping, sets: Sequence[str], faults: Faults) -> Mapping:
    """The tree with every `--set` in it, one after another."""
    if len(sets) > MAX_SETS:
        raise AlphaflowError(f"{len(sets):,} times --set, and {MAX_SETS:,} is the most. Write them into a file")
    for assignment in sets:
        tree = _assign(tree, assignment, faults)
    return tree


def _assign(tree: Mapping, assignment: str, faults: Faults) -> Mapping:
    where = f"--set {for_terminal(assignment, limit=100)}"
    dotted, equals, text = assignment.partition("=")
    path = [part.strip() for part in dotted.split(".")]
    if not equals or not all(path):
        faults.add(where, "wants the form section.key=value, such as train.steps=1000")
        return tree
    if len(path) > MAX_LEVELS:
        faults.add(where, f"more than {MAX_LEVELS} names inside each other")
        return tree
    value = parse_value(text, where, faults)
    return tree if value is None else with_value(tree, path, value, where)


def _place(path: str, places: dict[str, str], where: str) -> str:
    """The line where a field stands; a field left at its default is placed at its section, else at the file."""
    while path and path not in places:
        path = path.rpartition(".")[0]
    return places.get(path, where)


def is_plain(schedule: Schedule) -> bool:
    """True where a bare number says all of it."""
    return schedule == Schedule(initial=schedule.initial, final=schedule.initial, clamp=0.0)


def to_dict(section: Any) -> dict[str, Any]:
    """The recipe as nested plain values; a constant schedule is its number."""
    plain: dict[str, Any] = {}
    for field in fields(section):
        value = getattr(section, field.name)
        if isinstance(value, Schedule) and is_plain(value):
            value = value.initial
        elif is_dataclass(value):
            value = to_dict(value)
        plain[field.name] = [to_dict(v) if is_dataclass(v) else v for v in value] if isinstance(value, tuple) else value
    return plain


def dump_recipe(recipe: Recipe) -> str:
    """The format and every field, defaults included, so that a later version reads the same recipe."""
    return "\n".join(_lines({FORMAT_KEY: current_format(), **to_dict(recipe)}, "")) + "\n"


def _lines(section: dict[str, Any], indent: str) -> list[str]:
    lines: list[str] = []
    for key, value in section.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {_value(value)}")
    return lines


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, dict) or is_dataclass(value):
        value = value if isinstance(value, dict) else to_dict(value)
        return "{" + ", ".join(f"{key}: {_value(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)  # each JSON scalar is a YAML scalar of the same meaning


def set_text(value: Any) -> str:
    """Write a recipe's value as `--set` takes it."""
    if isinstance(value, tuple):
        return "[" + ", ".join(set_text(item) for item in value) + "]"
    if isinstance(value, str) and _reads_back(value):
        return value
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else _value(value)


@cache
def _reads_back(text: str) -> bool:
    """Whether YAML and the schema read a text without quotes as that text, alone and in a list."""
    tree = parse_value(f"[{text}]", "", Faults())
    item = tree.items[0] if isinstance(tree, Items) and len(tree.items) == 1 else None
    return isinstance(item, Scalar) and item == Scalar(text, False, "") and text not in EMPTY and not text_of(item)[0]


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Dotted name → value, for every leaf; schedules in their long form."""
    leaves: dict[str, Any] = {}

    def walk(section: Any, prefix: str) -> None:
        for field in fields(section):
            value = getattr(section, field.name)
            if is_dataclass(value):
                walk(value, f"{prefix}{field.name}.")
            else:
                leaves[prefix + field.name] = value

    walk(recipe, "")
    return leaves


def diff_recipes(a: Recipe, b: Recipe) -> list[tuple[str, Any, Any]]:
    """(dotted name, value in a, value in b) of every field in which two recipes differ."""
    left, right = flatten(a), flatten(b)
    return [(name, left[name], right[name]) for name in left if left[name] != right[name]]
