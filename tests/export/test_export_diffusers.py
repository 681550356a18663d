"""The folder for diffusers: loaded as anybody loads it, it gives the pictures of `alphaflow sample`."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from exported_models import latent_checkpoint, same_pictures, sampled
from hub_fixtures import hub, project_run  # noqa: F401 (fixtures)
from small_models import pixel_checkpoint

from alphaflow_cli.cli import run
from alphaflow_cli.export import diffusers
from alphaflow_cli.export.transformer_alphaflow import AlphaFlowTransformer2DModel

TWO = {"two_step_sampler": "consistency", "two_step_times": (1.0, 0.55, 0.0)}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return latent_checkpoint(tmp_path_factory.mktemp("latents") / "latents.safetensors", sample=TWO)


@pytest.fixture(scope="module")
def folder(latents):
    assert run(["export", str(latents), "--to", "diffusers", "-o", str(latents.parent / "pipeline")]) == 0
    return latents.parent / "pipeline"


def load(place, **more):
    pipe = DiffusionPipeline.from_pretrained(place, trust_remote_code=True, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, labels, steps=1):
    seeds = [torch.Generator().manual_seed(seed) for seed in range(16)]
    return pipe(class_labels=labels, num_inference_steps=steps, generator=seeds, output_type="np").images


def as_bytes(images):
    return (images * 255).round().astype("uint8")


@pytest.mark.parametrize("nfe", [1, 2, 3])
def test_the_pipeline_gives_the_pictures_of_sample(latents, folder, tmp_path, nfe):
    wanted = sampled(latents, tmp_path, nfe=nfe)
    same_pictures(f"diffusers, latents, {nfe} NFE", as_bytes(draw(load(folder), [3] * 16, nfe)), wanted)


def test_classes_have_names_and_an_unknown_one_is_refused(folder):
    pipe = load(folder)
    named = pipe(class_labels="class 3", generator=torch.Generator().manual_seed(0)).images[0]
    numbered = pipe(class_labels=[3], generator=[torch.Generator().manual_seed(0)]).images[0]
    assert named.size == (32, 32)
    assert named.tobytes() == numbered.tobytes()
    for several in (torch.tensor([3]), np.array([3]), np.int64(3)):
        seeds = [torch.Generator().manual_seed(0)]
        assert pipe(class_labels=several, generator=seeds).images[0].tobytes() == numbered.tobytes()
    with pytest.raises(ValueError, match="num_inference_steps 0: at least one step"):
        pipe(class_labels=[3], num_inference_steps=0)
    for wrong in ("unicorn", 10, -1):
        with pytest.raises(ValueError, match="is no class of this model, 0 to 9: class 0, "):
            pipe(class_labels=[wrong])
    with pytest.raises(ValueError, match="name a class for each picture"):
        pipe()


def test_every_file_is_in_the_hubs_convention_and_no_path_of_this_machine_is_in_it(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_alphaflow", "AlphaFlowPipeline"]
    assert [name for name, value in index.items() if isinstance(value, list)] == [
        "_class_name", "transformer", "scheduler", "vae"
    ]  # fmt: skip
    assert index["scheduler"] == ["diffusers", "FlowMapEulerDiscreteScheduler"]
    for path in folder.rglob("*"):
        assert not path.is_file() or str(folder.parent).encode() not in path.read_bytes(), path


def test_a_pipeline_that_diffusers_saved_loads_again(folder, tmp_path, monkeypatch):
    pipe = load(folder)
    pipe.save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_alphaflow", "AlphaFlowPipeline"]
    assert index["transformer"] == ["transformer_alphaflow", "AlphaFlowTransformer2DModel"]
    for name in ("pipeline_alphaflow.py", "transformer/transformer_alphaflow.py"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))  # of another machine
    assert (draw(load(tmp_path / "again"), [3] * 16, 2) == draw(pipe, [3] * 16, 2)).all()


def test_a_model_without_classes_takes_a_number_of_pictures(tmp_path):
    model = pixel_checkpoint(tmp_path / "m.safetensors", classes=0)
    assert run(["export", str(model), "--to", "diffusers", "-o", str(tmp_path / "pipeline")]) == 0
    pipe = load(tmp_path / "pipeline")
    assert len(pipe(num_images=3).images) == 3
    with pytest.raises(ValueError, match="this model has no classes"):
        pipe(class_labels=[1])
    with pytest.raises(ValueError, match="no null label"):
        pipe(guidance_scale=2.0)


@pytest.mark.parametrize(
    ("sample", "line"),
    [({"sampler": "heun", "nfe": 9}, "sampled by heun, whose steps FlowMapEulerDiscreteScheduler does not make")],
)
def test_what_diffusers_cannot_do_is_refused_in_one_line(tmp_path, capsys, sample, line):
    model = latent_checkpoint(tmp_path / "m.safetensors", sample=sample)
    assert run(["export", str(model), "--to", "diffusers", "-o", str(tmp_path / "pipeline")]) == 1
    assert line in capsys.readouterr().err
    assert not (tmp_path / "pipeline").exists()


def test_a_pipeline_of_other_pictures_is_refused_and_cannot_be_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("alphaflow_cli.export.graph.MOST_LEVELS", -1)
    model = pixel_checkpoint(tmp_path / "m.safetensors")
    assert run(["export", str(model), "--to", "diffusers", "-o", str(tmp_path / "pipe")]) == 1
    assert "pipe: not written, because it would give other pictures" in capsys.readouterr().err
    assert not (tmp_path / "pipe" / "model_index.json").exists()


def test_a_folder_with_other_files_is_kept(latents, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert run(["export", str(latents), "--to", "diffusers", "-o", str(tmp_path)]) == 1
    assert "holds other files; nothing was overwritten" in capsys.readouterr().err


def interrupted(*_):
    raise KeyboardInterrupt


def test_an_export_that_breaks_off_leaves_no_pipeline_and_is_gone_on_with(latents, tmp_path, monkeypatch):
    line = ["export", str(latents), "--to", "diffusers", "-o", str(tmp_path / "pipeline")]

    def break_off():
        with monkeypatch.context() as broken:
            broken.setattr(diffusers, "save_tensors", interrupted)
            assert run(line) == 130
        assert not (tmp_path / "pipeline" / "model_index.json").exists()

    break_off()
    assert run(line) == 0
    break_off()  # new weights beside the old index would be a pipeline that nobody wrote


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_push_puts_the_pipeline_beside_the_weights(hub, project_run, tmp_path):  # noqa: F811
    wanted = sampled(project_run, tmp_path)
    assert run(["push", "runs/tiny", "me/tiny", "--diffusers", "--dry-run"]) == 0
    same_pictures("diffusers beside pushed weights", as_bytes(draw(load(project_run / "hub"), [3] * 16)), wanted)
    assert run(["push", "runs/tiny", "me/tiny", "--diffusers", "--dry-run"]) == 0  # into the same folder
    assert run(["push", "runs/tiny", "me/tiny", "--dry-run"]) == 0
    assert not (project_run / "hub" / "model_index.json").exists()  # no old pipeline beside new weights
    assert not [path for path in (project_run / "hub" / "transformer").rglob("*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_diffusers_loads_the_pipeline_from_the_hub(hub, project_run, tmp_path):  # noqa: F811
    wanted = sampled(project_run, tmp_path)
    assert run(["push", "runs/tiny", "me/tiny", "--diffusers"]) == 0
    script = (
        "import numpy, sys, torch\nfrom diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained('me/tiny', trust_remote_code=True)\n"
        "seeds = [torch.Generator().manual_seed(seed) for seed in range(16)]\n"
        "images = pipe(class_labels=[3] * 16, generator=seeds, output_type='np').images\nnumpy.save('made', images)\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "another"), "HF_HUB_DISABLE_XET": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=environment)
    same_pictures("diffusers from the Hub, pixels", as_bytes(np.load(tmp_path / "made.npy")), wanted)
    assert run(["push", "runs/tiny", "me/tiny"]) == 0  # a version without it leaves no old pipeline behind
    assert not {"model_index.json", "transformer/config.json"} & set(hub.files("me/tiny"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sample", "model"), [({}, {"prediction": "noise"}), ({}, {"prediction": "data"}), ({"guidance": 1.5}, {})]
)
def test_every_prediction_and_guidance_at_sampling(tmp_path, sample, model):
    path = latent_checkpoint(tmp_path / "m.safetensors", sample=sample, **model)
    assert run(["export", str(path), "--to", "diffusers", "-o", str(tmp_path / "pipeline")]) == 0
    same_pictures(
        f"diffusers, {sample or model}", as_bytes(draw(load(tmp_path / "pipeline"), [3] * 16)), sampled(path, tmp_path)
    )


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["velocity", "noise", "data"])
def test_the_transformer_computes_in_bf16_too(prediction):
    sizes = {"sample_size": 4, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "label_rows": 0}
    net = AlphaFlowTransformer2DModel(**sizes, prediction=prediction).to(torch.bfloat16)
    assert net(torch.randn(2, 4, 4, 4).bfloat16(), torch.rand(2)).sample.isfinite().all()


def test_the_folder_needs_no_alphaflow(folder, tmp_path):
    script = (
        "import sys, torch\nfrom diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "pipe(class_labels=[3], generator=[torch.Generator().manual_seed(0)])\n"
        "sys.exit('alphaflow_cli' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
