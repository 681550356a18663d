"""Tables of labels: what they say decides the classes, and what is wrong with one is one clear line."""

import json
from pathlib import Path

import numpy as np
import pytest
from archive_forms import tar_of, zip_of
from awkward_pictures import encoded
from PIL import Image

from alphaflow_cli.cli import run
from alphaflow_cli.data.labels import label_pictures
from alphaflow_cli.data.sources import open_source
from alphaflow_cli.data.tables import AS_FOUND, Columns, Labelling
from alphaflow_cli.errors import AlphaflowError

RNG = np.random.default_rng(0)
PICTURES = {
    f"{index:02d}.png": encoded(Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)), "PNG")
    for index in range(12)
}
CLASS_OF = {name: ("cat", "dog", "ant")[index % 3] for index, name in enumerate(PICTURES)}
CSV = "file_name,label\n" + "".join(f"{name},{label}\n" for name, label in CLASS_OF.items())
JSONL = "".join(json.dumps({"file_name": name, "label": label}) + "\n" for name, label in CLASS_OF.items())
EXPECTED = [("ant", "cat", "dog").index(label) for label in CLASS_OF.values()]
OPTIONS = ("--size", "8", "--autoencoder", "none")


def folder_of(files: dict[str, bytes | str], root: Path) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def labels_of(source: Path, **labelling) -> tuple[list[str], list[int]]:
    found = label_pictures(open_source(str(source)), Labelling(**labelling))
    return found.classes.folders, found.labels


def fault_of(source: Path, **labelling) -> str:
    with pytest.raises(AlphaflowError) as fault:
        labels_of(source, **labelling)
    assert "\n" not in str(fault.value)
    return str(fault.value)


def classes_by_name(source: str) -> dict[str, str]:
    opened = open_source(source)
    labelled = label_pictures(opened, AS_FOUND)
    return {
        opened.paths[line]: labelled.classes.folders[label]
        for line, label in zip(labelled.lines, labelled.labels, strict=True)
    }


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("beside", [False, True])
def test_a_table_in_archives_or_beside_them_says_the_classes(tmp_path, count, beside):
    archives = {}
    for part in range(count):
        members = list(PICTURES.items())[part::count]
        rows = "".join(f"{name},{CLASS_OF[name]}\n" for name, _ in members)
        own = [] if beside else [("metadata.csv", f"file_name,label\n{rows}".encode())]
        archives[f"part-{part}.zip"] = zip_of([*members, *own])
    source = folder_of({**archives, **({"labels.csv": CSV} if beside else {})}, tmp_path / "set")
    assert classes_by_name(str(source)) == CLASS_OF


@pytest.mark.parametrize("count", [1, 2])
def test_a_class_list_beside_archives_decides(tmp_path, count):
    members = [(f"{name[1]}/{name}", data) for name, data in PICTURES.items()]
    archives = {f"part-{part}.zip": zip_of(members[part::count]) for part in range(count)}
    order = [str(number) for number in range(9, -1, -1)]
    source = folder_of({**archives, "classes.json": json.dumps(order)}, tmp_path / "set")
    assert labels_of(source)[0] == order


@pytest.mark.parametrize("form", ["folder", "zip", "tar", "tar.gz"])
@pytest.mark.parametrize("table", [("labels.csv", CSV), ("metadata.csv", CSV), ("metadata.jsonl", JSONL)])
def test_a_table_in_the_source_says_the_classes(tmp_path, form, table):
    files = {f"set/{name}": content for name, content in [*PICTURES.items(), table]}
    members = [(name, content if isinstance(content, bytes) else content.encode()) for name, content in files.items()]
    source = tmp_path / "x"
    if form == "folder":
        folder_of(files, source)
    else:
        source.write_bytes(zip_of(members) if form == "zip" else tar_of(members, form == "tar.gz"))
    assert labels_of(source) == (["ant", "cat", "dog"], EXPECTED)
    assert labels_of(source, unlabelled=True) == ([""], [0] * 12)


def test_a_table_anywhere_is_given_by_name(tmp_path):
    source = folder_of(PICTURES, tmp_path / "set")
    table = tmp_path / "any.tsv"
    table.write_text("id\tkind\tage\n" + "".join(f"{name[:2]}\t{label}\t3\n" for name, label in CLASS_OF.items()))
    given = {"table": str(table), "columns": Columns("id", "kind")}  # names without their suffixes
    assert labels_of(source, **given) == (["ant", "cat", "dog"], EXPECTED)


def test_names_are_relative_to_the_table_or_to_the_pictures(tmp_path):
    folder_of({f"data/images/{name}": content for name, content in PICTURES.items()}, tmp_path / "set")
    for at, names in (
        ("labels.csv", "data/images/{}"),
        ("data/labels.csv", "images/{}"),
        ("data/images/labels.csv", "{}"),
        ("data/labels.csv", "{}"),
        ("data/labels.csv", "images\\{}"),
    ):
        table = tmp_path / "set" / at
        table.write_text("file_name,label\n" + "".join(f"{names.format(n)},{c}\n" for n, c in CLASS_OF.items()))
        assert labels_of(tmp_path / "set") == (["ant", "cat", "dog"], EXPECTED), at
        table.unlink()


def test_each_split_has_its_own_table_and_train_is_taken(tmp_path):
    files: dict[str, bytes | str] = {
        "set/train/metadata.csv": CSV,
        "set/test/metadata.csv": "file_name,label\nx.png,y\n",
    }
    files |= {f"set/train/{name}": content for name, content in PICTURES.items()} | {
        "set/test/x.png": PICTURES["00.png"]
    }
    assert labels_of(folder_of(files, tmp_path)) == (["ant", "cat", "dog"], EXPECTED)


def test_class_folders_go_before_a_table_unless_it_is_given(tmp_path, capfd):
    files: dict[str, bytes | str] = {f"{'ab'[i % 2]}/{name}": c for i, (name, c) in enumerate(PICTURES.items())}
    table = "file_name,label\n" + "".join(f"{name},{CLASS_OF[name[2:]]}\n" for name in files)
    source = folder_of({**files, "labels.csv": table}, tmp_path / "set")
    assert labels_of(source)[0] == ["a", "b"]
    assert labels_of(source, table=str(source / "labels.csv"))[0] == ["ant", "cat", "dog"]
    assert run(["prep-latents", str(source), *OPTIONS, "--out", str(tmp_path / "s")]) == 0
    assert "labels.csv not used, because class folders are there (--labels uses it)" in capfd.readouterr().err


def test_tables_that_class_folders_make_useless_may_be_broken_and_several(tmp_path, capfd):
    files: dict[str, bytes | str] = {f"{'ab'[i % 2]}/{name}": c for i, (name, c) in enumerate(PICTURES.items())}
    broken: dict[str, bytes | str] = {
        "labels.csv": "file_name,label\n1.png,x,y,z\n",
        "metadata.csv": b"file_name,label\n\xff\xfe",
        "metadata.jsonl": JSONL,
        "dataset.json": "{",
    }
    source = folder_of({**files, **broken}, tmp_path / "set")
    assert labels_of(source) == (["a", "b"], [0] * 6 + [1] * 6)
    assert run(["prep-latents", str(source), *OPTIONS, "--out", str(tmp_path / "s")]) == 0
    assert "set/labels.csv not used, because class folders are there (--labels uses it)" in capfd.readouterr().err
    assert "line 2 has 4 columns" in fault_of(source, table=str(source / "labels.csv"))


def test_whole_numbers_are_sorted_as_numbers_and_a_class_list_decides(tmp_path):
    table = "file_name,label\n" + "".join(f"{name},{i}\n" for i, name in enumerate(PICTURES))
    source = folder_of({**PICTURES, "labels.csv": table}, tmp_path / "set")
    assert labels_of(source) == ([str(i) for i in range(12)], list(range(12)))
    (source / "classes.json").write_text(json.dumps([str(i) for i in reversed(range(12))]))
    assert labels_of(source)[1] == list(reversed(range(12)))


def test_the_store_is_that_of_the_folders_of_the_same_classes(tmp_path):
    by_class = sorted(PICTURES, key=lambda name: (CLASS_OF[name], name))
    folder_of({f"{CLASS_OF[name]}/{name}": PICTURES[name] for name in PICTURES}, tmp_path / "tree")
    flat: dict[str, bytes | str] = {f"{i:03d}.png": PICTURES[name] for i, name in enumerate(by_class)}
    flat["metadata.csv"] = "file_name,label\n" + "".join(f"{i:03d}.png,{CLASS_OF[n]}\n" for i, n in enumerate(by_class))
    folder_of(flat, tmp_path / "flat")
    for name in ("tree", "flat"):
        assert run(["prep-latents", str(tmp_path / name), *OPTIONS, "--out", str(tmp_path / f"{name}-s")]) == 0
    for file in ("train-00000.safetensors", "stats.safetensors", "classes.json"):
        assert (tmp_path / "tree-s" / file).read_bytes() == (tmp_path / "flat-s" / file).read_bytes()


def test_a_store_that_was_begun_as_one_class_stays_one(tmp_path):
    source, out = folder_of(PICTURES, tmp_path / "set"), tmp_path / "s"
    line = ["prep-latents", str(source), *OPTIONS, "--out", str(out)]
    assert run(line) == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    (out / "manifest.json").unlink()
    (source / "labels.csv").write_text(CSV)
    assert run(line) == 0
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_folder_without_classes_is_one_class_and_the_run_says_so(tmp_path, capfd):
    source = folder_of(PICTURES, tmp_path / "set")
    assert run(["prep-latents", str(source), *OPTIONS, "--out", str(tmp_path / "s")]) == 0
    assert "1 class (neither folders nor a table tell classes apart): 0 = all" in capfd.readouterr().err
    assert run(["prep-latents", str(source), *OPTIONS, "--unlabelled", "--out", str(tmp_path / "u")]) == 0
    assert "1 class (--unlabelled): 0 = all" in capfd.readouterr().err
    assert run(["prep-latents", str(source), "--unlabelled", "--labels", "x.csv", "--out", str(tmp_path / "u")]) == 2


def test_captions_are_no_classes(tmp_path):
    table = "file_name,text\n" + "".join(f"{name},a picture of {name}\n" for name in PICTURES)
    source = folder_of({**PICTURES, "metadata.csv": table}, tmp_path / "set")
    assert labels_of(source) == ([""], [0] * 12)


FAULTS = {
    "": "is empty, so it names no picture",
    "a,b,c\n1,2,3\n": "has no column file_name (a, b, c). Name it: --image-column",
    "file_name,b,c\n00.png,2,3\n": "has no column label (file_name, b, c). Name it: --label-column",
    "file_name,label\n00.png,\n": "line 2 (00.png) has no label. Give it one, or take all pictures as one class",
    "file_name,label\n00.png, \n": "line 2 (00.png) has no label. Give it one, or take all pictures as one class",
    "file_name,label\n,cat\n": "line 2 has no file_name. Name the picture, or remove the line",
    "file_name,label\n00.png,cat,3\n": "line 2 has 3 columns, the first line has 2. Mend it",
    "file_name,label\n00.png\n": "line 2 has 1 columns, the first line has 2. Mend it",
    'file_name,label\n00.png,"cat\n': "is no line of a csv (unexpected end of data). Mend it",
    "file_name,label\n00.png,cat\n00.png,dog\n": "line 3 says that 00.png is dog, an earlier one cat. Keep one of them",
    "file_name,label\n../../etc/x.png,cat\n": "line 2 names ../../etc/x.png, which is not in set (1 of 1 rows",
    "file_name,label\n00.png,cat\n": "has no row for 11 pictures; the first is 01.png. Add rows",
    CSV + "gone.png,cat\nlost.png,dog\n": "line 14 names gone.png, which is not in set (2 of 14 rows have no picture)",
    f"file_name,label\n00.png,{'x' * 2000}\n": "its label has 2,000 letters, at most 1,000 are a class",
    "image,image\n00.png,cat\n": "has no column label (image, image). Name it: --label-column",
    "image,label,image\n00.png,cat,1\n": "has two columns with the name image. Keep one of them",
    "image,label,label\n00.png,cat,1\n": "has two columns with the name label. Keep one of them",
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_broken_table_is_one_clear_line(tmp_path, text):
    source = folder_of(PICTURES, tmp_path / "set")
    (tmp_path / "t.csv").write_text(text)
    assert FAULTS[text] in fault_of(source, table=str(tmp_path / "t.csv"))


def test_a_broken_jsonl_is_one_clear_line(tmp_path):
    source = folder_of(PICTURES, tmp_path / "set")
    for line, words in (
        ('{"file_name": "00.png", "label": ["a", "b"]}', "line 1 (00.png): its label is a list; a class is a text"),
        ('{"file_name": "00.png", "label": 0.5}', "its label is a fraction"),
        ('{"file_name": "00.png"', "t.jsonl: line 1: not whole JSON"),
        ('["00.png"]', "t.jsonl: line 1: a table is wanted, this is a list"),
    ):
        (tmp_path / "t.jsonl").write_text(line)
        assert words in fault_of(source, table=str(tmp_path / "t.jsonl"), columns=Columns("file_name", "label"))
    (tmp_path / "t.jsonl").write_bytes(b"\xff\xfe")
    assert "is not text (byte 0 is not UTF-8)" in fault_of(source, table=str(tmp_path / "t.jsonl"))
    assert "cannot be read (No such file" in fault_of(source, table=str(tmp_path / "nowhere.csv"))


def test_a_line_of_jsonl_ends_at_a_line_feed_and_at_no_separator_inside_a_caption(tmp_path):
    rows = [{"file_name": name, "label": "cat", "text": "a\u2028b\x85c\u2029d"} for name in PICTURES]
    table = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    source = folder_of({**PICTURES, "metadata.jsonl": table}, tmp_path / "set")
    assert labels_of(source) == (["cat"], [0] * 12)


def test_two_tables_in_one_folder_need_a_choice(tmp_path):
    source = folder_of({**PICTURES, "labels.csv": CSV, "metadata.jsonl": JSONL}, tmp_path / "set")
    assert "holds several tables of labels (set/labels.csv, set/metadata.jsonl)" in fault_of(source)
    assert labels_of(source, table=str(source / "labels.csv"))[1] == EXPECTED
    assert AS_FOUND.given is False


def packed_by_edm(folder: str, labels: dict[str, object] | None = None) -> dict[str, bytes | str]:
    """Pictures as EDM's dataset_tool packs them, here six to a folder, with its dataset.json."""
    files: dict[str, bytes | str] = {
        f"{folder}{index // 6:05d}/img{index:08d}.png": data for index, data in enumerate(PICTURES.values())
    }
    rows = [[name[len(folder) :], label] for name, label in zip(files, (labels or {}).values(), strict=False)]
    return {**files, f"{folder}dataset.json": json.dumps({"labels": rows or None})}


@pytest.mark.parametrize("folder", ["", "train/"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_folders_of_edms_tools_are_no_classes_and_their_dataset_json_says_these(tmp_path, folder, packed):
    files = packed_by_edm(folder, {name: EXPECTED[index] for index, name in enumerate(PICTURES)})
    source = folder_of(files, tmp_path / "set")
    if packed:
        (tmp_path / "set.zip").write_bytes(zip_of([(name, (source / name).read_bytes()) for name in files]))
        source = tmp_path / "set.zip"
    assert labels_of(source) == (["0", "1", "2"], EXPECTED)


def test_the_folders_of_edms_tools_are_one_class_where_the_dataset_json_says_none(tmp_path):
    source = folder_of(packed_by_edm(""), tmp_path / "set")
    assert labels_of(source) == ([""], [0] * 12)


def test_class_folders_beside_another_dataset_json_are_classes(tmp_path):
    files = {f"{CLASS_OF[name]}/{name}": data for name, data in PICTURES.items()}
    for document in ({"title": "pets"}, {"labels": ["ant", "cat"]}, [1, 2]):
        source = folder_of({**files, "dataset.json": json.dumps(document)}, tmp_path / "set")
        assert labels_of(source)[0] == ["ant", "cat", "dog"]


@pytest.mark.parametrize(
    "document",
    [
        {"labels": [[name, label] for name, label in CLASS_OF.items()]},
        [{"file_name": name, "label": label, "width": 8} for name, label in CLASS_OF.items()],
    ],
)
def test_a_json_is_a_table_too(tmp_path, document):
    (tmp_path / "t.json").write_text(json.dumps(document))
    assert labels_of(folder_of(PICTURES, tmp_path / "set"), table=str(tmp_path / "t.json"))[1] == EXPECTED


def test_a_broken_json_is_one_clear_line(tmp_path):
    source = folder_of(PICTURES, tmp_path / "set")
    for text, words in (
        (
            '{"cat": 0}',
            't.json: says no labels. A json of labels is {"labels": [["1.jpg", "cat"], …]} or [{"file_name"',
        ),
        ('{"labels": null}', "t.json: says no labels."),
        ('{"labels": [["00.png", 1], ["zz.png", 2]]}', "t.json: entry 2 names zz.png, which is not in set"),
        ('{"labels": [["00.png", [0, 1]]]}', "t.json: entry 1 (00.png): its label is a list"),
        ('[{"file_name": "00.png"}]', "t.json: has no column label (file_name). Name it: --label-column"),
        ('{"labels": [', "t.json: not whole JSON"),
    ):
        (tmp_path / "t.json").write_text(text)
        assert words in fault_of(source, table=str(tmp_path / "t.json"))


def test_a_labels_csv_that_says_no_labels_is_an_error_where_nothing_else_says_them(tmp_path):
    breeds = CSV.replace("file_name,label", "image_id,breed")
    source = folder_of({**PICTURES, "labels.csv": breeds}, tmp_path / "set")
    assert "set/labels.csv: has no column file_name (image_id, breed). Name it: --image-column" in fault_of(source)
    assert labels_of(source, columns=Columns("image_id"))[1] == EXPECTED
    assert labels_of(source, unlabelled=True)[1] == [0] * 12
    sorted_files = {f"{CLASS_OF[name]}/{name}": data for name, data in PICTURES.items()}
    folders = folder_of({**sorted_files, "labels.csv": breeds}, tmp_path / "folders")
    assert labels_of(folders)[0] == ["ant", "cat", "dog"]


@pytest.mark.parametrize("captions", ["01.png,a cat, sitting\n", '01.png,"a cat\n', f"01.png,{'a cat ' * 30_000}\n"])
def test_captions_need_not_be_a_clean_csv(tmp_path, captions):
    source = folder_of({**PICTURES, "metadata.csv": f"file_name,text\n{captions}"}, tmp_path / "set")
    assert labels_of(source) == ([""], [0] * 12)
    table = source / "metadata.csv"
    table.write_text(table.read_text().replace("text", "label"))
    assert "set/metadata.csv: line " in fault_of(source)


def test_captions_above_do_not_hide_the_table_of_labels_below(tmp_path):
    files = {f"images/{name}": data for name, data in PICTURES.items()}
    captions = "file_name,text\n" + "".join(f"images/{name},a picture\n" for name in PICTURES)
    source = folder_of({**files, "metadata.csv": captions, "images/labels.csv": CSV}, tmp_path / "set")
    assert labels_of(source)[1] == EXPECTED
