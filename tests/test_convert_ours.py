"""Checkpoints of ours, honest and not: what reading them and writing the published form refuse."""

import resource
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from snapshots import published_snapshot

from alphaflow_cli.cli import run
from alphaflow_cli.convert import Options, convert, export
from alphaflow_cli.engine.checkpoint import load_checkpoint, save_checkpoint
from alphaflow_cli.engine.files import write_atomically
from alphaflow_cli.errors import AlphaflowError


@pytest.fixture
def ours(tmp_path):
    """A checkpoint of ours."""
    torch.save(published_snapshot(), tmp_path / "theirs.pt")
    convert(tmp_path / "theirs.pt", tmp_path / "ours.safetensors", Options())
    return tmp_path / "ours.safetensors"


@pytest.mark.parametrize("change", [{"dim": 60000}, {"depth": 3_000_000}, {"dim": 6 * 10**11}])
def test_a_checkpoint_of_ours_that_describes_a_larger_network_is_refused(ours, tmp_path, change):
    checkpoint = load_checkpoint(ours)
    recipe = replace(checkpoint.recipe, model=replace(checkpoint.recipe.model, **change))
    save_checkpoint(tmp_path / "large.safetensors", replace(checkpoint, recipe=recipe))
    with pytest.raises(AlphaflowError, match=r"large\.safetensors: its weights are not those of its recipe"):
        load_checkpoint(tmp_path / "large.safetensors")


def test_statistics_of_a_wrong_shape_in_a_checkpoint_of_ours_are_refused(ours, tmp_path):
    checkpoint, wrong = load_checkpoint(ours), torch.ones(3, 1, 1, dtype=torch.float64)
    save_checkpoint(tmp_path / "wrong.safetensors", replace(checkpoint, mean=0 * wrong, std=wrong))
    with pytest.raises(AlphaflowError, match=r"wrong\.safetensors: the latents' mean and std have the shapes \(3,"):
        load_checkpoint(tmp_path / "wrong.safetensors")


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
        write_atomically(tmp_path / "x", broken)
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
    with pytest.raises(AlphaflowError, match=r"odd\.safetensors: its origin is a list"):
        load_checkpoint(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("option", [["--json"], ["--weights", "raw"], ["--weights", "ema"], ["--from", "sit"]])
def test_options_that_the_way_back_ignores_are_refused(ours, tmp_path, capsys, option):
    assert run(["convert", str(ours), "--to", "alphaflow", "-o", str(tmp_path / "back.pt"), *option]) == 2
    assert option[0] in capsys.readouterr().err
    assert not (tmp_path / "back.pt").exists()
