"""Measure how fast pictures are read from each form of a data set, beside the libraries that others read it with.

    python benchmarks/bench_sources.py --pictures cifar10/train --folder /fast/disk
    python benchmarks/bench_sources.py --pictures cifar10/train --images 5000 --rounds 5

--pictures is a folder of class folders. Its pictures, spread over all classes, are written once in every form: folder,
table, zip, ten zips, ten tars of WebDataset, and parquet with 100 rows in a row group, as the Hub's library writes it.
A pass lists the set, finds the labels, and reads and decodes every picture to RGB, in one thread, from a warm cache.
Beside ours, where they are installed: `datasets` streaming the same parquet files and the same folder, and
`webdataset` reading the same tars.
Every pass must see the same pixels and labels: sums of both are compared. Each round runs every variant, in rotated
order; round 0 is dropped. Reported are the median, the smallest and the largest number of pictures per second of wall
time, which needs a quiet machine (the load is reported), and per second of CPU time of all threads, which hardly does;
and the ratio of the latter to the folder's within the round.
"""

import argparse
import io
import json
import os
import statistics
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from record import record

from alphaflow_cli.data.labels import label_pictures
from alphaflow_cli.data.pictures import MAX_PIXELS, decode_whole
from alphaflow_cli.data.sources import open_source
from alphaflow_cli.data.tables import AS_FOUND

PARTS, GROUP = 10, 100
Row = tuple[str, bytes]  # class, file
Sums = tuple[int, int, int]  # of pictures, labels times their place, pixels


@dataclass(frozen=True)
class Speed:
    """How fast one variant was in one round."""

    wall: float  # pictures per second
    cpu: float  # pictures per second of CPU time


Written = Callable[[Path, list[Row]], object]


def read_rows(root: Path, images: int) -> list[Row]:
    """Take pictures evenly from all classes, sorted as a folder is."""
    paths = sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
    step = max(1, len(paths) // images)
    return [(path.parent.name, path.read_bytes()) for path in paths[::step][:images]]


def write_folder(root: Path, rows: list[Row]) -> None:
    """Write one folder for each class."""
    for index, (label, data) in enumerate(rows):
        path = root / label / f"{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_table(root: Path, rows: list[Row]) -> None:
    """Write all pictures into one folder, with a metadata.csv."""
    root.mkdir()
    for index, (_, data) in enumerate(rows):
        (root / f"{index:06d}.jpg").write_bytes(data)
    lines = "".join(f"{index:06d}.jpg,{label}\n" for index, (label, _) in enumerate(rows))
    (root / "metadata.csv").write_text(f"file_name,label\n{lines}")


def write_zips(root: Path, rows: list[Row], parts: int = PARTS) -> None:
    """Write zips of class folders."""
    root.mkdir()
    for part, span in enumerate(np.array_split(np.arange(len(rows)), parts)):
        with zipfile.ZipFile(root / f"part-{part:03d}.zip", "w") as archive:
            for index in span:
                archive.writestr(f"{rows[index][0]}/{index:06d}.jpg", rows[index][1])


def write_tars(root: Path, rows: list[Row]) -> None:
    """Write tars of key.jpg and key.cls, whose classes are whole numbers, as webdataset's own decoder reads them."""
    root.mkdir()
    names = sorted({label for label, _ in rows})
    for part, span in enumerate(np.array_split(np.arange(len(rows)), PARTS)):
        with tarfile.open(root / f"part-{part:06d}.tar", "w") as archive:
            for index in span:
                label, data = rows[index]
                for suffix, content in (("jpg", data), ("cls", str(names.index(label)).encode())):
                    member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def write_parquet(root: Path, rows: list[Row]) -> None:
    """Write parquet files as the Hub's library does: a struct of bytes and path, a ClassLabel."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir()
    names = sorted({label for label, _ in rows})
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    for part, span in enumerate(np.array_split(np.arange(len(rows)), PARTS)):
        cells = [{"bytes": rows[index][1], "path": f"{index:06d}.jpg"} for index in span]
        table = pa.table({"image": cells, "label": [names.index(rows[index][0]) for index in span]}, schema=schema)
        pq.write_table(table, root / f"train-{part:05d}-of-{PARTS:05d}.parquet", row_group_size=GROUP)


FORMS: dict[str, Written] = {
    "folder": write_folder,
    "table": write_table,
    "zip": lambda root, rows: write_zips(root, rows, 1),
    "ten zips": write_zips,
    "ten tars": write_tars,
    "parquet": write_parquet,
}


def ours(path: Path) -> Sums:
    """Read a source as prep-latents does, in one thread."""
    source = open_source(str(path))
    labelled = label_pictures(source, AS_FOUND)
    pixels = labels = 0
    with source.reading(labelled.lines) as fetches:
        for place, (label, (_, fetch)) in enumerate(zip(labelled.labels, fetches, strict=True)):
            pixels += int(decode_whole(fetch(), MAX_PIXELS).sum(dtype=np.int64))
            labels += label * (place + 1)
    return len(labelled.lines), labels, pixels


def by_datasets(kind: str, files: dict[str, object]) -> Sums:
    """Stream the same files with the Hub's own library."""
    import datasets

    stream = datasets.load_dataset(kind, split="train", streaming=True, **files)
    count = pixels = labels = 0
    for row in stream:
        count += 1
        labels += row["label"] * count
        pixels += int(np.asarray(row["image"].convert("RGB")).sum(dtype=np.int64))
    return count, labels, pixels


def by_webdataset(path: Path) -> Sums:
    """Read the same tars with webdataset, decoded by its own rule for pictures."""
    import webdataset

    urls = sorted(map(str, path.glob("*.tar")))
    stream = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pilrgb").to_tuple("jpg", "cls")
    count = pixels = labels = 0
    for image, label in stream:
        count += 1
        labels += label * count
        pixels += int(np.asarray(image).sum(dtype=np.int64))
    return count, labels, pixels


def variants(root: Path) -> dict[str, Callable[[], Sums]]:
    """Every form read by us, and by the library that is at home in it."""
    found: dict[str, Callable[[], Sums]] = {form: lambda form=form: ours(root / form) for form in FORMS}  # type: ignore[misc]
    parquet = sorted(map(str, (root / "parquet").glob("*.parquet")))
    folder = str(root / "folder")
    if find_spec("datasets"):
        found["parquet, datasets streaming"] = lambda: by_datasets("parquet", {"data_files": {"train": parquet}})
        found["folder, datasets streaming"] = lambda: by_datasets("imagefolder", {"data_dir": folder})
    if find_spec("webdataset"):
        found["ten tars, webdataset"] = lambda: by_webdataset(root / "ten tars")
    return found


def measure(root: Path, rounds: int) -> list[dict[str, Speed]]:
    """Time each variant, round by round; each must have seen the same pictures and labels."""
    passes, table, seen = list(variants(root).items()), [], set[Sums]()
    for turn in range(rounds + 1):
        at, line = turn % len(passes), {}
        for name, work in [*passes[at:], *passes[:at]]:
            start, cpu = time.perf_counter(), time.process_time()
            sums = work()
            line[name] = Speed(sums[0] / (time.perf_counter() - start), sums[0] / (time.process_time() - cpu))
            seen.add(sums)
        table.append(line)
    if len(seen) > 1:
        raise SystemExit(f"the forms do not hold the same pictures and labels: {sorted(seen)}")
    return table[1:]


def spread(values: list[float]) -> dict[str, float]:
    """Give the median, the smallest and the largest value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="a folder of class folders")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--folder", type=Path, default=Path("bench-sources"))
    parser.add_argument("--rounds", type=int, default=3, help="kept rounds")
    options = parser.parse_args(words)
    rows = read_rows(options.pictures, options.images)
    Image.init()
    root = options.folder / f"{len(rows)}-pictures"
    root.mkdir(parents=True, exist_ok=True)
    for form, write in FORMS.items():
        if not (root / form).exists():
            write(root / form, rows)
    before = os.getloadavg()[0]
    table = measure(root, options.rounds)
    names = list(table[0])
    record(
        "sources",
        "cpu",
        pictures=len(rows),
        bytes=sum(len(data) for _, data in rows),
        rounds=options.rounds,
        load={"before": before, "after": os.getloadavg()[0]},
        pictures_per_second={name: spread([line[name].wall for line in table]) for name in names},
        pictures_per_cpu_second={name: spread([line[name].cpu for line in table]) for name in names},
        of_the_folders={name: spread([line[name].cpu / line["folder"].cpu for line in table]) for name in names},
    )


if __name__ == "__main__":
    main()
