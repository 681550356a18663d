"""`import-latents`: latents of another system to a store of ours, without encoding anything again.

What the source does not say has to be given: which autoencoder made the latents, of which size and crop the pictures
were, how many classes there are. The autoencoder is loaded to take its facts and to see that its latents have this
shape; where it cannot be loaded in diffusers' form, --downscale lets its name stand alone.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from alphaflow_cli.data.manifest import TRANSFORMS, AutoencoderRecord, Crop, StorePlan
from alphaflow_cli.data.writing import finish_store, is_done, write_shard
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.latents.encode import writing_to
from alphaflow_cli.latents.foreign import ForeignLatents, Second, described_count, open_foreign
from alphaflow_cli.latents.plan import STORED_DTYPES, check_plan, record_of, shard_size
from alphaflow_cli.latents.prepare import begin_store, check_room, has_documents
from alphaflow_cli.nn.autoencoder import load_autoencoder, public_id
from alphaflow_cli.runtime.lock import hold
from alphaflow_cli.runtime.progress import Progress, size
from alphaflow_cli.tensors import Array
from alphaflow_cli.text import brief, counted


@dataclass(frozen=True)
class ImportRequest:
    """What the command line of import-latents requests."""

    source: Path
    form: str
    out: Path
    autoencoder: str
    size: int
    crop: Crop
    classes: int
    dtype: str = "fp16"
    scale: float | None = None
    second: Second | None = None
    downscale: int | None = None  # the autoencoder is not loaded, and only its name is recorded


def import_latents(request: ImportRequest, *, shown: bool = True) -> Path:
    """Write the store, or go on with it; returns its folder."""
    foreign = open_foreign(request.source, request.form, scale=request.scale, second=request.second)
    _check_labels(request, foreign)
    plan = _plan(request, foreign)
    out, total = request.out, -(-plan.images // plan.shard_size)
    check_plan(plan, out)
    missing = [shard for shard in range(total) if not is_done(out, shard)]
    if not missing and has_documents(out):
        return out
    check_room(out, len(missing) * plan.shard_size * plan.sample_bytes)
    with ExitStack() as held:
        held.enter_context(writing_to(out))
        held.enter_context(hold(out, "import-latents"))
        classes = {str(number): number for number in range(plan.classes)}
        words = f"{plan.source['name']}: {described_count(foreign)}"
        begin_store(out, plan, _list(foreign), classes, [words] if shown else [])
        with Progress("import", plan.images, unit="img", shown=shown) as bar:
            for shard in range(total):
                span = range(shard * plan.shard_size, min((shard + 1) * plan.shard_size, plan.images))
                if shard in missing:
                    _write(out, plan, shard, foreign, span)
                bar.advance(len(span), note=size((bar.done + len(span)) * plan.sample_bytes))
        finish_store(out, plan)
    return out


def _check_labels(request: ImportRequest, foreign: ForeignLatents) -> None:
    highest = int(foreign.labels.max())
    if highest >= request.classes:
        row = int(np.argmax(foreign.labels >= request.classes))
        raise AlphaflowError(
            f"{brief(request.source)}: {foreign.names[row]!r} has label {int(foreign.labels[row])}, out of range for "
            f"--classes {request.classes}; the highest is {highest}"
        )


def _plan(request: ImportRequest, foreign: ForeignLatents) -> StorePlan:
    """What decides the bytes of the store."""
    digest = hashlib.sha256()
    for piece in _list(foreign):
        digest.update(piece)
    source = {"kind": "latents", "name": request.source.resolve().name, "form": request.form}
    plan = StorePlan(
        source={**source, "images": len(foreign.names), "list_sha256": digest.hexdigest()},
        image_size=request.size,
        latent=foreign.latent,
        kind=foreign.kind,
        dtype=STORED_DTYPES[request.dtype],
        flips=foreign.flips,
        autoencoder=_record(request, foreign),
        transform=TRANSFORMS[request.crop],
        classes=request.classes,
        shard_size=0,
    )
    return replace(plan, shard_size=shard_size(len(foreign.names), plan.sample_bytes))


def _record(request: ImportRequest, foreign: ForeignLatents) -> AutoencoderRecord:
    """The facts of the autoencoder, which must make latents of this shape."""
    stated = foreign.statistics
    record = AutoencoderRecord(
        public_id(request.autoencoder), "", "", request.downscale or 0, 1.0, 0.0, "unknown", None
    )
    if request.downscale is None:
        model = load_autoencoder(request.autoencoder, device=torch.device("cpu"))
        stated = stated or model.statistics
        if model.channels != foreign.latent[0]:
            raise AlphaflowError(
                f"{brief(request.source)}: latents of {counted(foreign.latent[0], 'channel')}, and {model.id} makes "
                f"{model.channels}. Give the autoencoder that made them: --autoencoder"
            )
        record = record_of(model, "unknown", None)
    side = foreign.latent[1] * record.downscale
    if side != request.size:
        raise AlphaflowError(
            f"--size {request.size}: latents of {foreign.latent[1]}×{foreign.latent[2]} by {record.id}, which divides "
            f"by {record.downscale}, are of pictures of {side} px. Give --size {side}, or the right autoencoder"
        )
    mean, std = stated or (None, None)
    return replace(record, channel_mean=mean, channel_std=std)


def _list(foreign: ForeignLatents) -> Iterator[bytes]:
    """The content of images.json, piece by piece."""
    pairs = zip(foreign.names, foreign.labels.tolist(), strict=True)
    for number, (name, label) in enumerate(pairs):
        yield (b",\n" if number else b"[\n") + json.dumps([name, label]).encode()
    yield b"\n]\n"


def _write(out: Path, plan: StorePlan, shard: int, foreign: ForeignLatents, span: range) -> None:
    rows = foreign.read(span.start, span.stop)
    content = {name: _stored(values, plan, foreign, span) for name, values in rows.items()}
    content["label"] = foreign.labels[span.start : span.stop]
    content["index"] = np.arange(span.start, span.stop)
    write_shard(out, plan, shard, content, [])


def _stored(values: Array, plan: StorePlan, foreign: ForeignLatents, span: range) -> Array:
    """Rows in the precision of the store; what is not finite there, and a std below 0, are refused with their row."""
    with np.errstate(over="ignore"):
        rows = values.astype(plan.dtype)
    bad = ~np.isfinite(rows).reshape(len(rows), -1).all(1)
    if bad.any():
        name = foreign.names[span.start + int(np.argmax(bad))]
        raise AlphaflowError(
            f"{name!r}: its latent is not finite in {plan.dtype}; try --dtype fp32, or mend the source"
        )
    if plan.kind == "moments" and (rows[:, plan.latent[0] :] < 0).any():
        raise AlphaflowError(
            f"{plan.source['name']}: a std below 0; is the second half the log-variance (--second logvar)?"
        )
    return rows
