"""`alphaflow push`: a run to the Hub."""

import re
import tempfile
from pathlib import Path

import click

from alphaflow_cli.commands.common import Destination, begin, complete_path, examples, print_table

EPILOG = examples(
    "alphaflow push",
    "alphaflow push runs/quickstart --dry-run",
    "alphaflow push runs/b2 me/b2 --private --license apache-2.0",
    "alphaflow push runs/quickstart --best --dry-run",
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


def local_source(source: str, repo: str | None) -> Path:
    """The run or checkpoint on this machine; a name on the Hub is refused, for only what lies here is published."""
    from alphaflow_cli.remote.address import is_repository

    path = Path(source).expanduser()
    if not path.exists():
        from alphaflow_cli.model.find import nearby

        if slip := nearby(path):
            raise click.UsageError(f"{source}: not here. Did you mean {slip}?")
        target = repo or (source if is_repository(source) else "")
        raise click.UsageError(f"{source}: not here; say the run: {f'alphaflow push runs/NAME {target}'.strip()}")
    return path


def after_dry_run(path: Path, repo: str | None, *, best: bool) -> str:
    """What a dry run says at its end: the command that sends, where the repository was named."""
    line = f"alphaflow push {path} {repo}{' --best' * best}"
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
    type=click.Path(exists=True, path_type=Path),
    help="The model's own autoencoder, if it is not beside the weights: a folder or a weights file.",
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
    from alphaflow_cli.hub.push import Target, check_login, check_name, newest_run, open_publication, stage, upload
    from alphaflow_cli.runtime.progress import say

    path = path or newest_run()
    opened = open_publication(path, with_results=not without_results, best=best)
    if dry_run:
        folder = out or (path / "hub" if path.is_dir() else path.with_name(f"{path.stem}-hub"))
        files = stage(opened, folder, repo=repo or f"user/{opened.name}", licence=licence, autoencoder=autoencoder)
        print_table([(name, f"{size:,} bytes") for name, size in files.items()])
        say(after_dry_run(path, repo, best=best))
        click.echo(folder)
        return
    user = check_login()
    target = Target(repo or f"{user}/{opened.name}", private, pull_request)
    check_name(target)
    with tempfile.TemporaryDirectory(prefix="alphaflow-push-") as temporary:
        files = stage(opened, Path(temporary), repo=target.repo, licence=licence, autoencoder=autoencoder)
        say(f"sending {len(files)} files, {sum(files.values()):,} bytes, to {target.repo}")
        click.echo(upload(Path(temporary), target, message=opened.title))
