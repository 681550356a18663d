"""Parquet on this disk and on the Hub: the shards of the folder, byte for byte, however it is read."""

import random
import signal
import time
from pathlib import Path

import pyarrow as pa
import pytest
from hub_fixtures import hub  # noqa: F401 (a fixture)
from hub_server import Fault
from new_process import Command, alphaflow
from packed_forms import CLASSES, bytes_of, hub_schema, parquet_files, parquet_of, pictures, write_files, write_folder

from alphaflow_cli.cli import run
from alphaflow_cli.data.labels import label_pictures
from alphaflow_cli.data.manifest import read_manifest
from alphaflow_cli.data.sources import open_source
from alphaflow_cli.data.tables import AS_FOUND, Columns, Labelling
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.evaluate.reference import load_reference
from alphaflow_cli.remote import ranges

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
COUNT = 1030  # five shards
OPTIONS = ("--size", "8", "--autoencoder", "none", "--bad", "skip")
WRITES_VIEWS = int(pa.__version__.split(".")[0]) >= 21
BROKEN = 300  # the row whose picture is cut off


@pytest.fixture(scope="module")
def rows():
    found = pictures(COUNT)
    label, data = found[BROKEN]
    found[BROKEN] = (label, data[: len(data) // 2])
    return found


@pytest.fixture(scope="module")
def files(rows):
    return parquet_files(rows, 3, group=70)


@pytest.fixture(scope="module")
def expected(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    write_folder(folder / "set", rows)
    assert run(["prep-latents", str(folder / "set"), *OPTIONS, "--out", str(folder / "s")]) == 0
    return shards(folder / "s")


def shards(store: Path) -> dict[str, bytes]:
    """The shards, the statistics and the classes: what depends on pictures and labels only."""
    names = [*store.glob("train-*.safetensors"), store / "stats.safetensors", store / "classes.json"]
    return {path.name: path.read_bytes() for path in names}


@pytest.fixture
def data(hub, files, monkeypatch):  # noqa: F811
    """The data set on a Hub, as lab/set."""
    monkeypatch.setattr(ranges, "PAUSE", 0.01)
    hub.add("datasets/lab/set", {"README.md": b"# set\n", "teaser.png": b"x", **files})
    return hub


@pytest.mark.parametrize("form", ["folder", "pattern", "stars"])
def test_parquet_files_give_the_shards_of_the_folder(form, files, expected, tmp_path, capfd):
    root = write_files(tmp_path / "set", files) / "data"
    name = {"folder": "", "pattern": "/train-{00000..00002}-of-00003.parquet", "stars": "/train-*.parquet"}[form]
    assert run(["prep-latents", f"{root}{name}", *OPTIONS, "--out", str(tmp_path / "s")]) == 0
    assert shards(tmp_path / "s") == expected
    assert "4 classes, in the source's order: 0 = ant, 1 = bee, 2 = cow, 3 = dog" in capfd.readouterr().err
    bad = read_manifest(tmp_path / "s").bad
    assert [(entry["line"], entry["name"]) for entry in bad] == [(BROKEN, "train-00000-of-00003.parquet#300")]


def test_a_data_set_on_the_hub_gives_the_shards_of_the_folder(data, expected, tmp_path):
    assert run(["prep-latents", "hf://datasets/lab/set", *OPTIONS, "--out", str(tmp_path / "s")]) == 0
    assert shards(tmp_path / "s") == expected
    plan = read_manifest(tmp_path / "s").plan
    commit = data.repos["datasets/lab/set"].commits[0][0]
    assert (plan.source["kind"], plan.source["revision"]) == ("parquet", commit)
    assert not list(Path(tmp_path / "cache").rglob("*.parquet"))


def test_only_the_row_groups_of_the_pictures_that_are_wanted_are_fetched(data):
    source = open_source("hf://datasets/lab/set")
    data.requests.clear()
    with source.reading([5, 6, 1000]) as fetches:
        assert [line for line, fetch in fetches if fetch()] == [5, 6, 1000]
    assert len(data.requests) <= 2 * 3  # two ends of files, two row groups


@pytest.mark.parametrize("status", [0, 503])
def test_a_connection_that_drops_costs_a_piece(data, expected, tmp_path, status, monkeypatch):
    monkeypatch.setattr(ranges, "PIECE", 30_000)
    half = Fault(status=206, body=b"x" * 10, headers={"Content-Length": "100", "Connection": "close"}, times=3)
    data.faults = {("GET", "00001-of"): Fault(status=status, times=3), ("GET", "00002-of"): half}
    assert run(["prep-latents", "hf://datasets/lab/set", *OPTIONS, "--out", str(tmp_path / "s")]) == 0
    assert shards(tmp_path / "s") == expected


def test_where_the_hub_sends_us_is_kept_until_it_expires(data, expected, tmp_path):
    data.sends_on = True
    data.faults = {
        ("GET", "/elsewhere/"): Fault(status=200, times=20),
        ("GET", "elsewhere"): Fault(status=403, times=1),
    }
    assert run(["prep-latents", "hf://datasets/lab/set", *OPTIONS, "--out", str(tmp_path / "s")]) == 0
    assert shards(tmp_path / "s") == expected
    assert data.faults["GET", "elsewhere"].times == 0
    opened = 3 * 3  # each file for its end, for its labels, and for its pictures
    assert data.count("GET", "resolve") == opened + 1
    assert data.count("GET", "elsewhere") > 20


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(status=401, code="GatedRepo"), "hf://datasets/lab/set: data/train-0000"),
        (
            Fault(status=403, code="GatedRepo"),
            "the repository is gated: ask for access on its page. Log in with: hf auth",
        ),
        (Fault(status=503), "the Hub is in trouble (HTTP 503)"),
        (Fault(status=0), "the connection to the Hub broke"),
        (Fault(status=200, body=b"<html>login</html>"), "this answer does not come from a Hub"),
        (Fault(status=404, code="EntryNotFound"), "the repository has no such file"),
    ],
)
def test_a_hub_that_refuses_is_one_line_and_no_picture_counts_as_bad(data, tmp_path, fault, words, capfd):
    data.faults = {("GET", "resolve"): fault}
    assert run(["prep-latents", "hf://datasets/lab/set", *OPTIONS, "--out", str(tmp_path / "s")]) == 1
    err = capfd.readouterr().err
    assert words in err
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert not (tmp_path / "s").exists()


def test_a_hub_that_goes_away_in_the_middle_ends_the_run_and_the_same_command_goes_on(data, expected, tmp_path, capfd):
    line = ["prep-latents", "hf://datasets/lab/set", *OPTIONS, "--out", str(tmp_path / "s"), "--batch", "16"]
    data.requests.clear()
    label_pictures(open_source("hf://datasets/lab/set"), AS_FOUND)
    listing = data.count("GET", "00002-of")
    good = Fault(status=200, times=listing + 2)  # the listing, the end of the file, one row group; then nothing more
    data.faults = {("GET", "00002-of"): good, ("GET", "2-of-00003.parquet"): Fault(status=503)}
    assert run(line) == 1
    assert "HTTP 503" in capfd.readouterr().err
    assert 1 < len(list((tmp_path / "s").glob("train-*.json"))) < 5
    data.faults = {}
    assert run(line) == 0
    assert shards(tmp_path / "s") == expected


@pytest.mark.distributed
@pytest.mark.usefixtures("forked_workers")
def test_two_processes_share_the_row_groups(data, expected, tmp_path):
    done = alphaflow(["prep-latents", "hf://datasets/lab/set", *OPTIONS, "--out", tmp_path / "s", "--processes", 2])
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "s") == expected


@pytest.mark.slow
def test_a_pass_that_ends_does_not_wait_for_a_slow_hub(data, monkeypatch):
    source = open_source("hf://datasets/lab/set")
    with source.reading(range(COUNT)) as fetches:
        monkeypatch.setattr(ranges, "PIECE", 500)
        next(fetches)
        data.faults = {("GET", "resolve"): Fault(status=503)}
        monkeypatch.setattr(ranges, "PAUSE", 0.3)
        time.sleep(0.1)  # the next row group is being fetched, piece by piece
        begun = time.monotonic()
    assert time.monotonic() - begun < 1.5  # and not the 2.1 s of all tries


def kill_test(kills, tmp_path, expected):
    """Killed at random moments on one or two processes, gone on with, and at the end the same."""
    rng, out, done = random.Random(0), tmp_path / "s", 0
    line = ["prep-latents", "hf://datasets/lab/set", *OPTIONS, "--out", out, "--processes"]
    for kill in range(kills):
        command = Command([*line, 1 + kill % 2])
        until = time.monotonic() + rng.uniform(0.2, 1.5)
        while command.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        done += command.poll() is None
        command.send_signal(signal.SIGKILL)
        command.wait()
        time.sleep(0.7)  # workers see within half a second that they are alone
        if (out / "manifest.json").exists():
            for name in ("manifest.json", "train-00001.json", "train-00004.json"):
                (out / name).unlink()
    assert done
    ended = alphaflow([*line, 1])
    assert ended.returncode == 0, ended.stderr
    assert shards(out) == expected


def test_killed_three_times_at_random_it_ends_the_same(data, expected, tmp_path):
    kill_test(3, tmp_path, expected)


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_twenty_times_at_random_it_ends_the_same(data, expected, tmp_path):
    kill_test(20, tmp_path, expected)


def write(path: Path, table: pa.Table, **options) -> Path:
    path.write_bytes(bytes_of(table, **options))
    return path


def found(path: Path, **columns) -> tuple[list[str], list[int]]:
    labelling = Labelling(columns=Columns(columns.get("image", ""), columns.get("label", "")))
    labelled = label_pictures(open_source(str(path), columns.get("image", "")), labelling)
    return labelled.classes.folders, labelled.labels


def test_columns_are_found_by_the_schema_or_by_their_types(tmp_path):
    data = [data for _, data in pictures(4)]
    cells = [{"bytes": each, "path": None} for each in data]
    path = tmp_path / "x.parquet"
    for images in (cells, data, pa.array(data, pa.large_binary()), pa.array(data).dictionary_encode()):
        write(path, pa.table({"id": [1, 2, 3, 4], "img": images, "label": ["b", "a", "b", "c"]}))
        assert found(path) == (["a", "b", "c"], [1, 0, 1, 2])
        source = open_source(str(path))
        with source.reading([1, 3]) as fetches:
            assert [fetch() for _, fetch in fetches] == [data[1], data[3]]
    write(path, pa.table({"img": cells, "label": [10, 2, 10, 3]}))
    assert found(path) == (["2", "3", "10"], [2, 0, 2, 1])
    write(path, pa.table({"img": cells, "n": [0.5] * 4}))
    assert found(path) == ([""], [0] * 4)


@pytest.mark.parametrize("labels", [[0.0, 1.0], [True, False]])
def test_a_label_that_is_no_class_is_named_unless_all_pictures_are_one(tmp_path, labels):
    cells = [data for _, data in pictures(2)]
    (tmp_path / "s.parquet").write_bytes(bytes_of(pa.table({"image": cells, "Label": labels})))
    source = open_source(str(tmp_path / "s.parquet"))
    with pytest.raises(AlphaflowError, match=r"its Label is (double|bool); a class is a text or a whole number"):
        label_pictures(source, AS_FOUND)
    assert run(["prep-latents", str(tmp_path), *OPTIONS, "--unlabelled", "--out", str(tmp_path / "store")]) == 0


@pytest.mark.skipif(not WRITES_VIEWS, reason="this pyarrow writes no such types")
@pytest.mark.parametrize("nested", [False, True])
def test_bytes_and_texts_in_the_types_that_polars_writes_are_pictures_and_classes(tmp_path, nested):
    rows = pictures(8)
    data, labels = [data for _, data in rows], [label for label, _ in rows]
    cells = pa.array(data, pa.binary_view())
    if nested:
        kind = pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())])
        cells = pa.array([{"bytes": each, "path": "x"} for each in data], kind)
    path = tmp_path / "a.parquet"
    path.write_bytes(bytes_of(pa.table({"image": cells, "label": pa.array(labels, pa.string_view())})))
    source = open_source(str(path))
    labelled = label_pictures(source, AS_FOUND)
    assert [labelled.classes.names[each] for each in labelled.labels] == labels
    with source.reading(range(8)) as fetches:
        assert [fetch() for _, fetch in fetches] == data


def test_columns_can_be_chosen(tmp_path):
    data = [data for _, data in pictures(2)]
    path = write(tmp_path / "x.parquet", pa.table({"a": data, "b": data[::-1], "fine": [1, 0], "kind": ["x", "y"]}))
    assert found(path, image="b", label="kind") == (["x", "y"], [0, 1])
    assert found(path, image="b", label="fine") == (["0", "1"], [1, 0])
    with open_source(str(path), "b").reading([0]) as fetches:
        assert [fetch() for _, fetch in fetches] == [data[1]]


@pytest.mark.parametrize("on_hub", [False, True])
def test_a_picture_may_lie_beside_the_file_but_not_outside_its_folder(tmp_path, hub, on_hub):  # noqa: F811
    cells = [{"bytes": None, "path": path} for path in BESIDE]
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
    table = write(tmp_path / "x.parquet", pa.table({"image": cells}, schema=schema)).read_bytes()
    files = {"out.png": b"secret", "set/in.png": b"picture", "set/x.parquet": table}
    source = str(write_files(tmp_path / "data", files) / "set" / "x.parquet")
    if on_hub:
        hub.add("datasets/lab/one", files)
        source = "hf://datasets/lab/one"
    else:
        (tmp_path / "data/set/circle.png").symlink_to("circle.png")
    fetched = []
    with open_source(source).reading(range(len(BESIDE))) as fetches:
        for _, fetch in fetches:
            try:
                fetched.append(fetch())
            except OSError as fault:
                fetched.append(str(fault))
    assert fetched[:5] == [b"picture", OUTSIDE, OUTSIDE, OUTSIDE, "there is no picture in this row"]
    assert ("the Hub answers 404" if on_hub else "links") in fetched[5]  # Python 3.13 leaves the word to the system
    assert fetched[6] == "its path holds a null byte"


BESIDE = ("in.png", "../out.png", "/out.png", "x/../../out.png", None, "circle.png", "in\0.png")
OUTSIDE = "its path leads out of the folder of the parquet file"


def test_class_names_that_occur_twice_stay_two_classes(tmp_path):
    rows = [(name, data) for name, (_, data) in zip(["crane", "dog", "crane"], pictures(3), strict=True)]
    path = tmp_path / "x.parquet"
    path.write_bytes(parquet_of(rows, names=["crane", "dog", "crane"]))
    assert found(path)[0] == ["crane", "dog", "crane (2)"]


def test_the_training_split_is_taken_and_another_can_be_named(data, rows):
    test = parquet_of(rows[:20])
    files = {"a/train-00000-of-00001.parquet": parquet_of(rows[:30]), "a/test-00000-of-00001.parquet": test}
    files["b/test-00000-of-00001.parquet"] = parquet_of(rows[:10])
    data.add("datasets/lab/splits", files)
    counts = {
        ":" + key if key else "": len(open_source(f"hf://datasets/lab/splits{':' + key if key else ''}").names)
        for key in ("", "test", "a/test", "b")
    }
    assert counts == {"": 30, ":test": 30, ":a/test": 20, ":b": 10}


def test_eval_and_reference_read_parquet_as_they_read_the_folder(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    good = pictures(120, side=16)
    write_folder(tmp_path / "tree", good)
    write_files(tmp_path / "pq", parquet_files(good, 2, group=40))
    contents = {}
    for name in ("tree", "pq"):
        line = ["reference", name, "--size", "16", "--metrics", "fd-tiny", "-o", f"{name}.safetensors"]
        assert run([*line, *(["--image-column", "image"] if name == "pq" else [])]) == 0, capfd.readouterr().err
        assert run(["eval", name, "--metrics", "fd-tiny", "--reference", "tree.safetensors"]) == 0
        assert "FD-tiny-120  0 " in capfd.readouterr().out
        contents[name] = load_reference(tmp_path / f"{name}.safetensors").facts["pictures_sha256"]
    assert contents["pq"] == contents["tree"]


def test_pictures_of_another_column_are_measured_and_prepared_anew(tmp_path, monkeypatch, capfd):
    """Real pictures beside drawn ones in one file: the second column got the numbers of the first."""
    monkeypatch.chdir(tmp_path)
    columns = {name: [data for _, data in pictures(120, side=16, seed=seed)] for seed, name in enumerate("ab")}
    Path("two.parquet").write_bytes(bytes_of(pa.table(columns)))
    contents = set()
    for name in columns:
        line = ["reference", "two.parquet", "--metrics", "fd-tiny", "--image-column", name]
        assert run([*line, "-o", f"{name}.safetensors"]) == 0, capfd.readouterr().err
        contents.add(load_reference(tmp_path / f"{name}.safetensors").facts["pictures_sha256"])
    assert len(contents) == 2

    line = ["prep-latents", "two.parquet", "--size", "16", "--autoencoder", "none", "--unlabelled", "--out", "store"]
    assert [run([*line, "--image-column", name]) for name in ("a", "a", "b")] == [0, 0, 1]
    assert "source.image_column is 'b' in this command, 'a' in the store" in capfd.readouterr().err


def test_the_only_column_of_pictures_is_no_choice_to_record(tmp_path):
    write_files(tmp_path, {"x.parquet": parquet_of(pictures(4))})
    facts = [open_source(str(tmp_path / "x.parquet"), column).facts() for column in ("", "image")]
    assert facts[0] == facts[1] == {"bytes": (tmp_path / "x.parquet").stat().st_size}


def test_a_file_that_changes_while_it_is_read_is_one_line(rows, tmp_path):
    path = tmp_path / "x.parquet"
    path.write_bytes(parquet_of(rows[:200]))
    source = open_source(str(path))
    path.write_bytes(parquet_of(rows[200:300]))
    with source.reading([150]) as fetches, pytest.raises(AlphaflowError, match="was changed or replaced while it was"):
        next(fetches)


def test_the_schema_of_the_hub_is_read(tmp_path):
    schema = hub_schema(CLASSES, "img", "kind")
    cells = [{"bytes": data, "path": "x"} for _, data in pictures(2)]
    path = write(tmp_path / "x.parquet", pa.table({"img": cells, "kind": [3, 0]}, schema=schema))
    assert found(path) == (CLASSES, [3, 0])
