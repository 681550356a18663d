"""SoFlow's checkpoints are ours under other names: the same function, and what the file does not say is recorded."""

import pytest
import torch
from foreign_nets import transformer
from snapshots import CLASSES, HEADS, soflow_weights

from alphaflow_cli.cli import run
from alphaflow_cli.convert import ConvertOptions, convert
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.model.checkpoint import load_checkpoint
from alphaflow_cli.sample.generator import load_network

SETS = (f"model.heads={HEADS}",)
GUIDED = (*SETS, "guidance.label_dropout=0.1")


def converted(tmp_path, tree, sets=GUIDED, **options):
    source, out = tmp_path / "theirs.pt", tmp_path / "ours.safetensors"
    torch.save(tree, source)
    outcome = convert(source, out, ConvertOptions(sets=sets, **options))
    checkpoint = load_checkpoint(out)
    return outcome, checkpoint, load_network(checkpoint)


def tree_of(rows=CLASSES + 1):
    moments = {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 1e-4}]}
    tables = {"model": soflow_weights(42, rows), "ema_model": soflow_weights(41, rows)}
    return {**tables, "optimizer": moments, "finished_steps": 400_000, "finished_epochs": 80}


@torch.no_grad()
@pytest.mark.parametrize("form", ["whole", "stripped", "bare"])
def test_a_converted_soflow_is_the_same_function(tmp_path, form):
    whole = tree_of()
    tree = {"whole": whole, "stripped": {"ema_model": whole["ema_model"]}, "bare": whole["ema_model"]}[form]
    outcome, checkpoint, net = converted(tmp_path, tree)
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(4, 4, 8, 8, generator=g), torch.tensor([0, 3, 9, 10])
    t = torch.tensor([0.1, 0.5, 0.8, 1.0])
    r = 0.3 * t
    theirs = {name.removeprefix("network."): value.double() for name, value in whole["ema_model"].items()}
    times = {"t_embedder": t.double(), "s_embedder": (t - r).double()}
    u = transformer(theirs, z.double(), times, y, heads=HEADS)
    torch.testing.assert_close(net(z, t, r, y).double(), u, rtol=1e-5, atol=1e-5)
    assert (outcome.family, outcome.weights) == ("soflow", "ema")
    assert checkpoint.origin.get("step") == (400_000 if form == "whole" else None)
    assert float(1 / checkpoint.std.flatten()[0]) == pytest.approx(0.18215)
    assert checkpoint.recipe.model.positions == "fixed"
    assert checkpoint.recipe.data.autoencoder == "stabilityai/sd-vae-ft-mse"


def test_the_raw_weights_are_taken_when_wanted(tmp_path):
    _, checkpoint, _ = converted(tmp_path, tree_of(), weights="raw")
    theirs = soflow_weights(42)["network.y_embedder.embedding_table.weight"]
    assert torch.equal(checkpoint.weights["label_embed.weight"], theirs)


@pytest.mark.parametrize(("sets", "rows", "classes", "omega", "dropout"), [
    (GUIDED, 11, 10, 0.75, 0.1), ((*SETS, "guidance.label_dropout=0"), 11, 11, 1.0, 0.0),
    (SETS, 1001, 1000, 0.75, 0.1), (SETS, 1000, 1000, 1.0, 0.0),
])  # fmt: skip
def test_the_label_rows_or_the_user_say_whether_guidance_is_built_in(tmp_path, sets, rows, classes, omega, dropout):
    outcome, checkpoint, _ = converted(tmp_path, tree_of(rows), sets)
    mix = checkpoint.recipe.guidance
    assert (checkpoint.recipe.data.classes, mix.omega, mix.label_dropout) == (classes, omega, dropout)
    assert "guidance" in outcome.filled


def test_rows_that_say_nothing_are_asked_about(tmp_path):
    with pytest.raises(AlphaflowError, match=r"11 rows of labels.*--recipe soflow-b2 \(guided\)"):
        converted(tmp_path, tree_of(), SETS)
    assert not (tmp_path / "ours.safetensors").exists()
    _, checkpoint, _ = converted(tmp_path, tree_of(), SETS, recipe="soflow-b4")
    assert checkpoint.recipe.guidance.fade_from == 0.8


def test_guidance_at_sampling_is_refused_where_it_is_built_in(tmp_path, capsys):
    converted(tmp_path, tree_of())
    model = str(tmp_path / "ours.safetensors")
    assert run(["sample", model, "--guidance", "2", "--seeds", "0-1", "--out", str(tmp_path / "pictures")]) == 1
    assert "guidance 3 is built into these weights" in capsys.readouterr().err


def test_the_way_back_says_what_the_published_form_cannot(tmp_path, capsys):
    _, checkpoint, _ = converted(tmp_path, tree_of())
    assert run(["convert", str(tmp_path / "ours.safetensors"), "--to", "alphaflow", "-o", str(tmp_path / "b.pt")]) == 0
    err = capsys.readouterr().err
    for name in ("guidance.fade_from", "guidance.dropped", "times.gap", "loss.later", "model.positions"):
        assert name in err
    back = torch.load(tmp_path / "b.pt", weights_only=True)["ema"]
    assert torch.equal(back["model.pos_embed"], checkpoint.weights["pos_embed"])
