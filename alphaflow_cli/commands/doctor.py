"""`alphaflow doctor`: what this machine has, and what will not work on it."""

from typing import Any

import click

from alphaflow_cli.commands.common import begin, examples, json_option, print_json


@click.command(epilog=examples("alphaflow doctor", "alphaflow doctor --json"))
@json_option
def command(as_json: bool) -> None:
    """Say what this machine has, and what will not work here and why.

    Versions, devices, caches, which weights are present, disk, and whether a Hugging Face token is set (it is not
    shown). Nothing is downloaded and no server is asked.
    """
    from alphaflow_cli.doctor import examine

    if not as_json:
        begin("looking at this machine")
    report = examine()
    if as_json:
        print_json(report)
        return
    for what, text in _lines(report):
        click.echo(f"{what:11}{text}")
    click.echo()
    for problem in report["problems"]:
        click.echo(f"- {problem}")
    click.echo("Nothing stands in the way." if not report["problems"] else f"{len(report['problems'])} things to know.")


def _lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    packages = ", ".join(f"{name} {number or 'MISSING'}" for name, number in report["packages"].items())
    rows = [
        ("alphaflow", f"{report['alphaflow']}, Python {report['python']}, {report['platform']}"),
        ("packages", packages),
    ]
    cards = [f"{card['name']}, {card['bytes'] / 2**30:.0f} GiB" for card in report["devices"]["cuda"]]
    rows.append(("devices", "; ".join([*cards, *(["Apple GPU"] if report["devices"]["mps"] else [])]) or "no GPU"))
    rows.append(("", f"{report['devices']['cpu_cores']} CPU cores"))
    for i, entry in enumerate(report["weights"]):
        state = "present" if entry["present"] else "missing"
        rows.append(("" if i else "weights", f"{state}  {entry['what']} ({entry['for']})"))
    for i, cache in enumerate(report["caches"]):
        locked = "" if cache["writable"] else ", not writable"
        rows.append(("" if i else "caches", f"{cache['what']}: {cache['path']}{locked}"))
    rows.append(("disk", f"{report['free_bytes'] / 1e9:.0f} GB free in the current folder"))
    token = "a token is set" if report["hub"]["token"] else "no token"
    return [*rows, ("hub", token + (", offline (HF_HUB_OFFLINE)" if report["hub"]["offline"] else ""))]
