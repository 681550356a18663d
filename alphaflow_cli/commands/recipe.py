"""`alphaflow recipe`: list, show, check, plot and copy recipes."""

from pathlib import Path

import click

from alphaflow_cli.commands.common import (
    Destination,
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
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.text import for_message

GPU_DEVICES = ("nvidia*", "kfd", "dxg")  # in /dev: Nvidia, AMD, and either under Windows; seen without loading torch


@click.group(epilog=examples("alphaflow recipe ls", "alphaflow recipe show b2 --set train.steps=100000"))
def command() -> None:
    """List, show, check, plot and copy recipes.

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
        entry = {"name": name, "title": line, "parameters": parameter_count(recipe)}
        entries.append({**entry, "steps": recipe.train.steps, "batch": recipe.train.batch, "path": str(path)})
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
    """Print a recipe with every default filled in, and what follows from it.

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
        keys = ("file", "ok", "error", "warnings")
        print_json(
            [dict(zip(keys, (f, not fault, fault or None, doubts), strict=True)) for f, fault, doubts in verdicts]
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

    on_cpu = not any(any(Path("/dev").glob(name)) for name in GPU_DEVICES)
    try:
        return "", warnings_of(load_recipe(file, sets), on_cpu=on_cpu)
    except AlphaflowError as fault:
        return for_message(str(fault)), []


@command.command(epilog=examples("alphaflow recipe plot b2", "alphaflow recipe plot xl2-cfg -o xl2.svg"))
@recipe_argument
@click.option("-o", "--out", type=Destination(), help="FILE.png or FILE.svg. Default: the recipe's name, as PNG.")
@set_option
def plot(recipe: str, out: Path | None, sets: tuple[str, ...]) -> None:
    """Draw alpha and its phases, the share of r = t rows and the learning rate over the steps."""
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
