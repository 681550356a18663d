"""`alphaflow push`: a run to the Hub."""

import tempfile
from pathlib import Path

import click

from alphaflow_cli.commands.common import examples, print_table

EPILOG = examples(
    "alphaflow push",
    "alphaflow push runs/quickstart --dry-run",
    "alphaflow push runs/b2 me/b2 --private --license apache-2.0",
)


@click.command(epilog=EPILOG)
@click.argument("source", metavar="[RUN|CKPT]", required=False)
@click.argument("repo", required=False)
@click.option("--private", is_flag=True, help="Create the repository for your eyes only.")
@click.option("--pr", "pull_request", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--dry-run", is_flag=True, help="Write the folder and list it; nothing is sent.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Where --dry-run writes it. Default: RUN/hub or <name>-hub."
)
@click.option(
    "--license", "licence", default="unknown", show_default=True, help="Of the weights, in the Hub's spelling."
)
@click.option("--without-results", is_flag=True, help="Leave results.json out.")
def command(
    source: str | None,
    repo: str | None,
    private: bool,
    pull_request: bool,
    dry_run: bool,
    out: Path | None,
    licence: str,
    without_results: bool,
) -> None:
    """Publish a model on the Hub.

    Weights, config.json, recipe.yaml, a model card, results.json and a sample grid; no optimiser state, no path of this
    machine. Without arguments: the newest run, to <you>/<recipe name>. Interrupted, the same command goes on.
    """
    from alphaflow_cli.engine.progress import say
    from alphaflow_cli.engine.publish import newest_run, open_source, stage
    from alphaflow_cli.hub.upload import Target, check_login, prepare, upload

    if repo is not None and repo.count("/") != 1:
        raise click.UsageError(f"REPO {repo!r} has the form user/name.")
    if out is not None and not dry_run:
        raise click.UsageError("--out goes with --dry-run.")
    path = Path(source) if source else newest_run()
    opened = open_source(path, with_results=not without_results)
    if dry_run:
        folder = out or (path / "hub" if path.is_dir() else path.with_name(f"{path.stem}-hub"))
        files = stage(opened, folder, repo=repo or f"user/{opened.name}", licence=licence)
        print_table([(name, f"{size:,} bytes") for name, size in files.items()])
        click.echo(folder)
        return
    user = check_login()
    target = Target(repo or f"{user}/{opened.name}", private, pull_request)
    prepare(target)
    with tempfile.TemporaryDirectory(prefix="alphaflow-push-") as temporary:
        files = stage(opened, Path(temporary), repo=target.repo, licence=licence)
        say(f"sending {len(files)} files, {sum(files.values()):,} bytes, to {target.repo}")
        click.echo(upload(Path(temporary), target, message=opened.title))
