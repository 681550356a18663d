"""JSON from outside, read strictly: bounded in bytes and depth, every key once, finite numbers, a declared shape.

    results = read_json(path, RESULTS)
    RESULTS = Table({"evaluations": ListOf(EVALUATION)}, optional={"schema": Text()})

A document that does not fit is one line that names the file and the place in it: `results.json: rows[2].value: a number
is wanted, this is text`. Nothing here knows what a document means.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.text import for_terminal

MAX_BYTES = 16 << 20
MAX_DEPTH = 32  # tables and lists inside each other; ours need 8
MAX_DIGITS = 19  # of a whole number: what 64 bits hold
SHOWN = 3  # faults of a shape in one message
ADVICE = "Move it away, or make it again."


@dataclass(frozen=True)
class Text:
    """A text. `one_of` names those that are allowed; `form` is a regular expression for the whole of it."""

    most: int = 10_000  # letters
    one_of: tuple[str, ...] = ()
    form: str = ""


@dataclass(frozen=True)
class Number:
    """A finite number, whole or not, within bounds."""

    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Whole:
    """A rule for a value of a document: a whole number, both bounds included."""

    low: int = -(2**63)
    high: int = 2**63 - 1


@dataclass(frozen=True)
class Flag:
    """true or false, and nothing that only looks like it."""


@dataclass(frozen=True)
class Anything:
    """Whatever JSON holds, because nothing of it is relied on."""


@dataclass(frozen=True)
class Maybe:
    """Either null, or a value of the shape."""

    shape: "Shape"


@dataclass(frozen=True)
class ListOf:
    """A list, all of whose entries have the shape."""

    shape: "Shape"
    least: int = 0
    most: int = 1_000_000


@dataclass(frozen=True)
class Table:
    """A table: the shapes of keys that must be there, of keys that may be, and of all others.

    others = None: no other key may be there.
    """

    required: Mapping[str, "Shape"] = field(default_factory=dict)
    optional: Mapping[str, "Shape"] = field(default_factory=dict)
    others: "Shape | None" = None


Shape = Text | Number | Whole | Flag | Anything | Maybe | ListOf | Table
NAMES = {Text: "text", Number: "a number", Whole: "a whole number", Flag: "true or false", ListOf: "a list"}


def read_json(path: Path, shape: Shape, *, limit: int = MAX_BYTES, advice: str = ADVICE) -> Any:
    """Read a JSON file, and check that the document has the shape."""
    try:
        if not path.is_file():
            raise AlphaflowError(f"{path}: {'not a file' if path.exists() else 'no such file'}. {advice}")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as fault:  # ValueError: a null byte in the name
        raise AlphaflowError(f"{path}: cannot be read ({getattr(fault, 'strerror', None) or fault}).") from fault
    return parse_json(data, str(path), shape, limit=limit, advice=advice)


def parse_json(data: bytes | str, where: str, shape: Shape, *, limit: int = MAX_BYTES, advice: str = ADVICE) -> Any:
    """Parse a document's bytes or text, and check that it has the shape; `where` stands before a fault."""
    if len(data) > limit:
        raise AlphaflowError(f"{where}: larger than {limit:,} bytes, so it is not the file that belongs here. {advice}")
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        value = json.loads(
            text, object_pairs_hook=_table, parse_constant=_refuse, parse_int=_whole, parse_float=_finite
        )
        if _is_deeper(value, MAX_DEPTH):
            raise RecursionError
    except UnicodeDecodeError as fault:
        raise AlphaflowError(f"{where}: not UTF-8 text, so it is not JSON. {advice}") from fault
    except RecursionError:
        raise AlphaflowError(f"{where}: nested more than {MAX_DEPTH} levels deep. {advice}") from None
    except ValueError as fault:
        raise AlphaflowError(f"{where}: not whole JSON ({for_terminal(fault, limit=200)}). {advice}") from fault
    check_shape(value, where, shape, advice=advice)
    return value


def check_shape(value: Any, where: str, shape: Shape, *, advice: str = ADVICE) -> None:
    """Raise an error where a value does not have the shape; it names the first faults with their places."""
    faults: list[str] = []
    for place, fault in _faults(value, shape, ""):
        if len(faults) == SHOWN:
            faults.append("and more")
            break
        faults.append(f"{for_terminal(place, limit=120)}: {fault}" if place else fault)
    if faults:
        raise AlphaflowError(f"{where}: {'; '.join(faults)}. {advice}")


def _faults(value: Any, shape: Shape, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(shape, Anything) or (isinstance(shape, Maybe) and value is None):
        return
    if isinstance(shape, Maybe):
        yield from _faults(value, shape.shape, place)
    elif isinstance(shape, Table):
        yield from _table_faults(value, shape, place)
    elif isinstance(shape, ListOf) and isinstance(value, list):
        if not shape.least <= len(value) <= shape.most:
            yield place, f"{len(value):,} entries, {shape.least:,} to {shape.most:,} are wanted"
        for i, item in enumerate(value[: shape.most]):
            yield from _faults(item, shape.shape, f"{place}[{i}]")
    else:
        fault = _plain_fault(value, shape)
        if fault:
            yield place, fault


def _table_faults(value: Any, shape: Table, place: str) -> Iterator[tuple[str, str]]:
    if not isinstance(value, dict):
        yield place, f"a table is wanted, this is {_kind(value)}"
        return
    dot = f"{place}." if place else ""
    yield from ((f"{dot}{key}", "is missing") for key in shape.required if key not in value)
    for key, item in value.items():
        wanted = shape.required.get(key) or shape.optional.get(key) or shape.others
        if wanted is None:
            yield f"{dot}{key}", "no such key is known here"
        else:
            yield from _faults(item, wanted, f"{dot}{key}")


def _plain_fault(value: Any, shape: Text | Number | Whole | Flag | ListOf) -> str:
    """Say what is wrong with a value that should be no table; empty where nothing is."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {
        Text: isinstance(value, str),
        Number: number,
        Whole: number and isinstance(value, int),
        Flag: isinstance(value, bool),
        ListOf: isinstance(value, list),
    }
    if not fits[type(shape)]:
        return f"{NAMES[type(shape)]} is wanted, this is {_kind(value)}"
    if isinstance(shape, Text) and len(value) > shape.most:
        return f"{len(value):,} letters are too many; at most {shape.most:,} are allowed"
    if isinstance(shape, Text) and shape.one_of and value not in shape.one_of:
        return f"'{for_terminal(value, limit=40)}' is not one of {', '.join(shape.one_of)}"
    if isinstance(shape, Text) and shape.form and not re.fullmatch(shape.form, value):
        return f"'{for_terminal(value, limit=60)}' does not have the required form"
    if isinstance(shape, (Number, Whole)) and not shape.low <= value <= shape.high:
        return f"{value:g} is not between {shape.low:g} and {shape.high:g}"
    return ""


def _kind(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    kinds = {str: "text", int: "a whole number", float: "a number", list: "a list", dict: "a table"}
    return kinds[type(value)]


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key '{for_terminal(twice, limit=40)}' stands twice")
    return table


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS + 1:
        raise ValueError(f"a whole number of {len(digits):,} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{for_terminal(digits, limit=20)} is too large for a number")
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    """Tell whether a value has more than `depth` levels; level by level, because recursion has a limit of its own."""
    level = [value]
    for _ in range(depth + 1):
        level = [item for each in level for item in _inside(each)]
    return bool(level)


def _inside(value: Any) -> list[Any]:
    """The tables and lists that stand directly in a table or list."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in items if isinstance(item, (dict, list))]
