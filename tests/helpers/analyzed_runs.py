"""A tiny run to analyze, and the command."""

import json

from alphaflow_cli.cli import run as cli

TINY = [
    "model.dim=16", "model.depth=2", "model.heads=2", "model.patch=8", "data.source=glyphs:60", "train.batch=8",
    "train.steps=6", "train.save_every=3", "train.keep=2", "train.log_every=2", "train.sample_every=0", "alpha=0",
    "optim.warmup_steps=1", "guidance.omega=0.7", "guidance.kappa=0.2", "guidance.label_dropout=0.3",
]  # fmt: skip


def train(folder, *sets):
    line = ["train", "quickstart", "--out", str(folder)]
    for value in (*TINY, *sets):
        line += ["--set", value]
    assert cli(line) == 0
    return folder


def analyze(folder, out, capsys, *options):
    capsys.readouterr()
    assert cli(["analyze", str(folder), "--out", str(out), "--batch", "8", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)
