"""Archives as people make them: every form gives the pictures that unpacking it would, to every verb that reads one."""

import errno
import json
import os
import signal
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from archive_forms import FORMS, SIDE, tar_of, write_form, write_tree, zip_of
from awkward_pictures import GOOD
from new_process import Command, alphaflow
from safetensors.numpy import load_file

from alphaflow_cli.cli import run
from alphaflow_cli.data import archives, pictures
from alphaflow_cli.data.manifest import read_manifest
from alphaflow_cli.data.sources import open_source
from alphaflow_cli.errors import AlphaflowError

COUNT = 400
PNG = GOOD["rgba.png"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("tree") / "set", COUNT)


@pytest.fixture(scope="module")
def expected(tree, tmp_path_factory):
    """What the folder gives."""
    store = tmp_path_factory.mktemp("expected") / "s"
    assert run(["prep-latents", str(tree), *OPTIONS, "--out", str(store)]) == 0
    return content_of(store)


OPTIONS = ("--size", str(SIDE), "--autoencoder", "none")


def content_of(store: Path) -> dict[str, tuple[int, bytes]]:
    """Label and pixels by the picture's name."""
    names = [name for name, _ in json.loads((store / "images.json").read_text())]
    found = {}
    for shard in read_manifest(store).shards:
        rows = load_file(store / shard.file)
        for index, label, pixels in zip(rows["index"], rows["label"], rows["pixels"], strict=True):
            found[names[index]] = (int(label), pixels.tobytes())
    return found


def command(source: Path, store: Path, processes: int) -> list[str]:
    return ["prep-latents", str(source), *OPTIONS, "--out", str(store), "--processes", str(processes)]


def prepare_with_a_kill(source: Path, store: Path, processes: int) -> None:
    """The real command; killed when its first shard is there, and started again."""
    first = Command(command(source, store, processes))
    while first.poll() is None and not list(store.glob("train-*.json")):
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    first.wait()
    if (store / "manifest.json").exists():  # too fast for us: take something away, so that there is work
        (store / "manifest.json").unlink()
        (store / "train-00001.json").unlink()
    time.sleep(0.7 * (processes > 1))  # workers see within half a second that they are alone
    done = alphaflow(command(source, store, processes))
    assert done.returncode == 0, done.stderr


def check_form(form, processes, tree, expected, tmp_path):
    prepare_with_a_kill(write_form(form, tree, tmp_path), tmp_path / "s", processes)
    found = content_of(tmp_path / "s")
    assert len(found) == COUNT
    assert found == expected


@pytest.mark.parametrize(("form", "processes"), [("zip", 1), ("tar -S", 1), ("tar with hard links", 2)])
def test_a_killed_and_resumed_command_finds_in_an_archive_what_the_folder_has(
    form, processes, tree, expected, tmp_path
):
    check_form(form, processes, tree, expected, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_on_one_and_two_processes_gives_the_same_latents(form, processes, tree, expected, tmp_path):
    check_form(form, processes, tree, expected, tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_latents(form, tree, expected, tmp_path, capfd):
    source = write_form(form, tree, tmp_path)
    assert run(["prep-latents", str(source), *OPTIONS, "--out", str(tmp_path / "s")]) == 0
    assert content_of(tmp_path / "s") == expected
    assert f"{COUNT} pictures" in capfd.readouterr().out


def measured(capfd, *args) -> dict:
    assert run([*map(str, args), "--json"]) == 0, capfd.readouterr().err
    return json.loads(capfd.readouterr().out)


def test_eval_and_reference_of_every_form_give_the_same_numbers(tree, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    values, contents, means = {}, {}, {}
    for form in FORMS:
        source = write_form(form, tree, tmp_path)
        (row,) = measured(capfd, "eval", source, "--metrics", "fd-tiny", "--reference", "glyphs:200")["evaluations"]
        made = f"{form.replace(' ', '-')}.safetensors"
        facts = measured(capfd, "reference", source, "--size", "16", "--metrics", "fd-tiny", "-o", made)["facts"]
        assert facts["count"] == COUNT
        values[form], held = row["rows"][0]["value"], load_file(made)
        contents[form] = {row["pictures_sha256"], facts["pictures_sha256"]}
        means[form] = held["tiny.mean"], held["tiny.cov"]
    streams = ("tar.gz", "tar.xz")  # links stand beside what they lead to: another order, other rounding at most
    for forms in (set(FORMS) - set(streams), streams):
        assert len(set.union(*(contents[form] for form in forms))) == 1
        assert len({values[form] for form in forms}) == 1
    assert values["tar.gz"] == pytest.approx(values["folder"], rel=1e-12)
    for one, other in zip(means["tar.gz"], means["folder"], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


MEMBERS: list[tuple[str, bytes | str]] = [
    ("set/a/one.png", PNG + b"1"),
    ("set/a/two.png", PNG + b"2"),
    ("set/a/soft.png", "../b/later.png"),
    ("set/a/chain.png", "soft.png"),
    ("set/b/later.png", PNG + b"3"),
    ("./set/a/one.png", PNG + b"4"),  # a copy that an unpacked archive would hold in the place of the first
    ("set/b/nowhere.png", "gone.png"),
    ("set/b/round.png", "round.png"),
    ("set/b/out.png", "../../../etc/passwd"),
    ("set/link", "b"),
    ("set/notes", "a/one.png"),
]
HARD: list[tuple[str, bytes | str]] = [("set/b/hard.png", "=set/a/one.png")]
CLASSES: tuple[str, bytes | str] = ("set/classes.json", b'["b", "a"]')


def fetched(source) -> dict[str, bytes | str]:
    found = {}
    with source.reading(range(len(source.names))) as fetches:
        for line, fetch in list(fetches):
            try:
                found[source.names[line]] = fetch()
            except OSError as fault:
                found[source.names[line]] = str(fault)
    return found


@pytest.mark.parametrize("form", ["zip", "tar", "tar.gz"])
def test_links_and_repeated_names_are_read_as_unpacking_would_leave_them(tmp_path, form):
    hard = [] if form == "zip" else HARD
    members = [CLASSES, *MEMBERS[:2], *hard, *MEMBERS[2:]]
    path = tmp_path / "set.bin"
    path.write_bytes(zip_of(members) if form == "zip" else tar_of(members, form == "tar.gz"))
    source = open_source(str(path))
    nowhere = "a link to what is not in the archive"
    assert fetched(source) == {
        "set/a/one.png": PNG + b"4",
        "set/a/two.png": PNG + b"2",
        "set/a/soft.png": PNG + b"3",
        "set/a/chain.png": PNG + b"3",
        "set/b/later.png": PNG + b"3",
        **({"set/b/hard.png": PNG + b"1"} if hard else {}),  # the file of that name when the link was written
        "set/b/nowhere.png": nowhere,
        "set/b/round.png": nowhere,
        "set/b/out.png": nowhere,
    }
    assert source.notes == [
        "1 other file left aside",
        "1 names that occur again: the last copy is taken",
        "1 links to folders not followed (unpack it, and give the folder)",
    ]
    assert source.classes_json() == CLASSES[1]


def test_names_are_kept_as_they_are_spelled_unless_one_folder_is_spelled_in_two_ways(tmp_path):
    path = tmp_path / "set.tar"
    for members, names in (
        ([("./b/1.png", PNG), ("./a/1.png", PNG)], ["./a/1.png", "./b/1.png"]),
        ([("./b/1.png", PNG), ("b/2.png", PNG)], ["b/1.png", "b/2.png"]),
    ):
        path.write_bytes(tar_of(members))
        assert list(open_source(str(path)).names) == names


@pytest.mark.parametrize(("system", "mark"), [(0, "/"), (3, "\\")])
def test_backslashes_in_a_zip_of_windows_part_folders(tmp_path, system, mark):
    path, written = tmp_path / "set.zip", ["cat\\1.png", "dog\\big\\2.png"]
    names = [name.replace("\\", mark) for name in written]
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("cat\\", *written):
            member = zipfile.ZipInfo("x")
            member.filename, member.create_system = name, system
            archive.writestr(member, PNG if name.endswith(".png") else b"")
    source = open_source(str(path))
    assert list(source.names) == names
    assert fetched(source) == dict.fromkeys(names, PNG)
    assert len(source.notes) == (1 if system else 0)  # the folder is no file


def test_a_zip_that_claims_more_than_it_has_asks_for_no_memory(tmp_path):
    data = bytearray(zip_of([("a/1.png", PNG), ("a/2.png", PNG)]))
    at = data.find(b"PK\1\2")
    data[at + 20 : at + 24] = b"\xff\xff\xff\x7f"
    path = tmp_path / "set.zip"
    path.write_bytes(data)
    assert fetched(open_source(str(path)))["a/1.png"] == "it claims more bytes than the archive has"


PACKINGS = {  # and the most bytes of memory: LZMA makes 29 MB of a piece of 4,096 bytes, and holds them twice
    "deflate": (zipfile.ZIP_DEFLATED, 16 << 20),
    "bzip2": (zipfile.ZIP_BZIP2, 16 << 20),
    "LZMA": (zipfile.ZIP_LZMA, 72 << 20),
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_zip_unpacks_to_what_it_claims_and_asks_for_no_more_memory(tmp_path, packing):
    path, bomb = tmp_path / "set.zip", 50_123_457  # bytes
    with zipfile.ZipFile(path, "w", PACKINGS[packing][0]) as archive:
        archive.writestr("a/1.png", PNG)
        archive.writestr("a/2.png", b"")
        archive.writestr("a/3.png", bytes(bomb))
    data = path.read_bytes()
    assert data.count(bomb.to_bytes(4, "little")) == 2
    path.write_bytes(data.replace(bomb.to_bytes(4, "little"), (100).to_bytes(4, "little")))
    source = open_source(str(path))
    tracemalloc.start()
    found = fetched(source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found["a/1.png"], found["a/2.png"]) == (PNG, b"")
    assert found["a/3.png"] == "Bad CRC-32 for file 'a/3.png'"
    assert peak < PACKINGS[packing][1]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_tar_that_claims_a_name_of_a_terabyte_asks_for_no_memory(tmp_path, kind):
    header = tarfile.TarInfo("name")
    header.type, header.size = kind, 1 << 40
    path, whole = tmp_path / "set.tar", tar_of([("a/1.png", PNG)])
    for before in (b"", whole[: 512 - len(PNG) // -512 * 512]):  # as the first header, and as a later one
        path.write_bytes(before + header.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        with pytest.raises(AlphaflowError, match="not a whole zip or tar archive"):
            open_source(str(path))


def test_a_compressed_tar_keeps_its_own_order(tmp_path):
    path = tmp_path / "set.tgz"
    path.write_bytes(tar_of([("b/1.png", b"1"), ("a/1.png", b"2"), ("c/1.png", b"3")], compressed=True))
    assert list(open_source(str(path)).names) == ["b/1.png", "a/1.png", "c/1.png"]


def test_a_gzip_of_several_parts_is_read_to_its_end(tmp_path):
    import gzip

    path, whole = tmp_path / "set.tar.gz", tar_of([(f"a/{index}.png", PNG * 40) for index in range(30)])
    half = len(whole) // 2
    path.write_bytes(gzip.compress(whole[:half]) + gzip.compress(whole[half:]))
    assert list(fetched(open_source(str(path))).values()) == [PNG * 40] * 30


def test_a_tar_that_holds_a_zip_is_a_tar(tmp_path):
    path = tmp_path / "set.tar"
    path.write_bytes(tar_of([("a/1.png", PNG), ("a/more.zip", zip_of([("x/2.png", PNG)]))]))
    assert list(open_source(str(path)).names) == ["a/1.png"]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("damage", ["cut between two members", "a damaged header"])
def test_a_tar_that_ends_early_is_refused_and_not_taken_for_a_smaller_one(tmp_path, damage, compressed):
    import gzip

    data = bytearray(tar_of([(f"a/{index}.png", b"x" * 512) for index in range(8)]))
    if damage == "cut between two members":
        del data[4 * 1024 :]
    else:
        data[4 * 1024 + 5] ^= 1
    path = tmp_path / "set.tar"
    path.write_bytes(gzip.compress(bytes(data)) if compressed else bytes(data))
    with pytest.raises(AlphaflowError, match="not a whole zip or tar archive"):
        open_source(str(path))


def test_an_empty_archive_has_no_pictures(tmp_path, capfd):
    for name, data in {"a.tar": tar_of([]), "a.tgz": tar_of([], compressed=True), "a.zip": zip_of([])}.items():
        (tmp_path / name).write_bytes(data)
        assert run(["prep-latents", str(tmp_path / name), *OPTIONS, "--out", str(tmp_path / "s")]) == 1
        assert f"{name}: no pictures here" in capfd.readouterr().err


def test_a_member_of_negative_size_ends_the_listing(tmp_path):
    data = bytearray(tar_of([("a/1.png", PNG), ("a/2.png", PNG)]))
    data[124:136] = b"\xff" * 10 + (-1024).to_bytes(2, "big", signed=True)
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    path = tmp_path / "set.tar"
    path.write_bytes(data)
    with pytest.raises(AlphaflowError, match="not a whole zip or tar archive"):
        open_source(str(path))


def test_listing_a_tar_keeps_no_header(tmp_path, monkeypatch):
    kept = []
    members = archives._members

    def spied(path, opened):
        for member in members(path, opened):
            kept.append(len(opened.members))
            yield member

    monkeypatch.setattr(archives, "_members", spied)
    path = tmp_path / "set.tar"
    path.write_bytes(tar_of([(f"a/{index}.png", PNG) for index in range(50)]))
    assert len(open_source(str(path)).names) == 50
    assert max(kept) == 0


def big_archive(path: Path, form: str, seed: int) -> None:
    """600 pictures: more than are read ahead."""
    rng = np.random.default_rng(seed)
    from awkward_pictures import encoded
    from PIL import Image

    pictures = [encoded(Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)), "PNG") for _ in range(40)]
    members = [(f"a/{index:04d}.png", pictures[index % 40]) for index in range(1200)]
    path.write_bytes(zip_of(members) if form == "zip" else tar_of(members, form == "tar.gz"))


@pytest.mark.parametrize(("kind", "number"), [("tar", errno.EIO), ("zip", errno.EIO), ("tar", errno.ENOTCONN)])
def test_a_disk_that_fails_ends_the_run_and_makes_no_picture_a_bad_one(kind, number, tmp_path, monkeypatch, capfd):
    (tmp_path / "x").write_bytes({"tar": tar_of, "zip": zip_of}[kind]([(f"{n}.png", PNG) for n in range(3)]))

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(archives, {"tar": "_exactly", "zip": "_unpacked"}[kind], fail)
    assert run(["prep-latents", str(tmp_path / "x"), *OPTIONS, "--bad", "skip", "--out", str(tmp_path / "s")]) == 1
    assert "the source cannot be read any more" in capfd.readouterr().err
    assert not list(tmp_path.glob("s/train-*"))


def test_memory_that_is_used_up_ends_the_run_and_makes_no_picture_a_bad_one(tmp_path, monkeypatch, capfd):
    (tmp_path / "x").write_bytes(tar_of([(f"{n}.png", PNG) for n in range(3)]))

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(pictures, "open_picture", fail)
    assert run(["prep-latents", str(tmp_path / "x"), *OPTIONS, "--bad", "skip", "--out", str(tmp_path / "s")]) == 1
    assert "memory is used up" in capfd.readouterr().err
    assert not list(tmp_path.glob("s/train-*"))


@pytest.mark.parametrize("form", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("change", ["truncated", "written over", "replaced"])
@pytest.mark.parametrize("bad", ["stop", "skip"])
def test_an_archive_that_changes_while_it_is_read_is_one_line(tmp_path, form, change, bad, monkeypatch, capfd):
    from alphaflow_cli.latents import encode

    path, other, done = tmp_path / "set.bin", tmp_path / "other", []
    big_archive(path, form, seed=0)
    big_archive(other, form, seed=1)

    def changing(*args, **options):
        if not done:
            done.append(change)
            if change == "truncated":
                os.truncate(path, path.stat().st_size // 2)
            elif change == "written over":
                path.write_bytes(other.read_bytes())
            else:
                other.replace(path)
        return encode_shard(*args, **options)

    encode_shard = encode.encode_shard
    monkeypatch.setattr(encode, "encode_shard", changing)
    line = [
        "prep-latents",
        str(path),
        "--size",
        "8",
        "--autoencoder",
        "none",
        "--bad",
        bad,
        "--out",
        str(tmp_path / "s"),
    ]
    code = run([*line, "--batch", "16"])
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert code == 1
    assert f"{path}: was changed or replaced while it was read" in err


def test_an_encrypted_zip_is_named(tmp_path, capfd):
    data = bytearray(zip_of([("a/1.png", PNG), ("a/2.png", PNG)]))
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = -1
        while (at := data.find(mark, at + 1)) >= 0:
            data[at + place] |= 1
    path = tmp_path / "set.zip"
    path.write_bytes(data)
    assert zipfile.is_zipfile(path)
    assert run(["prep-latents", str(path), *OPTIONS, "--out", str(tmp_path / "s")]) == 1
    err = capfd.readouterr().err
    assert "encrypted" in err
    assert "Traceback" not in err
