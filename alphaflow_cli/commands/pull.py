"""`alphaflow pull`: a published model from the Hub."""

from pathlib import Path

import click

from alphaflow_cli.commands.common import begin, examples
from alphaflow_cli.commands.values import Destination

EPILOG = examples("alphaflow pull user/b2", "alphaflow pull user/b2@v1.0 -o b2")


@click.command(epilog=EPILOG)
@click.argument("repo", metavar="REPO[@REVISION]")
@click.option("-o", "--out", type=Destination(is_folder=True, holds_weights=True), help="Copy it here too.")
def command(repo: str, out: Path | None) -> None:
    """Fetch a published model from the Hub.

    Into the cache, checked against the Hub's checksums, for use without a network; with -o also as a folder. The commit
    is printed on stderr: REPO@COMMIT is that very model for ever.
    """
    begin(f"pull {repo}")
    from alphaflow_cli.remote.download import pull

    pulled = pull(repo, out)
    click.echo(f"{pulled.repo}@{pulled.commit}", err=True)
    click.echo(pulled.folder)
