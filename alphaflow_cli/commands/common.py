"""What the verbs share: the RECIPE argument, `--set`, `--json`, examples in help, and the way results are printed."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from alphaflow_cli.errors import AlphaflowError

Command = TypeVar("Command", bound=Callable[..., Any])


def complete_recipe(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The shipped names, and files."""
    from alphaflow_cli.recipe import shipped

    names = [CompletionItem(name) for name in shipped() if name.startswith(incomplete)]
    return [*names, CompletionItem(incomplete, type="file")]


def recipe_argument(function: Command) -> Command:
    """RECIPE: a shipped recipe's name or a file; the names complete in the shell."""
    return click.argument("recipe", shell_complete=complete_recipe)(function)


def set_option(function: Command) -> Command:
    """`--set a.b=value`, repeatable; the command receives the tuple `sets`."""
    help_text = "Change one value of the recipe (again for another); checked as if it stood in the file."
    return click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help=help_text)(function)


def json_option(function: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")(function)


def autoencoder_option(function: Command) -> Command:
    """`--autoencoder`, of `sample` and `eval`."""
    help_text = "Decode with this one: a folder or Hub id. Default: the checkpoint's."
    return click.option("--autoencoder", default="", help=help_text)(function)


def decoder_option(function: Command) -> Command:
    """`--decoder auto|fp32|bf16`, of `sample` and `eval`."""
    help_text = "Precision of the autoencoder's decoder. auto: bf16 on a GPU, fp32 on a CPU."
    choice = click.Choice(["auto", "fp32", "bf16"])
    return click.option("--decoder", type=choice, default="auto", show_default=True, help=help_text)(function)


def command_line() -> Sequence[str]:
    """The arguments of the command that is running, for processes that run it too: `cli.run` may be anybody's."""
    arguments: Sequence[str] = click.get_current_context().find_root().obj
    return arguments


def examples(*lines: str) -> str:
    """An epilog that shows command lines; a test runs each of them."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def print_json(document: object) -> None:
    click.echo(json.dumps(document, ensure_ascii=False, indent=2))


def print_table(rows: Sequence[tuple[str, ...]], *, head: tuple[str, ...] = ()) -> None:
    """Columns as wide as their widest cell; the first row is the head where one is given."""
    shown = [head, *rows] if head else rows
    widths = [max(len(row[i]) for row in shown) for i in range(len(shown[0]))] if shown else []
    for row in shown:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def write_new(path: Path, content: str | bytes, *, overwrite: bool = False) -> None:
    """Write a whole file or nothing; the folder must exist, and a file that exists is kept unless `overwrite`."""
    if path.exists() and not overwrite:
        raise AlphaflowError(f"{path}: exists already, and is not overwritten. Choose another name or remove it")
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError as fault:
        raise AlphaflowError(f"{path}: cannot be written ({fault.strerror})") from fault
    finally:
        partial.unlink(missing_ok=True)
