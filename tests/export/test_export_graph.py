"""ONNX and torch.export: one graph gives the pictures of `alphaflow sample`, and what cannot be is said in one line."""

import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from exported_models import latent_checkpoint, noises, same_pictures, sampled
from small_models import checkpoint_m, pixel_checkpoint

from alphaflow_cli.cli import run
from alphaflow_cli.export import onnx
from alphaflow_cli.export.onnx import halve, pack
from alphaflow_cli.model.build import build_network
from alphaflow_cli.model.checkpoint import save_checkpoint
from alphaflow_cli.recipe import load_recipe


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    return pixel_checkpoint(tmp_path_factory.mktemp("pixels") / "pixels.safetensors", side=16)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    two = {"two_step_sampler": "consistency", "two_step_times": (1.0, 0.5, 0.0)}
    return latent_checkpoint(tmp_path_factory.mktemp("latents") / "latents.safetensors", sample=two)


def export(*args):
    return run(["export", *map(str, args)])


def by_onnx(path, given):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, given)[0].transpose(0, 2, 3, 1), {each.name: each for each in session.get_inputs()}


@pytest.fixture(scope="module")
def graph(pixels):
    assert export(pixels, "--to", "onnx", "-o", pixels.with_name("m.onnx")) == 0
    return pixels.with_name("m.onnx")


def test_onnx_runtime_gives_the_pictures_of_sample_at_any_batch(graph, pixels, tmp_path):
    wanted = sampled(pixels, tmp_path)
    noise = noises((3, 16, 16), range(16))
    for batch in (1, 16):
        made, _ = by_onnx(graph, {"noise": noise[:batch], "label": np.full(batch, 3)})
        same_pictures(f"ONNX Runtime, pixels, batch {batch}", made, wanted[:batch])
    assert (wanted != sampled(pixels, tmp_path, classes="4")).mean() > 0.1  # the label is heard


@pytest.mark.slow
def test_the_decoder_is_in_the_graph_and_fresh_noise_is_an_input(latents, tmp_path, capfd):
    assert export(latents, "--to", "onnx", "--nfe", 2, "-o", tmp_path / "m.onnx") == 0
    out = capfd.readouterr()
    assert out.out.strip() == str(tmp_path / "m.onnx")
    assert "noise, label, fresh_noise_1 → image; consistency on 1, 0.5, 0" in out.err
    assert "checked on 5 pictures against the checkpoint: largest difference" in out.err
    generators = [torch.Generator().manual_seed(seed) for seed in range(16)]
    first = torch.stack([torch.randn(4, 4, 4, generator=g) for g in generators])
    fresh = torch.stack([torch.randn(4, 4, 4, generator=g, dtype=torch.float64) for g in generators])
    given = {"noise": first, "label": torch.full((16,), 3), "fresh_noise_1": fresh.float()}
    made, inputs = by_onnx(tmp_path / "m.onnx", {name: value.numpy() for name, value in given.items()})
    assert list(inputs) == ["noise", "label", "fresh_noise_1"]
    same_pictures("ONNX Runtime, latents, consistency at 2 NFE", made, sampled(latents, tmp_path, nfe=2))


def test_the_decoder_can_stay_outside(latents, tmp_path, capsys):
    assert export(latents, "--to", "torch", "--no-decoder", "-o", tmp_path / "m.pt2") == 0
    assert "→ latent" in capsys.readouterr().err
    made = torch.export.load(tmp_path / "m.pt2").module()(
        torch.from_numpy(noises((4, 4, 4), range(16))), torch.full((16,), 3)
    )
    run(["sample", str(latents), "--seeds", "0-15", "--classes", "3", "--latents", str(tmp_path / "z.npy")])
    assert np.abs(made.numpy() - (np.load(tmp_path / "z.npy") * 1.5 + 0.1)).max() < 1e-5


@pytest.mark.slow
def test_torch_export_gives_the_pictures_of_sample_at_any_batch(latents, tmp_path):
    assert export(latents, "--to", "torch", "-o", tmp_path / "m.pt2") == 0
    module = torch.export.load(tmp_path / "m.pt2").module()
    wanted = sampled(latents, tmp_path, seeds="0-69")
    for batch in (1, 70):  # diffusers' decoder looks whether there are 64
        made = module(torch.from_numpy(noises((4, 4, 4), range(batch))), torch.full((batch,), 3))
        same_pictures(f"torch.export, latents, batch {batch}", made.permute(0, 2, 3, 1).numpy(), wanted[:batch])


@pytest.mark.slow
def test_a_graph_of_other_pictures_is_refused_by_the_name_that_was_given(pixels, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("alphaflow_cli.export.graph.MOST_LEVELS", -1)
    assert export(pixels, "--to", "torch", "-o", tmp_path / "m.pt2") == 1
    assert f"error: {tmp_path / 'm.pt2'}: not written, because" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_fp16_halves_the_file_and_weights_of_many_graphs_lie_in_one_file(graph, tmp_path):
    small = onnx_ir.load(graph)
    halve(small)
    onnx_ir.save(small, tmp_path / "half.onnx")
    size, weights = (
        graph.stat().st_size,
        sum(value.const_value.nbytes for value in onnx_ir.load(graph).graph.initializers.values()),
    )
    assert size - (tmp_path / "half.onnx").stat().st_size > 0.45 * weights
    given = {"noise": noises((3, 16, 16), [0]), "label": np.array([3])}
    full, half = (by_onnx(path, given)[0].astype(int) for path in (graph, tmp_path / "half.onnx"))
    assert 0 < np.abs(full - half).max() <= 2
    models = [onnx_ir.load(graph) for _ in range(2)]
    pack(models, tmp_path / "weights.bin")
    for place, model in enumerate(models):
        onnx_ir.save(model, tmp_path / f"packed-{place}.onnx")
        assert (tmp_path / f"packed-{place}.onnx").stat().st_size < size - 0.9 * weights
        assert (by_onnx(tmp_path / f"packed-{place}.onnx", given)[0] == full).all()
    assert (tmp_path / "weights.bin").stat().st_size < size


@pytest.mark.parametrize(
    ("args", "code", "line"),
    [
        (["--to", "onnx", "--no-decoder"], 1, "--no-decoder: this model makes pixels without a decoder; leave it out."),
        (["--to", "torch", "--fp16"], 2, "--fp16 goes with --to onnx"),
        (["--to", "onnx", "--no-decoder", "--autoencoder", "x"], 2, "--no-decoder that nothing does: give one of them"),
        (["--to", "onnx", "--autoencoder", "x"], 1, "--autoencoder x: this model makes pixels without one"),
        (["--to", "tflite"], 2, "'tflite' is not one of 'onnx', "),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(pixels, tmp_path, capsys, args, code, line):
    assert export(pixels, *args, "-o", tmp_path / "m") == code
    assert line in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


@pytest.fixture
def graph_of(monkeypatch):
    """Have `export_onnx` write a graph whose weights take so many bytes; its list says what stood there before them."""
    before = []

    def export_of(out, nbytes):
        weight = SimpleNamespace(const_value=SimpleNamespace(nbytes=nbytes))
        model = SimpleNamespace(graph=SimpleNamespace(initializers={"weight": weight}))
        monkeypatch.setattr(onnx, "build_model", lambda source, half: model)
        onnx.export_onnx(None, out, half=False)

    monkeypatch.setattr(onnx, "reference_pictures", lambda source: ([], [], np.zeros(0)))
    monkeypatch.setattr(onnx, "pack", lambda models, path: (before.append(sorted(path.parent.iterdir())), path.touch()))
    monkeypatch.setattr(onnx, "write_graph", lambda model, source, out, *_, **__: out.touch())
    return export_of, before


def test_an_earlier_graph_does_not_stay_beside_the_weights_of_another(tmp_path, graph_of):
    """Beyond 2 GB the weights are written first, into a file of their own."""
    export_of, before = graph_of
    (tmp_path / "m.onnx").write_text("an earlier graph")
    export_of(tmp_path / "m.onnx", onnx.ONE_FILE + 1)
    assert before == [[]]


def test_weights_of_an_earlier_graph_do_not_stay_beside_one_that_has_its_own(tmp_path, graph_of):
    export_of, _ = graph_of
    (tmp_path / "m.onnx.data").touch()  # of nobody we know
    export_of(tmp_path / "m.onnx", 1)
    assert (tmp_path / "m.onnx.data").exists()
    export_of(tmp_path / "m.onnx", 1)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["m.onnx"]


def test_without_onnx_one_line_names_the_extra(pixels, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("alphaflow_cli.export.onnx.find_spec", lambda name: None if "onnx" in name else find(name))
    assert export(pixels, "--to", "onnx", "-o", tmp_path / "m.onnx") == 1
    assert "onnxruntime are not installed. Run: pip install " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["noise", "data"])
def test_every_prediction_can_be_exported(tmp_path, prediction):
    path = latent_checkpoint(tmp_path / "m.safetensors", prediction=prediction)
    assert export(path, "--to", "onnx", "--nfe", 2, "-o", tmp_path / "m.onnx") == 0
    given = {"noise": noises((4, 4, 4), range(16)), "label": np.full(16, 3)}
    made, inputs = by_onnx(tmp_path / "m.onnx", given)
    same_pictures(f"ONNX Runtime, {prediction}", made, sampled(path, tmp_path, nfe=2))
    assert set(inputs) == set(given)


@pytest.mark.slow
def test_guidance_at_sampling_is_in_the_graph(tmp_path, capsys):
    path = latent_checkpoint(tmp_path / "m.safetensors", sample={"guidance": 1.5})
    assert export(path, "--to", "onnx", "-o", tmp_path / "m.onnx") == 0
    assert "guidance 1.5" in capsys.readouterr().err
    made, _ = by_onnx(tmp_path / "m.onnx", {"noise": noises((4, 4, 4), range(16)), "label": np.full(16, 3)})
    same_pictures("ONNX Runtime, guidance 1.5", made, sampled(path, tmp_path))


@pytest.mark.slow
def test_a_network_that_is_told_its_guidance_can_be_exported(tmp_path, capsys):
    """The modern block, a prefix of tokens, a velocity head: improved MeanFlow, of which diffusers has no form."""
    recipe = load_recipe("imf-b2")
    pixels = {"autoencoder": "none", "image_size": 8, "channels": 3, "latent_size": 8, "classes": 10}
    data = replace(recipe.data, **pixels, normalise="scale", channel_mean=None, channel_std=None)
    model = replace(recipe.model, dim=32, depth=4, heads=2, patch=2, velocity_head=1)
    recipe = replace(recipe, data=data, model=model, train=replace(recipe.train, precision="fp32"))
    net, generator = build_network(recipe), torch.Generator().manual_seed(1)
    weights = {n: torch.randn(w.shape, generator=generator) * 0.05 for n, w in net.named_parameters()}
    save_checkpoint(tmp_path / "m.safetensors", checkpoint_m(recipe, weights))
    assert export(tmp_path / "m.safetensors", "--to", "onnx", "--nfe", 2, "-o", tmp_path / "m.onnx") == 0
    made, _ = by_onnx(tmp_path / "m.onnx", {"noise": noises((3, 8, 8), range(16)), "label": np.full(16, 3)})
    same_pictures("ONNX Runtime, iMF", made, sampled(tmp_path / "m.safetensors", tmp_path, nfe=2))
    assert export(tmp_path / "m.safetensors", "--to", "diffusers", "-o", tmp_path / "pipeline") == 1
    assert "the pipeline has no form of this network yet" in capsys.readouterr().err
