"""`alphaflow convert`: foreign checkpoints to ours, and ours to the published form."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from alphaflow_cli.commands.common import (
    begin,
    check_checkpoint,
    checkpoint_argument,
    examples,
    json_option,
    print_json,
    set_option,
    tell,
)
from alphaflow_cli.commands.values import Destination
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import is_there, user_path

if TYPE_CHECKING:
    from alphaflow_cli.convert import Outcome
    from alphaflow_cli.convert.imported import Family

EPILOG = examples(
    "alphaflow convert alphaflow-B-2.pt -o b2.safetensors",
    "alphaflow convert SiT-XL-2-256x256.pt --from sit -o sit-xl2.safetensors",
    "alphaflow convert b2.safetensors --to alphaflow -o b2.pt",
)
ONLY_FROM_SRC = (
    "--to alphaflow takes everything from SRC and prints a path: no --from, --recipe, --set, --latents, --weights or "
    "--json"
)

TORCH_ENDINGS = (".pt", ".pth", ".ckpt", ".bin")


@click.command(epilog=EPILOG)
@checkpoint_argument("source", "SRC")
@click.option(
    "-o", "--out", type=Destination(holds_weights=True), required=True, help="The file to write; never overwritten."
)
@click.option(
    "--from",
    "family",
    type=click.Choice(["auto", "alphaflow", "sit", "dit", "repa", "meanflow", "fastgen", "soflow", "imf"]),
    default="auto",
    help="What SRC is. SiT, DiT and REPA cannot always be told apart by their files.",
)
@click.option("--to", "target", type=click.Choice(["alphaflow"]), help="Write the published .pt form instead.")
@click.option(
    "--cfg-from",
    "template",
    metavar="SNAPSHOT.pt",
    help="With --to: take what the published loader wants from a published snapshot's cfg.",
)
@click.option("--recipe", help="The recipe it was trained by (a shipped name or a file), for what SRC does not say.")
@set_option
@click.option("--latents", metavar="STATS", help="scale:0.18215, meanflow, or a .safetensors with mean and std.")
@click.option(
    "--autoencoder",
    metavar="ID|DIR|none",
    help="What decodes the latents, where it is not in SRC; with --to: put it in.",
)
@click.option("--weights", type=click.Choice(["ema", "raw"]), help="Which of SRC's weights.")
@json_option
def command(
    source: str,
    out: Path,
    family: str,
    target: str | None,
    template: str | None,
    recipe: str | None,
    sets: tuple[str, ...],
    latents: str | None,
    autoencoder: str | None,
    weights: str | None,
    as_json: bool,
) -> None:
    """Convert a checkpoint of another system to ours.

    SRC is a .pt or .safetensors file (or hf://user/repo/file.pt): a published α-Flow or MeanFlow snapshot, a SiT, DiT,
    REPA, SoFlow or improved MeanFlow, or a PyTorch MeanFlow of zhuyu-cs or FastGen. Nothing in it is executed. What SRC
    does not say (guidance, latents' statistics, sampler) is taken from the published recipe or asked for, and recorded.
    With --to, SRC is a checkpoint of ours: a file, a run folder, or a Hub id user/repo[@revision].
    """
    check_ending(out, target)
    if target and (recipe or sets or latents or weights or as_json or family != "auto"):
        raise click.UsageError(ONLY_FROM_SRC)
    if template and not target:
        raise click.UsageError("--cfg-from belongs to --to alphaflow")
    (check_checkpoint if target else check_there)(source)
    begin(f"convert {source}")
    if target:
        _export(source, out, autoencoder, template)
        return
    from alphaflow_cli.convert import ConvertOptions, convert
    from alphaflow_cli.remote.download import resolve_file

    options = ConvertOptions(
        family=cast("Family", family), recipe=recipe, sets=sets, latents=latents, autoencoder=autoencoder,
        weights="raw" if weights == "raw" else "ema",
    )  # fmt: skip
    _report(convert(resolve_file(source), out, options), as_json)


def check_ending(out: Path, target: str | None) -> None:
    """Refuse a name that would hide which of the two forms is in the file."""
    if target and out.suffix == ".safetensors":
        raise click.UsageError(f"{out}: --to {target} writes a file of torch.save; give it the ending .pt")
    if not target and out.suffix in TORCH_ENDINGS:
        raise click.UsageError(f"{out}: what is written is .safetensors; the published form is --to alphaflow")


def check_there(source: str) -> None:
    """Refuse a file that is not there, before anything is loaded."""
    if ":" not in source and not is_there(user_path(source)):
        from alphaflow_cli.remote.address import is_repository

        of_hub = f" On the Hub say which file: hf://{source}/FILE" if is_repository(source) else ""
        raise AlphaflowError(f"{source}: no such file. Give a .pt or .safetensors checkpoint.{of_hub}")


def _export(source: str, out: Path, autoencoder: str | None, template: str | None) -> None:
    from alphaflow_cli.convert import export
    from alphaflow_cli.model.find import find_checkpoint
    from alphaflow_cli.remote.download import resolve_file

    snapshot = resolve_file(template) if template else None
    click.echo(export(find_checkpoint(source), out, autoencoder=autoencoder or "", template=snapshot))


def _report(outcome: "Outcome", as_json: bool) -> None:
    """Print the path on stdout, and on stderr what stood in the file and what did not."""
    if as_json:
        facts = {"path": str(outcome.path), "family": outcome.family, "weights": outcome.weights}
        beside = str(outcome.autoencoder) if outcome.autoencoder else None
        details = {"said": outcome.stated, "filled": outcome.filled, "unread": list(outcome.unread)}
        print_json({**facts, **details, "autoencoder": beside})
        return
    lines = [f"{outcome.family} checkpoint, {outcome.weights} weights"]
    lines += [f"  said by the file   {key}: {value}" for key, value in outcome.stated.items()]
    lines += [f"  not in the file    {key}: {value}" for key, value in outcome.filled.items()]
    if outcome.unread:
        lines.append(f"  not read           {', '.join(outcome.unread)}")
    if outcome.autoencoder:
        lines.append(f"  its autoencoder    {outcome.autoencoder}; keep it beside the checkpoint")
    for line in lines:
        tell(line, err=True)
    click.echo(outcome.path)
