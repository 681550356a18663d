"""A model whose latents are of a local autoencoder goes out with it, or not at all."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_fixtures import alphaflow, hub, write_checkpoint  # noqa: F401 (a fixture)
from safetensors.torch import load_file
from tiny_autoencoders import tiny_kl

import alphaflow_cli
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.model.find import step_name
from alphaflow_cli.nn.autoencoder import load_autoencoder
from alphaflow_cli.sample.grid import grid_png

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
SHAPE = ("data.latent_size=2", "data.channels=4", "model.patch=1")
PACKAGED = {"autoencoder/config.json", "autoencoder/diffusion_pytorch_model.safetensors"}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with an autoencoder in three forms; write_run makes runs/tiny of it."""
    monkeypatch.chdir(tmp_path)
    tiny_kl(Path("vae"))
    weights = Path("vae/diffusion_pytorch_model.safetensors")
    shutil.copyfile(weights, "vae.safetensors")
    Path("bin").mkdir()
    shutil.copyfile("vae/config.json", "bin/config.json")
    torch.save(load_file(weights), "bin/diffusion_pytorch_model.bin")
    return tmp_path


def write_run(name):
    """Trained on latents of that autoencoder, which the store knows by its bare name."""
    digest = load_autoencoder("vae", device=torch.device("cpu")).weights_sha256
    record = {"id": name, "revision": "", "weights_sha256": digest}
    Path("runs/tiny").mkdir(parents=True)
    sets = (*SHAPE, f"data.autoencoder={name}")
    write_checkpoint(Path("runs/tiny/model.safetensors"), sets=sets, autoencoder=record)


@pytest.mark.parametrize("name", ["vae", "vae.safetensors", "bin"])
def test_an_autoencoder_of_any_form_goes_along(hub, project, capsys, monkeypatch, name):  # noqa: F811
    write_run(name)
    code, said = alphaflow("push", "runs/tiny", capsys=capsys)
    assert code == 0, said
    files = hub.files("me/tiny")
    assert {path for path in files if path.startswith("autoencoder/")} == PACKAGED
    assert str(project).encode() not in b"".join(files.values())
    local = alphaflow_cli.load("runs/tiny/model.safetensors").sample(seeds=[0, 1], classes=3).tensor
    (project / "elsewhere").mkdir()
    monkeypatch.chdir(project / "elsewhere")
    assert torch.equal(alphaflow_cli.load("me/tiny").sample(seeds=[0, 1], classes=3).tensor, local)


def test_one_that_is_not_found_is_said_before_anything_is_made(hub, project, capsys):  # noqa: F811
    write_run("lost")
    code, said = alphaflow("push", "runs/tiny", capsys=capsys)
    assert code == 1
    assert "autoencoder lost, which is not on the Hub and was not found here" in said
    assert "me/tiny" not in hub.repos
    code, said = alphaflow("push", "runs/tiny", "--autoencoder", "bin", capsys=capsys)
    assert code == 0, said
    assert set(hub.files("me/tiny")) >= PACKAGED


def test_one_that_lies_in_the_folder_of_a_dry_run_is_not_deleted(project, capsys):
    write_run("vae")
    dry = ("push", "runs/tiny", "me/tiny", "--dry-run")
    assert alphaflow(*dry, capsys=capsys)[0] == 0
    Path("vae").rename("lost")
    code, said = alphaflow(*dry, "--autoencoder", "runs/tiny/hub/autoencoder", capsys=capsys)
    assert code == 1
    assert "runs/tiny/hub/autoencoder: lies in runs/tiny/hub, which is written anew" in said
    assert {path.name for path in Path("runs/tiny/hub/autoencoder").iterdir()} == {Path(each).name for each in PACKAGED}


@pytest.mark.parametrize("args", [(), ("--autoencoder", "other")])
def test_another_of_the_same_name_is_refused_before_anything_is_made(hub, project, capsys, args):  # noqa: F811
    write_run("vae")
    tiny_kl(project / "other", seed=9)
    if not args:
        shutil.rmtree("vae")
        Path("other").rename("vae")
    code, said = alphaflow("push", "runs/tiny", *args, capsys=capsys)
    assert code == 1
    assert "the latents were made with" in said
    assert "me/tiny" not in hub.repos


PICTURE = grid_png([[np.zeros((32, 32, 3), np.uint8)]])


def test_one_of_the_hub_stays_there(hub, project, capsys):  # noqa: F811
    write_run("user/vae")
    (project / "runs/tiny/samples").mkdir()
    (project / "runs/tiny/samples" / f"{step_name(100)}.png").write_bytes(PICTURE)
    assert alphaflow("push", "runs/tiny", capsys=capsys)[0] == 0
    assert not {path for path in hub.files("me/tiny") if path.startswith("autoencoder/")}


def test_a_model_of_pixels_takes_none(hub, project, capsys):  # noqa: F811
    path = write_checkpoint(project / "pixels.safetensors")
    code, said = alphaflow("push", path, "me/tiny", "--autoencoder", "vae", capsys=capsys)
    assert code == 1
    assert "makes pixels without a decoder" in said
    assert "me/tiny" not in hub.repos


def test_a_pulled_model_can_be_pushed_again(hub, project, capsys):  # noqa: F811
    write_run("vae")
    assert alphaflow("push", "runs/tiny", capsys=capsys)[0] == 0
    assert alphaflow("pull", "me/tiny", "-o", "got", capsys=capsys)[0] == 0
    shutil.rmtree("vae")
    assert alphaflow("push", "got", "me/again", capsys=capsys)[0] == 0
    assert hub.files("me/again")["model.safetensors"] == hub.files("me/tiny")["model.safetensors"]
    assert set(hub.files("me/again")) >= PACKAGED


@pytest.mark.parametrize(("name", "below"), [("me/vae", ""), ("me/model/vae", "vae/"), ("me/vae@v1", "")])
@pytest.mark.parametrize("form", ["vae", "bin"])
def test_one_of_the_hub_is_downloaded_once_and_then_found_in_the_cache(hub, project, form, name, below):  # noqa: F811
    repo = "/".join(name.split("@")[0].split("/")[:2])
    files = {f"{below}{path.name}": path.read_bytes() for path in Path(form).iterdir()}
    hub.add(repo, {**files, f"{below}diffusion_pytorch_model.fp16.safetensors": b"not wanted", "README.md": b"x"})
    if "@" in name:
        hub.repos[repo].refs["v1"] = hub.repos[repo].refs["main"]
    local = load_autoencoder(form, device=torch.device("cpu"))
    online = load_autoencoder(name, device=torch.device("cpu"))
    assert (online.weights_sha256, online.id) == (local.weights_sha256, name.split("@")[0])
    assert len(online.revision) == 40
    fetched = {path.name for path in (project / "cache").rglob("snapshots/**/*") if path.is_file()}
    assert fetched == {path.name for path in Path(form).iterdir()}
    count = len(hub.requests)
    assert load_autoencoder(name, device=torch.device("cpu")).revision == online.revision
    assert len(hub.requests) == count


def test_one_of_the_hub_that_comes_damaged_is_refused(hub, project):  # noqa: F811
    hub.add("me/vae", {"config.json": b"{}", "diffusion_pytorch_model.safetensors": b"x" * 100})
    with pytest.raises(AlphaflowError, match=r"_class_name"):
        load_autoencoder("me/vae", device=torch.device("cpu"))
    with pytest.raises(AlphaflowError, match=r"no such repository on the Hub.*--autoencoder DIR"):
        load_autoencoder("me/nothing", device=torch.device("cpu"))
