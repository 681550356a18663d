"""Classes that stand beside the pictures in an archive, by the convention of WebDataset: `key.jpg` and `key.cls`.

A picture's key is its path up to the first dot of its name. `key.cls` holds the class as a whole number or a text;
`key.json` holds a table with it. Where both are there, `key.cls` is taken, unless a key of the json is named.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from alphaflow_cli.data.pictures import CLASS_LIST, Labels
from alphaflow_cli.data.tables import LABEL_COLUMNS, choose_column, label_of
from alphaflow_cli.documents import Anything, Table, parse_json
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.text import brief, counted

MOST_BYTES = 1 << 20  # of one key.json
Readers = Callable[[Collection[str]], dict[str, bytes]]


def labels_beside(
    path: Path, names: Sequence[str], asides: Collection[str], read: Readers, column: str
) -> Labels | None:
    """The class of each picture by the file beside it; None where no such file says a class."""
    classes = {key_of(name): name for name in asides if name.endswith(".cls")}
    notes = (name for name in asides if name.endswith(".json") and name.rpartition("/")[2] != CLASS_LIST)
    tables = {key_of(name): name for name in notes}
    keys = [key_of(name) for name in names]
    if column or not classes:
        tables = {key: tables[key] for key in keys if key in tables}
        return _of_tables(path, keys, tables, read, column)
    strangers = sorted(classes.keys() - set(keys))
    if strangers:
        raise AlphaflowError(
            f"{path}: {brief(classes[strangers[0]])} has no picture beside it "
            f"({counted(len(strangers), 'such class', 'such classes')}). Mend the archive, or take all pictures as one "
            "class: --unlabelled"
        )
    texts = read(classes.values())
    return Labels([_class(path, classes[key], texts) if key in classes else None for key in keys])


def key_of(name: str) -> str:
    """The part of a path that a picture and what stands beside it share."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _class(path: Path, name: str, texts: Mapping[str, bytes]) -> str:
    try:
        return label_of(texts[name].decode("utf-8").strip(), f"{path}: {brief(name)}")
    except UnicodeDecodeError as fault:
        raise AlphaflowError(f"{path}: {brief(name)} is no text, so it is no class. Mend the archive") from fault


def _of_tables(path: Path, keys: Sequence[str], names: Mapping[str, str], read: Readers, column: str) -> Labels | None:
    first = next(iter(names.values()), None)
    if first is None:
        if column:
            raise AlphaflowError(f"{path}: no picture has a json beside it with {column}. Leave --label-column out")
        return None
    key = _key_in(path, first, read([first])[first], column)
    if key is None:
        return None
    texts = read(names.values())
    return Labels([_cell(path, names[each], texts[names[each]], key) if each in names else None for each in keys])


def _key_in(path: Path, name: str, text: bytes, column: str) -> str | None:
    """The key of the class in the first table; the others have the same, or no class."""
    head = list(_parsed(path, name, text))
    key = choose_column(head, column, LABEL_COLUMNS)
    if key is None and column:
        raise AlphaflowError(f"{path}: {brief(name)} has no key {column} ({brief(', '.join(head))})")
    return key


def _cell(path: Path, name: str, text: bytes, key: str) -> str:
    return label_of(_parsed(path, name, text).get(key), f"{path}: {brief(name)}")


def _parsed(path: Path, name: str, text: bytes) -> dict[str, object]:
    where = f"{path}: {brief(name)}"
    table: dict[str, object] = parse_json(
        text, where, Table(others=Anything()), limit=MOST_BYTES, advice="Mend the archive."
    )
    return table
