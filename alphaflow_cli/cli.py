"""The command group, loaded lazily, and the one place where errors become exit codes.

0 done; 1 a recipe, file, checkpoint or run at fault; 2 the command line; 130 and 143 interrupted; 141 the reader of
stdout went away. An error of our own keeps its traceback.
"""

import codecs
import contextlib
import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

import click

from alphaflow_cli import __version__
from alphaflow_cli.errors import LostOutput, fault_of_the_user
from alphaflow_cli.text import for_message

# verb → (the module whose `command` it is, its line in `alphaflow --help`). A listing imports none of the modules.
VERBS: dict[str, tuple[str, str]] = {
    "prep-latents": ("alphaflow_cli.commands.prep_latents", "Turn pictures into a latent store."),
    "import-latents": ("alphaflow_cli.commands.import_latents", "Turn another system's latents into a latent store."),
    "train": ("alphaflow_cli.commands.train", "Train a recipe; the same command again resumes."),
    "sample": ("alphaflow_cli.commands.sample", "Draw pictures from a checkpoint."),
    "eval": (
        "alphaflow_cli.commands.evaluate",
        "Measure pictures: FID, FDD, FCD, FD-tiny, KID, IS, precision and recall.",
    ),
    "reference": ("alphaflow_cli.commands.reference", "Measure real pictures once, for eval to compare with."),
    "ema": ("alphaflow_cli.commands.ema", "Make averages of other half-lives of a run's kept weights, and score them."),
    "convert": ("alphaflow_cli.commands.convert", "Convert a checkpoint of another system to ours."),
    "export": ("alphaflow_cli.commands.export", "Write a checkpoint for other programs, such as ONNX Runtime."),
    "push": ("alphaflow_cli.commands.push", "Publish a model on the Hub."),
    "pull": ("alphaflow_cli.commands.pull", "Fetch a published model from the Hub."),
    "demo": ("alphaflow_cli.commands.demo", "Look at a model in the browser; push --space publishes the same app."),
    "analyze": (
        "alphaflow_cli.commands.analyze",
        "Measure the conflict between the objective's two halves at a checkpoint.",
    ),
    "report": ("alphaflow_cli.commands.report", "Make one self-contained HTML page of a run."),
    "recipe": ("alphaflow_cli.commands.recipe", "List, show, check, plot, copy and make recipes."),
    "doctor": ("alphaflow_cli.commands.doctor", "Say what this machine has, and what will not work here and why."),
}

EPILOG = """\b
Examples:
  alphaflow train quickstart
  alphaflow sample runs/quickstart --grid grid.png
  alphaflow recipe show quickstart
  alphaflow doctor
"""


class Result(io.FileIO):
    """stdout, which carries the result. A write that fails raises LostOutput, which no other error is taken for."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as fault:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # said once: what waits behind it goes nowhere
            raise LostOutput(fault) from fault


class Talk(io.FileIO):
    """stderr, which carries talk: where it cannot be written (a full disk, a reader that left), the work goes on."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            super().write(data)
        return len(memoryview(data))


class LazyGroup(click.Group):
    """Knows every verb's name and line; imports a verb's module when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(VERBS[cmd_name][0]).command
        assert isinstance(command, click.Command), cmd_name
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, line) for verb, (_, line) in VERBS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as fault:  # click looks for likenesses among loaded commands only
            raise click.exceptions.NoSuchCommand(fault.command_name, possibilities=VERBS, ctx=ctx) from None

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as fault:  # click would begin a log's line with an empty one, too
            if sys.stderr.isatty():
                click.echo(err=True)  # behind the terminal's ^C
            raise click.Abort from fault
        except (BrokenPipeError, EOFError) as fault:
            # click would leave without a word at the one, and call the other an interruption; stdout's are LostOutput
            raise RuntimeError(f"{type(fault).__name__}: {fault}") from fault


def print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"alphaflow {__version__}")
        ctx.exit()


SETTINGS = {"max_content_width": 100, "help_option_names": ["-h", "--help"]}  # the verbs inherit them


@click.command(cls=LazyGroup, epilog=EPILOG, context_settings=SETTINGS)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=print_version, help="Print the version."
)
@click.option(
    "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error; works after a verb too."
)
def group() -> None:
    """Train, sample, measure and publish one-step image generators: α-Flow and its family."""


def say_error(message: str) -> None:
    """Write `error: …` to stderr: red on a terminal, unless NO_COLOR or a dumb one."""
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    line = click.style("error:", fg="red", bold=True) + " " + for_message(message)
    click.echo(line, err=True, color=False if plain else None)


def split_debug(args: Sequence[str]) -> tuple[bool, list[str]]:
    """Take `--debug` out of the arguments, wherever it stands before a `--`."""
    end = args.index("--") if "--" in args else len(args)
    return "--debug" in args[:end], [a for i, a in enumerate(args) if a != "--debug" or i >= end]


def run(args: Sequence[str]) -> int:
    """Run one command line in this process; returns the exit code."""
    debug, rest = split_debug(args)
    try:
        # obj: see common.command_line
        code = group.main(rest, prog_name="alphaflow", standalone_mode=False, obj=tuple(args))
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as fault:  # its message is the help, which has the usage in it
        click.echo(fault.format_message(), err=True)
        return _traced(debug, 2)
    except click.UsageError as fault:
        from alphaflow_cli.commands.common import usage_message

        ctx = fault.ctx or _context(rest)
        click.echo(ctx.get_usage(), err=True)
        say_error(usage_message(fault, ctx, rest))
        return _traced(debug, 2)
    except click.ClickException as fault:
        say_error(fault.format_message())
        return _traced(debug, 1)
    except (click.Abort, KeyboardInterrupt):
        say_error("interrupted")
        return _traced(debug, 130)
    except LostOutput as lost:
        return _traced(debug, _without_output(lost))
    except Exception as fault:
        line = fault_of_the_user(fault)
        if not line:
            raise  # a bug of ours: its traceback is what we want to see
        say_error(line)
        return _traced(debug, 1)


def _context(args: Sequence[str]) -> click.Context:
    """The context of the command that the arguments name, whose usage click does not always know."""
    ctx = click.Context(group, info_name="alphaflow", **SETTINGS)  # type: ignore[arg-type]
    for word in args:
        command = ctx.command.get_command(ctx, word) if isinstance(ctx.command, click.Group) else None
        if command is None:
            break
        ctx = click.Context(command, info_name=word, parent=ctx)
    return ctx


def _without_output(lost: LostOutput) -> int:
    """The exit code where stdout took no more: 141 if its reader went away, 1 if the disk behind it is full."""
    if isinstance(lost.__cause__, BrokenPipeError):
        return 141
    say_error(str(lost))
    return 1


def _traced(debug: bool, code: int) -> int:
    if debug:
        traceback.print_exc()
    return code


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)  # so that `finally` blocks run and temporary files go


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    """Answer Ctrl-C with KeyboardInterrupt; while a module is imported, end the process at once.

    An exception in the middle of an import is turned into another one, or lost, by modules written in C (torch).
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"error: interrupted\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _write_anyway(fault: UnicodeError) -> tuple[str | bytes, int]:
    """Write a byte of a file name as it was, so that a path on stdout is that path; any other letter as an escape."""
    assert isinstance(fault, UnicodeEncodeError)
    first = fault.object[fault.start]
    written = os.fsencode(first) if "\udc80" <= first <= "\udcff" else first.encode("ascii", "backslashreplace")
    return written, fault.start + 1


def set_streams() -> None:
    """Make stdout and stderr safe to use, whatever they were when the process began: closed, full, or without UTF-8."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:  # closed ones would be given to the next file that is opened
        os.set_inheritable(handle, True)
    os.close(handle)
    codecs.register_error("anyway", _write_anyway)
    for name, kind, number in (("stdout", Result, 1), ("stderr", Talk, 2)):
        now, raw = getattr(sys, name), kind(number, "w", closefd=False)
        encoding = getattr(now, "encoding", "utf-8")
        safe = io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors="anyway", line_buffering=True)
        setattr(sys, name, safe)


def run_and_exit() -> NoReturn:
    """Run the `alphaflow` command: the entry point of the installed program."""
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, _interrupt)
    set_streams()
    code = run(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done: leaving takes a moment with torch
    raise SystemExit(code)
