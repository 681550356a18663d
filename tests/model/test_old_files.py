"""What the first version of alphaflow wrote is read for ever. The files in old/ are kept as they are, whatever changes.

    old/model.safetensors   a finished checkpoint at step 60 (16 channels, one block, glyphs:40)
    old/seed-….png          four of its pictures, as the first version sampled them
    old/run.tar.gz          the same run at step 9, ended by SIGTERM: recipe, latents, checkpoint and state
    old/quickstart.yaml     the first quickstart, on glyphs:4000; runs of it carry it, and its numbers are compared with

When a change of the recipe or the checkpoint's form makes a test here fail, add a migration (recipe/migrations.py,
OLDER in model/checkpoint.py). Never make these files anew, and never remove them.
"""

import hashlib
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from alphaflow_cli.cli import run
from alphaflow_cli.model.checkpoint import load_checkpoint, save_checkpoint
from alphaflow_cli.recipe import load_recipe

OLD = Path(__file__).parent / "old"
MODEL = OLD / "model.safetensors"
WEIGHTS_SHA256 = "fed42c5611fe473ca4da2ace175bd226b53d23b8e04bb6b6c435b98b21f3ee1b"
FD_TINY_100 = 100.00960973792559  # of MODEL, by the first version
LAST_LOSS = 2.2311534374952315  # at step 60 of the run that MODEL came from
NEAR = 0.01  # Euclidean distance of all weights; between step 9 and step 60 it is 3.46, after resuming it was 0.001


@pytest.fixture
def old_run(tmp_path):
    with tarfile.open(OLD / "run.tar.gz") as archive:
        known = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python has it from 3.10.12, 3.11.4 on
        archive.extractall(tmp_path, **known)
    return tmp_path / "run"


def distance(one, other):
    """Euclidean, over the tensors of two files."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    return float(sum((a[name].double() - b[name].double()).square().sum() for name in a).sqrt())


def test_the_kept_checkpoint_is_untouched():
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(MODEL).items()):
        digest.update(name.encode() + str(tensor.dtype).encode() + tensor.contiguous().numpy().tobytes())
    assert digest.hexdigest() == WEIGHTS_SHA256


def test_an_old_checkpoint_draws_the_pictures_it_drew(tmp_path):
    assert run(["sample", str(MODEL), "--seeds", "0-3", "--out", str(tmp_path)]) == 0
    kept = sorted(OLD.glob("*.png"))
    assert [path.name for path in kept] == sorted(path.name for path in tmp_path.glob("*.png"))
    for path in kept:
        pairs = zip(Image.open(path).tobytes(), Image.open(tmp_path / path.name).tobytes(), strict=True)
        assert max(abs(old - new) for old, new in pairs) <= 1, path.name


def test_an_old_checkpoint_scores_what_it_scored(tmp_path, capsys):
    options = ["--metrics", "fd-tiny", "--images", "100", "--reference", "glyphs:200", "--out", str(tmp_path)]
    assert run(["eval", str(MODEL), "--nfe", "1", *options, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["evaluations"][-1]["rows"][0]
    assert row["name"] == "FD-tiny-100"
    assert row["value"] == pytest.approx(FD_TINY_100, rel=1e-3)


def test_an_old_checkpoint_is_read_by_convert(tmp_path, capsys):
    assert run(["convert", str(MODEL), "--to", "alphaflow", "-o", str(tmp_path / "old.pt")]) == 1
    assert "the published network has no norm of queries and keys" in capsys.readouterr().err  # its only objection


def test_an_old_checkpoint_is_written_anew_without_a_difference(tmp_path):
    old = load_checkpoint(MODEL)
    save_checkpoint(tmp_path / "new.safetensors", old)
    assert distance(MODEL, tmp_path / "new.safetensors") == 0
    new = load_checkpoint(tmp_path / "new.safetensors")
    assert (new.recipe, new.origin) == (old.recipe, old.origin)


def test_an_old_run_is_resumed_by_its_own_recipe_and_reported(old_run):
    before = (old_run / "recipe.yaml").read_bytes()
    assert run(["report", str(old_run), "-o", str(old_run / "before.html")]) == 0
    assert run(["train", str(old_run / "recipe.yaml"), "--out", str(old_run)]) == 0
    assert (old_run / "recipe.yaml").read_bytes() == before  # the format alone is no change of the recipe
    assert distance(MODEL, old_run / "model.safetensors") < NEAR
    last = json.loads((old_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["l"]) == (60, pytest.approx(LAST_LOSS, rel=1e-3))
    assert run(["report", str(old_run), "-o", str(old_run / "after.html")]) == 0


def test_an_old_run_refuses_another_recipe_and_names_only_what_differs(old_run, capsys):
    other = ["--set", "optim.lr=0.1", "--out", str(old_run)]
    assert run(["train", str(old_run / "recipe.yaml"), *other]) == 1
    differences = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  ")]
    assert differences == ["  optim.lr: 0.005 there, 0.1 requested"]


def test_the_first_quickstart_is_still_a_recipe():
    recipe = load_recipe(str(OLD / "quickstart.yaml"))
    assert (recipe.name, recipe.data.source, recipe.data.image_size) == ("quickstart", "glyphs:4000", 16)
    assert (recipe.train.steps, recipe.train.batch, recipe.guidance.kappa) == (2_600, 32, 0.75)
