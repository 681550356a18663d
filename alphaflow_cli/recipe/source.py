"""YAML text → a tree that remembers where each value stands. Refuses what a recipe must not contain.

A recipe is plain data: no anchors or aliases (alias bombs), no tags (code), no repeated keys, one document. Scalars
stay text here, because YAML's own reading is a trap (`1e-4` a string, `no` a boolean, `010` eight, `12:30` 750); the
schema says what a value has to be, and build.py reads it as that.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

import yaml

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.text import shorten

MAX_FILE = 64 * 1024  # the longest shipped recipe has 3 kB; a parser in Python must never see 50 MB
MAX_INSIDE = 4 * MAX_FILE  # as metadata of a checkpoint, where every default is written out
MAX_VALUES = 5_000  # names and values in all; the schema has about 100, and its lists are bounded
MAX_LEVELS = 12  # mappings and lists inside each other; the schema needs 3

MOST_FAULTS, LONGEST_FAULT, LONGEST_LIST = 30, 1000, 3500  # shown at once, in lines and characters


@dataclass(frozen=True)
class Scalar:
    text: str
    quoted: bool
    where: str


@dataclass(frozen=True)
class Items:
    items: tuple["Tree", ...]
    where: str


@dataclass(frozen=True)
class Mapping:
    items: dict[str, "Tree"]
    where: str
    key_where: dict[str, str] = field(default_factory=dict)


Tree = Scalar | Items | Mapping


@dataclass
class Faults:
    """Every fault found so far, as (where, what), in order and each once."""

    listed: dict[tuple[str, str], None] = field(default_factory=dict)

    def add(self, where: str, what: str) -> None:
        self.listed[where, what] = None

    def stop(self, title: str) -> None:
        """Raise if there is any, all in one error; of very many the first are shown."""
        lines = [shorten(f"{where}: {what}", LONGEST_FAULT) for where, what in sorted(self.listed, key=_line)]
        if len(lines) == 1:
            raise AlphaflowError(lines[0])
        if lines:
            fit = max(n for n in range(MOST_FAULTS + 1) if sum(len(line) + 3 for line in lines[:n]) <= LONGEST_LIST)
            rest = [f"and {len(lines) - fit:,} more"] if fit < len(lines) else []
            listed = "".join(f"\n  {line}" for line in [*lines[:fit], *rest])
            raise AlphaflowError(f"{title} has {len(lines):,} faults:{listed}")


def _line(fault: tuple[str, str]) -> float:
    number = fault[0].rpartition(":")[2]
    return int(number) if number.isdecimal() else float("inf")  # what --set says comes after the file


class _Refused(yaml.YAMLError):
    """Raised out of the parser at a line."""

    def __init__(self, mark: yaml.Mark, what: str) -> None:
        super().__init__(what)
        self.problem_mark, self.problem = mark, what


class _Composer(yaml.SafeLoader):
    """Compose the nodes of a YAML text within bounds; no object is ever constructed from it."""

    depth = 0
    values = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _Refused(event.start_mark, "anchors and aliases (& and *) are not allowed in a recipe: write it out")
        if getattr(event, "tag", None):
            raise _Refused(event.start_mark, f"tags such as {event.tag} are not allowed in a recipe")
        if self.depth >= MAX_LEVELS:
            raise _Refused(event.start_mark, f"more than {MAX_LEVELS} levels inside each other")
        self.values += 1
        if self.values > MAX_VALUES:
            raise _Refused(event.start_mark, f"more than {MAX_VALUES:,} names and values, so this is not a recipe")
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_text(path: Path) -> str:
    """The text of a recipe file; refuses directories, big files and binaries with one line each."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE + 1)
    except FileNotFoundError:
        raise AlphaflowError(f"{path}: no such file. Shipped recipes: alphaflow recipe ls") from None
    except IsADirectoryError:
        inside, run = quote(str(path / "recipe.yaml")), quote(str(path))
        advice = f"To go on with the run in it: alphaflow train {inside} --out {run}"
        if not (path / "recipe.yaml").is_file():
            advice = "Give the .yaml file inside it"
        raise AlphaflowError(f"{path}: a directory, not a recipe. {advice}") from None
    except (OSError, ValueError) as fault:  # ValueError: a null byte in the name
        reason = getattr(fault, "strerror", None) or fault
        raise AlphaflowError(f"{path}: cannot be read ({reason})") from None
    if len(raw) > MAX_FILE:
        raise AlphaflowError(f"{path}: larger than {MAX_FILE // 1024} KiB, so it is not a recipe")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise AlphaflowError(f"{path}: not UTF-8 text, so it is not a recipe (a recipe is a YAML file)")
    return text


def parse(text: str, name: str, faults: Faults) -> Mapping:
    """The mapping at the top of a recipe. Each value knows its `name:line`."""
    node = _compose(text, lambda line: f"{name}:{line}" if line else name, faults)
    if isinstance(node, Mapping):
        return node
    if not faults.listed:
        kind = {Scalar: "one value", Items: "a list"}.get(type(node), "empty")
        faults.add(name, f"a recipe is a mapping of sections (model:, data:, train: …), this is {kind}")
    return Mapping({}, name)


def parse_value(text: str, where: str, faults: Faults) -> Tree | None:
    """The value of `--set a.b=value`, None where it is at fault; `#` and `: ` in it have their YAML meaning."""
    before = len(faults.listed)
    node = _compose(text, lambda line: where, faults)
    return None if len(faults.listed) > before else node or Scalar("", False, where)


def _compose(text: str, place: Callable[[int], str], faults: Faults) -> Tree | None:
    with _yaml_faults(place, faults):
        loader = _Composer(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        return None if node is None else _tree(node, place, faults)
    return None


@contextmanager
def _yaml_faults(place: Callable[[int], str], faults: Faults) -> Iterator[None]:
    try:
        yield
    except yaml.YAMLError as fault:
        mark = getattr(fault, "problem_mark", None)
        what = getattr(fault, "problem", None) or getattr(fault, "reason", None) or str(fault)
        if "'\\t'" in what:
            what = "a tab: YAML indents with spaces"
        if "single document" in str(getattr(fault, "context", "")):
            what = "a second document (---): one file is one run"
        plain = what if isinstance(fault, _Refused) or what.startswith("a ") else f"not valid YAML: {what}"
        faults.add(place(mark.line + 1 if mark else 0), plain)


def _tree(node: yaml.Node, place: Callable[[int], str], faults: Faults) -> Tree:
    where = place(node.start_mark.line + 1)
    if isinstance(node, yaml.ScalarNode):
        return Scalar(node.value, node.style is not None, where)
    if isinstance(node, yaml.SequenceNode):
        return Items(tuple(_tree(item, place, faults) for item in node.value), where)
    items: dict[str, Tree] = {}
    key_where: dict[str, str] = {}
    for key, value in node.value:
        line = place(key.start_mark.line + 1)
        if not isinstance(key, yaml.ScalarNode):
            faults.add(line, "a key must be a name")
        elif key.value in items:
            faults.add(line, f"{key.value!r} stands twice; the first is at {key_where[key.value]}")
        else:
            items[key.value], key_where[key.value] = _tree(value, place, faults), line
    return Mapping(items, where, key_where)


def title(text: str) -> str:
    """The first line of a recipe's header."""
    first = text.lstrip().split("\n", 1)[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""
