"""`alphaflow convert`: foreign checkpoints to ours, and ours to the published form."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from alphaflow_cli.commands.common import Destination, examples, json_option, print_json, set_option, tell

if TYPE_CHECKING:
    from alphaflow_cli.convert import Outcome
    from alphaflow_cli.convert.imported import Family

EPILOG = examples(
    "alphaflow convert alphaflow-B-2.pt -o b2.safetensors",
    "alphaflow convert SiT-XL-2-256x256.pt --from sit -o sit-xl2.safetensors",
    "alphaflow convert b2.safetensors --to alphaflow -o b2.pt",
)


@click.command(epilog=EPILOG)
@click.argument("source", metavar="SRC")
@click.option(
    "-o", "--out", type=Destination(holds_weights=True), required=True, help="The file to write; never overwritten."
)
@click.option(
    "--from",
    "family",
    type=click.Choice(["auto", "alphaflow", "sit", "dit", "meanflow"]),
    default="auto",
    help="What SRC is. SiT and DiT cannot be told apart by their files.",
)
@click.option("--to", "target", type=click.Choice(["alphaflow"]), help="Write the published .pt form instead.")
@click.option("--recipe", help="The recipe it was trained by (a shipped name or a file), for what SRC does not say.")
@set_option
@click.option("--latents", metavar="STATS", help="scale:0.18215, meanflow, or a .safetensors with mean and std.")
@click.option("--autoencoder", metavar="ID|DIR|none", help="What decodes the latents, where it is not inside SRC.")
@click.option("--weights", type=click.Choice(["ema", "raw"]), help="Which of SRC's weights.")
@json_option
def command(
    source: str,
    out: Path,
    family: str,
    target: str | None,
    recipe: str | None,
    sets: tuple[str, ...],
    latents: str | None,
    autoencoder: str | None,
    weights: str | None,
    as_json: bool,
) -> None:
    """Convert a checkpoint of another system to ours.

    SRC is a .pt or .safetensors file (or hf://user/repo/file.pt): a published α-Flow or MeanFlow snapshot, a SiT or
    DiT, or a PyTorch MeanFlow of zhuyu-cs. Nothing in it is executed. What SRC does not say (guidance, the latents'
    statistics, the sampler) is taken from the published recipe or asked for, and recorded as such in FILE.
    """
    from alphaflow_cli.convert import Options, convert, export
    from alphaflow_cli.hub import resolve_file

    if target and (recipe or sets or latents or autoencoder or weights or as_json or family != "auto"):
        raise click.UsageError(
            "--to alphaflow takes everything from SRC and prints a path: no --from, --recipe, --set, --latents, "
            "--autoencoder, --weights or --json"
        )
    path = resolve_file(source)
    if target:
        click.echo(export(path, out))
        return
    options = Options(
        family=cast("Family", family),
        recipe=recipe,
        sets=sets,
        latents=latents,
        autoencoder=autoencoder,
        weights="raw" if weights == "raw" else "ema",
    )
    outcome = convert(path, out, options)
    _report(outcome, as_json)


def _report(outcome: "Outcome", as_json: bool) -> None:
    """What stood in the file, what did not, and the path."""
    if as_json:
        facts = {"path": str(outcome.path), "family": outcome.family, "weights": outcome.weights}
        beside = str(outcome.autoencoder) if outcome.autoencoder else None
        print_json({**facts, "said": outcome.said, "filled": outcome.filled, "autoencoder": beside})
        return
    tell(f"{outcome.family} checkpoint, {outcome.weights} weights", err=True)
    for key, value in outcome.said.items():
        tell(f"  said by the file   {key}: {value}", err=True)
    for key, value in outcome.filled.items():
        tell(f"  not in the file    {key}: {value}", err=True)
    if outcome.autoencoder:
        tell(f"  its autoencoder    {outcome.autoencoder}; keep it beside the checkpoint", err=True)
    click.echo(outcome.path)
