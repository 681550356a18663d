"""`alphaflow report`: one page of a run."""

from pathlib import Path

import click

from alphaflow_cli.commands.common import Destination, begin, examples

EXAMPLES = examples("alphaflow report runs/quickstart", "alphaflow report runs/b2 -o b2.html")


@click.command("report", epilog=EXAMPLES)
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=Destination(), help="The page. Default: RUN/report.html")
def command(run: Path, out: Path | None) -> None:
    """Make one self-contained HTML page of a run.

    Recipe and what differs from the shipped one, alpha and its phases, curves, the conflict where it was recorded,
    samples over time, scores with their protocols, environment, commands. It needs no network and opens anywhere.
    """
    from alphaflow_cli.model.find import check_run

    check_run(run)
    begin(f"report {run}")
    from alphaflow_cli.report.run import write_report

    click.echo(str(write_report(run, out or run / "report.html")))
