"""`alphaflow export`: a checkpoint for other programs."""

from pathlib import Path
from typing import Any

import click

from alphaflow_cli.commands.common import autoencoder_option, begin, check_checkpoint, checkpoint_argument, examples
from alphaflow_cli.commands.values import Destination, UserPath, WholeWithin
from alphaflow_cli.commands.walking import averages_option

EPILOG = examples(
    "alphaflow export runs/quickstart --to onnx -o model.onnx",
    "alphaflow export runs/quickstart --to onnx --nfe 2 --fp16 -o model-2.onnx",
    "alphaflow export runs/quickstart --to torch -o model.pt2",
    "alphaflow export runs/quickstart --to diffusers -o pipeline",
    "alphaflow export runs/quickstart --to web -o page",
)
FOLDERS = ("diffusers", "web")
FORMS = ("onnx", "torch", "diffusers", "web")
MOST_STEPS = 64  # each one is unrolled in the graph
ONLY_FOR = {"nfe": ("onnx", "torch"), "decoder": ("onnx", "torch"), "half": ("onnx", "web"), "runtime": ("web",)}
OPTIONS = {"nfe": "--nfe", "decoder": "--decoder/--no-decoder", "half": "--fp16", "runtime": "--runtime"}


@click.command("export", epilog=EPILOG)
@checkpoint_argument("checkpoint", "CKPT")
@click.option("--to", "form", type=click.Choice(FORMS), required=True, help="What to write.")
@click.option("-o", "--out", type=UserPath(), required=True, help="The file or folder that is written.")
@click.option("--nfe", type=WholeWithin(1, MOST_STEPS), help="onnx, torch: evaluations per picture. Default: 1.")
@click.option(
    "--decoder/--no-decoder", default=None, help="onnx, torch: whether latents become pictures. Default: yes."
)
@click.option(
    "--fp16", "half", is_flag=True, help="onnx, web: store weights in half precision; the arithmetic stays fp32."
)
@averages_option
@autoencoder_option
@click.option(
    "--runtime",
    type=UserPath(),
    help="web: ONNX Runtime, where it cannot be fetched: the file of npm pack onnxruntime-web.",
)
def command(
    checkpoint: str,
    form: str,
    out: Path,
    nfe: int | None,
    decoder: bool | None,
    half: bool,
    weights: str,
    autoencoder: str,
    runtime: Path | None,
) -> None:
    """Write CKPT in a form that other programs run: a file, a run folder, or a Hub id user/repo[@revision].

    \b
    onnx       one graph, from noise and label to the picture, for ONNX Runtime
    torch      the same graph as a .pt2 of torch.export
    diffusers  a folder for DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)
    web        a page that runs the model in a browser, from any file server, without a network

    What is written is compared with the checkpoint, and the largest difference is printed on stderr.
    """
    for name, given in (("nfe", nfe), ("decoder", decoder), ("half", half or None), ("runtime", runtime)):
        if given is not None and form not in ONLY_FOR[name]:
            raise click.UsageError(f"{OPTIONS[name]} goes with --to {' or '.join(ONLY_FOR[name])}.")
    if autoencoder and decoder is False:
        raise click.UsageError("--autoencoder says what decodes, and --no-decoder that nothing does: give one of them.")
    check_checkpoint(checkpoint)
    out = Destination(is_folder=form in FOLDERS, holds_weights=True).convert(out, None, None)
    begin(f"export {checkpoint} to {form}")
    opening: dict[str, Any] = {"weights": weights, "autoencoder": autoencoder}
    if form == "web":
        from alphaflow_cli.export.web import export_web

        lines = [str(each) for each in export_web(checkpoint, out, half=half, runtime=runtime, **opening)]
        lines.append(f"look at it: python -m http.server --directory {out}")
    else:
        lines = _export(form, checkpoint, out, {**opening, "nfe": nfe or 1, "decoder": decoder}, half=half)
    for line in [*lines, f"{_size(out):,} bytes"]:
        click.echo(line, err=True)
    click.echo(out)


def _export(form: str, checkpoint: str, out: Path, opening: dict[str, Any], *, half: bool) -> list[str]:
    """Write one of the other forms; returns what there is to say about it."""
    from alphaflow_cli.export.graph import export_torch, open_exported

    if form == "diffusers":
        from alphaflow_cli.export.diffusers import check_pipeline_folder, export_diffusers

        check_pipeline_folder(out)
        return [str(export_diffusers(open_exported(checkpoint, **opening), out))]
    if form == "onnx":
        from alphaflow_cli.export.onnx import check_onnx, export_onnx

        check_onnx()
        source = open_exported(checkpoint, **opening)
        difference = export_onnx(source, out, half=half)
    else:
        source = open_exported(checkpoint, **opening)
        difference = export_torch(source, out)
    return [f"{', '.join(source.names)} → {source.output}; {source.walk}", str(difference)]


def _size(out: Path) -> int:
    """The bytes of a file, or of all files of a folder."""
    files = [out, out.with_name(f"{out.name}.data")] if out.is_file() else list(out.rglob("*"))
    return sum(path.stat().st_size for path in files if path.is_file())
