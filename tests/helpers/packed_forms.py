"""Pictures with their classes, as people pack them: parquet files as the Hub's library writes them, shards, tables."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from archive_forms import zip_of
from awkward_pictures import encoded
from PIL import Image

CLASSES = ["ant", "bee", "cow", "dog"]
Pictures = list[tuple[str, bytes]]  # class, bytes


def pictures(count: int, *, side: int = 8, seed: int = 0) -> Pictures:
    """Random PNGs, sorted by class, as a folder of class folders lists them."""
    rng = np.random.default_rng(seed)
    drawn = [
        encoded(Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)), "PNG") for _ in range(count)
    ]
    return [(CLASSES[index * len(CLASSES) // count], data) for index, data in enumerate(drawn)]


def write_folder(root: Path, rows: Pictures) -> Path:
    """One folder for each class; names in the order of the rows."""
    for index, (label, data) in enumerate(rows):
        path = root / label / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def hub_schema(names=CLASSES, image="image", label="label") -> pa.Schema:
    """The schema that the Hub's library writes for an Image and a ClassLabel."""
    features = {image: {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
    fields = [(image, pa.struct([("bytes", pa.binary()), ("path", pa.string())])), (label, pa.int64())]
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def parquet_of(rows: Pictures, *, names=CLASSES, group=10, image="image", label="label") -> bytes:
    """A parquet file's bytes, with so many rows in each row group."""
    cells = [{"bytes": data, "path": f"{index}.png"} for index, (_, data) in enumerate(rows)]
    schema = hub_schema(names, image, label)
    table = pa.table({image: cells, label: [list(names).index(key) for key, _ in rows]}, schema=schema)
    return bytes_of(table, group)


def bytes_of(table: pa.Table, group: int = 10, **options) -> bytes:
    """Any table as parquet."""
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=group, **options)
    return out.getvalue()


def parquet_files(rows: Pictures, files: int, **options) -> dict[str, bytes]:
    """The rows cut into files, which are named as the Hub's library does."""
    cuts = np.linspace(0, len(rows), files + 1).astype(int)
    return {
        f"data/train-{index:05d}-of-{files:05d}.parquet": parquet_of(rows[cuts[index] : cuts[index + 1]], **options)
        for index in range(files)
    }


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    """Files by their names below a folder."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def webdataset(rows: Pictures, shards: int, *, note: str = "cls") -> dict[str, bytes]:
    """Tars of key.png and key.cls (or key.json), named part-0.tar …; keys are counted over all of them."""
    cuts = np.linspace(0, len(rows), shards + 1).astype(int)
    files = {}
    for shard in range(shards):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            for index in range(cuts[shard], cuts[shard + 1]):
                label, data = rows[index]
                text = label if note == "cls" else json.dumps({"label": label, "width": 8})
                for suffix, content in (("png", data), (note, text.encode())):
                    member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        files[f"part-{shard}.tar"] = out.getvalue()
    return files


def zips(rows: Pictures, parts: int) -> dict[str, bytes]:
    """Zips of class folders, each with a part of the rows."""
    cuts = np.linspace(0, len(rows), parts + 1).astype(int)
    members = [(f"{label}/{index:05d}.png", data) for index, (label, data) in enumerate(rows)]
    return {f"part-{part}.zip": zip_of(members[cuts[part] : cuts[part + 1]]) for part in range(parts)}


def table_of(rows: Pictures) -> dict[str, bytes]:
    """Flat files with a metadata.csv."""
    files = {f"{index:05d}.png": data for index, (_, data) in enumerate(rows)}
    lines = "".join(f"{index:05d}.png,{label}\n" for index, (label, _) in enumerate(rows))
    return {**files, "metadata.csv": f"file_name,label\n{lines}".encode()}
