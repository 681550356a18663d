"""`alphaflow recipe`: list, show, check, plot, copy and make recipes."""

import re
from pathlib import Path

import click

from alphaflow_cli.commands.common import (
    begin,
    complete_path,
    complete_recipe,
    examples,
    json_option,
    print_json,
    print_table,
    recipe_argument,
    set_option,
    tell,
    write_new,
)
from alphaflow_cli.commands.values import Destination, NumberWithin
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import check_new
from alphaflow_cli.text import for_message

GPU_DEVICES = ("nvidia*", "kfd", "dxg")  # in /dev: Nvidia, AMD, and either under Windows; seen without loading torch
MOST_GPU_MEMORY = 2_000  # GB


@click.group(epilog=examples("alphaflow recipe ls", "alphaflow recipe show b2 --set train.steps=100000"))
def command() -> None:
    """List, show, check, plot, copy and make recipes.

    A recipe is one YAML file that says everything about one run. RECIPE is a file, or the name of a shipped recipe.
    """


@command.command("ls", epilog=examples("alphaflow recipe ls"))
@json_option
def list_recipes(as_json: bool) -> None:
    """List the shipped recipes."""
    from alphaflow_cli.recipe import load_recipe, shipped
    from alphaflow_cli.recipe.plan import parameter_count
    from alphaflow_cli.recipe.source import read_text, title

    entries = []
    for name, path in shipped().items():
        recipe, line = load_recipe(name), title(read_text(path))
        facts = {"parameters": parameter_count(recipe), "steps": recipe.train.steps, "batch": recipe.train.batch}
        entries.append({"name": name, "title": line, **facts, "path": str(path)})
    if as_json:
        print_json(entries)
        return
    rows = [
        (str(f["name"]), f"{f['parameters']:,}", f"{f['steps']:,}", f"{f['batch']:,}", str(f["title"])) for f in entries
    ]
    print_table(rows, head=("name", "parameters", "steps", "batch", "what it is"))


@command.command(
    epilog=examples("alphaflow recipe show b2", "alphaflow recipe show b2 --set train.steps=100000 --json")
)
@recipe_argument
@set_option
@json_option
def show_command(recipe: str, sets: tuple[str, ...], as_json: bool) -> None:
    """Print a recipe with every default, and what follows from it.

    What follows are the phases of alpha in steps, images seen, parameters, and estimates of memory and disk. They come
    as comments: the output is itself a recipe.
    """
    from alphaflow_cli.recipe import dump_recipe, load_recipe
    from alphaflow_cli.recipe.facts import facts, lines
    from alphaflow_cli.recipe.loader import to_dict

    loaded = load_recipe(recipe, sets)
    if as_json:
        print_json({"recipe": to_dict(loaded), **facts(loaded)})
        return
    for what, text in lines(loaded):
        tell(f"# {what:11}{text}")
    click.echo()
    tell(dump_recipe(loaded).removesuffix("\n"))


@command.command(epilog=examples("alphaflow recipe check b2", "alphaflow recipe check b2 cifar10 --json"))
@click.argument("files", nargs=-1, required=True, metavar="FILE...", shell_complete=complete_recipe)
@set_option
@json_option
@click.pass_context
def check_command(ctx: click.Context, files: tuple[str, ...], sets: tuple[str, ...], as_json: bool) -> None:
    """Check recipes; every fault is listed with its file and line.

    What a sound recipe would do in vain is said too (beware). The exit code is 1 if any of them is at fault.
    """
    verdicts = [(file, *_verdict(file, sets)) for file in files]
    if as_json:
        print_json(
            [{"file": f, "ok": not fault, "error": fault or None, "warnings": doubts} for f, fault, doubts in verdicts]
        )
    for file, fault, doubts in () if as_json else verdicts:
        tell(f"error: {fault}" if fault else f"{file}: good", err=bool(fault))
        for doubt in doubts:
            tell(f"  beware: {doubt}")
    if any(fault for _, fault, _ in verdicts):
        ctx.exit(1)


def _verdict(file: str, sets: tuple[str, ...]) -> tuple[str, list[str]]:
    """What is wrong with a recipe, and what is allowed but might not be meant."""
    from alphaflow_cli.recipe import load_recipe
    from alphaflow_cli.recipe.plan import warnings_of

    try:
        return "", warnings_of(load_recipe(file, sets), on_cpu=not has_gpu())
    except AlphaflowError as fault:
        return for_message(str(fault)), []


@command.command(epilog=examples("alphaflow recipe plot b2", "alphaflow recipe plot xl2-cfg -o xl2.svg"))
@recipe_argument
@click.option("-o", "--out", type=Destination(), help="FILE.png or FILE.svg. Default: the recipe's name, as PNG.")
@set_option
def plot(recipe: str, out: Path | None, sets: tuple[str, ...]) -> None:
    """Draw alpha, the share of r = t rows and the learning rate."""
    from alphaflow_cli.charts.draw import to_png, to_svg
    from alphaflow_cli.recipe import load_recipe
    from alphaflow_cli.train.curves import recipe_chart

    loaded = load_recipe(recipe, sets)
    out = out or Destination().convert(f"{loaded.name}.png", None, None)
    if out.suffix.lower() not in (".png", ".svg"):
        raise click.BadParameter(f"{str(out)!r} must end in .png or .svg", param_hint="-o")
    chart = recipe_chart(loaded)
    write_new(out, to_svg(chart) if out.suffix.lower() == ".svg" else to_png(chart), overwrite=True)
    click.echo(out)


class Memory(click.ParamType):  # type: ignore[type-arg]
    """The memory of a GPU, as its data sheet gives it: 24GB, or 24."""

    name = "memory"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        digits = re.fullmatch(r"([0-9]{1,4}(?:\.[0-9]{1,3})?) ?(?:gi?b)?", str(value).strip(), re.IGNORECASE)
        if not digits or not 1 <= float(digits[1]) <= MOST_GPU_MEMORY:
            self.fail(f"{str(value)!r} is no memory of a GPU, such as 24GB (1 to {MOST_GPU_MEMORY:,}).", param, ctx)
        return float(digits[1]) * 1e9


NEW_EXAMPLES = examples(
    "alphaflow recipe new latents/mine -o mine.yaml",
    "alphaflow recipe new latents/mine -o mine.yaml --like b2 --gpu 24GB",
    "alphaflow recipe new latents/mine -o mine.yaml --hours 8 --set model.depth=6",
)


@command.command(epilog=NEW_EXAMPLES)
@click.argument("store", shell_complete=complete_path)
@click.option("-o", "--out", type=Destination(), help="The file. Default: the store's name, in this folder.")
@click.option(
    "--like",
    default="",
    metavar="RECIPE",
    shell_complete=complete_recipe,
    help="Begin with this recipe. Default: by the store and the machine.",
)
@click.option("--hours", type=NumberWithin(0, 100_000, open_below=True), help="Fit the steps to this time.")
@click.option("--gpu", "memory", type=Memory(), help="Memory of the GPU that it is meant for, such as 24GB.")
@set_option
def new(
    store: str, out: Path | None, like: str, hours: float | None, memory: float | None, sets: tuple[str, ...]
) -> None:
    """Write a recipe that fits STORE, a folder made by prep-latents.

    Each choice is explained in the file. Size, channels, classes and autoencoder come from the store; steps, batch,
    warm-up and average from the number of its pictures. With --hours the steps are timed on this machine, as
    `train --estimate` does. An existing file is never overwritten.
    """
    from alphaflow_cli.train.propose import RecipeRequest, propose_recipe

    folder = Path(store)
    target = out or Path(f"{folder.resolve().name}.yaml")
    if target.suffix not in (".yaml", ".yml"):
        raise click.BadParameter(f"{str(target)!r} must end in .yaml", param_hint="-o")
    check_new(target)
    if hours is not None:
        begin(f"recipe new {store}")
    proposal = propose_recipe(RecipeRequest(folder, target, like, sets, hours, memory, has_gpu()))
    write_new(target, proposal.text)
    for note in proposal.notes:
        tell(f"beware: {note}", err=True)
    click.echo(target)


def has_gpu() -> bool:
    """Whether the machine has a GPU that trains, seen without loading torch."""
    return any(any(Path("/dev").glob(name)) for name in GPU_DEVICES)


@command.command(epilog=examples("alphaflow recipe cp b2 mine.yaml"))
@recipe_argument
@click.argument("file", type=Destination(may_be_folder=True))
@set_option
def cp(recipe: str, file: Path, sets: tuple[str, ...]) -> None:
    """Copy a recipe to FILE, to change it there. An existing FILE is never overwritten.

    With --set the copy is written with every default filled in.
    """
    from dataclasses import replace

    from alphaflow_cli.recipe import dump_recipe, load_recipe
    from alphaflow_cli.recipe.loader import find_recipe
    from alphaflow_cli.recipe.source import read_text

    loaded = load_recipe(recipe, sets)
    target = file / f"{loaded.name}.yaml" if file.is_dir() else file
    if target.suffix not in (".yaml", ".yml"):
        raise click.BadParameter(f"{str(target)!r} must end in .yaml", param_hint="FILE")
    write_new(target, dump_recipe(replace(loaded, name=target.stem)) if sets else read_text(find_recipe(recipe)))
    click.echo(target)
