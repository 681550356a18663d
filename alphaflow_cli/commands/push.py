"""`alphaflow push`: a run to the Hub."""

import re
import shlex
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alphaflow_cli.commands.common import begin, command_line, complete_path, examples, print_table
from alphaflow_cli.commands.values import Destination, UserPath
from alphaflow_cli.files import user_path

if TYPE_CHECKING:
    from alphaflow_cli.hub.stage import Publication

EPILOG = examples(
    "alphaflow push",
    "alphaflow push runs/quickstart --dry-run",
    "alphaflow push runs/b2 me/b2 --private --license apache-2.0",
    "alphaflow push runs/quickstart --best --dry-run",
    "alphaflow push runs/b2 me/b2 --diffusers --space",
)


def check_licence(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """Refuse a text that does not look like one of the Hub's licence ids."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", value):
        raise click.BadParameter(f"{value!r} is no id the Hub knows; they look like apache-2.0, cc-by-nc-4.0 or other.")
    return value


def check_repository(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse a text that cannot be a repository's name."""
    from alphaflow_cli.remote.address import is_repository

    if value is not None and not is_repository(value):
        raise click.BadParameter(f"{value!r} is not of the form user/name, in the letters the Hub takes.")
    return value


def check_space_name(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse what cannot be a Space's name; a run's path behind a bare --space is one that slipped in there."""
    if value and user_path(value).exists():
        raise click.BadParameter(f"{value} lies here. Write --space at the end, or --space=user/name.")
    return check_repository(context, parameter, value) if value else value


def local_source(source: str, repo: str | None) -> Path:
    """The run or checkpoint on this machine; a name on the Hub is refused, for only what lies here is published."""
    from alphaflow_cli.remote.address import is_repository

    path = user_path(source)
    if not path.exists():
        from alphaflow_cli.model.find import nearby

        if slip := nearby(path):
            raise click.UsageError(f"{source}: not here. Did you mean {slip}?")
        target = repo or (source if is_repository(source) else "")
        raise click.UsageError(f"{source}: not here; say the run: {f'alphaflow push runs/NAME {target}'.strip()}")
    return path


def after_dry_run(words: Sequence[str], repo: str | None) -> str:
    """What a dry run says at its end: this very command without --dry-run, where the repository was named."""
    pairs = pairwise(["", *words])
    kept = [word for before, word in pairs if word not in ("--dry-run", "--debug") and "--out" not in (before, word)]
    line = shlex.join(["alphaflow", *(word for word in kept if not word.startswith("--out="))])
    return f"nothing was sent; to send it: {line}" if repo else "nothing was sent"


@click.command(epilog=EPILOG)
@click.argument("source", metavar="[RUN|CKPT]", required=False, shell_complete=complete_path)
@click.argument("repo", required=False, callback=check_repository)
@click.option("--best", is_flag=True, help="The checkpoint that scored best while training, not the newest.")
@click.option("--private", is_flag=True, help="Create a private repository.")
@click.option("--pr", "pull_request", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--dry-run", is_flag=True, help="Write the folder and list it; nothing is sent.")
@click.option(
    "--out",
    type=Destination(is_folder=True, holds_weights=True),
    help="Where --dry-run writes it. Default: RUN/hub or <name>-hub.",
)
@click.option(
    "--license",
    "licence",
    default="unknown",
    show_default=True,
    callback=check_licence,
    help="Licence of the weights, as the Hub spells it.",
)
@click.option(
    "--autoencoder",
    type=UserPath(exists=True),
    help="The model's own autoencoder, if it is not beside the weights: a folder or a weights file.",
)
@click.option("--diffusers", is_flag=True, help="Add a pipeline that diffusers loads, beside the weights.")
@click.option(
    "--space",
    is_flag=False,
    flag_value="",
    metavar="[=user/name]",
    callback=check_space_name,
    help="Publish a Space that samples it, too. Default: the model's name.",
)
@click.option("--without-results", is_flag=True, help="Leave results.json out.")
def command(
    source: str | None,
    repo: str | None,
    best: bool,
    private: bool,
    pull_request: bool,
    dry_run: bool,
    out: Path | None,
    licence: str,
    autoencoder: Path | None,
    diffusers: bool,
    space: str | None,
    without_results: bool,
) -> None:
    """Publish a model on the Hub.

    Weights, config.json, recipe.yaml, a model card, results.json and a sample grid; no optimiser state, no path of this
    machine. Without arguments: the newest run, to <you>/<run's name>. Interrupted, the same command goes on.
    """
    if out is not None and not dry_run:
        raise click.UsageError("--out goes with --dry-run.")
    path = local_source(source, repo) if source else None
    begin(f"push {source or 'the newest run'}")
    from alphaflow_cli.hub.push import newest_run
    from alphaflow_cli.hub.stage import open_publication
    from alphaflow_cli.runtime.progress import say

    more: dict[str, Any] = {"licence": licence, "autoencoder": autoencoder, "diffusers": diffusers}
    path = path or newest_run()
    opened = open_publication(path, with_results=not without_results, best=best)
    if not dry_run:
        _send(opened, repo, space, more, private=private, pull_request=pull_request)
        return
    folder = out or (path / "hub" if path.is_dir() else path.with_name(f"{path.stem}-hub"))
    _dry_run(opened, folder, repo or f"user/{opened.name}", space, more)
    say(after_dry_run(command_line(), repo))
    click.echo(folder)


def _send(
    opened: "Publication",
    repo: str | None,
    space: str | None,
    more: dict[str, Any],
    *,
    private: bool,
    pull_request: bool,
) -> None:
    """Publish the model, then its Space; everything is written and checked before anything is sent."""
    from alphaflow_cli.hub.push import Target, check_login, check_name, upload
    from alphaflow_cli.hub.space import check_space, stage_space, upload_space
    from alphaflow_cli.hub.stage import stage
    from alphaflow_cli.runtime.progress import say

    user = check_login()
    target = Target(repo or f"{user}/{opened.name}", private, pull_request)
    check_name(target)
    with tempfile.TemporaryDirectory(prefix="alphaflow-push-") as temporary:
        folder, beside = Path(temporary) / "model", Path(temporary) / "space"
        if space is not None:
            check_space(space or target.repo)
            stage_space(beside, repo=target.repo, title=target.repo.split("/")[1], licence=more["licence"])
        files = stage(opened, folder, repo=target.repo, **more)
        say(f"sending {len(files)} files, {sum(files.values()):,} bytes, to {target.repo}")
        click.echo(upload(folder, target, message=opened.title))
        if space is not None:
            click.echo(upload_space(beside, space or target.repo, private=private, message=opened.title))


def _dry_run(opened: "Publication", folder: Path, repo: str, space: str | None, more: dict[str, Any]) -> None:
    """Write the folder of the model, and beside it that of the Space, and list them."""
    from alphaflow_cli.hub.space import stage_space
    from alphaflow_cli.hub.stage import stage

    files = stage(opened, folder, repo=repo, **more)
    if space is not None:
        beside = folder.with_name(f"{folder.name}-space")
        made = stage_space(beside, repo=repo, title=opened.name, licence=more["licence"])
        files |= {f"{beside.name}/{name}": size for name, size in made.items()}
    print_table([(name, f"{size:,} bytes") for name, size in files.items()])
