"""REPA, zhuyu-cs's MeanFlow and FastGen's: whose time is whose, and what their files say of the training."""

import argparse
import json
from typing import get_args

import pytest
import torch
from click.testing import CliRunner
from foreign_nets import published_u, random_weights, transformer
from snapshots import CLASSES, HEADS, SIZE, meanflow_weights, sit_weights

from alphaflow_cli.commands.convert import command
from alphaflow_cli.convert import ConvertOptions, convert, main
from alphaflow_cli.convert.imported import Family
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.model.checkpoint import load_checkpoint
from alphaflow_cli.sample.generator import load_network

HEADS_SET = f"model.heads={HEADS}"
REPA = {"model": "SiT-XL/2", "path_type": "linear", "prediction": "v", "enc_type": "dinov2-vit-b"}
ZHUYU = {
    "model": "SiT-B/2", "path_type": "linear", "num_classes": CLASSES, "cfg_prob": 0.1, "cfg_omega": 0.2,
    "cfg_kappa": 0.92, "cfg_min_t": 0.0, "cfg_max_t": 0.75, "time_sampler": "logit_normal", "time_mu": -0.3,
    "time_sigma": 1.2, "ratio_r_not_equal_t": 0.75, "adaptive_p": 1.0, "weighting": "adaptive", "batch_size": 512,
    "learning_rate": 2e-4, "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_epsilon": 1e-7, "adam_weight_decay": 0.0,
    "max_grad_norm": 1.0, "max_train_steps": 1234, "mixed_precision": "no", "allow_tf32": True, "exp_name": "x",
}  # fmt: skip


def repa_weights():
    """SiT's names, no variance, and the projectors of the training."""
    weights = random_weights(**SIZE, rows=CLASSES + 1, out=4, embedders=("t_embedder",), seed=41)
    return weights | {f"projectors.0.{i}.weight": torch.ones(3, 3) for i in (0, 2, 4)}


def fastgen_weights(*, second=True):
    """The table of meanflow_weights under FastGen's names."""
    spelled = {
        "_embedder.mlp.": "_embedder.proj_net.", "y_embedder.embedding_table": "y_embedder.class_embeddings",
        ".attn.": ".attention.", "final_layer.adaLN_modulation": "final_layer.adaptive_params",
        ".adaLN_modulation.": ".conditioning_net.", "final_layer.linear": "final_layer.projection",
    }  # fmt: skip
    table = {}
    for name, value in meanflow_weights().items():
        for common, theirs in spelled.items():
            name = name.replace(common, theirs)
        table[name.replace(".mlp.fc", ".feed_forward.fc")] = value
    table |= {"logvar_linear.weight": torch.zeros(1, 96), "logvar_linear.bias": torch.zeros(1)}
    return {name: value for name, value in table.items() if second or not name.startswith("r_embedder.")}


def fastgen(**tables):
    rest = {"optimizer": {"net": {}}, "scheduler": {}, "grad_scaler": {}, "callbacks": {}, "iteration": 77}
    return {"model": tables} | rest


def converted(tmp_path, tree, *sets, family="auto", **options):
    source, out = tmp_path / "theirs.pt", tmp_path / "ours.safetensors"
    out.unlink(missing_ok=True)
    torch.save(tree, source)
    outcome = convert(source, out, ConvertOptions(family=family, sets=(HEADS_SET, *sets), **options))
    checkpoint = load_checkpoint(out)
    return outcome, checkpoint, load_network(checkpoint)


def inputs():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(6, 4, 8, 8, generator=g)
    return z, torch.tensor([0.0, 0.1, 0.35, 0.5, 0.8, 1.0]), torch.tensor([0, 3, 9, 10, 5, 1])


@torch.no_grad()
@pytest.mark.parametrize("how", ["by its arguments", "by its projectors", "by --from"])
def test_a_repa_is_not_turned_and_loses_its_projectors(tmp_path, how):
    weights = repa_weights()
    table = {n: w for n, w in weights.items() if how == "by its projectors" or not n.startswith("projectors.")}
    tree = {"ema": table, "args": argparse.Namespace(**REPA)} if how == "by its arguments" else {"ema": table}
    outcome, checkpoint, net = converted(tmp_path, tree, family="repa" if how == "by --from" else "auto")
    z, t, y = inputs()
    theirs = transformer(
        {n: w.double() for n, w in weights.items()}, z.double(), {"t_embedder": t.double()}, y, heads=6
    )
    torch.testing.assert_close(net(z, t, 0.3 * t, y).double(), theirs, rtol=1e-5, atol=1e-5)
    assert outcome.family == checkpoint.origin["converted"]["from"] == "repa"
    assert checkpoint.recipe.sample.sampler == "flow"


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [({"path_type": "linear", "prediction": "v"}, "repa"), ({"prediction": "v"}, "repa"), (REPA, "repa"),
     ({"path_type": "Linear", "prediction": "velocity"}, "sit"), ({"path_type": "Linear"}, "sit")],
)  # fmt: skip
def test_the_spelling_of_the_arguments_tells_sit_from_repa(tmp_path, arguments, kind):
    tree = {"ema": sit_weights(), "args": argparse.Namespace(**arguments)}
    outcome, _, _ = converted(tmp_path, tree)
    assert outcome.family == kind
    other = {"repa": "sit", "sit": "repa"}[kind]
    with pytest.raises(AlphaflowError, match=f"--from {other}, but .* are those of {kind}"):
        converted(tmp_path, tree, family=other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"path_type": "cosine", "prediction": "v"}, "a repa with path_type 'cosine'"),
     ({"path_type": "linear", "prediction": "velocity"}, "a sit with path_type 'linear'"),
     ({"path_type": "linear", "prediction": "v", "num_classes": 7}, "num_classes is 7, its label table has 11 rows"),
     ({"model": "DMFT-XL/2", "dmf_depth": 20}, "a Decoupled MeanFlow .DMF.: one embedder serves both times"),
     ({"model": "SiT-XL/2", "dmf_depth": 20, "path_type": "linear"}, "a Decoupled MeanFlow")],
)  # fmt: skip
def test_a_child_of_repa_that_means_something_else_is_refused_by_name(tmp_path, arguments, message):
    with pytest.raises(AlphaflowError, match=message):
        converted(tmp_path, {"ema": sit_weights(), "args": argparse.Namespace(**arguments)})


def test_a_table_without_arguments_is_asked_about_with_all_three(tmp_path):
    with pytest.raises(AlphaflowError, match="--from sit, or --from dit, or --from repa"):
        converted(tmp_path, {"ema": sit_weights()})
    bare = {n: w for n, w in repa_weights().items() if "projectors" not in n}
    outcome, _, _ = converted(tmp_path, bare, family="sit")
    assert "--from repa" in outcome.filled["time"]


def test_what_a_zhuyu_says_of_its_training_goes_into_the_recipe(tmp_path):
    outcome, checkpoint, _ = converted(tmp_path, {"ema": meanflow_weights(), "args": argparse.Namespace(**ZHUYU)})
    recipe = checkpoint.recipe
    assert (recipe.times.law, recipe.times.mean, recipe.times.std) == ("logit_normal", -0.3, 1.2)
    assert (recipe.times.equal_share.kind, recipe.times.equal_share.initial) == ("constant", 0.25)
    assert (recipe.loss.weight, recipe.loss.reduction, recipe.loss.c) == ("adaptive", "sum", 1e-3)
    assert (recipe.optim.lr, recipe.optim.betas, recipe.optim.eps) == (2e-4, (0.9, 0.99), 1e-7)
    assert (recipe.optim.clip_norm, recipe.train.batch, recipe.train.steps) == (1.0, 512, 1234)
    assert (recipe.train.precision, recipe.train.tf32) == ("fp32", True)
    assert outcome.stated["ratio_r_not_equal_t"] == 0.75
    assert outcome.unread == ("exp_name",)
    assert checkpoint.origin["converted"]["unread"] == ["exp_name"]


def test_what_has_no_place_in_a_recipe_is_listed_as_not_read(tmp_path):
    odd = ZHUYU | {"adaptive_p": 0.5, "mixed_precision": "fp16", "weighting": "other", "adam_weight_decay": 0.1}
    torch.save({"ema": meanflow_weights(), "args": argparse.Namespace(**odd)}, tmp_path / "theirs.pt")
    line = [str(tmp_path / "theirs.pt"), "--set", HEADS_SET, "-o"]
    done = CliRunner().invoke(command, [*line, str(tmp_path / "a.safetensors")])
    assert done.exit_code == 0, done.output
    assert "not read           adam_weight_decay, adaptive_p, exp_name, mixed_precision, weighting" in done.stderr
    done = CliRunner().invoke(command, [*line, str(tmp_path / "b.safetensors"), "--json"])
    assert json.loads(done.stdout)["unread"][0] == "adam_weight_decay"


@pytest.mark.parametrize(("key", "value"), [("time_mu", "x"), ("time_sigma", float("inf")), ("ratio_r_not_equal_t", 2)])
def test_an_argument_that_means_nothing_is_named(tmp_path, key, value):
    with pytest.raises(AlphaflowError, match=f"its argument {key} is "):
        converted(tmp_path, {"ema": meanflow_weights(), "args": argparse.Namespace(**ZHUYU | {key: value})})


@torch.no_grad()
@pytest.mark.parametrize("form", ["training", "bare"])
def test_a_fastgen_meanflow_is_the_same_function(tmp_path, form):
    other = {name: value + 1 for name, value in fastgen_weights().items()}
    average = fastgen_weights()
    tree = average if form == "bare" else fastgen(net=other, ema_9996=other, ema_99995=other, ema_9999=average)
    outcome, checkpoint, net = converted(tmp_path, tree, recipe="meanflow-xl2-cfg")
    z, t, y = inputs()
    names = {"t_embedder": "noise_labels_embedder", "r_embedder": "noise_labels_next_embedder"}
    double = {}
    for name, value in meanflow_weights().items():
        head = name.split(".")[0]
        double[names.get(head, head) + name[len(head) :]] = value.double()
    theirs = published_u(double, z.double(), 0.4 * t.double(), t.double(), y, heads=HEADS)
    torch.testing.assert_close(net(z, t, 0.4 * t, y).double(), theirs, rtol=1e-5, atol=1e-5)
    assert outcome.family == "fastgen"
    assert checkpoint.recipe.guidance.kappa == 0.92
    assert float(1 / checkpoint.std) == pytest.approx(0.18215)
    assert checkpoint.recipe.data.autoencoder == "stabilityai/sd-vae-ft-mse"
    assert outcome.filled.keys() >= {"times", "latents", "weights", "labels"}
    if form == "training":
        assert checkpoint.origin["step"] == 77
        assert outcome.filled["weights"] == "ema_9999 (of ema_9999, ema_9996, ema_99995)"


def test_raw_weights_of_a_fastgen_are_its_net(tmp_path):
    tree = fastgen(net=fastgen_weights(), ema={n: w + 1 for n, w in fastgen_weights().items()})
    _, checkpoint, _ = converted(tmp_path, tree, recipe="meanflow-b2-cfg", weights="raw")
    assert torch.equal(checkpoint.weights["pos_embed"], meanflow_weights()["pos_embed"])
    with pytest.raises(AlphaflowError, match="holds no ema weights, only raw"):
        converted(tmp_path, fastgen(net=fastgen_weights()), recipe="meanflow-b2-cfg")


def test_a_fastgen_that_is_no_meanflow_is_refused_by_name(tmp_path):
    with pytest.raises(AlphaflowError, match="a FastGen DiT without r_embedder"):
        converted(tmp_path, fastgen(net=fastgen_weights(second=False)), weights="raw")
    with pytest.raises(AlphaflowError, match="does not say with which guidance"):
        converted(tmp_path, fastgen(ema=fastgen_weights(), net={}))


@pytest.mark.parametrize("kind", ["sit", "dit", "repa"])
def test_flows_of_one_embedder_train_on_as_uniform_flow_matching(tmp_path, kind):
    _, checkpoint, _ = converted(tmp_path, {"ema": sit_weights()}, family=kind)
    assert checkpoint.recipe.times.law == "uniform"
    assert checkpoint.recipe.times.equal_share.initial == 1.0


def test_every_family_has_a_reader_and_a_choice_on_the_command_line():
    (choice,) = (option.type.choices for option in command.params if option.name == "family")
    assert tuple(choice) == get_args(Family)
    assert {"auto", *main.FLOWS, *main.READERS} == set(get_args(Family))
