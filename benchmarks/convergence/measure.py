"""FD-tiny of a finished run at 1, 2 and 4 NFE, and the conflict at its last checkpoint. What is there is kept."""

import json
from pathlib import Path
from typing import Any

import torch

from alphaflow_cli.analyze.analyze import AnalyzeRequest, analyze
from alphaflow_cli.evaluate.evaluate import Ruler, build_extractors, evaluate, make_reference
from alphaflow_cli.evaluate.pictures import GeneratedImages, open_pictures
from alphaflow_cli.evaluate.reference import load_reference
from alphaflow_cli.evaluate.results import save_results
from alphaflow_cli.files import sha256_of
from alphaflow_cli.runtime.processes import Processes
from alphaflow_cli.sample.generator import open_generator
from alphaflow_cli.sample.walk import plan_walk

NFE = (1, 2, 4)


def evaluate_run(run: Path, reference: Path, out: Path, *, images: int) -> None:
    """results.json of the run, unless it has these very weights' already."""
    torch.set_num_threads(1)
    digest, wanted = sha256_of(run / "model.safetensors"), load_reference(reference)
    if is_measured(run / "results.json", digest, wanted.facts["sha256"], images):
        return
    ruler = tiny_ruler(out)
    generator, found = open_generator(str(run), device=torch.device("cpu")), []
    for nfe in NFE:
        walk = plan_walk(generator.recipe, nfe=nfe)
        source = GeneratedImages(generator, walk, count=images, draw=generator.recipe.eval.draw)
        evaluation = evaluate(source, ("fd-tiny",), ruler, reference=wanted)
        assert evaluation is not None, "one process is always the first"
        found.append(evaluation)
    save_results(run / "results.json", run / "history.jsonl", found)


def tiny_ruler(out: Path) -> Ruler:
    """FD-tiny's features need no weights."""
    return Ruler(
        build_extractors(("fd-tiny",), torch.device("cpu"), {})[0], Processes(torch.device("cpu")), out / "evals", 250
    )


def is_measured(path: Path, digest: str, reference: str, images: int) -> bool:
    """Whether the file has these weights' scores at every NFE, of that many pictures, against this reference."""
    if not path.is_file():
        return False
    rows = [row for each in json.loads(path.read_text(encoding="utf-8"))["evaluations"] for row in each["rows"]]
    found = {
        row["pictures"]["nfe"]
        for row in rows
        if (row["pictures"]["checkpoint_sha256"], row["reference"]["sha256"], row["count"])
        == (digest, reference, images)
    }
    return found == set(NFE) and len(rows) == len(NFE)


def prepare_reference(pictures: Path, out: Path, name: str) -> Path:
    """The training pictures at 16 px, measured once."""
    path = out / f"reference-{name}.safetensors"
    if not path.is_file():
        make_reference(open_pictures(str(pictures), size=16, limit=None), tiny_ruler(out), path, name=name)
    return path


def conflict_of(run: Path, store: Path, *, batches: int, rows: int, out: Path) -> dict[str, Any]:
    """What `alphaflow analyze` finds at the last checkpoint, averaged weights."""
    torch.set_num_threads(1)
    request = AnalyzeRequest(
        address=str(run), data=store, out=out, batches=batches, batch=rows, seed=0, weights="ema", all_checkpoints=False
    )
    checkpoint: dict[str, Any] = analyze(request)[0]["checkpoints"][-1]
    return checkpoint
