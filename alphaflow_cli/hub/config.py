"""config.json of a published model: what other programs need to know, without reading a recipe."""

import json
from typing import Any

from alphaflow_cli.recipe import Recipe


def config_json(recipe: Recipe, origin: dict[str, Any], parameters: int) -> str:
    """The text of the file."""
    data, mix = recipe.data, recipe.guidance
    model = {name: getattr(recipe.model, name) for name in recipe.model.__dataclass_fields__}
    content = {
        "model_type": "alphaflow",
        "format": "alphaflow/1",
        "library_name": "alphaflow",
        "architecture": model | {"parameters": parameters},
        "convention": "t = 0 data, t = 1 noise; z_r = z_t - (t - r) u(z_t, r, t)",
        "latents": {
            "autoencoder": data.autoencoder,
            "shape": [data.channels, data.latent_size, data.latent_size],
            "normalise": data.normalise,
            "image_size": data.image_size,
        },
        "classes": data.classes,
        "guidance": {"baked": mix.omega / (1 - mix.kappa), "null_label": mix.label_dropout > 0},
        "sample": {name: getattr(recipe.sample, name) for name in recipe.sample.__dataclass_fields__},
        "weights": {key: origin.get(key) for key in ("weights", "step", "images_seen", "half_life")},
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
