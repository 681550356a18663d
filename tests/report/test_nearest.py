"""The nearest training pictures of samples, and what a new picture would have."""

import pytest
import torch
from run_pages import Page, report
from train_helpers import make_recipe

from alphaflow_cli.core.pixels import from_uint8
from alphaflow_cli.data.store import open_store
from alphaflow_cli.latents.encode import StoreRequest
from alphaflow_cli.latents.prepare import prepare_store
from alphaflow_cli.model.build import build_network
from alphaflow_cli.model.checkpoint import Checkpoint, save_checkpoint
from alphaflow_cli.recipe import dump_recipe
from alphaflow_cli.report import nearest as room
from alphaflow_cli.report.nearest import nearest, nearest_of, training_latents
from alphaflow_cli.runtime.processes import Processes

TEXT = """
model: {dim: 16, depth: 1, heads: 2, patch: 4}
data:
  {autoencoder: none, image_size: 16, channels: 3, latent_size: 16, classes: 10, normalise: scale, flips: true}
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "store"
    prepare_store(StoreRequest("shapes:40", 16, "none", flips=True), folder, Processes(torch.device("cpu")))
    return folder


@pytest.fixture
def run(store, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = make_recipe(tmp_path, f"data.store={store}", text=TEXT)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    origin = {"step": 3, "weights": "ema", "autoencoder": {"id": "none"}}
    checkpoint = Checkpoint(build_network(recipe).state_dict(), recipe, 0 * one, one, origin)
    save_checkpoint(folder / "model.safetensors", checkpoint)
    return folder, recipe


def test_the_nearest_are_found_by_plain_arithmetic_and_a_picture_is_not_its_own_neighbour():
    generator = torch.Generator().manual_seed(0)
    x, known = torch.randn(3, 2, 4, 4, generator=generator), torch.randn(7, 2, 4, 4, generator=generator)
    distances, places = nearest(x, known, 2)
    slow = torch.stack([torch.stack([(a - b).square().mean().sqrt() for b in known]) for a in x])
    torch.testing.assert_close(distances, slow.sort(dim=1).values[:, :2])
    assert torch.equal(places, slow.argsort(dim=1)[:, :2])
    both = torch.cat([known, known.flip(-1)])  # and mirror images
    own, _ = nearest(known, both, 1, but=torch.arange(7), period=7)
    assert own.min() > 0.5, "neither the picture nor its mirror image"
    assert nearest(known, both, 1)[0].max() == 0.0


def test_the_training_pictures_are_those_of_the_store_and_their_mirror_images(store):
    opened = open_store(store, "full")
    real = training_latents(opened, mirrored=True)
    assert real.shape == (80, 3, 16, 16)
    assert torch.equal(real[40:], real[:40].flip(-1))
    assert real.abs().max() <= 1
    assert torch.equal(real, training_latents(opened, mirrored=True))


def test_the_page_shows_samples_beside_their_nearest_training_pictures(run, capsys):
    folder, _ = run
    page = Page(report(folder, capsys).read_text(encoding="utf-8"))
    assert "Nearest training pictures" in page.text
    assert "the nearest of the 40 training pictures" in page.text
    assert any(source.startswith("data:image/webp;base64,") for source in page.sources)
    assert "0 of 64 samples are nearer" in page.text, "an untrained network draws noise"


def test_a_network_that_repeats_its_training_pictures_is_found_out(run, store, monkeypatch):
    folder, recipe = run
    real = training_latents(open_store(store, "full"), mirrored=False)
    copies = ((real + 1) * 127.5).round().to(torch.uint8)

    def repeat(self, latents):
        return real[torch.arange(len(latents)) % len(real)]

    monkeypatch.setattr(room.Generator, "_decoded", repeat)
    shown = nearest_of(folder, recipe)
    assert shown.texts[2].startswith("64 of 64 samples are nearer")
    assert torch.equal(from_uint8(copies), real)


def test_many_pictures_or_none_here_leave_the_section_out(run, tmp_path, monkeypatch):
    folder, recipe = run
    monkeypatch.setattr(room, "FEW", 39)
    assert nearest_of(folder, recipe) is None
    assert nearest_of(folder, make_recipe(tmp_path, "data.store=nowhere", text=TEXT)) is None
    assert nearest_of(folder, make_recipe(tmp_path, text=TEXT)) is None


def test_a_gpu_that_a_run_fills_costs_the_section_and_not_the_page(run, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(room, "_compare", full)
    (text,) = nearest_of(*run).texts
    assert text.startswith("The training pictures could not be compared: out of memory (CUDA out of memory.")


def test_a_damaged_store_costs_the_section_and_not_the_page(run, store, tmp_path, capsys):
    folder, _ = run
    shard = next(iter(store.glob("*.safetensors")))
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-100])
    try:
        assert "The training pictures could not be compared" in report(folder, capsys).read_text(encoding="utf-8")
    finally:
        shard.write_bytes(kept)
