"""Tables of files and their classes: labels.csv, metadata.csv, metadata.jsonl, dataset.json, and any given by --labels.

A table has a column with the pictures' names, `file_name` by the imagefolder convention, and a column with their
classes, `label`. A csv begins with a line of names; its columns are parted by commas, semicolons or tabs. A jsonl has
one table per line. A json is a list of such, or {"labels": [[name, class], …]}, the dataset.json of StyleGAN's and
EDM's tools. Classes are texts or whole numbers; as texts they are what the names of folders are elsewhere.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from alphaflow_cli.documents import Anything, parse_json
from alphaflow_cli.documents import Table as Shape
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.text import brief

FILE_COLUMNS = ("file_name", "filename", "file", "image", "path", "name")
LABEL_COLUMNS = ("label", "class", "class_name", "category", "target", "cls")
MOST_BYTES = 1 << 28  # of one table: ten million rows
LONGEST_LABEL = 1000  # letters
JSON_LINES = (".jsonl", ".ndjson")
NumberedRow = tuple[int, Mapping[str, Any]]  # the number of the line or entry, and its cells by column
Columned = tuple[list[str], Iterable[NumberedRow]]  # the names of the columns, and the rows


@dataclass(frozen=True)
class TableRow:
    """One row: the name of a picture, as the table spells it, and its class."""

    number: int  # of the line in the file, of a json the entry
    name: str
    label: str


@dataclass(frozen=True)
class Columns:
    """The columns that the command line names; empty: the usual names."""

    image: str = ""
    label: str = ""


UNNAMED = Columns()


@dataclass(frozen=True)
class Labelling:
    """What the command line says about classes."""

    table: str = ""  # a file that names pictures and their classes
    unlabelled: bool = False
    columns: Columns = UNNAMED

    @property
    def given(self) -> bool:
        """Whether anything is said about where labels come from."""
        return self.unlabelled or bool(self.table or self.columns.label)


AS_FOUND = Labelling()


def parse_table(data: bytes, where: str, columns: Columns, *, given: bool) -> list[TableRow] | None:
    """Read a table; None where it says no labels, and was not `given` as one that does."""
    if len(data) > MOST_BYTES:
        raise AlphaflowError(f"{where}: {len(data):,} bytes, a table of labels has at most {MOST_BYTES:,}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise AlphaflowError(f"{where}: is not text (byte {fault.start} is not UTF-8). Save it as UTF-8") from fault
    cells = _cells(text, where)
    if cells is None:
        if not given:
            return None
        raise AlphaflowError(
            f'{where}: says no labels. A json of labels is {{"labels": [["1.jpg", "cat"], …]}} or '
            '[{"file_name": "1.jpg", "label": "cat"}, …]'
        )
    head, rows = cells
    if not head:
        raise AlphaflowError(f"{where}: is empty, so it names no picture")
    file = choose_column(head, columns.image, FILE_COLUMNS)
    label = choose_column(head, columns.label, LABEL_COLUMNS)
    if label is None and given and not columns.label and len(head) == 2 and file:
        label = next((name for name in head if name != file), None)
    if label is None and not given and not columns.label:
        return None
    shown = brief(", ".join(head))
    if file is None:
        raise AlphaflowError(
            f"{where}: has no column {columns.image or 'file_name'} ({shown}). Name it: --image-column; or take all "
            "pictures as one class: --unlabelled"
        )
    if label is None:
        raise AlphaflowError(
            f"{where}: has no column {columns.label or 'label'} ({shown}). Name it: --label-column; or take all "
            "pictures as one class: --unlabelled"
        )
    for name in (file, label):
        if head.count(name) > 1:
            raise AlphaflowError(f"{where}: has two columns with the name {brief(name)}. Keep one of them")
    return [_row(number, row, file, label, where) for number, row in rows]


def place_in(where: str, number: int) -> str:
    """The place of a row, as the beginning of a message: its line, or in a json its entry."""
    return f"{where}: {'entry' if where.lower().endswith('.json') else 'line'} {number}"


def choose_column(head: Sequence[str], wanted: str, usual: Sequence[str]) -> str | None:
    """The column of that name, or the first of the usual ones, in capitals or not; None: it is not there."""
    if wanted:
        return wanted if wanted in head else None
    known = {name.lower(): name for name in reversed(head)}
    return next((known[name] for name in usual if name in known), None)


def label_of(value: object, where: str) -> str:
    """The class that a cell holds, as a text; what is no class is an error that begins with `where`."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise AlphaflowError(f"{where} has no label. Give it one, or take all pictures as one class: --unlabelled")
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        kind = {list: "a list", dict: "a table", float: "a fraction", bool: "true or false"}.get(type(value), "no text")
        raise AlphaflowError(
            f"{where}: its label is {kind}; a class is a text or a whole number. Choose another --label-column, or "
            "take all pictures as one class: --unlabelled"
        )
    text = str(value).strip()
    if len(text) > LONGEST_LABEL:
        raise AlphaflowError(f"{where}: its label has {len(text):,} letters, at most {LONGEST_LABEL:,} are a class")
    return text


def _cells(text: str, where: str) -> Columned | None:
    """Take a table apart; None where a json holds no table."""
    if where.lower().endswith(JSON_LINES):
        return _json_lines(text, where)
    return _json(text, where) if where.lower().endswith(".json") else _csv(text, where)


def _csv(text: str, where: str) -> Columned:
    first = text.partition("\n")[0]
    mark = next((each for each in (",", ";", "\t") if each in first), ",")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    with _named_line(reader, where):
        head = [name.strip() for name in reader.fieldnames or []]
    reader.fieldnames = head
    return head, _csv_rows(reader, head, where)


def _csv_rows(reader: "csv.DictReader[str]", head: list[str], where: str) -> Iterator[NumberedRow]:
    """Read a row when it is wanted: captions, which nobody wants, need not be a clean csv."""
    with _named_line(reader, where):
        for row in reader:
            if None in row or None in row.values():
                count = len(head) + len(row.get(None) or []) - sum(value is None for value in row.values())
                raise AlphaflowError(
                    f"{where}: line {reader.line_num} has {count} columns, the first line has {len(head)}. Mend it"
                )
            yield reader.line_num, row


@contextmanager
def _named_line(reader: "csv.DictReader[str]", where: str) -> Iterator[None]:
    try:
        yield
    except csv.Error as fault:
        raise AlphaflowError(f"{where}: line {reader.line_num} is no line of a csv ({fault}). Mend it") from fault


def _json(text: str, where: str) -> Columned | None:
    document = parse_json(text, where, Anything(), limit=MOST_BYTES, advice="Mend it.")
    entries = document.get("labels") if isinstance(document, dict) else document
    if not isinstance(entries, list) or not entries:
        return None
    if all(isinstance(entry, list) and len(entry) == 2 for entry in entries):
        entries = [{FILE_COLUMNS[0]: name, LABEL_COLUMNS[0]: label} for name, label in entries]
    return _of_tables(list(enumerate(entries, 1))) if all(isinstance(entry, dict) for entry in entries) else None


def _json_lines(text: str, where: str) -> Columned:
    rows = [
        (number, parse_json(line, f"{where}: line {number}", Shape(others=Anything()), advice="Mend it."))
        for number, line in enumerate(text.split("\n"), 1)  # splitlines would part a caption at its U+2028
        if line.strip()
    ]
    return _of_tables(rows)


def _of_tables(rows: Sequence[NumberedRow]) -> Columned:
    return list(dict.fromkeys(key for _, row in rows for key in row)), rows


def _row(number: int, row: Mapping[str, Any], file: str, label: str, where: str) -> TableRow:
    name = row.get(file)
    if not isinstance(name, str) or not name.strip():
        raise AlphaflowError(f"{place_in(where, number)} has no {file}. Name the picture, or remove the line")
    return TableRow(number, name.strip(), label_of(row.get(label), f"{place_in(where, number)} ({brief(name)})"))
