"""The α-Flow pipeline for diffusers: pictures of classes in one step, or in a few.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]
    pipe(class_labels=[0, 1, 2, 3], num_inference_steps=1, generator=seeds).images

A list of CPU generators, one per picture, gives the pictures that `alphaflow sample` draws of these seeds. This file
lies beside published weights and stands alone: it needs torch and diffusers only. Licence: Apache-2.0.
"""

import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

RULES = {"truncate": torch.floor, "round": torch.round}  # from numbers to bytes


class AlphaFlowPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Noise and class go in, pictures come out."""

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012 (diffusers wants a list)

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        vae: Any = None,
        vae_id: str | None = None,
        vae_revision: str | None = None,
        vae_class: str | None = None,
        classes: int = 0,
        id2label: Any = None,
        null_label: int | None = None,
        guidance_scale: float = 1.0,
        latents: Any = None,
        pixels: str = "round",
        sampler: str = "trajectory",
        walks: Any = None,
    ) -> None:
        """`id2label`: the names of the classes. `latents`: their mean and std, before they are decoded.

        `walks`: number of steps → [sampler, times]; other numbers of steps take even times and `sampler`.

        An autoencoder that is not in the folder is loaded from the Hub by `vae_id`.
        """
        super().__init__()
        if vae is None and vae_id:
            user, repository, *below = vae_id.split("/", 2)
            where = {"subfolder": below[0]} if below else {}
            kind = getattr(diffusers, vae_class or "AutoencoderKL")
            vae = kind.from_pretrained(f"{user}/{repository}", revision=vae_revision, **where)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(
            vae_id=vae_id, vae_revision=vae_revision, vae_class=vae_class, classes=classes,
            id2label=id2label or {}, null_label=null_label, guidance_scale=guidance_scale,
            latents=latents or {"mean": 0.0, "std": 1.0}, pixels=pixels, sampler=sampler, walks=walks or {},
        )  # fmt: skip

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write model_index.json and, beside it, the code that it names: what was saved loads as this was loaded."""
        folder, index = Path(json_file_path).parent, json.loads(self.to_json_string())
        index["_class_name"] = [_lay(__file__, folder), type(self).__name__]
        if self.transformer is not None:
            network = getattr(self.transformer, "_orig_mod", self.transformer)  # compiled, perhaps
            index["transformer"] = [
                _lay(inspect.getfile(type(network)), folder / "transformer"),
                type(network).__name__,
            ]
        Path(json_file_path).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        num_inference_steps: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_images: int | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw one picture for each class: a number or a name.

        `num_images`: of a model without classes. `generator`: a list with one for each picture, or one for all.
        `guidance_scale`: for models with a null label that were trained without guidance; 1 is none.
        `output_type`: "pil", "np" (bytes as numbers from 0 to 1) or "pt" (uint8, (n, 3, H, W)).
        """
        y = self._labels(class_labels, num_images if num_images else len(_listed(generator)))
        config = self.transformer.config
        shape = (len(y), config.in_channels, config.sample_size, config.sample_size)
        device = self._execution_device
        wide = torch.float32 if device.type == "mps" else torch.float64
        noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if scale != 1.0 and self.config.null_label is None:
            raise ValueError(f"guidance_scale {scale:g}: this model has no null label, or guidance is built into it.")
        x = self._walk(noise.to(wide), y.to(device), num_inference_steps, scale, generator)
        images: Any = self._decode(x)
        self.maybe_free_model_hooks()
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).cpu().numpy().astype(np.float32) / 255
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(self, given: Any, count: int) -> Tensor:
        """The numbers of the classes that were given by number or by name."""
        known, names = self.config.classes, list(self.config.id2label.values())
        if not known:
            if given is not None:
                raise ValueError("class_labels: this model has no classes; num_images says how many pictures.")
            return torch.zeros(max(count, 1), dtype=torch.int64)
        chosen = []
        for each in _listed(given):
            alike = [i for i, name in enumerate(names) if str(each).lower() in _parts(name)]
            if isinstance(each, str) and len(alike) == 1:
                chosen.append(alike[0])
            elif str(each).isdecimal() and int(each) < known:
                chosen.append(int(each))
            else:
                listed = f": {', '.join(names[:12])}{', …' * (len(names) > 12)}" if names else ""
                raise ValueError(f"class_labels: {each!r} is no class of this model, 0 to {known - 1}{listed}.")
        if not chosen:
            raise ValueError("class_labels: name a class for each picture, such as [0, 1].")
        return torch.tensor(chosen)

    def _walk(self, x: Tensor, y: Tensor, steps: int, scale: float, generator: Any) -> Tensor:
        """From noise to data, in float64, by the scheduler's steps."""
        kind, times = self.config.walks.get(str(steps)) or [self.config.sampler, _even(steps)]
        self.scheduler.set_timesteps(sigmas=times[:-1], device=x.device)
        for i, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            t, later = times[i], times[i + 1]
            target = {"trajectory": later, "consistency": 0.0, "flow": t}[kind]
            u = self._velocity(x, t, target, y, scale).to(x.dtype)
            if kind != "consistency":
                x = self.scheduler.step(u, timestep, x).prev_sample
                continue
            data = self.scheduler.step(u, timestep, x, r_timestep=0.0).prev_sample
            fresh = randn_tensor(tuple(x.shape), generator=generator, device=x.device, dtype=x.dtype)
            x = (1.0 - later) * data + later * fresh
        return x

    def _velocity(self, x: Tensor, t: float, r: float, y: Tensor, scale: float) -> Tensor:
        """The network's average velocity, guided where a scale other than 1 is given."""
        dtype = self.transformer.dtype
        if scale != 1.0:
            x, y = torch.cat([x, x]), torch.cat([y, torch.full_like(y, self.config.null_label)])
        t_rows, r_rows = (torch.full((len(x),), each, dtype=torch.float32, device=x.device) for each in (t, r))
        u: Tensor = self.transformer(x.to(dtype), t_rows, r_rows, y).sample
        if scale == 1.0:
            return u
        guided, plain = u.to(torch.float32 if x.dtype == torch.float32 else torch.float64).chunk(2)
        return plain + scale * (guided - plain)

    def _decode(self, x: Tensor) -> Tensor:
        """Normalised latents to uint8 pictures (n, 3, H, W)."""
        known = self.config.latents
        mean, std = (torch.tensor(known[name], dtype=x.dtype, device=x.device) for name in ("mean", "std"))
        latents = x * std + mean
        pixels = latents if self.vae is None else self.vae.decode(latents.to(self.vae.dtype)).sample
        return RULES[self.config.pixels]((pixels.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)


def _lay(code: str, folder: Path) -> str:
    """Copy a file of code into a folder; gives the name that diffusers knows it by there."""
    content = Path(code).read_bytes()
    (folder / Path(code).name).write_bytes(content)
    return Path(code).stem


def _listed(value: Any) -> list[Any]:
    """A list as it is, one value as a list of one; arrays and tensors as lists of numbers."""
    if value is None:
        return []
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _parts(name: str) -> list[str]:
    """The names that a class goes by: `tench, Tinca tinca` has two."""
    return [name.lower(), *(part.strip().lower() for part in name.split(","))]


def _even(steps: int) -> list[float]:
    if steps < 1:
        raise ValueError(f"num_inference_steps {steps}: at least one step is needed.")
    return [(steps - i) / steps for i in range(steps + 1)]
