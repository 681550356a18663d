"""A folder that diffusers loads: model_index.json, the transformer, the scheduler, the autoencoder, the pipeline.

The code in it stands alone (transformer_alphaflow.py, pipeline_alphaflow.py: remote code in the Hub's convention) and
needs no alphaflow. An autoencoder of the Hub is noted by its id and commit; any other is written into `vae/`. The
folder is loaded as a user would load it, and its pictures are compared with the checkpoint's.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphaflow_cli.documents import Anything, Table, Text, read_json
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.export.graph import Difference, Exported, checked, reference_pictures, refuse_far
from alphaflow_cli.files import make_folder, write_whole
from alphaflow_cli.recipe.plan import has_null_label, is_guided, label_rows, null_label
from alphaflow_cli.sample.walk import plan_walk
from alphaflow_cli.tensors import save_tensors

PIPELINE, TRANSFORMER = "AlphaFlowPipeline", "AlphaFlowTransformer2DModel"
SCHEDULER = "FlowMapEulerDiscreteScheduler"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX, TRANSFORMER_CONFIG = "model_index.json", "transformer/config.json"
OUR_TRANSFORMER = Table({"_class_name": Text(one_of=(TRANSFORMER,))}, others=Anything())
SAMPLERS = ("trajectory", "consistency", "flow")  # that the scheduler's steps make
HERE = Path(__file__).parent


def check_diffusers(source: Exported) -> None:
    """Refuse early what cannot become a pipeline."""
    import diffusers

    recipe = source.generator.recipe
    if not hasattr(diffusers, SCHEDULER):
        raise AlphaflowError(
            f"--to diffusers: diffusers {diffusers.__version__} has no {SCHEDULER}. Run: pip install 'diffusers>=0.39'"
        )
    if recipe.sample.sampler not in SAMPLERS:
        raise AlphaflowError(
            f"--to diffusers: this model is sampled by {recipe.sample.sampler}, whose steps {SCHEDULER} does not make. "
            "--to onnx holds them."
        )


def check_pipeline_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than an earlier export."""
    if folder.is_dir() and any(folder.iterdir()) and not is_our_pipeline(folder):
        raise AlphaflowError(f"{folder}: holds other files; nothing was overwritten. Give a new or an empty folder.")


def is_our_pipeline(folder: Path) -> bool:
    """Whether an earlier export wrote this folder, or broke off in it."""
    try:
        read_json(folder / TRANSFORMER_CONFIG, OUR_TRANSFORMER, limit=1 << 24)
    except AlphaflowError:
        return False
    return True


def export_diffusers(source: Exported, folder: Path) -> Difference:
    """Write the folder, and load it once to compare its pictures."""
    check_diffusers(source)
    reference = reference_pictures(source)
    write_pipeline(source, folder)
    try:
        difference = checked(source, lambda inputs: run_pipeline(folder, source, inputs), reference)
        refuse_far(difference, folder)
    except BaseException:
        (folder / INDEX).unlink()  # without it nobody takes the folder for a pipeline
        raise
    return difference


def write_pipeline(source: Exported, folder: Path) -> None:
    """Write every file of the pipeline; model_index.json last, so that half a folder is none, nor two halves one."""
    import diffusers

    (folder / INDEX).unlink(missing_ok=True)  # of an earlier export
    version = {"_diffusers_version": diffusers.__version__}
    for name in ("transformer", "scheduler"):
        make_folder(folder / name)
    config = {"_class_name": TRANSFORMER, **version, **transformer_config(source)}
    _check_form(source, config)
    write_whole(folder / TRANSFORMER_CONFIG, _to_text(config))  # first: the folder is known as ours by it
    save_tensors(folder / "transformer" / WEIGHTS, _weights(source), {"format": "pt"})
    for name, place in (("transformer_alphaflow.py", "transformer"), ("pipeline_alphaflow.py", "")):
        write_whole(folder / place / name, (HERE / name).read_text(encoding="utf-8"))
    scheduler = {"_class_name": SCHEDULER, **version, "num_train_timesteps": 1000, "shift": 1.0}
    write_whole(folder / "scheduler" / "scheduler_config.json", _to_text(scheduler))
    vae = _autoencoder(source, folder)
    components = {
        "transformer": ["transformer_alphaflow", TRANSFORMER],
        "scheduler": ["diffusers", SCHEDULER],
        "vae": vae.pop("vae", [None, None]),
    }
    index = {"_class_name": ["pipeline_alphaflow", PIPELINE], **version, **components, **vae, **pipeline_config(source)}
    write_whole(folder / INDEX, _to_text(index))


def _to_text(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _weights(source: Exported) -> dict[str, Tensor]:
    return {name: value.float().contiguous() for name, value in source.generator.net.state_dict().items()}


def transformer_config(source: Exported) -> dict[str, Any]:
    """The transformer's sizes, by the names that diffusers' transformers have for them."""
    recipe = source.generator.recipe
    model, data = recipe.model, recipe.data
    return {
        "sample_size": data.latent_size,
        "in_channels": data.channels,
        "patch_size": model.patch,
        "hidden_size": model.dim,
        "num_layers": model.depth,
        "num_attention_heads": model.heads,
        "mlp_ratio": model.mlp_ratio,
        "label_rows": label_rows(recipe),
        "qk_norm": model.qk_norm,
        "second_time": model.second_time,
        "prediction": model.prediction,
        "t_floor": model.t_floor,
    }


def _check_form(source: Exported, config: dict[str, Any]) -> None:
    """Refuse a network whose weights the published transformer does not have."""
    from alphaflow_cli.export.transformer_alphaflow import AlphaFlowTransformer2DModel

    sizes = {name: value for name, value in config.items() if not name.startswith("_")}
    with torch.device("meta"):
        wanted = {n: tuple(v.shape) for n, v in AlphaFlowTransformer2DModel(**sizes).state_dict().items()}
    ours = {name: tuple(value.shape) for name, value in _weights(source).items()}
    if differing := sorted({name for name in wanted | ours if wanted.get(name) != ours.get(name)}):
        raise AlphaflowError(
            f"--to diffusers: the pipeline has no form of this network yet ({', '.join(differing[:3])} differ). "
            "--to onnx holds any network."
        )


def _autoencoder(source: Exported, folder: Path) -> dict[str, Any]:
    """Note an autoencoder of the Hub, or write another one into vae/."""
    generator = source.generator
    if not generator.has_decoder:
        return {}
    autoencoder = generator.autoencoder
    module: Any = autoencoder.module
    if autoencoder.revision:
        return {"vae_id": autoencoder.id, "vae_revision": autoencoder.revision, "vae_class": type(module).__name__}
    module.save_pretrained(folder / "vae", safe_serialization=True)
    config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # a folder of this machine
    write_whole(folder / "vae" / "config.json", _to_text(config))
    return {"vae": ["diffusers", type(module).__name__]}


def pipeline_config(source: Exported) -> dict[str, Any]:
    """Classes, statistics and steps: what the pipeline knows besides its components.

    No value is a bare list: from the Hub, diffusers takes each list in model_index.json for a component.
    """
    generator = source.generator
    recipe, mix = generator.recipe, generator.recipe.guidance
    walks = {}
    for steps in sorted({1, 2, recipe.sample.nfe}):
        walk = plan_walk(recipe, nfe=steps)
        walks[str(len(walk.grid) - 1)] = [walk.sampler, list(walk.grid)]
    guidable = has_null_label(recipe) and not is_guided(mix.omega, mix.kappa)
    return {
        "classes": recipe.data.classes if label_rows(recipe) else 0,
        "id2label": {str(label): name for label, name in enumerate(generator.class_names)},
        "null_label": null_label(recipe) if guidable else None,
        "guidance_scale": recipe.sample.guidance,
        "latents": {"mean": generator.mean.tolist(), "std": generator.std.tolist()},
        "pixels": recipe.data.pixels,
        "sampler": recipe.sample.sampler,
        "walks": walks,
    }


def run_pipeline(folder: Path, source: Exported, inputs: list[Tensor]) -> Any:
    """The pictures of the first seeds, by the folder's own code."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    finally:
        if shown:
            logging.enable_progress_bar()
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(inputs[0]))]
    labels = {"class_labels": inputs[1].tolist()} if "label" in source.names else {"num_images": len(inputs[0])}
    return pipe(**labels, generator=generators, output_type="pt").images.numpy()
