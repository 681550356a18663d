"""A static page that runs the model in a browser: a class, a seed and 1 or 2 steps, and the picture of `sample`.

The graphs of one and of two steps share one file of weights. ONNX Runtime for the web lies beside them, in `ort/`: one
version, known by its checksum, fetched from the npm registry when the page is exported. So the page needs no network:
`python -m http.server` in the folder is enough. `page/noise.js` draws the noise of a seed as torch does.
"""

import io
import json
import math
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alphaflow_cli import __version__
from alphaflow_cli.documents import Anything, Table, Text, read_json
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.export.graph import Difference, Exported, open_exported, reference_pictures
from alphaflow_cli.export.onnx import build_model, check_onnx, pack, write_graph
from alphaflow_cli.files import make_folder, write_whole
from alphaflow_cli.model.find import model_name
from alphaflow_cli.recipe.plan import label_rows, parameter_count
from alphaflow_cli.remote.registry import NpmPackage, fetch_package
from alphaflow_cli.sample.walk import plan_walk

RUNTIME = NpmPackage(
    name="onnxruntime-web",
    version="1.30.0",
    sha512="q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
)
RUNTIME_FILES = {  # in the archive → its name in ort/
    "package/dist/ort.wasm.min.mjs": "ort.wasm.min.mjs",
    "package/dist/ort-wasm-simd-threaded.mjs": "ort-wasm-simd-threaded.mjs",
    "package/dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
    "package/package.json": "package.json",  # its version and licence (MIT)
}
STEPS = (1, 2)
PAGE = Path(__file__).parent / "page"
FACTS, WEIGHTS = "model.json", "weights.bin"
OUR_FACTS = Table({"made_by": Text(100, form="alphaflow .+")}, others=Anything())
LEAST_NOISE = 16  # values; fewer, torch draws in another way than page/noise.js


def check_page_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than an earlier page."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        read_json(folder / FACTS, OUR_FACTS, limit=1 << 24)
    except AlphaflowError as fault:
        raise AlphaflowError(
            f"{folder}: holds other files; nothing was overwritten. Give a new or an empty folder."
        ) from fault


def export_web(
    address: str,
    folder: Path,
    *,
    half: bool,
    runtime: Path | None = None,
    weights: str = "ema",
    autoencoder: str = "",
) -> list[Difference]:
    """Write the page; each graph is run and compared with the checkpoint. Returns how far each of them is."""
    check_onnx()
    check_page_folder(folder)
    archive = _runtime_files(fetch_package(RUNTIME, runtime))
    first = open_exported(address, weights=weights, autoencoder=autoencoder)
    if math.prod(first.generator.shape) < LEAST_NOISE:
        raise AlphaflowError(f"{address}: its noise has fewer than {LEAST_NOISE} values, which the page cannot draw.")
    sources = [replace(first, walk=plan_walk(first.generator.recipe, nfe=nfe)) for nfe in STEPS]
    references = [reference_pictures(source) for source in sources]  # before the network is touched
    name = model_name(address, first.generator.recipe, unnamed="A picture in one step")
    make_folder(folder / "ort")
    for nfe in STEPS:  # of an earlier page: its graphs must not run the new weights
        (folder / _graph_file(nfe)).unlink(missing_ok=True)
    write_whole(folder / FACTS, json.dumps(_facts(sources, name, half=half), indent=1, ensure_ascii=False) + "\n")
    for name, content in archive.items():
        write_whole(folder / "ort" / name, content)
    for path in sorted(PAGE.iterdir()):
        write_whole(folder / path.name, path.read_bytes())
    models = [build_model(source, half=half) for source in sources]
    pack(models, folder / WEIGHTS)
    differences = []
    for nfe, model, source, reference in zip(STEPS, models, sources, references, strict=True):
        differences.append(write_graph(model, source, folder / _graph_file(nfe), reference, half=half))
    return differences


def _graph_file(nfe: int) -> str:
    return f"model-{nfe}.onnx"


def _runtime_files(archive: bytes) -> dict[str, bytes]:
    """The files of ONNX Runtime that the page loads, by their names in ort/."""
    files = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as packed:
        for place, name in RUNTIME_FILES.items():
            member = packed.extractfile(place)
            assert member is not None, place
            files[name] = member.read()
    return files


def _facts(sources: Sequence[Exported], name: str, *, half: bool) -> dict[str, Any]:
    """What the page needs to know about the model."""
    generator = sources[0].generator
    recipe = generator.recipe
    size = f"{recipe.data.image_size} × {recipe.data.image_size} pixels"
    return {
        "made_by": f"alphaflow {__version__}",
        "name": name,
        "about": f"A one-step image generator: {size}, {parameter_count(recipe):,} parameters.",
        "side": recipe.data.image_size,
        "shape": list(generator.shape),
        "classes": recipe.data.classes if label_rows(recipe) else 0,
        "names": generator.class_names,
        "half": half,
        "weights": WEIGHTS,
        "graphs": {
            str(nfe): {"file": _graph_file(nfe), "inputs": source.names, "walk": str(source.walk)}
            for nfe, source in zip(STEPS, sources, strict=True)
        },
    }
