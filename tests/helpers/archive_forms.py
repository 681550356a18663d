"""One tree of pictures, and every form of archive in which a user may have it."""

import io
import lzma
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

FORMS = ("folder", "zip", "tar", "tar -S", "tar with hard links", "tar.gz", "tar.xz")
SUFFIXES = {"zip": ".zip", "tar.gz": ".tar.gz", "tar.xz": ".tar.xz"}
SIDE = 16


def write_tree(root: Path, count: int, seed: int = 0) -> Path:
    """Pictures of four classes, one of them nested; every 7th ends in a hole, every 11th is a hard link to the one
    before, every 13th a symbolic one."""
    rng = np.random.default_rng(seed)
    before = None
    for index in range(count):
        path = root / ("ant", "bee", "cow/brown", "cow/white")[index % 4] / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if before and index % 11 == 0:
            os.link(before, path)
        elif before and index % 13 == 0:
            path.symlink_to(os.path.relpath(before, path.parent))
        else:
            Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
            if index % 7 == 0:
                os.truncate(path, 40_000)  # nothing but a hole: decoders stop before it
            before = path
    return root


def write_form(form: str, tree: Path, folder: Path) -> Path:
    """The tree in this form; the members are sorted, as the pictures of a folder are."""
    if form == "folder":
        return tree
    path = folder / f"{form.replace(' ', '-')}{SUFFIXES.get(form, '.tar')}"
    names = sorted(file.relative_to(tree).as_posix() for file in tree.rglob("*") if not file.is_dir())
    if form == "zip":
        return write_zip(path, tree, names)
    options = {"tar -S": ["-S", "--hole-detection=raw"], "tar": ["--hard-dereference"]}
    listed = "\n".join(names).encode()
    archive = path.with_name(path.name.removesuffix(".gz").removesuffix(".xz"))
    subprocess.run(["tar", *options.get(form, []), "-C", tree, "-cf", archive, "-T", "-"], input=listed, check=True)
    if form == "tar.gz":
        subprocess.run(["gzip", archive], check=True)
    if form == "tar.xz":
        path.write_bytes(lzma.compress(archive.read_bytes()))
        archive.unlink()
    return path


def write_zip(path: Path, tree: Path, names: list[str]) -> Path:
    """Stored and deflated in turn; symbolic links as `zip -y` writes them."""
    with zipfile.ZipFile(path, "w") as archive:
        for index, name in enumerate(names):
            file = tree / name
            member = zipfile.ZipInfo(name)
            member.compress_type = zipfile.ZIP_DEFLATED if index % 2 else zipfile.ZIP_STORED
            member.create_system = 3
            member.external_attr = (0o120777 if file.is_symlink() else 0o100644) << 16
            archive.writestr(member, str(file.readlink()) if file.is_symlink() else file.read_bytes())
    return path


def tar_of(members: list[tuple[str, bytes | str]], compressed: bool = False) -> bytes:
    """Files by their bytes; a text is the target of a symbolic link, or of a hard one where it begins with `=`."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz" if compressed else "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                member.type = tarfile.LNKTYPE if content.startswith("=") else tarfile.SYMTYPE
                member.linkname = content.removeprefix("=")
                archive.addfile(member)
    return out.getvalue()


def zip_of(members: list[tuple[str, bytes | str]]) -> bytes:
    """The same, as far as a zip has links."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members:
            member = zipfile.ZipInfo(name)
            member.create_system = 3
            member.external_attr = (0o100644 if isinstance(content, bytes) else 0o120777) << 16
            archive.writestr(member, content)
    return out.getvalue()
