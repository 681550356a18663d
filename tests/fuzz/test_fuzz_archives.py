"""Archives with damaged bytes, links, holes and odd names: no picture is lost or changed without a word."""

import io
import json
import lzma
import os
import posixpath
import stat
import tarfile
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from fuzzing import TEXTS, Trial, fuzz, mutate_bytes
from PIL import Image
from safetensors.numpy import load_file

from alphaflow_cli.cli import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600, method="thread")]

KINDS = ("zip", "tar", "tar.gz", "tar.xz")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
HOLES = [(0, 512), (2560, 525)]  # what a sparse picture stores of its 3,085 bytes; the rest is zero


def picture(number):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (20 * number, 255 - 20 * number, 7 * number)).save(out, "PNG")
    return out.getvalue()


def sparse_picture():
    rows = np.zeros((32, 32, 3), np.uint8)
    data = bytearray(b"P6\n32 32\n255\n" + rows.tobytes())
    for start, length in HOLES:
        first = max(start, 13)
        data[first : start + length] = bytes(i % 251 + 1 for i in range(first, start + length))
    return bytes(data)


PICTURES = {f"{'ab'[i % 2]}/{i}.png": picture(i) for i in range(6)}
SPARSE = sparse_picture()
# name → bytes | ("hard" | "link", target) | ("holes", "old" | "pax") | ("kind", type of a tar member); given in order
SPECIAL = {
    "plain": [],
    "hard link": [("b/hard.png", ("hard", "a/0.png"))],
    "symbolic link": [("b/soft.png", ("link", "../a/0.png"))],
    "holes": [("a/holes.ppm", ("holes", "old"))],
    "holes by pax": [("a/holes.ppm", ("holes", "pax"))],
    "name twice": [("a/0.png", picture(9))],
    "name twice, then linked": [("b/hard.png", ("hard", "a/0.png")), ("a/0.png", picture(9))],
    "a program's file": [("a/eps.jpg", EPS)],
    "link to nowhere": [("b/soft.png", ("link", "../gone.png"))],
    "hard link to nowhere": [("b/hard.png", ("hard", "gone.png"))],
    "link to itself": [("b/soft.png", ("link", "soft.png"))],
    "link out": [("b/soft.png", ("link", "../../../../etc/passwd"))],
    "device": [("a/dev.png", ("kind", tarfile.CHRTYPE))],
    "pipe": [("a/pipe.png", ("kind", tarfile.FIFOTYPE))],
    "folder": [("a/folder.png", ("kind", tarfile.DIRTYPE))],
    "unknown": [("a/what.png", ("kind", b"Q"))],
    "empty": [("a/empty.png", b"")],
    "classes": [("classes.json", b'{"a": 0, "b": 0}')],
    "deep classes": [("classes.json", b"[" * 100_000)],
    "large numbers": [("classes.json", b'{"a": ' + b"9" * 5000 + b"}")],
    "binary classes": [("classes.json", b"\xff\xfe\0")],
}
GOOD = 4 * list(SPECIAL).index(
    "link to nowhere"
)  # the first examples must be taken: all their pictures, or all but the bad one
SPECIAL |= {f"named {name[:20]!r}": [(f"a/{name}.png", PICTURES["a/0.png"])] for name in TEXTS if len(name) < 5000}
SPECIAL |= {
    f"at {name!r}": [(name, PICTURES["a/0.png"])]
    for name in ("/a/0.png", "../0.png", "a\\0.png", "a//0.png", "./a/0.png", ".png")
}


def build(kind, members):
    """The archive's bytes, and where each member lies in a plain tar."""
    out, places = io.BytesIO(), {}
    if kind == "zip":
        with warnings.catch_warnings(), zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            warnings.simplefilter("ignore")  # a name twice
            for name, content in members:
                if isinstance(content, bytes):
                    archive.writestr(name, content)
        return out.getvalue(), places
    for name, content in members:
        start = out.tell()
        out.write(tar_member(name, content))
        places[name] = (start, out.tell())
    out.write(b"\0" * 1024)
    pack = {"tar": bytes, "tar.gz": gzipped, "tar.xz": lzma.compress}[kind]
    return pack(out.getvalue()), places


def named(kind, name):
    """As its format can hold it: no zero byte, no lone surrogate in a zip, bytes that are no UTF-8 in a tar."""
    raw = name.replace("\0", "").encode("utf-8", "surrogatepass")
    return raw.decode("utf-8", "replace" if kind == "zip" else "surrogateescape")


def gzipped(data):
    packer = zlib.compressobj(wbits=31)
    return packer.compress(data) + packer.flush()


def tar_member(name, content):
    """Header and padded data; holes as GNU tar writes them, in both of its ways."""
    info, data = tarfile.TarInfo(name), content if isinstance(content, bytes) else b""
    kind, what = ("", None) if isinstance(content, bytes) else content
    if kind in ("hard", "link"):
        info.type, info.linkname = (tarfile.LNKTYPE if kind == "hard" else tarfile.SYMTYPE), what
    elif kind == "kind":
        info.type = what
    elif kind == "holes":
        data = b"".join(SPARSE[start : start + length] for start, length in HOLES)
        if what == "pax":
            data = "\n".join(["2", *(str(n) for pair in HOLES for n in pair), ""]).encode().ljust(512, b"\0") + data
            info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name}
            info.pax_headers["GNU.sparse.realsize"] = str(len(SPARSE))
    info.size = len(data)
    header = info.tobuf(tarfile.PAX_FORMAT if what == "pax" else tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    if what == "old":
        header = with_map(bytearray(header))
    return header + data + b"\0" * (-len(data) % 512)


def with_map(header):
    """The old GNU form: the map of the holes and the real size stand in the header."""
    header[156:157] = b"S"
    for i, number in enumerate(number for pair in HOLES for number in pair):
        header[386 + 12 * i : 398 + 12 * i] = b"%011o\0" % number
    header[483:495] = b"%011o\0" % len(SPARSE)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def rows_of(store):
    """name → pixels, and the names of bad pictures."""
    names = [name for name, _ in json.loads((store / "images.json").read_text())]
    manifest = json.loads((store / "manifest.json").read_text())
    rows = {}
    for shard in manifest["shards"]:
        tensors = load_file(store / shard["file"])
        rows |= {names[i]: row for i, row in zip(tensors["index"], tensors["pixels"], strict=True)}
    return rows, manifest


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """What every picture is, prepared from a folder; by its bytes."""
    folder = tmp_path_factory.mktemp("pixels")
    contents = [*PICTURES.values(), picture(9), SPARSE]
    for i, content in enumerate(contents):
        (folder / "in").mkdir(exist_ok=True)
        (folder / "in" / f"{i:02}.{'ppm' if content == SPARSE else 'png'}").write_bytes(content)
    assert (
        run(["prep-latents", str(folder / "in"), "--size", "8", "--autoencoder", "none", "--out", str(folder / "out")])
        == 0
    )
    rows = rows_of(folder / "out")[0]
    return {content: rows[name] for content, name in zip(contents, sorted(rows), strict=True)}


def wanted(kind, members, damaged=()):
    """name → bytes of every picture that the archive holds whole: a name that stands twice is its last copy."""
    found = {}
    for name, content in members:
        if (
            name in damaged
            or not name.endswith(("png", "ppm"))
            or name.rpartition("/")[2].startswith(".")
            or not content
        ):
            continue
        if isinstance(content, bytes):
            found[name] = content
        elif kind != "zip" and content[0] == "hard" and content[1] in found:
            found[name] = found[content[1]]
        elif kind != "zip" and content[0] == "holes":
            found[name] = SPARSE
    return {unpacked(name): content for name, content in found.items() if name not in damaged and ".." not in name}


def unpacked(name):
    """Where it would lie after unpacking."""
    return posixpath.normpath(name).lstrip("/")


def test_archives(tmp_path, pixels, monkeypatch):
    starter = tmp_path / "bin"
    starter.mkdir()
    for name in ("gs", "convert", "ffmpeg"):
        (starter / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        (starter / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{starter}{os.pathsep}{os.environ['PATH']}")
    examples = [(kind, special) for special in SPECIAL for kind in KINDS]

    def make(rng, number):
        kind, special = examples[number % len(examples)]
        members = [*PICTURES.items(), *((named(kind, name), content) for name, content in SPECIAL[special])]
        flip = None
        if number >= len(examples):
            rng.shuffle(members)
            members = members[: rng.choice((1, 3, 99))]
            data, places = build(kind, members)
            if rng.random() < 0.5:  # one byte: what it does not touch must arrive
                flip = rng.randrange(len(data))
                data = data[:flip] + bytes([data[flip] ^ 1 << rng.randrange(8)]) + data[flip + 1 :]
            else:
                data = mutate_bytes(rng, data)
        else:
            data, places = build(kind, members)
        path, out = tmp_path / f"pictures.{kind}", tmp_path / f"out-{number}"
        path.write_bytes(data)
        damaged = [name for name, (start, end) in places.items() if flip is not None and start <= flip < end]
        known = number < len(examples) or (flip is not None and kind == "tar")
        whole = wanted(kind, members, damaged) if known else {}
        argv = ["prep-latents", str(path), "--size", "8", "--autoencoder", "none", "--bad", "skip", "--out", str(out)]

        def check(outcome):
            if (tmp_path / "started").exists():
                (tmp_path / "started").unlink()
                return "a program was started for a picture"
            if outcome.code:
                return f"{outcome.err}\na good archive refused: {kind}, {special}" if number < GOOD else ""
            return lost(out, whole, kind, special, outcome.err)

        return Trial(argv, f"{kind}, {special}, byte {flip}", check=check)

    def lost(out, whole, kind, special, err):
        rows, manifest = rows_of(out)
        if "0x" in json.dumps(manifest.get("bad", manifest)):
            return "an address of memory stands in the manifest"
        if (
            kind != "zip"
            and special == "symbolic link"
            and len(whole) > 5
            and "b/soft.png" not in rows
            and "link" not in err
        ):
            return "a symbolic link vanished without a note"
        rows = {unpacked(name): row for name, row in rows.items()}
        for name, content in whole.items():
            if name not in rows:
                return f"{name}\na picture is lost, {special}"
            if content in pixels and not np.array_equal(rows[name], pixels[content]):
                return f"{name}\na picture is another, {special}"
        return ""

    fuzz("archives", make, 2_500)
