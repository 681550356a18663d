"""Parquet files that are not as they should be: one clear line each, no traceback, no memory, nothing written."""

import contextlib
import io
import json
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from packed_forms import CLASSES, bytes_of, hub_schema, parquet_files, parquet_of, pictures, write_files

from alphaflow_cli.cli import run
from alphaflow_cli.data.labels import label_pictures
from alphaflow_cli.data.sources import open_source
from alphaflow_cli.data.tables import AS_FOUND
from alphaflow_cli.errors import AlphaflowError

OPTIONS = ("--size", "8", "--autoencoder", "none")
ROWS = pictures(40)
DATA = [data for _, data in ROWS]
CELLS = [{"bytes": data, "path": None} for data in DATA]
GOOD = parquet_of(ROWS)


def table(**columns) -> bytes:
    return bytes_of(pa.table(columns))


def described(features: object, **columns) -> bytes:
    metadata = {"huggingface": features if isinstance(features, str) else json.dumps({"info": {"features": features}})}
    return bytes_of(pa.table(columns).replace_schema_metadata(metadata))


def with_labels(*labels: int | None) -> bytes:
    cells = [*labels, *[0] * (40 - len(labels))]
    return bytes_of(pa.table({"image": CELLS, "label": cells}, schema=hub_schema()))


def damaged_group() -> bytes:
    """The bytes of the second row group are zeros."""
    data = bytearray(GOOD)
    column = pq.ParquetFile(io.BytesIO(GOOD)).metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    return bytes(data)


def not_text() -> bytes:
    """A path that is no UTF-8, of a picture without bytes."""
    paths = pa.array([b"\xff\xfe", *[b"x"] * 39]).view(pa.string())
    cells = pa.array([None, *DATA[1:]], pa.binary())
    return table(image=pa.StructArray.from_arrays([cells, paths], ["bytes", "path"]))


FAULTS = {
    "no image column": (table(id=[1], text=["a"]), "has no column of pictures (it has id: int64, text: string)"),
    "two image columns": (
        table(a=DATA, b=DATA),
        "has several columns of pictures (a, b); choose one with --image-column",
    ),
    "a list column": (
        table(images=[[cell] for cell in CELLS], label=[0] * 40),
        "column images holds lists; one picture",
    ),
    "a list of bytes": (table(images=[[data] for data in DATA]), "column images holds lists; one picture in each row"),
    "a truncated file": (GOOD[: len(GOOD) // 2], "its end cannot be read, so this is no whole parquet file"),
    "a damaged row group": (damaged_group(), "row group 1, rows 10 to 19 of all, cannot be read"),
    "an empty file": (b"", "its end cannot be read, so this is no whole parquet file"),
    "only the mark": (b"PAR1", "its end cannot be read, so this is no whole parquet file"),
    "another file": (b"PAR1" + b"\0" * 100 + b"PAR1", "its end cannot be read, so this is no whole parquet file"),
    "no rows": (bytes_of(pa.table({"image": CELLS}).slice(0, 0)), "x.parquet: no pictures here"),
    "a label out of range": (
        with_labels(0, 9),
        "row 1: its label is 9, out of range (0 … 3, as the file names 4 classes)",
    ),
    "a hidden label": (with_labels(-1), "row 0: its label is -1, out of range"),
    "no label": (with_labels(0, None, None), "'x.parquet#1' has no label (2 pictures without)"),
    "a huge label": (table(image=CELLS, label=["x" * 100_000] * 40), "its label has 100,000 letters"),
    "several columns of classes": (
        described(
            {name: {"_type": "ClassLabel", "names": ["x"]} for name in "ab"}, image=CELLS, a=[0] * 40, b=[0] * 40
        ),
        "has several columns of classes (a, b); choose one with --label-column",
    ),
    "a broken description": (
        described("{", image=CELLS, label=[0] * 40),
        "the Hub's description in its schema: not whole",
    ),
    "no names": (described({"label": {"_type": "ClassLabel"}}, image=CELLS, label=[0] * 40), "a list is wanted"),
    "no picture": (
        bytes_of(pa.table({"image": [None, *CELLS[1:]]})),
        "'x.parquet#0': cannot be read (there is no picture",
    ),
    "no bytes": (
        bytes_of(pa.table({"image": [{"bytes": None, "path": "gone.png"}, *CELLS[1:]]})),
        "'x.parquet#0': cannot be read (No such file",
    ),
    "a path that is no text": (not_text(), "'x.parquet#0': cannot be read (its path is no text)"),
    "a name of a column that is no text": (
        parquet_of(ROWS).replace(b"\x05image", b"\x05\xff\xfe\xff\xfe\xff"),
        "its end cannot be read, so this is no whole parquet file",
    ),
    "two columns of one name": (
        bytes_of(pa.Table.from_arrays([pa.array(DATA)] * 2, ["image", "image"])),
        "has two columns with the name image",
    ),
    "no whole picture": (table(image=[b"\x89PNG", *DATA[1:]]), "'x.parquet#0': not a whole picture"),
}


def fault_of(capfd, *line: object) -> str:
    """The one line of a command that fails."""
    assert run(["prep-latents", *map(str, line), *OPTIONS]) == 1
    err = capfd.readouterr().err
    assert err.count("error:") == 1, err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_parquet_file_is_one_clear_line(fault, tmp_path, capfd):
    data, words = FAULTS[fault]
    (tmp_path / "x.parquet").write_bytes(data)
    assert words in fault_of(capfd, tmp_path / "x.parquet", "--out", tmp_path / "s")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--image-column", "nothing"),
            "column nothing is not there (it has image: struct<bytes: binary, path: string>",
        ),
        (("--image-column", "label"), "column label holds no pictures"),
        (("--label-column", "nothing"), "nothing is no column of classes, that is of whole numbers or texts"),
        (("--labels", "nowhere.csv"), "nowhere.csv: the table of labels cannot be read (No such file"),
    ],
)
def test_a_wrong_column_is_one_clear_line(options, words, tmp_path, capfd):
    (tmp_path / "x.parquet").write_bytes(GOOD)
    assert words in fault_of(capfd, tmp_path / "x.parquet", *options, "--out", tmp_path / "s")


def test_files_that_do_not_belong_together_are_one_clear_line(tmp_path, capfd):
    files = parquet_files(ROWS, 2)
    files["data/train-00002.parquet"] = parquet_of(ROWS, names=[*CLASSES, "eel"])
    root = write_files(tmp_path / "set", files)
    words = "train-00002.parquet: its columns or classes differ from those of"
    assert words in fault_of(capfd, root, "--out", tmp_path / "s")


def test_a_huge_value_in_many_rows_is_in_memory_once(tmp_path):
    """60 rows of one value of 10 MB are half a MB on the disk; unpacked they would be 600 MB."""
    big = pa.array([b"x" * 10_000_000], pa.binary())
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 60, pa.int32()), big)
    (tmp_path / "x.parquet").write_bytes(bytes_of(pa.table({"image": column}), 60, store_schema=False))
    script = (
        "import resource, sys\nfrom alphaflow_cli.data.sources import open_source\n"
        "import pyarrow.parquet\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"with open_source({str(tmp_path / 'x.parquet')!r}).reading(range(60)) as fetches:\n"
        "    assert [len(fetch()) for _, fetch in fetches] == [10_000_000] * 60\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=100)
    assert int(done.stdout) < 300_000


def test_whatever_is_damaged_is_one_clear_line(tmp_path):
    """Bytes are changed at random, most of them in the footer, where the schema is."""
    rng, path, faults = random.Random(0), tmp_path / "x.parquet", []
    for _ in range(150):
        data = bytearray(GOOD)
        for _ in range(rng.choice([1, 2, 5])):
            data[rng.randrange(len(data) - 1500 if rng.random() < 0.7 else 0, len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            source = open_source(str(path))
            label_pictures(source, AS_FOUND)
            with source.reading(range(len(source.names))) as fetches:
                for _, fetch in fetches:
                    with contextlib.suppress(OSError):  # of one picture
                        fetch()
        except AlphaflowError as fault:
            faults.append(str(fault))
    assert len(faults) > 50
    assert not any("\n" in fault for fault in faults)


def test_without_pyarrow_the_line_names_the_extra(tmp_path, capfd, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(GOOD)
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, name, None)
    words = "parquet files need pyarrow, which is not installed. Run: pip install "
    assert words in fault_of(capfd, tmp_path / "x.parquet", "--out", tmp_path / "s")


def test_a_row_group_of_more_than_memory_should_hold_is_refused(tmp_path, capfd, monkeypatch):
    from alphaflow_cli.data import parquet

    monkeypatch.setattr(parquet, "MOST_OF_A_GROUP", 1000)
    (tmp_path / "x.parquet").write_bytes(GOOD)
    words = "row group 0 has 3,"
    assert words in fault_of(capfd, tmp_path / "x.parquet", "--out", tmp_path / "s")


def test_memory_holds_two_row_groups_and_not_the_file(tmp_path):
    from alphaflow_cli.data.parquet import Parquet, _Reader

    (tmp_path / "x.parquet").write_bytes(GOOD)
    source = open_source(str(tmp_path / "x.parquet"))
    assert isinstance(source, Parquet)
    reads: list[int] = []
    read = _Reader.read

    def counted(self, group, rows):
        reads.append(group.number)
        return read(self, group, rows)

    _Reader.read = counted  # type: ignore[method-assign]
    try:
        with source.reading(range(40)) as fetches:
            for line, _ in fetches:
                assert len(reads) <= line // 10 + 2
    finally:
        _Reader.read = read  # type: ignore[method-assign]
    assert reads == [0, 1, 2, 3]
