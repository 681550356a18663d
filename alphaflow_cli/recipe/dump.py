"""A recipe as YAML that loads back to the same recipe, as a plain dict, and as differences."""

import json
from dataclasses import fields, is_dataclass
from typing import Any

from alphaflow_cli.recipe.schema import Recipe, Schedule


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
        plain[field.name] = list(value) if isinstance(value, tuple) else value
    return plain


def dump_recipe(recipe: Recipe) -> str:
    """Every field, defaults included, so that the file means the same under a later version's defaults."""
    return "\n".join(_lines(to_dict(recipe), "")) + "\n"


def _lines(section: dict[str, Any], indent: str) -> list[str]:
    lines: list[str] = []
    for key, value in section.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {_value(value)}")
    return lines


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)  # each JSON scalar is a YAML scalar of the same meaning


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
