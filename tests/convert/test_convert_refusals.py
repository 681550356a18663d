"""What convert asks for, refuses and says: a contradiction, a gap, a file too large for its own bytes."""

import argparse
import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from snapshots import HEADS, meanflow_weights, published_snapshot, sit_weights

from alphaflow_cli.commands.convert import command
from alphaflow_cli.convert import ConvertOptions, convert, main
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.model.checkpoint import load_checkpoint

HEADS_SET = f"model.heads={HEADS}"
SIT = {"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity"}
UNGUIDED = {"cfg_omega": 0.0, "cfg_kappa": 0.0, "cfg_min_t": 0.0, "cfg_max_t": -1.0}
GUIDED = {"cfg_omega": 0.2, "cfg_kappa": 0.92, "cfg_min_t": 0.0, "cfg_max_t": 0.75, "cfg_prob": 0.1}


def with_arguments(weights, **arguments):
    return {"ema": weights, "args": argparse.Namespace(**arguments)}


def converted(tmp_path, tree, *sets, name="theirs.pt", **options):
    source, out = tmp_path / name, tmp_path / "ours.safetensors"
    torch.save(tree, source)
    outcome = convert(source, out, ConvertOptions(sets=(HEADS_SET, *sets), **options))
    return outcome, load_checkpoint(out)


def without_cfg(dropout=0.1):
    return {key: value for key, value in published_snapshot(dropout=dropout).items() if key != "cfg"}


@pytest.mark.parametrize("sets", [(), ("guidance.omega=0.2", "guidance.kappa=0.92")])
def test_label_rows_without_a_configuration_are_asked_about(tmp_path, sets):
    with pytest.raises(AlphaflowError, match=r"has 11 rows .*11 classes, or 10 and the null label.*--recipe"):
        converted(tmp_path, without_cfg(), *sets)
    assert not (tmp_path / "ours.safetensors").exists()


@pytest.mark.parametrize(
    ("sets", "recipe", "name", "classes"),
    [(("guidance.label_dropout=0",), None, "mine.pt", 11), (("guidance.label_dropout=0.1",), None, "mine.pt", 10),
     ((), "b2-cfg", "mine.pt", 10), ((), None, "alphaflow-B-2-cfg.pt", 10)],
)  # fmt: skip
def test_label_rows_are_read_as_the_answer_says(tmp_path, sets, recipe, name, classes):
    outcome, checkpoint = converted(tmp_path, without_cfg(), *sets, name=name, recipe=recipe)
    assert checkpoint.recipe.data.classes == classes
    assert f"11 rows read as {classes} classes" in outcome.filled["labels"]


@pytest.mark.parametrize(
    ("tree", "asked", "is_one"),
    [(with_arguments(sit_weights(), **SIT), "dit", "sit"),
     (with_arguments(sit_weights(), model="SiT-XL/2"), "dit", "sit"),
     (with_arguments(sit_weights(), model="DiT-XL/2"), "sit", "dit"),
     (with_arguments(meanflow_weights(), **GUIDED), "sit", "meanflow"),
     (published_snapshot(), "meanflow", "alphaflow")],
)  # fmt: skip
def test_a_family_that_the_file_contradicts_is_refused_with_both(tmp_path, tree, asked, is_one):
    with pytest.raises(AlphaflowError, match=f"--from {asked}, but .* are those of {is_one}"):
        converted(tmp_path, tree, family=asked)


def test_a_meanflow_on_another_path_is_refused(tmp_path):
    with pytest.raises(AlphaflowError, match="path_type 'cosine'"):
        converted(tmp_path, with_arguments(meanflow_weights(), **GUIDED, path_type="cosine"))


def test_a_meanflow_trained_without_guidance_converts_and_says_so(tmp_path):
    outcome, checkpoint = converted(tmp_path, with_arguments(meanflow_weights(), **UNGUIDED, path_type="linear"))
    mix = checkpoint.recipe.guidance
    assert (mix.omega, mix.kappa, mix.t_min, mix.t_max) == (1.0, 0.0, 0.0, 1.0)
    assert outcome.filled["guidance"].startswith("none: cfg_max_t -1")


@pytest.mark.parametrize(
    ("key", "value"),
    [("cfg_omega", 0.0), ("cfg_omega", "abc"), ("cfg_kappa", 1.0), ("cfg_kappa", float("nan")), ("cfg_prob", "often")],
)
def test_an_impossible_argument_is_named(tmp_path, key, value):
    with pytest.raises(AlphaflowError, match=rf"theirs\.pt: its argument {key} is "):
        converted(tmp_path, with_arguments(meanflow_weights(), **GUIDED | {key: value}))


@pytest.mark.parametrize("set_", ["data.scale=0.13025", "data.shift=1", "data.normalise=channel"])
def test_the_recipe_cannot_be_set_apart_from_the_statistics(tmp_path, set_):
    with pytest.raises(AlphaflowError, match="Say it with --latents"):
        converted(tmp_path, sit_weights(), set_, family="sit")


def test_all_that_is_filled_in_is_printed_and_kept(tmp_path):
    torch.save(with_arguments(meanflow_weights(), **GUIDED), tmp_path / "theirs.pt")
    arguments = [str(tmp_path / "theirs.pt"), "--set", HEADS_SET, "--json", "-o"]
    done = CliRunner().invoke(command, [*arguments, str(tmp_path / "ours.safetensors")])
    assert done.exit_code == 0, done.output
    filled = json.loads(done.stdout)["filled"]
    assert filled.keys() >= {"recipe", "latents", "autoencoder", "heads"}
    assert filled["heads"] == f"{HEADS} (--set model.heads)"
    assert filled["recipe"].startswith("meanflow-b2 (no better knowledge)")
    assert load_checkpoint(tmp_path / "ours.safetensors").origin["converted"]["filled"] == filled


def test_statistics_and_heads_that_stood_in_the_file_are_not_called_filled_in(tmp_path):
    torch.save(published_snapshot(), tmp_path / "mine.pt")
    outcome = convert(tmp_path / "mine.pt", tmp_path / "ours.safetensors", ConvertOptions())
    assert outcome.filled.keys() == {"recipe", "autoencoder"}
    assert outcome.stated.keys() >= {"num_heads", "latents"}


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_which_weights_a_bare_table_holds_is_said(tmp_path, weights):
    outcome, checkpoint = converted(tmp_path, sit_weights(), family="sit", weights=weights)
    assert outcome.filled["weights"].startswith(weights)
    assert checkpoint.origin["weights"] == outcome.weights == weights


def test_a_block_number_is_no_number_of_blocks(tmp_path):
    tree = sit_weights()
    tree["blocks.3000.attn.proj.bias"] = torch.zeros(96)
    with pytest.raises(AlphaflowError, match="has 3 blocks, but numbers them up to 3000"):
        converted(tmp_path, tree, family="sit")


def test_nothing_is_built_before_the_shapes_agree(tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(main, "build_network", lambda recipe: built.append(recipe.model.dim))
    tree = sit_weights() | {"x_embedder.proj.weight": torch.zeros(60000, 4, 2, 2)}
    with pytest.raises(AlphaflowError, match="of another shape"):
        converted(tmp_path, tree, family="sit")
    assert built == []


def test_tables_that_share_their_bytes_are_refused(tmp_path):
    one = torch.zeros(96, 96)
    with pytest.raises(AlphaflowError, match="share their bytes"):
        converted(tmp_path, {"blocks.0.attn.proj.weight": one, "blocks.1.attn.proj.weight": one}, family="sit")


def test_tables_that_overlap_in_a_larger_store_are_refused(tmp_path):
    weights, store = sit_weights(), torch.zeros(100_000)
    for name, start in (("x_embedder.proj.bias", 0), ("final_layer.linear.bias", 48)):
        weights[name] = store[start : start + weights[name].numel()]
    with pytest.raises(AlphaflowError, match="share their bytes"):
        converted(tmp_path, weights, family="sit")


def test_views_that_do_not_overlap_are_weights_like_others(tmp_path):
    weights, store = sit_weights(), torch.randn(200_000)
    for name, start in (("x_embedder.proj.bias", 0), ("y_embedder.embedding_table.weight", 96)):
        weights[name] = store[start : start + weights[name].numel()].reshape(weights[name].shape)
    _, checkpoint = converted(tmp_path, weights, family="sit")
    assert torch.equal(checkpoint.weights["patch_embed.proj.bias"], store[:96])


@pytest.mark.parametrize("shape", [(4,), (3, 1, 1), (4, 9, 9), (2, 4, 1, 1), ()], ids=str)
def test_statistics_of_a_wrong_shape_are_refused(tmp_path, shape):
    save_file({"mean": torch.zeros(shape), "std": torch.ones(shape)}, tmp_path / "l.safetensors")
    with pytest.raises(AlphaflowError, match=r"l\.safetensors: .*shapes .*wanted \(.*, 1, 1\) or"):
        converted(tmp_path, sit_weights(), family="sit", latents=str(tmp_path / "l.safetensors"))
    assert not (tmp_path / "ours.safetensors").exists()


@pytest.mark.parametrize("name", ["empty.safetensors", "empty.pt"])
def test_an_empty_file_is_named(tmp_path, name):
    (save_file if name.endswith("safetensors") else torch.save)({}, tmp_path / name)
    with pytest.raises(AlphaflowError, match="it holds 'nothing'"):
        convert(tmp_path / name, tmp_path / "ours.safetensors", ConvertOptions())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_configuration_that_is_not_finite_is_refused(tmp_path, value):
    tree = published_snapshot()
    tree["cfg"]["model"]["dim"] = value
    with pytest.raises(AlphaflowError, match="not one of numbers"):
        converted(tmp_path, tree)


@pytest.mark.parametrize("heads", [-6, 5, 0, 6.5])
def test_heads_that_do_not_divide_are_refused(tmp_path, heads):
    tree = published_snapshot()
    tree["cfg"]["model"]["num_heads"] = heads
    with pytest.raises(AlphaflowError, match=f"{heads} attention heads do not divide 96"):
        converted(tmp_path, tree)


BROKEN = {
    "patches of 0x0": ({"x_embedder.proj.weight": torch.zeros(96, 4, 0, 0)}, "patches of 0x0"),
    "no first time layer": ({"t_embedder.mlp.0.weight": None}, "1 missing, such as time_embed.mlp.0.weight"),
    "no last bias": ({"final_layer.linear.bias": None}, "final.linear.bias is missing"),
    "a short last bias": ({"final_layer.linear.bias": torch.zeros(5)}, "final.linear.bias is missing or short"),
    "a label table of no rows": ({"y_embedder.embedding_table.weight": torch.zeros(())}, "not whole"),
    "a last bias that is one number": ({"final_layer.linear.bias": torch.zeros(())}, "final.linear.bias is missing or"),
    "a table of nothing": ({"pos_embed": torch.zeros(0)}, "not whole"),
    "flat patches": ({"x_embedder.proj.weight": torch.zeros(96)}, "not whole"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_table_that_is_no_network_gets_its_line(tmp_path, what):
    change, message = BROKEN[what]
    tree = {name: value for name, value in (sit_weights() | change).items() if value is not None}
    with pytest.raises(AlphaflowError, match=message):
        converted(tmp_path, tree, family="sit")


@pytest.mark.parametrize("ready", [torch.zeros(0), torch.zeros(2, 2), torch.zeros(())])
def test_statistics_that_are_not_there_are_asked_for_however_it_is_written(tmp_path, ready):
    tree = published_snapshot()
    tree["ema"]["are_ldm_stats_inited"] = ready
    with pytest.raises(AlphaflowError, match="holds no latents' statistics"):
        converted(tmp_path, tree)


ODD_AUTOENCODERS = {
    "20,000 levels": (
        {f"encoder.down_blocks.{i}.x": torch.zeros(1) for i in range(20_000)},
        "ours.safetensors (its recipe):28: data.image_size must be 8,192 or less, got 32768",
    ),
    "a layer without a shape": (
        {"encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(())},
        "ours.safetensors: the autoencoder in the snapshot is no whole one (tuple index out of range).",
    ),
}


@pytest.mark.parametrize("what", ODD_AUTOENCODERS)
def test_an_autoencoder_of_odd_names_and_shapes_is_named(tmp_path, what):
    names, message = ODD_AUTOENCODERS[what]
    tree = published_snapshot()
    tree["ema"] |= {f"autoencoder.model.model.{name}": value for name, value in names.items()}
    with pytest.raises(AlphaflowError) as error:
        converted(tmp_path, tree)
    assert str(error.value) == message
