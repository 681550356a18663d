"""Which class each picture of a source shows: what the command line says, the source itself, its folders, or a table.

The first of these decides: --unlabelled (all pictures are one class), --labels FILE, class folders, what stands in the
source beside each picture (parquet, WebDataset), and a table in the source. Of many archives that is a table in any of
them, or in the folder where they lie. Pictures of which nothing says the class are one class. The folders 00000,
00001, … below a dataset.json are no classes: StyleGAN's and EDM's tools pack a thousand pictures into each.
"""

import posixpath
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from alphaflow_cli.data.classes import Classes, choose_split, folders_of, read_classes
from alphaflow_cli.data.pictures import PACKERS_TABLE, TABLES, Labels, Source
from alphaflow_cli.data.tables import UNNAMED, Columns, Labelling, TableRow, parse_table, place_in
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import read_file, user_path
from alphaflow_cli.text import brief, counted

PACK = re.compile(r"\d{5}")  # a folder of a thousand pictures
LABELS = "labels.csv"  # whose name promises labels


@dataclass(frozen=True)
class Labelled:
    """The pictures to take, by their lines in the source, with their labels; and what there is to say about it."""

    lines: Sequence[int]
    labels: list[int]
    classes: Classes
    notes: list[str]


def label_pictures(source: Source, labelling: Labelling) -> Labelled:
    """Choose the split, and find the class of each picture in it."""
    every = source.paths
    lines, prefix = choose_split(every)
    if labelling.unlabelled:
        return _one_class(lines, "--unlabelled")
    if labelling.table:
        path = Path(labelling.table)
        base, where = _inside(source, path), str(path)
        rows = parse_table(_read(path), where, labelling.columns, given=True) or []
        return _by_keys(source, lines, _matched(source, lines, prefix, [(base, where, rows)]), None, [])
    paths = [every[line] for line in lines]
    places = (source, *source.beside)
    packed = _are_packed(places, paths, prefix)
    in_folders = not labelling.columns.label and not packed and _are_sorted_into_folders(paths, prefix)
    own = None if in_folders else source.labels(labelling.columns.label)
    if own is not None:
        return _by_keys(source, lines, _of_source(source, lines, own), own.order, [])
    tables = [] if in_folders else [table for each in places for table in _tables_of(each, prefix, labelling.columns)]
    if tables:
        return _by_keys(source, lines, _matched(source, lines, prefix, tables), None, [])
    if labelling.columns.label:
        raise AlphaflowError(f"{source.name}: no table and no column says classes there, so --label-column has no use")
    if packed:
        return _one_class(lines, f"{PACKERS_TABLE} says no labels")
    folders = folders_of(paths, prefix)
    if set(folders) == {""} and source.classes_json() is None:
        return _one_class(lines, "neither folders nor a table tell classes apart")
    unused = [where for each in places for where in _unused_tables(each, prefix)] if in_folders else []
    notes = [f"{where} not used, because class folders are there (--labels uses it)" for where in unused[:3]]
    return _by_keys(source, lines, folders, source.class_order(), notes)


def _one_class(lines: Sequence[int], reason: str) -> Labelled:
    return Labelled(lines, [0] * len(lines), Classes([""], ["all"], reason), [])


def _by_keys(
    source: Source, lines: Sequence[int], keys: Sequence[str], order: Sequence[str] | None, notes: list[str]
) -> Labelled:
    classes = read_classes(keys, source.classes_json(), order)
    index = {key: number for number, key in enumerate(classes.folders)}
    return Labelled(lines, [index[key] for key in keys], classes, notes)


def _of_source(source: Source, lines: Sequence[int], own: Labels) -> list[str]:
    keys = []
    for line in lines:
        key = own.of_each[line]
        if key is None:
            missing = sum(own.of_each[each] is None for each in lines)
            raise AlphaflowError(
                f"{source.name}: {brief(source.names[line])!r} has no label ({counted(missing, 'picture')} without). "
                "Mend it, or take all pictures as one class: --unlabelled"
            )
        keys.append(key)
    return keys


def _are_sorted_into_folders(paths: Sequence[str], prefix: str) -> bool:
    """Whether all pictures lie in class folders, and there are several of these."""
    folders = {posixpath.dirname(path[len(prefix) :]) for path in paths}
    return len(folders) > 1 and "" not in folders


def _are_packed(places: Sequence[Source], paths: Sequence[str], prefix: str) -> bool:
    """Whether all folders are numbered as by StyleGAN's and EDM's tools, and there is their table."""
    if not any(posixpath.basename(name) == PACKERS_TABLE for place in places for name in place.asides):
        return False
    return all(PACK.fullmatch(posixpath.dirname(path[len(prefix) :])) for path in paths)


Tables = list[tuple[str, str, list[TableRow]]]  # the folder that the names are relative to, the table's name, its rows


def _tables_of(source: Source, prefix: str, columns: Columns) -> Tables:
    """The tables of the split that lie in the fewest folders; several in one folder need a choice.

    A labels.csv must say labels. Other tables may hold something else, such as captions.
    """
    for _, level in groupby(_table_names(source, prefix), lambda name: name.count("/")):
        tables: Tables = []
        for name in level:
            where, must = f"{source.name}/{name}", name.rsplit("/", 1)[-1] == LABELS
            rows = parse_table(source.read_aside(name), where, columns, given=must or bool(columns.label))
            if rows is not None:
                tables.append((posixpath.dirname(name), where, rows))
        folders = [folder for folder, _, _ in tables]
        if len(set(folders)) < len(folders):
            shown = ", ".join(where for _, where, _ in tables)
            raise AlphaflowError(
                f"{source.name}: holds several tables of labels ({shown}); choose one with --labels FILE"
            )
        if tables:
            return tables
    return []


def _unused_tables(source: Source, prefix: str) -> list[str]:
    """The tables that say labels, for a line: class folders go before them. What is wrong in one stops nobody."""
    unused = []
    for name in _table_names(source, prefix):
        where = f"{source.name}/{name}"
        with suppress(AlphaflowError):
            if parse_table(source.read_aside(name), where, UNNAMED, given=False) is None:
                continue
        unused.append(where)
    return unused


def _table_names(source: Source, prefix: str) -> list[str]:
    """All files of the split that may be tables of labels, those that lie in the fewest folders first."""
    names = [name for name in source.asides if name.rsplit("/", 1)[-1] in TABLES]
    names = [name for name in names if _is_on_the_way(posixpath.dirname(name), prefix)]
    return sorted(names, key=lambda name: (name.count("/"), name))


def _is_on_the_way(folder: str, prefix: str) -> bool:
    """Whether a folder lies above or below the one that the pictures share."""
    folder = posixpath.join(posixpath.normpath(folder or "."), "").removeprefix("./")
    prefix = prefix.removeprefix("./")
    return prefix.startswith(folder) or folder.startswith(prefix)


def _matched(source: Source, lines: Sequence[int], prefix: str, tables: Tables) -> list[str]:
    """The class of each picture by the tables; a name without its picture, or a picture without a row, is an error."""
    paths = source.paths
    names = _Names(paths, prefix)
    keys: dict[int, str] = {}
    for base, where, rows in tables:
        strangers = []
        for row in rows:
            line = names.find(base, row.name)
            if line is None:
                strangers.append(row)
            elif keys.setdefault(line, row.label) != row.label:
                raise AlphaflowError(
                    f"{place_in(where, row.number)} says that {brief(row.name)} is {brief(row.label)}, an earlier one "
                    f"{brief(keys[line])}. Keep one of them"
                )
        if strangers:
            raise AlphaflowError(
                f"{place_in(where, strangers[0].number)} names {brief(strangers[0].name)}, which is not in "
                f"{source.name} ({len(strangers):,} of {len(rows):,} rows have no picture). Names are relative "
                "to the table, or to the folder of the pictures"
            )
    missing = [line for line in lines if line not in keys]
    if missing:
        raise AlphaflowError(
            f"{tables[0][1]}: has no row for {counted(len(missing), 'picture')}; the first is "
            f"{brief(paths[missing[0]])}. Add rows, or move such pictures away"
        )
    return [keys[line] for line in lines]


class _Names:
    """Lines of a source by the names that a table may use: whole paths, with or without the suffix."""

    def __init__(self, paths: Sequence[str], prefix: str) -> None:
        self.prefix = prefix
        self.whole: dict[str, int] = {}
        self.stems: dict[str, int] = {}
        for line, path in enumerate(paths):
            path = posixpath.normpath(path)
            if path in self.whole:
                raise AlphaflowError(
                    f"{brief(path)}: is in several archives, so no table can name it. Rename one of them"
                )
            self.whole[path] = line
            stem = posixpath.splitext(path)[0]
            self.stems[stem] = -1 if stem in self.stems else line  # -1: two pictures differ only in their suffixes

    def find(self, base: str, name: str) -> int | None:
        for known in (self.whole, self.stems):
            for start in (base, self.prefix):
                line = known.get(posixpath.normpath(posixpath.join(start, name.replace("\\", "/"))))
                if line is not None and line >= 0:
                    return line
        return None


def _inside(source: Source, table: Path) -> str:
    """The folder of a table as a path in the source, where it lies in it; else the source's own."""
    root = getattr(source, "root", None)
    folder = user_path(table).resolve().parent
    return folder.relative_to(root).as_posix() if root and folder.is_relative_to(root) else ""


def _read(path: Path) -> bytes:
    try:
        return read_file(user_path(path))
    except OSError as fault:
        raise AlphaflowError(f"{path}: the table of labels cannot be read ({fault.strerror or fault})") from fault
