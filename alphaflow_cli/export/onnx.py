"""The graph as ONNX: written, halved, its weights put into a file of their own, run and compared.

Needs the extra `onnx`. `--fp16` stores the weights in half precision; the arithmetic stays float32, because CPUs have
no kernels for half precision, and times and statistics need more of it.
"""

import hashlib
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alphaflow_cli.errors import AlphaflowError, pip_install
from alphaflow_cli.export.graph import (
    Difference,
    Exported,
    OneGraph,
    Wanted,
    checked,
    dynamic_shapes,
    quiet,
    reference_pictures,
    refuse_far,
)
from alphaflow_cli.files import write_by, write_pieces

OPSET = 20  # the first with Gelu
HALVED_FROM = 1024  # values of a tensor: the small ones (biases, times, statistics) stay float32
LARGEST_HALF = 65504.0
ONE_FILE = 1_800_000_000  # bytes of weights: protobuf holds 2 GiB, what is more lies beside the graph
ALIGNED = 64


def check_onnx() -> None:
    """Refuse early when a package of the extra is missing."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        names = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'}"
        raise AlphaflowError(f"ONNX: {names} not installed. Run: {pip_install('onnx')}")


def export_onnx(source: Exported, out: Path, *, half: bool) -> Difference:
    """Write FILE.onnx, checked; beyond 2 GB the weights lie beside it in FILE.onnx.data."""
    check_onnx()
    reference = reference_pictures(source)
    model = build_model(source, half=half)
    beside, replaces = out.with_name(f"{out.name}.data"), out.is_file()
    apart = sum(value.const_value.nbytes for value in model.graph.initializers.values()) > ONE_FILE
    if apart:
        out.unlink(missing_ok=True)  # an earlier graph must not run the new weights
        pack([model], beside)
    difference = write_graph(model, source, out, reference, half=half)
    if replaces and not apart:
        beside.unlink(missing_ok=True)  # the weights of the earlier graph
    return difference


def write_graph(model: Any, source: Exported, out: Path, reference: Wanted, *, half: bool) -> Difference:
    """Write a graph that gives the checkpoint's pictures; of halved weights the difference is only reported."""
    import onnx_ir

    differences: list[Difference] = []

    def write(path: Path) -> None:
        onnx_ir.save(model, path)
        differences.append(checked(source, lambda inputs: run_onnx(path, source, inputs), reference))
        if not half:
            refuse_far(differences[0], out)

    write_by(out, write)
    return differences[0]


@torch.no_grad()
def build_model(source: Exported, *, half: bool) -> Any:
    """The graph as an onnx_ir.Model, with what a program needs to know about it in its metadata."""
    with quiet():
        example = tuple(source.inputs([0, 1], [0, 0]))
        program = torch.onnx.export(
            OneGraph(source),
            example,
            dynamo=True,
            dynamic_shapes=dynamic_shapes(len(example)),
            input_names=source.names,
            output_names=[source.output],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    model: Any = program.model
    if half:
        halve(model)
    model.metadata_props.update(_facts(source))
    model.graph.name = source.generator.recipe.name or "alphaflow"
    return model


def _facts(source: Exported) -> dict[str, str]:
    """Name, classes and steps: all strings, as ONNX's metadata are."""
    recipe, origin = source.generator.recipe, source.generator.origin
    return {
        "alphaflow.name": recipe.name,
        "alphaflow.step": str(origin.get("step", "")),
        "alphaflow.checkpoint_sha256": source.generator.digest,
        "alphaflow.walk": str(source.walk),
        "alphaflow.classes": json.dumps(source.generator.class_names or recipe.data.classes),
        "alphaflow.noise": f"torch.randn{source.generator.shape} of a CPU torch.Generator seeded with the seed",
    }


def halve(model: Any) -> None:
    """Store large float32 weights as float16; a Cast gives the arithmetic float32 back."""
    import onnx_ir

    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor.dtype != onnx_ir.DataType.FLOAT or tensor.size < HALVED_FROM:
            continue
        numbers = tensor.numpy()
        if np.abs(numbers).max() > LARGEST_HALF:
            continue
        small = onnx_ir.Value(name=f"{name}.half", const_value=onnx_ir.tensor(numbers.astype(np.float16)))
        small.dtype, small.shape = onnx_ir.DataType.FLOAT16, value.shape
        cast = onnx_ir.node("Cast", [small], {"to": int(onnx_ir.DataType.FLOAT)})
        full = cast.outputs[0]
        full.dtype, full.shape = onnx_ir.DataType.FLOAT, value.shape
        onnx_ir.convenience.replace_all_uses_with(value, full)
        model.graph.insert_before(model.graph[0], cast)
        del model.graph.initializers[name]
        full.name = name
        model.graph.initializers[small.name] = small


def pack(models: Sequence[Any], path: Path) -> None:
    """Put the weights of several graphs into one file, equal ones once."""
    import onnx_ir

    places: dict[str, int] = {}
    pieces: list[bytes] = []
    size = 0
    for model in models:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor.nbytes < HALVED_FROM:
                continue
            content = tensor.tobytes()
            digest = hashlib.sha256(content).hexdigest()
            if digest not in places:
                places[digest] = size
                pieces.append(content + bytes(-len(content) % ALIGNED))
                size += len(pieces[-1])
            value.const_value = onnx_ir.ExternalTensor(
                path.name,
                places[digest],
                len(content),
                tensor.dtype,
                shape=tensor.shape,
                name=name,
                base_dir=path.parent,
            )
    write_pieces(path, pieces)


def run_onnx(path: Path, source: Exported, inputs: list[Tensor]) -> np.ndarray:
    """What ONNX Runtime makes of some inputs on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: it warns of weights that it removes itself
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {name: value.numpy() for name, value in zip(source.names, inputs, strict=True)}
    out: np.ndarray = session.run([source.output], given)[0]
    return out
