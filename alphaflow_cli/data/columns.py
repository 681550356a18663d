"""Which columns of a parquet file hold pictures and classes: by the Hub's description in the schema, or by their types.

The Hub's library writes the features of a data set into the schema, as JSON under the key `huggingface`: a column of
type Image is a struct of bytes and path, one of type ClassLabel is a number with a list of names.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from alphaflow_cli.data.tables import LABEL_COLUMNS, LONGEST_LABEL, choose_column
from alphaflow_cli.documents import Anything, ListOf, Table, Text, check_shape, parse_json
from alphaflow_cli.errors import AlphaflowError, pip_install
from alphaflow_cli.text import brief

DESCRIPTION = Table(
    optional={"info": Table(optional={"features": Table(others=Anything())}, others=Anything())}, others=Anything()
)
NAMES = ListOf(Text(LONGEST_LABEL), 1)
NO_CLASSES = ("bool", "halffloat", "float", "double")  # types of a column called label that are refused


@dataclass(frozen=True)
class LabelColumn:
    """A column of classes: numbers, whose names the file may say, or texts."""

    name: str
    holds_texts: bool
    order: tuple[str, ...] | None


@dataclass(frozen=True)
class Layout:
    """What must be the same in all files of a data set."""

    image: str
    bytes_column: str  # as pyarrow writes the path to the bytes in a struct
    labels: tuple[LabelColumn, ...]  # all columns that may be one; where the Hub names some, those
    others: tuple[str, ...] = field(compare=False)  # `name: type` of all columns, for messages

    def label(self, wanted: str, where: str) -> LabelColumn | None:
        """The column of that name, or the one that there is; None where no column says a class."""
        by_name = {column.name: column for column in self.labels}
        if wanted:
            if wanted not in by_name:
                raise AlphaflowError(
                    f"{where}: {wanted} is no column of classes, that is of whole numbers or texts "
                    f"(it has {brief(', '.join(self.others))})"
                )
            return by_name[wanted]
        described = [column for column in self.labels if column.order is not None]
        if len(described) == 1:
            return described[0]
        usual = choose_column([column.name for column in described or self.labels], "", LABEL_COLUMNS)
        if usual is None and described:
            shown = ", ".join(column.name for column in described)
            raise AlphaflowError(f"{where}: has several columns of classes ({shown}); choose one with --label-column")
        if usual is None:
            self._refuse_a_label_that_is_none(where)
        return by_name[usual] if usual else None

    def _refuse_a_label_that_is_none(self, where: str) -> None:
        """Name a column that is called like one of classes and holds something else, as a table's labels are named."""
        kinds = dict(each.rsplit(": ", 1) for each in self.others)
        name = choose_column([name for name, kind in kinds.items() if kind in NO_CLASSES], "", LABEL_COLUMNS)
        if name:
            raise AlphaflowError(
                f"{where}: its {name} is {kinds[name]}; a class is a text or a whole number. Choose another "
                "--label-column, or take all pictures as one class: --unlabelled"
            )


def parquet_library(where: str) -> Any:
    """pyarrow with its part for parquet; it is an extra of this package."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as fault:
        raise AlphaflowError(
            f"{where}: parquet files need pyarrow, which is not installed. Run: {pip_install('parquet')}"
        ) from fault
    return pyarrow


def layout_of(schema: Any, where: str, wanted: str) -> Layout:
    """Find the columns of a file, and refuse one without pictures, or with several columns of them."""
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise AlphaflowError(f"{where}: has two columns with the name {brief(twice[0])}. Write it again with one")
    features = _features(schema, where)
    shown = tuple(f"{column.name}: {_short(column.type)}" for column in schema)
    image = _image_column(schema, features, where, wanted, shown)
    labels = tuple(
        LabelColumn(column.name, kind == "text", _names(features, column.name, where))
        for column in schema
        if (kind := _kind_of(column.type)) in ("number", "text") and column.name != image
    )
    kind = _kind_of(schema.field(image).type)
    return Layout(image, f"{image}.bytes" if kind == "struct" else image, labels, shown)


def choice_of(schema: Any, where: str, wanted: str) -> dict[str, str]:
    """What has to be recorded of --image-column: its name, where the file alone would give other pictures, or none."""
    try:
        return {"image_column": wanted} if wanted and layout_of(schema, where, "").image != wanted else {}
    except AlphaflowError:  # of several columns none is the one
        return {"image_column": wanted}


def _image_column(schema: Any, features: dict[str, Any], where: str, wanted: str, shown: Sequence[str]) -> str:
    kinds = {column.name: _kind_of(column.type) for column in schema}
    has = f"it has {brief(', '.join(shown))}"
    if wanted:
        if kinds.get(wanted) not in ("struct", "bytes"):
            what = {"list": "holds lists; one picture in each row is wanted"}.get(
                kinds.get(wanted, ""), "holds no pictures"
            )
            raise AlphaflowError(
                f"{where}: column {wanted} {what if wanted in kinds else 'is not there'} ({has}). Choose --image-column"
            )
        return wanted
    described = [name for name, kind in features.items() if _type(kind) == "Image" and name in kinds]
    structs, plain = ([name for name, kind in kinds.items() if kind == each] for each in ("struct", "bytes"))
    candidates = described or structs or plain
    if len(candidates) > 1:
        raise AlphaflowError(
            f"{where}: has several columns of pictures ({', '.join(candidates)}); choose one with --image-column"
        )
    if not candidates:
        lists = [name for name, kind in kinds.items() if kind == "list"]
        why = (
            f"column {lists[0]} holds lists; one picture in each row is wanted"
            if lists
            else "has no column of pictures"
        )
        raise AlphaflowError(f"{where}: {why} ({has}). Pictures are bytes, or a struct of bytes and path")
    return candidates[0]


def _kind_of(kind: Any) -> str:
    """What a column may be here: struct (of bytes and path), bytes, number, text, list (of pictures), or nothing."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _kind_of(kind.value_type)
    if types.is_struct(kind):
        parts = {kind.field(number).name: _kind_of(kind.field(number).type) for number in range(kind.num_fields)}
        return "struct" if parts.get("bytes") == "bytes" and len(parts) == kind.num_fields else ""
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return "list" if _kind_of(kind.value_type) in ("struct", "bytes") else ""
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return "bytes"
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    views = {"binary_view": "bytes", "string_view": "text"}  # of Polars; the oldest pyarrow has no function for them
    return views.get(str(kind), "number" if types.is_integer(kind) else "")


def _features(schema: Any, where: str) -> dict[str, Any]:
    """What the Hub's library wrote about the columns; empty where it did not write the file."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    document = parse_json(text, f"{where}: the Hub's description in its schema", DESCRIPTION, advice="Write it again.")
    features: dict[str, Any] = document.get("info", {}).get("features", {})
    return features


def _type(feature: Any) -> str:
    return str(feature.get("_type", "")) if isinstance(feature, dict) else ""


def _names(features: dict[str, Any], column: str, where: str) -> tuple[str, ...] | None:
    """The classes' names of a ClassLabel in order; a name that occurs again gets its number."""
    feature = features.get(column)
    if not isinstance(feature, dict) or _type(feature) != "ClassLabel":
        return None
    names: Any = feature.get("names")
    parse = f"{where}: the class names of {column}"
    check_shape(names, parse, NAMES, advice="Write it again.")
    seen: set[str] = set()
    order = []
    for number, name in enumerate(names):
        key = name if name not in seen and name else f"{name} ({number})"
        seen.add(key)
        order.append(key)
    return tuple(order)


def _short(kind: Any) -> str:
    text = str(kind)
    return text if len(text) <= 40 else f"{text[:37]}…"
