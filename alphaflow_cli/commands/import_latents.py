"""`alphaflow import-latents`: latents of another system in, a latent store out."""

from pathlib import Path
from typing import Literal

import click

from alphaflow_cli.commands.common import begin, complete_path, examples, tell
from alphaflow_cli.commands.values import Destination, NumberWithin, WholeWithin
from alphaflow_cli.errors import AlphaflowError

FORMS = "dit-npy|lightningdit|repa|lmdb|moments-safetensors"
NEEDED = {  # option → what to give where it is missing
    "--from": f"which system wrote them: {FORMS}",
    "--autoencoder": "which autoencoder made the latents: a Hub id, folder or weights file",
    "--size": "the side of the pictures that were encoded, in px",
    "--crop": "how pictures became square: adm (REPA, PyTorch MeanFlow and fast-DiT prepare ImageNet so), or square",
    "--classes": "how many classes there are (1000 for ImageNet)",
}
EPILOG = examples(
    "alphaflow import-latents features/ --from dit-npy --autoencoder stabilityai/sd-vae-ft-ema "
    "--size 256 --crop adm --classes 1000 --out latents/imagenet-dit",
    "alphaflow import-latents vae-sd/ --from repa --autoencoder stabilityai/sd-vae-ft-mse "
    "--size 256 --crop adm --classes 1000 --out latents/imagenet-repa",
)


@click.command("import-latents", epilog=EPILOG)
@click.argument("source", shell_complete=complete_path)
@click.option("--from", "form", metavar="FORM", help=f"Who wrote them: {FORMS}.")
@click.option("--out", type=Destination(is_folder=True), help="The store. [default: latents/SOURCE]")
@click.option("--autoencoder", metavar="ID|DIR|FILE", help="The one that made the latents.")
@click.option("--size", type=WholeWithin(1, 8192), help="Side of the pictures that were encoded.")
@click.option("--crop", type=click.Choice(["square", "adm"]), help="How pictures became square; as in prep-latents.")
@click.option("--classes", type=WholeWithin(1, 10_000_000), help="Number of classes; labels are 0 … N − 1.")
@click.option(
    "--dtype",
    type=click.Choice(["fp16", "fp32"]),
    default="fp16",
    show_default=True,
    help="Form of the numbers on disk.",
)
@click.option(
    "--scale",
    type=NumberWithin(0, 1e6, open_below=True),
    help="dit-npy: what the latents were multiplied by. [0.18215]",
)
@click.option("--second", type=click.Choice(["std", "logvar"]), help="moments-safetensors: what follows the mean.")
@click.option(
    "--downscale", type=WholeWithin(1, 1024), help="Do not load the autoencoder; it divides the side by this."
)
def command(
    source: str,
    form: str | None,
    out: Path | None,
    autoencoder: str | None,
    size: int | None,
    crop: Literal["square", "adm"] | None,
    classes: int | None,
    dtype: str,
    scale: float | None,
    second: Literal["std", "logvar"] | None,
    downscale: int | None,
) -> None:
    """Turn latents that another system wrote into a store, without encoding again. Running it again resumes.

    What SOURCE does not say has to be given. Nothing in it is executed.
    """
    if not Path(source).exists():
        raise AlphaflowError(f"{source}: no such folder or file. Check the path")
    if form is not None and form not in FORMS.split("|"):
        from alphaflow_cli.latents.foreign import check_form

        check_form(form)
    if form is None or autoencoder is None or size is None or crop is None or classes is None:
        given = (form, autoencoder, size, crop, classes)
        missing = next(name for name, value in zip(NEEDED, given, strict=True) if value is None)
        raise AlphaflowError(f"{source}: does not say {NEEDED[missing]}. Give {missing}")
    begin(f"import-latents {source}")
    from alphaflow_cli.latents.importing import ImportRequest, import_latents
    from alphaflow_cli.latents.prepare import describe_store

    folder = Path(source)
    store = out or Path("latents") / folder.resolve().name
    request = ImportRequest(folder, form, store, autoencoder, size, crop, classes, dtype, scale, second, downscale)
    for line in describe_store(import_latents(request)):
        tell(line)
