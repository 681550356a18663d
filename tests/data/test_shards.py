"""Many archives as one source: the shards of a WebDataset, many zips; every form gives the shards of the folder."""

import io
import tarfile
from pathlib import Path

import pytest
from archive_forms import tar_of, zip_of
from hub_fixtures import hub  # noqa: F401 (a fixture)
from hub_server import Fault
from packed_forms import parquet_files, pictures, table_of, webdataset, write_files, write_folder, zips

from alphaflow_cli.cli import run
from alphaflow_cli.data.labels import label_pictures
from alphaflow_cli.data.sources import open_source
from alphaflow_cli.data.tables import Columns, Labelling
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.latents.plan import default_out

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
COUNT = 700
OPTIONS = ("--size", "8", "--autoencoder", "none")
ROWS = pictures(COUNT)
PNG = ROWS[0][1]
FORMS = {
    "ten tars of WebDataset": (webdataset(ROWS, 10), ""),
    "tars with json, by a pattern": (webdataset(ROWS, 12, note="json"), "part-{0..11}.tar"),
    "one tar of WebDataset": (webdataset(ROWS, 1), "part-0.tar"),
    "eleven zips of class folders": (zips(ROWS, 11), ""),
    "parquet": (parquet_files(ROWS, 3, group=64), ""),
    "a table": (table_of(ROWS), ""),
}


def shards(store: Path) -> dict[str, bytes]:
    names = [*store.glob("train-*.safetensors"), store / "stats.safetensors", store / "classes.json"]
    return {path.name: path.read_bytes() for path in names}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    write_folder(folder / "set", ROWS)
    assert run(["prep-latents", str(folder / "set"), *OPTIONS, "--out", str(folder / "s")]) == 0
    return shards(folder / "s")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_shards_of_the_folder(form, expected, tmp_path):
    files, pattern = FORMS[form]
    source = write_files(tmp_path / "set", files) / pattern
    assert run(["prep-latents", str(source), *OPTIONS, "--out", str(tmp_path / "s"), "--batch", "32"]) == 0
    assert shards(tmp_path / "s") == expected


@pytest.mark.parametrize("form", ["ten tars of WebDataset", "eleven zips of class folders"])
def test_the_same_forms_on_the_hub_give_the_shards_of_the_folder(form, expected, tmp_path, hub):  # noqa: F811
    hub.add("datasets/lab/set", {"README.md": b"# set\n", **FORMS[form][0]})
    assert run(["prep-latents", "hf://datasets/lab/set", *OPTIONS, "--out", str(tmp_path / "s")]) == 0
    assert shards(tmp_path / "s") == expected


def test_a_table_on_the_hub_says_the_classes_of_its_files(hub):  # noqa: F811
    hub.add("datasets/lab/set", table_of(ROWS[::50]))
    labelled = label_pictures(open_source("hf://datasets/lab/set"), Labelling())
    assert [labelled.classes.folders[label] for label in labelled.labels] == [label for label, _ in ROWS[::50]]
    assert hub.count("GET", "resolve") == 1  # the table alone


def test_a_table_beside_archives_on_the_hub_says_their_classes(hub):  # noqa: F811
    table = "file_name,label\n" + "".join(f"{index}.png,{label}\n" for index, (label, _) in enumerate(ROWS[::50]))
    members = [(f"{index}.png", data) for index, (_, data) in enumerate(ROWS[::50])]
    hub.add(
        "datasets/lab/set", {"a.zip": zip_of(members[:9]), "b.zip": zip_of(members[9:]), "labels.csv": table.encode()}
    )
    labelled = label_pictures(open_source("hf://datasets/lab/set"), Labelling())
    source = open_source("hf://datasets/lab/set")
    expected = {name: label for (name, _), (label, _) in zip(members, ROWS[::50], strict=True)}
    named = {source.paths[line]: labelled.classes.folders[label] for line, label in enumerate(labelled.labels)}
    assert named == expected


def test_an_archive_on_the_hub_that_comes_damaged_is_removed_and_fetched_again(hub):  # noqa: F811
    hub.add("datasets/lab/set", {"a.zip": zip_of([("a/1.png", PNG)])})
    hub.faults["GET", "/resolve/"] = Fault(200, corrupt=True)
    with pytest.raises(AlphaflowError, match=r"hf://datasets/lab/set: a.zip came damaged \(not the Hub's checksum\)"):
        open_source("hf://datasets/lab/set")
    hub.faults.clear()
    assert list(open_source("hf://datasets/lab/set").names) == ["a/1.png"]


def labels_of(source: Path, **labelling) -> tuple[list[str], list[int]]:
    labelled = label_pictures(open_source(str(source)), Labelling(**labelling))
    return labelled.classes.folders, labelled.labels


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_the_archives_are_in_the_order_of_their_numbers(tmp_path):
    root = write_files(tmp_path / "set", {f"p-{n}.zip": zip_of([("a/x.png", PNG)]) for n in (10, 9, 100, 1)})
    assert [name.split("/")[0] for name in open_source(str(root)).names] == [
        "p-1.zip",
        "p-9.zip",
        "p-10.zip",
        "p-100.zip",
    ]
    assert open_source(str(root / "p-*.zip")).names == open_source(str(root)).names


def test_a_pattern_names_no_hidden_file(tmp_path):
    files = {"p0.tar": tar_of([("1.png", PNG)]), "._p0.tar": b"what a Mac leaves beside it"}
    assert open_source(str(write_files(tmp_path / "set", files) / "*.tar")).names == ["1.png"]


@pytest.mark.parametrize("pattern", ["**", "p**.tar", "***0.t*r"])
def test_two_stars_are_one_as_in_a_shell(tmp_path, pattern):
    folder = write_files(tmp_path / "set", {"p0.tar": tar_of([("1.png", PNG)])})
    assert open_source(str(folder / pattern)).names == ["1.png"]


def test_archives_named_by_the_classes_of_imagenet_are_classes(tmp_path):
    files = {f"n0000000{n}.tar": tar_of([(f"n0000000{n}_{i}.JPEG", PNG) for i in range(2)]) for n in (2, 1)}
    assert labels_of(write_files(tmp_path / "set", files)) == (["n00000001", "n00000002"], [0, 0, 1, 1])


def test_the_archives_of_the_training_split_are_taken(tmp_path):
    files = {name: zip_of([("a/x.png", PNG)]) for name in ("set-train-0.zip", "set-train-1.zip", "set-val-0.zip")}
    source = open_source(str(write_files(tmp_path / "set", files)))
    assert len(source.names) == 2
    assert source.notes == ["2 archives", "1 file of other splits left aside"]


def test_a_class_may_be_a_key_of_the_json(tmp_path):
    members = [
        ("1.jpg", PNG),
        ("1.json", b'{"label": 3, "kind": "cat"}'),
        ("2.jpg", PNG),
        ("2.json", b'{"kind": "ant"}'),
    ]
    (tmp_path / "x.tar").write_bytes(tar_of(members))
    assert labels_of(tmp_path / "x.tar", columns=Columns(label="kind")) == (["ant", "cat"], [1, 0])
    assert labels_of(tmp_path / "x.tar", unlabelled=True) == ([""], [0, 0])


def test_a_json_whose_key_ends_like_a_list_of_classes_is_a_note_of_its_picture(tmp_path):
    members = [("my-classes.jpg", PNG), ("my-classes.json", b'{"label": 3}')]
    members += [("2.jpg", PNG), ("2.json", b'{"label": 5}')]
    (tmp_path / "x.tar").write_bytes(tar_of(members))
    assert labels_of(tmp_path / "x.tar") == (["3", "5"], [1, 0])


def test_captions_beside_the_pictures_are_no_classes(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_of([("1.jpg", PNG), ("1.json", b'{"caption": "a cat"}'), ("1.txt", b"a cat")]))
    assert labels_of(tmp_path / "x.tar") == ([""], [0])


def test_few_archives_are_open_at_a_time_and_each_is_closed_when_its_pictures_are_fetched(tmp_path):
    root = write_files(tmp_path / "set", {f"{n}.tar": tar_of([(f"{n}.png", PNG), ("x.png", PNG)]) for n in range(30)})
    source = open_source(str(root))
    before, most = open_files(), 0
    with source.reading(range(60)) as fetches:
        pending = []
        for _, fetch in fetches:
            pending.append(fetch)
            if len(pending) > 4:
                assert pending.pop(0)() == PNG
            most = max(most, open_files() - before)
        assert [fetch() for fetch in pending] == [PNG] * 4
        assert open_files() - before <= 1
    assert 1 < most <= 5
    assert open_files() == before


def test_a_pass_that_ends_early_closes_its_archives(tmp_path):
    root = write_files(tmp_path / "set", {f"{n}.zip": zip_of([("a.png", PNG)] * 1) for n in range(5)})
    source, before = open_source(str(root)), open_files()
    with source.reading(range(5)) as fetches:
        next(fetches), next(fetches)
    assert open_files() == before


def test_a_store_of_a_pattern_has_a_name(tmp_path):
    assert default_out("in/set-{000..146}.tar", 32, "none").name == "set-32-pixels"
    assert default_out("in/*.parquet", 32, "none").name == "in-32-pixels"
    assert default_out("hf://datasets/u/x:a/train", 32, "none").name == "x-32-pixels"


FAULTS = {
    "unpaired pictures": (
        [("1.jpg", PNG), ("1.cls", b"3"), ("2.jpg", PNG)],
        "'2.jpg' has no label (1 picture without)",
    ),
    "unpaired classes": (
        [("1.jpg", PNG), ("1.cls", b"3"), ("2.cls", b"3")],
        "2.cls has no picture beside it (1 such class)",
    ),
    "an empty class": ([("1.jpg", PNG), ("1.cls", b"")], "1.cls has no label"),
    "a binary class": ([("1.jpg", PNG), ("1.cls", b"\xff\xfe")], "1.cls is no text, so it is no class"),
    "a huge class": ([("1.jpg", PNG), ("1.cls", b"x" * 5000)], "1.cls: its label has 5,000 letters"),
    "a broken json": ([("1.jpg", PNG), ("1.json", b"{")], "1.json: not whole JSON"),
    "a list of classes": (
        [("1.jpg", PNG), ("1.json", b'{"label": [1, 2]}')],
        "1.json: its label is a list; a class is",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_tar_of_webdataset_is_one_clear_line(fault, tmp_path, capfd):
    members, words = FAULTS[fault]
    (tmp_path / "x.tar").write_bytes(tar_of(members))
    assert run(["prep-latents", str(tmp_path / "x.tar"), *OPTIONS, "--out", str(tmp_path / "s")]) == 1
    err = capfd.readouterr().err
    assert words in err
    assert err.count("error:") == 1
    assert "Traceback" not in err


def test_broken_sets_of_archives_are_one_clear_line(tmp_path):
    files = webdataset(ROWS[:20], 3)
    root = write_files(tmp_path / "set", files)
    for pattern, words in (
        ("part-{0..4}.tar", "part-3.tar: is not there (2 of the 5 files are missing)"),
        ("part-{4..1}.tar", "should count upwards"),
        ("other-*.tar", "no such file. Put a pattern in quotes"),
        ("*/part-*.tar", "only the last part of a path may be a pattern"),
    ):
        with pytest.raises(AlphaflowError) as fault:
            open_source(str(root / pattern))
        assert words in str(fault.value)
    (root / "part-1.tar").write_bytes(files["part-1.tar"][:2000])
    with pytest.raises(AlphaflowError, match=r"part-1.tar: not a whole zip or tar archive"):
        open_source(str(root))
    (root / "part-1.tar").write_bytes(files["part-1.tar"])
    (root / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(AlphaflowError, match=r"holds parquet files .* and archives .* name those of one kind"):
        open_source(str(root))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w"):
        pass
    (root / "x.parquet").unlink()
    (root / "part-2.tar").write_bytes(out.getvalue())
    assert len(open_source(str(root)).names) == 13
