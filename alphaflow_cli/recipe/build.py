"""A tree of text → the dataclasses of the schema: each value is read as what its field has to be, or is a fault.

What a field does not say comes from the schema's own default of that field; nothing is guessed from a value's looks.
"""

import re
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from alphaflow_cli.recipe.schema import Auto, Recipe, Schedule, StepOrShare
from alphaflow_cli.recipe.source import Faults, Items, Mapping, Scalar, Tree
from alphaflow_cli.text import shorten

INT = re.compile(r"[+-]?(0|[1-9][0-9]*(_[0-9]+)*)")
FLOAT = re.compile(r"[+-]?([0-9]+(_[0-9]+)*(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s?%")
NOT_FINITE = re.compile(r"[+-]?\.?(nan|inf|infinity)", re.IGNORECASE)
SWITCHES = {"yes", "no", "on", "off", "y", "n"}
EMPTY = {"", "~", "null", "Null", "NULL"}
LARGEST = 10**12  # of any whole number in a recipe: beyond it is a slip of the hand
LONGEST_NUMBER = 40  # characters: Python refuses to read whole numbers of thousands of digits
LONGEST_TEXT = 4096  # characters, as in a path
MOST_ITEMS = 1000  # of a list
MOST_GUESSES = 20  # likenesses looked for in one recipe: they take longer than all the rest


@dataclass
class Reader:
    """Collects faults, and where each field stands, by its dotted name."""

    faults: Faults
    places: dict[str, str] = field(default_factory=dict)
    guesses: int = 0

    def suggest(self, word: str, known: object) -> str:
        """As `suggest` below, for the first unknown names only: likeness takes longer than all the rest."""
        self.guesses += 1
        return suggest(word, known) if self.guesses <= MOST_GUESSES else ""

    def bad(self, node: Tree, path: str, what: str) -> None:
        self.faults.add(node.where, f"{path} {what}")


def build(tree: Mapping, faults: Faults) -> tuple[Recipe, dict[str, str]]:
    """The recipe, as far as the tree is sound, and the place of each field that it says."""
    reader = Reader(faults)
    recipe = _section(Recipe(), tree, "", reader)
    return recipe, reader.places


@cache
def field_types(section: Any) -> dict[str, Any]:
    return get_type_hints(section)


def suggest(word: str, known: object) -> str:
    """` Did you mean 'x'?` with the nearest known name, or nothing where none is near."""
    near = get_close_matches(word[:100], [str(k) for k in cast(list[str], known)], n=1, cutoff=0.5)
    return f". Did you mean {near[0]!r}?" if near else ""


def long_form(value: Scalar) -> Mapping:
    """A bare number as a schedule: that constant, exactly."""
    zero, kind = Scalar("0", False, value.where), Scalar("constant", False, value.where)
    return Mapping({"kind": kind, "initial": value, "final": value, "clamp": zero}, value.where)


def with_value(tree: Mapping, path: list[str], value: Tree, where: str, section: Any = Recipe) -> Mapping:
    """The tree with `value` at a dotted path; sections on the way appear as needed, unknown names are kept to fail."""
    key, rest = path[0], path[1:]
    if rest:
        inner = tree.items.get(key)
        kind = field_types(cast(type, section)).get(key) if is_dataclass(section) else None
        if isinstance(inner, Scalar) and kind is Schedule:
            inner = long_form(inner)
        value = with_value(inner if isinstance(inner, Mapping) else Mapping({}, where), rest, value, where, kind)
    return replace(tree, items={**tree.items, key: value}, key_where={**tree.key_where, key: where})


def _section(default: Any, node: Tree, path: str, reader: Reader) -> Any:
    """One section of the recipe: `default`, with every field that the mapping says replaced."""
    if not isinstance(node, Mapping):
        names = ", ".join(f.name for f in fields(default)[:3])
        reader.bad(node, path, f"is a section: give it lines of its own ({names}, …)")
        return default
    types, values = field_types(cast(type, type(default))), {}
    for key, value in node.items.items():
        full = f"{path}.{key}" if path else key
        if key not in types:
            reader.faults.add(node.key_where.get(key, value.where), _unknown(key, full, path, types, reader))
            continue
        reader.places[full] = value.where
        values[key] = _value(types[key], value, getattr(default, key), full, reader)
    return replace(default, **values)


def _unknown(key: str, full: str, path: str, types: dict[str, Any], reader: Reader) -> str:
    hint = _home_of(key, path) or reader.suggest(key, types) or f". Known here: {', '.join(types)}"
    return f"unknown key {shorten(full, 100)!r}{hint}"


def _home_of(key: str, path: str) -> str:
    """Where a misplaced key belongs, if one section has it."""
    for name, kind in field_types(Recipe).items():
        if name != path and is_dataclass(kind) and key in field_types(cast(type, kind)):
            return f". It belongs to {name!r}: {name}.{key}"
    return ""


def _value(kind: Any, node: Tree, default: Any, path: str, reader: Reader) -> Any:
    """One field, read as `kind`; on a fault, the default stands in so that reading goes on."""
    if kind is Schedule and isinstance(node, Scalar):
        return _constant(node, default, path, reader)
    if is_dataclass(kind):  # an item of a list has no default of its own
        return _section(cast(type, kind)() if default is None else default, node, path, reader)
    optional = get_origin(kind) in (UnionType, Union) and NoneType in get_args(kind)
    if optional and isinstance(node, Scalar) and not node.quoted and node.text in EMPTY:
        return None
    if optional:
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is tuple:
        return _items(get_args(kind), node, default, path, reader)
    if not isinstance(node, Scalar):
        reader.bad(node, path, f"wants {_wanted(kind)}, got {'a list' if isinstance(node, Items) else 'a mapping'}")
        return default
    return _scalar(kind, node, default, path, reader)


def _constant(node: Scalar, default: Schedule, path: str, reader: Reader) -> Schedule:
    """A schedule that is one bare number; what is none is one fault, not one of each end."""
    problem, _ = _float(node)
    if not problem:
        return cast(Schedule, _section(default, long_form(node), path, reader))
    kinds = get_args(field_types(Schedule)["kind"])
    hint = f": write {{kind: {node.text}}}" if node.text in kinds else problem.removeprefix("-")
    reader.bad(node, path, f"wants a number or a schedule, got {node.text[:60]!r}{hint}")
    return default


def _items(kinds: tuple[Any, ...], node: Tree, default: Any, path: str, reader: Reader) -> Any:
    if not isinstance(node, Items):
        shown = f": write [{node.text}]" if isinstance(node, Scalar) and node.text not in EMPTY else ""
        reader.bad(node, path, f"wants a list{shown}")
        return default
    if len(node.items) > MOST_ITEMS:
        reader.bad(node, path, f"has {len(node.items):,} items, and {MOST_ITEMS:,} is the most")
        return default
    if kinds[-1] is not Ellipsis and len(kinds) != len(node.items):
        reader.bad(node, path, f"wants {len(kinds)} values, got {len(node.items)}")
        return default
    return tuple(_value(kinds[0], item, None, f"{path}[{i}]", reader) for i, item in enumerate(node.items))


def _wanted(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    names: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    names |= {Auto: "auto, true or false", StepOrShare: 'a step or a percentage of the run ("50%")'}
    return names[kind]


def _scalar(kind: Any, node: Scalar, default: Any, path: str, reader: Reader) -> Any:
    if node.text in EMPTY and not node.quoted:
        hint = ': write "" for empty text' if kind is str else ""
        reader.bad(node, path, f"is empty, but wants {_wanted(kind)}{hint}")
        return default
    if len(node.text) > LONGEST_TEXT:
        reader.bad(node, path, f"has {len(node.text):,} characters, and {LONGEST_TEXT:,} is the most")
        return default
    if get_origin(kind) is Literal:
        return _choice(kind, node, default, path, reader)
    read = {int: _int, float: _float, bool: _bool, str: text_of, Auto: _auto, StepOrShare: _step}[kind]
    problem, value = read(node)
    if problem:
        reader.bad(node, path, f"wants {_wanted(kind)}, got {node.text[:60]!r}{problem if problem != '-' else ''}")
        return default
    return value


def _choice(kind: Any, node: Scalar, default: Any, path: str, reader: Reader) -> Any:
    if node.text in get_args(kind):
        return node.text
    why = ". fp16 is not offered: the derivative of the network overflows in it" if node.text == "fp16" else ""
    near = why or reader.suggest(node.text, get_args(kind))
    reader.bad(node, path, f"wants {_wanted(kind)}; got {node.text[:60]!r}{near}")
    return default


# Each reader below returns (what is wrong or "", the value); "-" is a fault with nothing to add.


def _int(node: Scalar) -> tuple[str, Any]:
    text = node.text
    if not node.quoted and INT.fullmatch(text):
        value = int(text.replace("_", "")) if len(text) <= LONGEST_NUMBER else LARGEST + 1
        return ("", value) if abs(value) <= LARGEST else (f": more than {LARGEST:,}", None)
    if node.quoted:
        return " in quotes: leave them out", None
    if re.fullmatch(r"[+-]?0[0-9]+", text):
        return ": leading zeros mean octal to YAML, leave them out", None
    if FLOAT.fullmatch(text) and abs(float(text)) <= LARGEST and float(text).is_integer():
        return f": write {int(float(text))}", None
    return "-", None


def _float(node: Scalar) -> tuple[str, Any]:
    if node.quoted:
        return " in quotes: leave them out", None
    if NOT_FINITE.fullmatch(node.text):
        return ": it must be finite", None
    if not FLOAT.fullmatch(node.text):
        return ": a schedule's steps may be percentages, its values not" if node.text.endswith("%") else "-", None
    value = float(node.text)
    return (": it must be finite", None) if value in (float("inf"), float("-inf")) else ("", value)


def _bool(node: Scalar) -> tuple[str, Any]:
    if not node.quoted and node.text in ("true", "false"):
        return "", node.text == "true"
    lowered = node.text.lower()
    if lowered in SWITCHES | {"true", "false"}:
        return f": write {'true' if lowered in ('yes', 'on', 'y', 'true') else 'false'}", None
    return "-", None


def _auto(node: Scalar) -> tuple[str, Any]:
    return ("", "auto") if node.text == "auto" else _bool(node)


def text_of(node: Scalar) -> tuple[str, Any]:
    if not node.text.isprintable():  # it names files and folders
        return ": a line break, a null byte or half a character cannot stand here", None
    trap = node.text.lower() in SWITCHES | {"true", "false"} or FLOAT.fullmatch(node.text)
    if trap and not node.quoted:
        return f': YAML reads that as something else: write "{node.text}"', None
    return "", node.text


def _step(node: Scalar) -> tuple[str, Any]:
    percent = PERCENT.fullmatch(node.text)
    if percent:
        share = float(percent[1])
        return ("", node.text.replace(" ", "")) if share <= LARGEST else (f": more than {LARGEST:,}%", None)
    return _int(node)
