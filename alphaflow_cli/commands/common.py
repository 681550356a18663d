"""What the verbs share: the RECIPE argument, `--set`, `--json`, examples in help, and the way results are printed."""

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from alphaflow_cli.commands.values import PROCESSES, THREADS, NumberOrAuto
from alphaflow_cli.errors import no_such_source
from alphaflow_cli.files import check_new, user_path, write_whole
from alphaflow_cli.text import brief, for_terminal

if TYPE_CHECKING:
    from alphaflow_cli.runtime.processes import Processes

UNSAFE = r"[\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff]"  # JSON itself escapes what is below
SOURCE_LIKENESS = 0.7  # how alike two names of folders are before one is taken for a slip: fotos and photos are .73
FIRST_RECIPES = ("quickstart", "cifar10", "b2")  # of many; named where one is missing
OTHER_WORDS = {  # option of other programs → what does the same here: the first one that the verb takes
    **dict.fromkeys(("steps", "num_steps", "num_inference_steps", "max_steps"), ("--nfe", "train.steps")),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance_scale"), ("--guidance",)),
    **dict.fromkeys(("gpus", "devices", "num_processes", "nproc_per_node"), ("--processes",)),
    **dict.fromkeys(("output", "output_dir", "outdir"), ("--out",)),
    **dict.fromkeys(("dataset", "data_dir", "data_path"), ("--data",)),
    **dict.fromkeys(("resolution", "image_size"), ("--size",)),
    "vae": ("--autoencoder",),
    "batch_size": ("--batch", "train.batch"),
    "learning_rate": ("optim.lr",),
    "mixed_precision": ("train.precision",),
}
LONGEST = 100_000  # letters of one printed text
THREADS_KEY = "alphaflow.threads"  # of click's context
Command = TypeVar("Command", bound=Callable[..., Any])
Shown = TypeVar("Shown")


def complete_recipe(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete a RECIPE in the shell: by the names of the shipped recipes, and by files."""
    from alphaflow_cli.recipe import shipped

    names = [CompletionItem(name) for name in shipped() if name.startswith(incomplete)]
    return [*names, CompletionItem(incomplete, type="file")]


def recipe_argument(function: Command) -> Command:
    """Add the argument RECIPE: a shipped recipe's name or a file."""
    return click.argument("recipe", shell_complete=complete_recipe)(function)


def set_option(function: Command) -> Command:
    """Add `--set a.b=value`, which may be repeated; the command receives the tuple `sets`."""
    help_text = "Change one value of the recipe, by the rules of the file. May be repeated."
    return click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help=help_text)(function)


def bad_option(function: Command) -> Command:
    """Add `--bad stop|skip`, what `prep-latents` and `reference` do with a bad picture."""
    text = "What to do with a file that is not a whole picture: end the run, or leave it out and count it."
    choice = click.Choice(["stop", "skip"])
    return click.option("--bad", type=choice, default="stop", show_default=True, help=text)(function)


def json_option(function: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")(function)


def autoencoder_option(function: Command) -> Command:
    """Add `--autoencoder ID|DIR`, which `sample` and `eval` decode with."""
    help_text = "Decode with this autoencoder: a folder or Hub id. Default: the checkpoint's."
    return click.option("--autoencoder", default="", shell_complete=complete_path, help=help_text)(function)


def decoder_option(function: Command) -> Command:
    """Add `--decoder auto|fp32|bf16`, the precision in which `sample` and `eval` decode."""
    help_text = "Precision of the autoencoder's decoder. auto: bf16 on a GPU that has it, else fp32."
    choice = click.Choice(["auto", "fp32", "bf16"])
    return click.option("--decoder", type=choice, default="auto", show_default=True, help=help_text)(function)


def device_option(function: Command) -> Command:
    """Add `--device cpu|cuda|mps`; the command receives its name, or None for the best one that is here."""
    choice = click.Choice(["cpu", "cuda", "mps"])
    return click.option("--device", type=choice, help="What computes. Default: a GPU where there is one.")(function)


def processes_option(function: Command) -> Command:
    """Add `--processes N`; the command receives the number, or None for what the machine suggests."""
    text = "Processes to share the work. Default: one per GPU."
    return click.option("--processes", type=PROCESSES, help=text)(function)


def threads_option(function: Command) -> Command:
    """Add `--threads auto|N`, which `share` heeds: the command itself need not know it."""
    help_text = "Threads that compute on a CPU. auto: no more than affinity mask and cgroup quota grant."
    return click.option(
        "--threads",
        type=NumberOrAuto(THREADS),
        default="auto",
        expose_value=False,
        callback=lambda ctx, _, value: ctx.meta.update({THREADS_KEY: value}),
        help=help_text,
    )(function)


def requested_threads() -> int | None:
    """The N of this command's `--threads N`; None for auto."""
    return click.get_current_context().meta.get(THREADS_KEY) or None


def complete_path(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete by files and folders, where a value may be a path or something else."""
    return [CompletionItem(incomplete, type="file")]


def checkpoint_argument(name: str, metavar: str) -> Callable[[Command], Command]:
    """Add an argument for a checkpoint: a file, a run folder or an address on the Hub, completed by paths."""
    return click.argument(name, metavar=metavar, shell_complete=complete_path)


def check_source(text: str) -> None:
    """Refuse a source of pictures that is a path and leads nowhere, before anything is loaded."""
    if not text.strip():
        raise click.UsageError(
            "An empty name is no source of pictures. Give a folder, an archive, or hf://datasets/USER/NAME"
        )
    try:
        if ":" not in text and not re.search(r"\{\d+\.\.\d+\}|[*?[]", text):
            user_path(text).stat()
    except (FileNotFoundError, NotADirectoryError):
        from alphaflow_cli.model.find import alike

        path = user_path(text)
        likely = [str(path.with_name(name)) for name in alike(path.name, path.parent, likeness=SOURCE_LIKENESS)]
        raise no_such_source(text, (likely or [""])[0]) from None
    except (OSError, ValueError, RuntimeError):  # opening it says why
        pass


def check_checkpoint(address: str, classes: str = "") -> None:
    """Refuse a run or a checkpoint that is not there, or does not have these classes, before torch is loaded."""
    from alphaflow_cli.model.find import check_address, check_named_classes

    check_address(address)
    check_named_classes(address, classes)


MANY_FILES = "Many files are one SOURCE as a pattern in quotes, such as 'part-*.tar', or as the folder that holds them"


def usage_message(fault: click.UsageError, ctx: click.Context, args: Sequence[str]) -> str:
    """What is wrong, and what to write instead: a value of the recipe for an option, or what an argument may be."""
    message = fault.format_message()
    if isinstance(fault, click.NoSuchOption):
        advice = _in_place_of(fault.option_name, ctx, args)
        return f"No such option {fault.option_name!r}. {advice}" if advice else message
    if extra := re.fullmatch(r"Got unexpected extra arguments? \((.*)\)", message):
        assignments = re.findall(r"[a-z_]+\.[a-z_.]+=\S+", extra[1]) if _takes(ctx, "--set") else []
        if assignments:
            return " ".join([f"{message}.", "Write:", *(f"--set {each}" for each in assignments)])
        several = any(param.name == "source" for param in ctx.command.params) and _takes(ctx, "--image-column")
        return f"{message}. {MANY_FILES}" if several else message
    if not (isinstance(fault, click.MissingParameter) and isinstance(fault.param, click.Argument)):
        return message
    wanted = fault.param.make_metavar(ctx)
    if wanted == "RECIPE":
        return f"{message} Give a file, or a shipped recipe: {', '.join(FIRST_RECIPES)}, … (alphaflow recipe ls)"
    if "RUN" in wanted or "CKPT" in wanted:
        from alphaflow_cli.model.find import runs_in

        runs = ", ".join(runs_in(Path("runs"))) or "none yet; alphaflow train quickstart makes one"
        return f"{message} Runs here: {runs}"
    return f"{message} Examples: {ctx.command_path} --help"


def _takes(ctx: click.Context, option: str) -> bool:
    return any(option in param.opts for param in ctx.command.params)


def _in_place_of(option: str, ctx: click.Context, args: Sequence[str]) -> str:
    """What to write in place of an option that has the name of a recipe's value, or a name of other programs."""
    from alphaflow_cli.recipe.loader import flatten
    from alphaflow_cli.recipe.schema import Recipe

    name = option.lstrip("-").replace("-", "_")
    if name in ("resume", "resume_from", "resume_from_checkpoint", "continue"):
        return "Leave it out: the same command again goes on."
    joined = next((word.partition("=")[2] for word in args if word.startswith(f"{option}=")), "")
    after = next((after for before, after in pairwise([*args, ""]) if before == option and after[:1] != "-"), "")
    value = quote(joined or after or "VALUE")
    fields = [field for field in flatten(Recipe()) if field.split(".")[-1] == name]
    for ours in (*OTHER_WORDS.get(name, ()), *fields[:1]):
        if ours.startswith("--") and _takes(ctx, ours):
            return f"Write: {ours} {value}"
        if not ours.startswith("--") and _takes(ctx, "--set"):
            return f"Write: --set {ours}={value}"
    return ""


def begin(what: str) -> None:
    """Say at once what begins, before the libraries that do it are loaded; of many processes one says it."""
    from alphaflow_cli.runtime.launch import has_parent
    from alphaflow_cli.runtime.progress import say

    task = os.environ.get("SLURM_PROCID", "0") if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1" else "0"
    if os.environ.get("RANK", task) == "0" and not has_parent():
        say(brief(what))


def share(
    work: "Callable[[Processes], Shown | None]",
    show: Callable[[Shown], object],
    processes: int | None,
    device: str | None,
    *,
    needs_gpu: bool = True,
    count: Callable[[int | None], int] | None = None,
) -> None:
    """Do a verb's work here or in N processes, and show the result, which the first process has."""
    from alphaflow_cli.runtime.processes import join_processes, processes_here, run_shared
    from alphaflow_cli.runtime.threads import threads_bounded

    def run() -> int:
        joined = join_processes(needs_gpu=needs_gpu, device=device)
        with threads_bounded(requested_threads(), on_cpu=joined.device.type == "cpu", is_main=joined.rank == 0):
            result = work(joined)
        if result is not None:
            show(result)
        return 0

    counting = count or partial(processes_here, device=device)
    if code := run_shared(run, command_line(), requested=processes, count=counting):
        sys.exit(code)


def command_line() -> Sequence[str]:
    """The arguments of the command that is running, to start more processes of it.

    sys.argv is no source for them: any program may call `cli.run`.
    """
    arguments: Sequence[str] = click.get_current_context().find_root().obj
    return arguments


def examples(*lines: str) -> str:
    """Make the end of a help page that shows command lines; a test runs each of them."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def print_json(document: object) -> None:
    """Print a document as JSON. What a terminal would obey is escaped, which means the same in JSON."""
    text = json.dumps(document, ensure_ascii=False, indent=2)
    click.echo(text if text.replace("\n", "").isprintable() else re.sub(UNSAFE, _escaped, text))


def _escaped(unsafe: re.Match[str]) -> str:
    return json.dumps(unsafe[0])[1:-1]


def tell(text: str, *, err: bool = False) -> None:
    """Print words that may come from a file; what a terminal would obey is shown instead."""
    click.echo(for_terminal(text, limit=LONGEST, lines=True), err=err)


def print_table(rows: Sequence[tuple[str, ...]], *, head: tuple[str, ...] = ()) -> None:
    """Print rows in columns as wide as their widest cell, with `head` above them if it is given."""
    shown = [tuple(for_terminal(cell, limit=LONGEST) for cell in row) for row in ([head, *rows] if head else rows)]
    widths = [max(len(row[i]) for row in shown) for i in range(len(shown[0]))] if shown else []
    for row in shown:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def write_new(path: Path, content: str | bytes, *, overwrite: bool = False) -> None:
    """Write a whole file or nothing; the folder must exist, and a file that exists is kept unless `overwrite`."""
    if not overwrite:
        check_new(path)
    write_whole(path, content)
