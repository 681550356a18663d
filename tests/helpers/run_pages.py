"""A run folder as training would leave it, its page, and what a reader finds there."""

import json
from html.parser import HTMLParser

import numpy as np
import torch

from alphaflow_cli.cli import run as cli
from alphaflow_cli.evaluate.results import Evaluation, FeatureSpace, Row, document
from alphaflow_cli.model.build import build_network
from alphaflow_cli.model.checkpoint import Checkpoint, save_checkpoint
from alphaflow_cli.recipe import dump_recipe, load_recipe
from alphaflow_cli.sample.grid import grid_png

STEPS = (100, 200, 300)
SETS = (
    "train.steps=300",
    "model.dim=16",
    "model.depth=1",
    "model.heads=2",
    "optim.lr=2e-3",
    "train.conflict_every=100",
)


def journal_row(step):
    row = {"step": step, "images_seen": 64 * step, "alpha": 0.5, "phase": "between", "equal_share": 0.5, "lr": 1e-3}
    row |= {"l": 1.0, "l_tfm": 100 / step, "l_tc": None if step == 100 else -0.1, "v_loss": 0.5, "grad_norm": 2.0}
    cosines = {"cos_tfm_tc": -0.5, "cos_tfm_fm": 0.6, "cos_tc_fm": -0.2}
    norms = {"norm_tfm": 1.0, "norm_tc": 2.0, "norm_fm": 0.5}
    return row | {"seconds_per_step": 0.25, "conflict": cosines | norms}


def score(nfe, value):
    space = FeatureSpace("fd_haar192", "", "as they are", 192)
    reference = {"name": "glyphs", "kind": "pictures", "count": 2000, "sha256": "ab" * 32}
    pictures = {"kind": "checkpoint", "nfe": nfe, "checkpoint_sha256": "cd" * 32}
    return Row("FD-tiny-2k", value, None, "fd-tiny", space, 2000, pictures, f"quickstart, {nfe} NFE", reference)


def write_run(folder):
    recipe = load_recipe("quickstart", SETS)
    (folder / "samples").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(journal_row(step)) + "\n" for step in STEPS))
    for step in STEPS:
        picture = np.full((32, 32, 3), step % 256, np.uint8)
        (folder / "samples" / f"step-{step:08d}.png").write_bytes(grid_png([[picture] * 4] * 2))
    evaluation = Evaluation("e", "ef" * 32, [score(2, 3.25), score(1, 7.5)], [], {}, 1)
    (folder / "results.json").write_text(json.dumps(document([evaluation])))
    one = torch.ones(3, 1, 1, dtype=torch.float64)
    origin = {
        "step": 300,
        "weights": "ema",
        "versions": {"alphaflow": "0.1.0", "torch": "x.y"},
        "autoencoder": {"id": "none"},
    }
    weights = build_network(recipe).state_dict()
    save_checkpoint(folder / "model.safetensors", Checkpoint(weights, recipe, 0 * one, one, origin))
    return folder


def report(folder, capsys):
    capsys.readouterr()
    assert cli(["report", str(folder)]) == 0
    path = folder / "report.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    return path


class Page(HTMLParser):
    """What a test wants to know of a page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.sources, self.tags, self.words, self.open = [], [], [], [], [], []
        self.feed(text)
        self.close()
        self.text = " ".join(self.words)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if "href" in values else []
        self.sources += [values[name] for name in ("src", "srcset", "data", "poster") if name in values]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)
