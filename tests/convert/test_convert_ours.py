"""Checkpoints of ours, honest and not: what reading them and writing the published form refuse."""

import resource
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from hub_fixtures import hub  # noqa: F401 (a fixture)
from safetensors.torch import load_file
from snapshots import published_snapshot, tiny_autoencoder

from alphaflow_cli.cli import run
from alphaflow_cli.convert import ConvertOptions, convert, export
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import write_by
from alphaflow_cli.model.build import build_network
from alphaflow_cli.model.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture
def ours(tmp_path):
    """A checkpoint of ours."""
    torch.save(published_snapshot(), tmp_path / "theirs.pt")
    convert(tmp_path / "theirs.pt", tmp_path / "ours.safetensors", ConvertOptions())
    return tmp_path / "ours.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 60000}, ": its weights are not those of its recipe"),
        ({"depth": 3_000_000}, r" \(its recipe\):\d+: model.depth must be 10,000 or less"),
        ({"dim": 6 * 10**11}, r" \(its recipe\):\d+: model.dim must be 65,536 or less"),
    ],
)
def test_a_checkpoint_of_ours_that_describes_a_larger_network_is_refused(ours, tmp_path, change, message):
    checkpoint = load_checkpoint(ours)
    recipe = replace(checkpoint.recipe, model=replace(checkpoint.recipe.model, **change))
    save_checkpoint(tmp_path / "large.safetensors", replace(checkpoint, recipe=recipe))
    with pytest.raises(AlphaflowError, match=r"large\.safetensors" + message):
        load_checkpoint(tmp_path / "large.safetensors")


def test_statistics_of_a_wrong_shape_in_a_checkpoint_of_ours_are_refused(ours, tmp_path):
    checkpoint, wrong = load_checkpoint(ours), torch.ones(3, 1, 1, dtype=torch.float64)
    save_checkpoint(tmp_path / "wrong.safetensors", replace(checkpoint, mean=0 * wrong, std=wrong))
    with pytest.raises(AlphaflowError, match=r"wrong\.safetensors: the latents' mean and std have the shapes \(3,"):
        load_checkpoint(tmp_path / "wrong.safetensors")


def test_a_checkpoint_of_ours_needs_no_conversion(ours, tmp_path):
    with pytest.raises(AlphaflowError, match="a checkpoint of alphaflow already"):
        convert(ours, tmp_path / "again.safetensors", ConvertOptions())


def test_a_full_disk_gets_one_line_and_leaves_nothing(ours, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(AlphaflowError, match=r"back\.pt: cannot be written: .*disk full"):
            export(ours, tmp_path / "back.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path for path in tmp_path.iterdir() if "back" in path.name]


def test_a_bug_of_a_writer_stays_a_bug_and_leaves_nothing(tmp_path):
    def broken(path):
        path.write_text("half")
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        write_by(tmp_path / "x", broken)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_ours_that_lacks_a_tensor_is_not_exported(ours, tmp_path):
    checkpoint = load_checkpoint(ours)
    weights = {name: value for name, value in checkpoint.weights.items() if name != "final.linear.bias"}
    save_checkpoint(tmp_path / "short.safetensors", replace(checkpoint, weights=weights))
    with pytest.raises(AlphaflowError, match=r"1 missing, such as final\.linear\.bias"):
        export(tmp_path / "short.safetensors", tmp_path / "back.pt")


def test_an_origin_that_is_no_table_is_named(ours, tmp_path):
    save_checkpoint(tmp_path / "odd.safetensors", replace(load_checkpoint(ours), origin=[]))
    assert load_file(tmp_path / "odd.safetensors")
    with pytest.raises(AlphaflowError, match=r"odd\.safetensors \(its origin\): a table is wanted, this is a list"):
        load_checkpoint(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("option", [["--json"], ["--weights", "raw"], ["--weights", "ema"], ["--from", "sit"]])
def test_options_that_the_way_back_ignores_are_refused(ours, tmp_path, capsys, option):
    assert run(["convert", str(ours), "--to", "alphaflow", "-o", str(tmp_path / "back.pt"), *option]) == 2
    assert option[0] in capsys.readouterr().err
    assert not (tmp_path / "back.pt").exists()


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_the_way_back_takes_a_folder_and_a_model_of_the_hub_with_its_autoencoder(hub, tmp_path, capsys):  # noqa: F811
    torch.save(published_snapshot(autoencoder=tiny_autoencoder()), tmp_path / "theirs.pt")
    convert(tmp_path / "theirs.pt", tmp_path / "ours.safetensors", ConvertOptions())
    assert run(["push", str(tmp_path / "ours.safetensors"), "me/ours"]) == 0, capsys.readouterr().err
    assert run(["pull", "me/ours", "-o", str(tmp_path / "pulled")]) == 0
    for name, source in (("a", tmp_path / "ours.safetensors"), ("b", tmp_path / "pulled"), ("c", "me/ours")):
        assert run(["convert", str(source), "--to", "alphaflow", "-o", str(tmp_path / f"{name}.pt")]) == 0
    first, *others = (torch.load(tmp_path / f"{name}.pt", weights_only=False)["ema"] for name in "abc")
    assert any(name.startswith("autoencoder.") for name in first)
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], first[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--to", "alphaflow", "-o", "back.safetensors"], "give it the ending .pt"),
        (["-o", "back.pt"], "what is written is .safetensors; the published form is --to alphaflow"),
    ],
)
def test_a_name_that_hides_the_form_is_refused(ours, tmp_path, capsys, monkeypatch, options, line):
    monkeypatch.chdir(tmp_path)
    assert run(["convert", str(ours), *options]) == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / options[-1]).exists()


def test_a_published_snapshot_lends_the_rest_of_its_configuration(ours, tmp_path, capsys):
    theirs = published_snapshot()
    theirs["cfg"]["model"] |= {"target_class": "src.models.DiT", "dim": 768}
    theirs["cfg"]["sampling"] = {"target_class": "src.sampling.RecFlow", "num_steps": 256, "time_shifting": 1.0}
    theirs["cfg"]["env"] = {"deep": [{"target_class": "x"}, OrderedDict(a=1)]}
    torch.save(theirs, tmp_path / "published.pt")
    line = ["convert", str(ours), "--to", "alphaflow", "-o", str(tmp_path / "back.pt")]
    assert run([*line, "--cfg-from", str(tmp_path / "published.pt")]) == 0
    assert "target_class" not in capsys.readouterr().err
    cfg = torch.load(tmp_path / "back.pt", weights_only=True)["cfg"]
    assert (cfg["model"]["target_class"], cfg["model"]["dim"]) == ("src.models.DiT", 96)
    assert cfg["sampling"] | {"target_class": "src.sampling.RecFlow", "num_steps": 1} == cfg["sampling"]
    assert cfg["env"] == {"deep": [{"target_class": "x"}, {"a": 1}]}
    assert (cfg["loss"]["alpha_cfg"]["scheduler"], cfg["loss"]["alpha_cfg"]["change_end_steps"]) == ("sigmoid", 400_000)


def test_without_a_snapshot_the_missing_class_names_are_told(ours, tmp_path, capsys):
    assert run(["convert", str(ours), "--to", "alphaflow", "-o", str(tmp_path / "back.pt")]) == 0
    streams = capsys.readouterr()
    assert "--cfg-from SNAPSHOT.pt" in streams.err
    assert "no autoencoder is in it" in streams.err
    assert streams.out == f"{tmp_path / 'back.pt'}\n"


def test_their_schedules_are_replaced_where_they_stand(ours, tmp_path):
    theirs = published_snapshot()
    schedule = {"scheduler": "constant", "initial_value": 0.0, "extra": 1}
    theirs["cfg"]["loss"] = {"alpha": schedule, "ratio_fm": 0.75, "name": "mf"}
    torch.save(theirs, tmp_path / "published.pt")
    export(ours, tmp_path / "back.pt", template=tmp_path / "published.pt")
    loss = torch.load(tmp_path / "back.pt", weights_only=True)["cfg"]["loss"]
    assert loss.keys() == {"alpha", "ratio_fm", "name", "cfg_params"}
    assert (loss["alpha"]["scheduler"], loss["alpha"]["extra"]) == ("sigmoid", 1)
    assert loss["ratio_fm"]["initial_value"] == 0.5


def test_a_configuration_that_never_ends_is_named(ours, tmp_path):
    theirs = published_snapshot()
    theirs["cfg"]["loop"] = theirs["cfg"]
    torch.save(theirs, tmp_path / "published.pt")
    with pytest.raises(AlphaflowError, match="nested without end"):
        export(ours, tmp_path / "back.pt", template=tmp_path / "published.pt")


@pytest.mark.parametrize("tree", [{"ema": {}}, {"cfg": {"model": 3}}, {"cfg": []}])
def test_a_snapshot_that_lends_nothing_is_named(ours, tmp_path, tree):
    torch.save(tree, tmp_path / "published.pt")
    with pytest.raises(AlphaflowError, match=r"published\.pt: has no cfg with a model in it"):
        export(ours, tmp_path / "back.pt", template=tmp_path / "published.pt")


def test_what_was_written_is_read_again_with_all_it_says(ours, tmp_path):
    export(ours, tmp_path / "back.pt")
    outcome = convert(tmp_path / "back.pt", tmp_path / "again.safetensors", ConvertOptions())
    first, again = load_checkpoint(ours).recipe, load_checkpoint(tmp_path / "again.safetensors").recipe
    assert again.guidance == first.guidance
    assert (again.alpha.kind, again.alpha.gamma, again.train.steps) == ("sigmoid", 25.0, first.train.steps)
    assert again.times.equal_share == first.times.equal_share
    assert "loss.alpha_cfg" in outcome.stated


def test_the_autoencoder_may_be_named_on_the_way_back(tmp_path):
    autoencoder = tiny_autoencoder()
    torch.save(published_snapshot(autoencoder=autoencoder), tmp_path / "theirs.pt")
    convert(tmp_path / "theirs.pt", tmp_path / "ours.safetensors", ConvertOptions())
    (tmp_path / "ours-autoencoder").rename(tmp_path / "elsewhere")
    line = ["convert", str(tmp_path / "ours.safetensors"), "--to", "alphaflow", "-o", str(tmp_path / "back.pt")]
    assert run([*line, "--autoencoder", str(tmp_path / "elsewhere")]) == 0
    state = torch.load(tmp_path / "back.pt", weights_only=True)["ema"]
    for name, value in autoencoder.state_dict().items():
        assert torch.equal(state[f"autoencoder.model.model.{name}"], value)


def test_another_autoencoder_than_the_latents_are_of_is_refused_on_the_way_back(tmp_path):
    torch.save(published_snapshot(autoencoder=tiny_autoencoder()), tmp_path / "theirs.pt")
    convert(tmp_path / "theirs.pt", tmp_path / "ours.safetensors", ConvertOptions())
    tiny_autoencoder(seed=6).save_pretrained(tmp_path / "other")
    with pytest.raises(AlphaflowError, match="the latents were made with"):
        export(tmp_path / "ours.safetensors", tmp_path / "back.pt", autoencoder=str(tmp_path / "other"))
    with pytest.raises(AlphaflowError, match="holds an AutoencoderKL, not a none"):
        export(tmp_path / "ours.safetensors", tmp_path / "back.pt", autoencoder="none")
    assert not (tmp_path / "back.pt").exists()


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [("model", {"qk_norm": True}, "no norm of queries and keys"),
     ("data", {"autoencoder": "none", "channels": 3, "latent_size": 8, "image_size": 8}, "makes pixels without")],
)  # fmt: skip
def test_what_has_no_published_form_is_refused_in_one_line(ours, tmp_path, capsys, part, change, message):
    checkpoint = load_checkpoint(ours)
    recipe = replace(checkpoint.recipe, **{part: replace(getattr(checkpoint.recipe, part), **change)})
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    weights = build_network(recipe).state_dict()
    save_checkpoint(
        tmp_path / "odd.safetensors", replace(checkpoint, recipe=recipe, weights=weights, mean=0 * one, std=one)
    )
    assert run(["convert", str(tmp_path / "odd.safetensors"), "--to", "alphaflow", "-o", str(tmp_path / "b.pt")]) == 1
    _, line = capsys.readouterr().err.splitlines()  # the first says what begins
    assert message in line


def test_a_snapshot_for_the_configuration_belongs_to_the_way_back(ours, tmp_path, capsys):
    assert run(["convert", str(ours), "-o", str(tmp_path / "x.safetensors"), "--cfg-from", str(ours)]) == 2
    assert "--cfg-from belongs to --to alphaflow" in capsys.readouterr().err
