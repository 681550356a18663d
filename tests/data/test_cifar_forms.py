"""CIFAR-10 in every form gives one store: pictures of cameras, as JPEG, through a small autoencoder.

    ALPHAFLOW_CIFAR_IMAGES=50000 pytest -n0 -m slow tests/data/test_cifar_forms.py

ALPHAFLOW_CIFAR_IMAGES says how many of the training pictures are taken; without it 2,000, spread over all classes.
"""

import os
import tarfile

import pytest
from packed_forms import parquet_files, table_of, webdataset, write_files, write_folder, zips
from ruler import CIFAR
from tiny_autoencoders import tiny_kl

from alphaflow_cli.cli import run

IMAGES = int(os.environ.get("ALPHAFLOW_CIFAR_IMAGES", "2000"))


def training_pictures() -> list[tuple[str, bytes]]:
    """The class and the bytes of each, sorted by name."""
    with tarfile.open(CIFAR) as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}
    return [(name.split("/")[1], members[name]) for name in sorted(members) if name.startswith("train/")]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not CIFAR.is_file(), reason="the CIFAR-10 copy is not here")
def test_cifar_as_folder_zip_ten_tars_parquet_and_table_is_one_store(tmp_path):
    rows = training_pictures()
    rows = rows[:: len(rows) // IMAGES][:IMAGES]
    assert len(rows) == IMAGES
    names = sorted({label for label, _ in rows})
    tiny_kl(tmp_path / "tiny-kl")
    forms = {
        "zip": zips(rows, 1),
        "tars": webdataset(rows, 10),
        "parquet": parquet_files(rows, 5, names=names, group=100),
        "table": table_of(rows),
    }
    write_folder(tmp_path / "folder", rows)
    for form, files in forms.items():
        write_files(tmp_path / form, files)
    stores = {}
    for form in ("folder", *forms):
        out = tmp_path / f"{form}-store"
        line = ["prep-latents", str(tmp_path / form), "--size", "32", "--autoencoder", str(tmp_path / "tiny-kl")]
        assert run([*line, "--out", str(out)]) == 0
        kept = [*sorted(out.glob("train-*.safetensors")), out / "stats.safetensors", out / "classes.json"]
        stores[form] = {path.name: path.read_bytes() for path in kept}
    assert len(stores["folder"]) > 3
    assert [form for form in forms if stores[form] != stores["folder"]] == []
