"""Pictures and places that are not as they should be: nothing is started, lost or passed over without a word."""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from archive_forms import tar_of, zip_of
from awkward_pictures import BAD, GOOD, encoded, gradient, write_awkward

from alphaflow_cli.cli import run
from alphaflow_cli.data import pictures, sources
from alphaflow_cli.data.manifest import read_manifest
from alphaflow_cli.data.pictures import BadPicture, decode, open_picture
from alphaflow_cli.data.sources import MAX_WAYS, open_folder
from alphaflow_cli.errors import AlphaflowError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
PACKAGE = Path(pictures.__file__).parent.parent
PNG = encoded(gradient(size=(16, 16)), "PNG")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n0 0 40 40 rectfill\nshowpage\n%%EOF\n"
BINARY_EPS = b"\xc5\xd0\xd3\xc6" + (30).to_bytes(4, "little") + len(EPS).to_bytes(4, "little") + bytes(18) + EPS
OTHERS = {  # forms that Pillow knows, and hands to another program, another library or another form
    "eps.jpg": EPS,
    "binary-eps.png": BINARY_EPS,
    "wmf.png": b"\xd7\xcd\xc6\x9a\0\0" + bytes(80),
    "emf.gif": b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(80),
    "pdf.jpg": b"%PDF-1.4\n%%EOF\n",
    "fits.tif": b"SIMPLE  =                    T" + b" " * 3000,
    "icns.png": b"icns\0\0\0\x20ic07\0\0\0\x18" + bytes(16),
    "psd.jpg": b"8BPS\0\1" + bytes(200),
}
PROGRAMS = ("gs", "gswin64c", "convert", "magick", "ffmpeg", "djpeg", "cjpeg", "ppmquant", "xdg-open", "xv", "display")
OPTIONS = ("--size", "16", "--autoencoder", "none")


@pytest.fixture
def traps(tmp_path, monkeypatch):
    """Programs first on the PATH that leave a mark when they are started."""
    folder, mark = tmp_path / "bin", tmp_path / "started"
    folder.mkdir()
    for name in PROGRAMS:
        (folder / name).write_text(f"#!/bin/sh\necho {name} >> {mark}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    subprocess.run(["gs"], check=True)
    assert mark.read_text() == "gs\n"
    mark.unlink()
    return mark


def write_set(root: Path, count: int = 100) -> Path:
    (root / "a").mkdir(parents=True)
    for index in range(count):
        (root / "a" / f"{index:03d}.png").write_bytes(PNG)
    return root


@pytest.mark.parametrize("form", ["folder", "zip", "tar", "tar.gz"])
def test_no_picture_starts_a_program(tmp_path, form, traps, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    members = [(f"a/{name}", data) for name, data in OTHERS.items()]
    members += [(f"a/{index:03d}.png", PNG) for index in range(100)]
    source = tmp_path / "set"
    if form == "folder":
        for name, data in members:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(data)
    else:
        source.write_bytes(zip_of(members) if form == "zip" else tar_of(members, form == "tar.gz"))
    assert run(["prep-latents", str(source), *OPTIONS, "--bad", "skip", "--out", "s"]) == 0
    bad = read_manifest(tmp_path / "s").bad
    assert {entry["name"].removeprefix("a/") for entry in bad} == set(OTHERS)
    measure = ("--metrics", "fd-tiny")
    for verb in (
        ("eval", source, "--reference", "glyphs:100"),
        ("reference", source, "--size", "16", "-o", "r.safetensors"),
    ):
        assert run([*map(str, verb), *measure]) == 1
        assert "not a whole picture" in capfd.readouterr().err
    assert not traps.exists()


def test_without_the_list_of_decoders_the_same_bytes_would_start_one(traps):
    """The traps work: this is what Pillow does with these bytes when nobody chooses for it."""
    from io import BytesIO

    from PIL import EpsImagePlugin, Image

    EpsImagePlugin.gs_binary = None
    with pytest.raises(OSError):  # noqa: PT011 (the fake one writes no picture; Pillow says so in changing words)
        Image.open(BytesIO(EPS)).load()
    assert set(traps.read_text().split()) == {"gs"}
    EpsImagePlugin.gs_binary = None


def test_pictures_are_opened_in_one_place_of_the_package():
    found = [path.name for path in PACKAGE.rglob("*.py") if "Image.open(" in path.read_text("utf-8")]
    assert found == ["pictures.py"]
    assert (PACKAGE / "data/pictures.py").read_text("utf-8").count("Image.open(") == 1


@pytest.mark.parametrize("name", GOOD)
def test_every_form_that_a_suffix_promises_is_still_decoded(name):
    assert decode(GOOD[name], 16, 10**9).shape == (3, 16, 16)


@pytest.mark.parametrize("form", ["JPEG2000", "TGA", "TIFF", "BMP", "DIB", "PPM", "WEBP", "AVIF", "MPO"])
def test_the_rarer_forms_are_decoded_too(form):
    from PIL import features

    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    assert decode(encoded(gradient(size=(32, 32)), form), 16, 10**9).shape == (3, 16, 16)


def test_a_reason_is_the_same_words_each_time(tmp_path):
    """It stands in the manifest, whose digest a run compares."""
    bad = write_awkward(tmp_path / "root")
    stores = [tmp_path / "one", tmp_path / "two"]
    for store in stores:
        hold = [bytearray(random.randrange(10**6)) for _ in range(50)]  # other addresses
        assert run(["prep-latents", str(tmp_path / "root"), *OPTIONS, "--bad", "skip", "--out", str(store)]) == 0
        del hold
    one, two = (read_manifest(store) for store in stores)
    assert len(one.bad) == len(bad)
    assert one.digest == two.digest
    assert not any("0x" in entry["why"] or str(tmp_path) in entry["why"] for entry in one.bad)


def test_no_bytes_at_all_give_a_reason_with_an_address_or_a_path():
    rng, seen = random.Random(0), set()
    for _ in range(1500):
        data = bytearray(rng.choice([*GOOD.values(), *(data for data, _ in BAD.values()), *OTHERS.values()]))[:3000]
        for _ in range(rng.randrange(1, 8)):
            if data:
                data[rng.randrange(min(len(data), rng.choice([40, 3000])))] = rng.randrange(256)
        try:
            decode(bytes(data), 16, 10**6)
        except BadPicture as fault:
            seen.add(str(fault))
    assert len(seen) > 10
    assert not [why for why in seen if "0x" in why or "object at" in why or "/tmp" in why]


# Classes.


def numbered(root: Path, count: int = 12) -> Path:
    for number in range(count):
        (root / str(number)).mkdir(parents=True)
        (root / str(number) / "x.png").write_bytes(encoded(gradient(size=(16 + number, 16)), "PNG"))
    return root


def labels(store: Path) -> dict[str, int]:
    return dict(json.loads((store / "images.json").read_text()))


def test_folders_named_by_numbers_are_classes_in_the_order_of_the_numbers_and_it_is_said(tmp_path, capfd):
    source = numbered(tmp_path / "set")
    assert run(["prep-latents", str(source), *OPTIONS, "--out", str(tmp_path / "s")]) == 0
    assert labels(tmp_path / "s") == {f"{number}/x.png": number for number in range(12)}
    assert "12 classes, sorted as numbers: 0 = 0, 1 = 1, 2 = 2, …, 11 = 11" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("folders", "order"),
    [
        (["n01440764", "n01443537", "n12057211"], ["n01440764", "n01443537", "n12057211"]),
        (["0", "10", "2", "x"], ["0", "10", "2", "x"]),
        (["007", "7", "10", "08"], ["007", "7", "08", "10"]),
        (["1", "10" * 3000, "2"], ["1", "2", "10" * 3000]),
        (["0/a", "10/a", "2/a"], ["0/a", "10/a", "2/a"]),
        (["١", "٢", "10"], ["10", "١", "٢"]),
        (["0", "00"], ["0", "00"]),
    ],
)
def test_only_whole_numbers_are_sorted_as_numbers(folders, order):
    from alphaflow_cli.data.classes import read_classes

    assert read_classes(folders, None, None).folders == order


@pytest.mark.parametrize("finished", [False, True])
def test_a_store_of_former_times_keeps_the_order_that_it_was_begun_with(tmp_path, monkeypatch, finished, capfd):
    source, old = numbered(tmp_path / "set"), tmp_path / "old"
    line = ["prep-latents", str(source), *OPTIONS, "--out", str(old)]
    with monkeypatch.context() as patch:  # as it was before: all folders sorted as words
        patch.setattr("alphaflow_cli.data.classes._are_numbers", lambda folders: False)
        assert run(line) == 0
    before = {file.name: file.read_bytes() for file in old.iterdir()}
    assert labels(old)["10/x.png"] == 2
    if not finished:
        (old / "manifest.json").unlink()
        (old / "train-00000.json").unlink()
    capfd.readouterr()
    assert run(line) == 0
    assert {file.name: file.read_bytes() for file in old.iterdir()} == before
    err = capfd.readouterr().err
    assert finished or "in the order that this store was begun with: sorted as words, not as numbers" in err
    assert run(["prep-latents", "--verify", str(old)]) == 0


def test_a_kill_before_the_plan_is_written_leaves_what_the_same_command_goes_on_with(tmp_path):
    source, store = numbered(tmp_path / "set"), tmp_path / "s"
    assert run(["prep-latents", str(source), *OPTIONS, "--out", str(store)]) == 0
    for file in store.iterdir():
        if file.name not in ("images.json", "classes.json"):
            file.unlink()
    assert run(["prep-latents", str(source), *OPTIONS, "--out", str(store)]) == 0


# Trees.


def refusing(monkeypatch, name, error):
    scandir = os.scandir

    def patched(path):
        if Path(path).name == name:
            raise error(13, os.strerror(13), str(path))
        return scandir(path)

    monkeypatch.setattr(sources.os, "scandir", patched)


def test_an_unreadable_folder_is_named_and_lost_and_found_is_left_aside(tmp_path, monkeypatch, capfd):
    source = write_set(tmp_path / "set", 3)
    (source / "lost+found").mkdir()
    refusing(monkeypatch, "lost+found", PermissionError)
    assert open_folder(source).notes == ["1 other file left aside"]
    refusing(monkeypatch, "a", PermissionError)
    assert run(["prep-latents", str(source), *OPTIONS, "--out", str(tmp_path / "s")]) == 1
    assert f"{source}/a: cannot be listed (Permission denied). Make it readable" in capfd.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.fixture
def open_to_all():
    """A folder that everybody may enter: pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root, to become somebody else")
def test_somebody_who_may_not_read_a_folder_or_write_the_destination_gets_one_line(open_to_all):
    source = write_set(open_to_all / "set", 3)
    (source / "closed").mkdir(mode=0)
    free = open_to_all / "free"
    free.mkdir()
    free.chmod(0o777)
    cases = {
        "closed: cannot be listed (Permission denied)": [source, "--out", free / "s"],
        "/s: cannot be written (": [source / "a", "--out", open_to_all / "s"],
        "deep/s: cannot be written (": [source / "a", "--out", source / "closed/deep/s"],
        "closed/x: cannot be opened (Permission denied)": [source / "closed/x", "--out", free / "s"],
    }
    lines = [["prep-latents", *map(str, line), *OPTIONS] for line in cases.values()]
    warm = [
        "prep-latents",
        str(source / "a"),
        "--out",
        str(open_to_all / "warm"),
        *OPTIONS,
    ]  # imports all that it takes
    script = (
        f"import os, sys; from alphaflow_cli.cli import run; assert run({warm!r}) == 0; "
        f"os.setgid(65534); os.setuid(65534); sys.exit([run(line) for line in {lines!r}] != [1] * {len(lines)})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for line, words in zip(errors, cases, strict=True):
        assert words in line


def test_a_path_that_is_too_long_is_one_line(tmp_path, capfd, monkeypatch):
    source = write_set(tmp_path / "set", 2)
    monkeypatch.chdir(source)
    for _ in range(25):
        Path("d" * 200).mkdir()
        os.chdir("d" * 200)
    Path("x.png").write_bytes(PNG)
    monkeypatch.chdir(tmp_path)
    assert run(["prep-latents", str(source), *OPTIONS, "--out", "s"]) == 1
    shutil.rmtree(source)  # tests that look through all of pytest's folder stumble over such a path
    err = capfd.readouterr().err
    assert "cannot be listed (File name too long)" in err
    assert len(err) < 800
    for text in ("x" * 300, "x" * 5000, "d/" * 3000):
        assert run(["prep-latents", text, *OPTIONS]) == 1
        err = capfd.readouterr().err
        assert len(err) < 800
        assert "Traceback" not in err


def test_a_web_of_links_is_refused_at_once_and_links_side_by_side_are_followed(tmp_path):
    web = tmp_path / "web"
    for one in range(8):
        (web / str(one)).mkdir(parents=True)
        for other in range(8):
            (web / str(one) / f"to-{other}").symlink_to(f"../{other}")
    with pytest.raises(AlphaflowError, match=r"in more than 1,000 ways\. Remove such links"):
        open_folder(web)
    side = tmp_path / "side"
    shared = tmp_path / "shared"
    write_set(shared, 1)
    side.mkdir()
    for index in range(MAX_WAYS + 5):
        (side / str(index)).symlink_to(shared)
    assert len(open_folder(side).names) == MAX_WAYS + 5
    (tmp_path / "linked").symlink_to(side)
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes" / "cat").symlink_to(shared / "a")
    assert open_folder(tmp_path / "classes").names == ["cat/000.png"]


# Destinations.


def blocked(tmp_path: Path, kind: str) -> Path:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    return {
        "a file": tmp_path / "file",
        "under a file": tmp_path / "file" / "s",
        "a loop of links": tmp_path / "loop" / "s",
        "a name too long": tmp_path / ("x" * 300),
        "a path too long": tmp_path.joinpath(*["y" * 200] * 30),
        "no device": Path("/dev/null/s"),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["a file", "under a file", "a loop of links", "a name too long", "a path too long", "no device"],
)
def test_a_destination_that_cannot_be_written_is_one_line(tmp_path, kind, capfd):
    out = blocked(tmp_path, kind)
    assert run(["prep-latents", "glyphs:20", "--out", str(out)]) == (2 if kind == "a file" else 1)  # click's own check
    err = capfd.readouterr().err
    assert kind == "a file" or "cannot be written (" in err
    assert len(err) < 1000
    assert "Traceback" not in err


def test_a_destination_that_goes_away_is_one_line(tmp_path, monkeypatch, capfd):
    import shutil

    from alphaflow_cli.latents import encode

    def gone(*args, **options):
        shutil.rmtree(tmp_path / "s")
        return encode_shard(*args, **options)

    encode_shard = encode.encode_shard
    monkeypatch.setattr(encode, "encode_shard", gone)
    assert run(["prep-latents", "glyphs:20", "--out", str(tmp_path / "s")]) == 1
    assert "s: cannot be written (No such file or directory)" in capfd.readouterr().err


# Options and files of arrays.


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "0", "-1", "1e400", "x"])
def test_megapixels_that_are_no_number_are_a_usage_error(value, capfd):
    assert run(["prep-latents", "glyphs:4", "--max-megapixels", value]) == 2
    assert "--max-megapixels" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["glyphs:" + "9" * 5000, "glyphs:١", "glyphs:", "glyphs:-1", "glyphs:1e3"])
def test_a_count_of_glyphs_that_is_none_is_one_line(text, capfd):
    assert run(["prep-latents", text]) == 1
    err = capfd.readouterr().err
    assert "glyphs:N" in err
    assert len(err) < 500


def npz_files() -> dict[str, bytes]:
    from io import BytesIO

    out, plain, giant = BytesIO(), BytesIO(), BytesIO()
    np.savez(out, mu=np.zeros(192), sigma=np.eye(192))
    np.save(plain, np.zeros(3))
    with zipfile.ZipFile(giant, "w") as archive:
        header = str({"descr": "|u1", "fortran_order": False, "shape": (10**9, 10**6, 256, 3)}).encode()
        member = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header
        for name in ("arr_0", "mu", "sigma"):
            archive.writestr(f"{name}.npy", member)
    whole = out.getvalue()
    return {
        "empty": b"",
        "cut": whole[:-100],
        "half": whole[:1000],
        "text": b"hello",
        "one array": plain.getvalue(),
        "no array": zip_of([("x.txt", b"x")]),
        "a giant": giant.getvalue(),
        "a damaged member": whole[:200] + bytes(60) + whole[260:],
        "a pickle": b"\x80\x04]\x94.",
    }


@pytest.mark.parametrize("kind", npz_files())
def test_an_npz_that_is_none_is_one_line_as_pictures_and_as_reference(tmp_path, kind, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("x.npz").write_bytes(npz_files()[kind])
    for line in ("eval x.npz --metrics fd-tiny --reference glyphs:100", "reference x.npz -o r.safetensors"):
        assert run(line.split()) == 1
        err = capfd.readouterr().err
        assert "x.npz: no array arr_0 of pictures in it" in err
        assert "Traceback" not in err
    assert run(["eval", "glyphs:100", "--metrics", "fd-tiny", "--reference", "x.npz"]) == 1
    err = capfd.readouterr().err
    assert "x.npz: " in err
    assert "Traceback" not in err


def test_the_decoders_are_those_that_this_pillow_has(tmp_path):
    (tmp_path / "x.png").write_bytes(PNG)
    with open_picture(tmp_path / "x.png") as image:
        assert image.format == "PNG"
