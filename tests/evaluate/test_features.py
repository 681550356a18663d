"""The feature networks: known answers, independent implementations, and what is said when weights are missing."""

import math
from pathlib import Path
from typing import Any

import pytest
import ruler
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.evaluate.features import resize_bicubic
from alphaflow_cli.evaluate.networks import (
    Clip,
    DinoV2,
    Inception,
    build_extractor,
    fuse_convolutions,
    resample_positions,
)
from alphaflow_cli.evaluate.tiny import FLOOR, Tiny
from alphaflow_cli.files import sha256_of
from alphaflow_cli.nn.weights import load_weights
from alphaflow_cli.runtime.precision import true_float32

CPU = torch.device("cpu")
HERE = Path("weights")


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ruler.random_inception(tmp_path_factory.mktemp("hub") / ruler.INCEPTION_FILE)


# --- tiny ---


def test_tiny_of_a_flat_grey_picture_is_the_noise_floor_and_the_grey() -> None:
    features = Tiny()(torch.full((1, 3, 32, 32), 200, dtype=torch.uint8))[0]
    torch.testing.assert_close(features[:144], torch.full((144,), math.log(FLOOR)), rtol=0, atol=1e-5)
    luma, chroma = features[144:160], features[160:]
    torch.testing.assert_close(luma, torch.full((16,), 200 / 127.5 - 1))
    torch.testing.assert_close(chroma, torch.zeros(32), rtol=0, atol=1e-6)


def test_tiny_of_a_checkerboard_is_one_diagonal_band() -> None:
    board = ((torch.arange(32)[:, None] + torch.arange(32)) % 2 * 255).to(torch.uint8)
    features = Tiny()(board.expand(1, 3, 32, 32))[0]
    diagonal = features[:9].view(3, 3)[2]  # level 1, third band, by colour
    # ±1 in every pixel: each coefficient of the orthonormal transform is (1 + 1 + 1 + 1)/2 = 2
    assert float(diagonal[0]) == pytest.approx(0.5 * math.log(4 + FLOOR**2), abs=1e-6)
    assert float(features[:9].view(3, 3)[:2].max()) == pytest.approx(math.log(FLOOR), abs=1e-5)


def test_tiny_is_the_same_for_any_batch() -> None:
    images, tiny = ruler.pictures(20), Tiny()
    whole = tiny(images)
    assert torch.equal(whole, torch.cat([tiny(few) for few in torch.split(images, 3)]))
    assert whole.shape == (20, 192)


def test_tiny_features_of_a_drawn_picture_stay_what_they_are() -> None:
    """A reference file made today must fit pictures measured next year."""
    ramp = torch.arange(32)
    picture = torch.stack([ramp[:, None] * 8 + ramp, (ramp[:, None] * ramp) % 256, 255 - ramp * 7 + 0 * ramp[:, None]])
    features = Tiny()(picture.to(torch.uint8)[None])[0].double()
    assert float(features.sum()) == pytest.approx(GOLDEN_SUM, abs=1e-3)
    assert float(features.square().sum()) == pytest.approx(GOLDEN_SQUARES, abs=1e-2)


GOLDEN_SUM, GOLDEN_SQUARES = -170.99324, 320.85376


def test_tiny_takes_16_px_as_it_is_reduces_larger_and_refuses_smaller() -> None:
    tiny = Tiny()
    assert tiny(ruler.pictures(2, size=16)).shape == (2, 192)
    assert tiny(ruler.pictures(2, size=28)).shape == (2, 192)
    flat = torch.full((1, 3, 64, 48), 77, dtype=torch.uint8)
    torch.testing.assert_close(tiny(flat), tiny(flat[..., :32, :32]), rtol=0, atol=1e-5)
    with pytest.raises(AlphaflowError, match="needs 16 px"):
        tiny(ruler.pictures(2, size=12))


# --- inception ---


def test_inception_is_torch_fidelitys_and_its_logits_come_from_the_features(inception_file: Path) -> None:
    from torch_fidelity import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file)
    )
    ours, images = Inception.load(inception_file).eval(), ruler.pictures(3)
    pooled, logits = theirs(images)
    features = ours(images)
    assert torch.equal(features, pooled)
    quick = build_extractor("inception", device=CPU, weights=inception_file)(images)  # another layout in memory
    assert float((quick - pooled).abs().max()) < 3e-4 * float(pooled.mean())
    torch.testing.assert_close(ours.logits(features), logits, rtol=1e-6, atol=1e-6)
    assert float(features.std(0).mean()) > 0.01  # the random network tells pictures apart


def test_unpublished_inception_weights_are_named(inception_file: Path) -> None:
    ours = Inception.load(inception_file)
    assert not ours.known
    assert ours.weights_sha256 == sha256_of(inception_file)
    assert ours.weights_sha256[:8] in ours.id


def test_inception_is_found_in_torchs_hub_cache(inception_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALPHAFLOW_WEIGHTS", raising=False)
    home = inception_file.parent / "home" / "hub" / "checkpoints"
    home.mkdir(parents=True)
    (home / ruler.INCEPTION_FILE).symlink_to(inception_file)
    monkeypatch.setenv("TORCH_HOME", str(home.parents[1]))
    assert Inception.load(None).weights_sha256 == sha256_of(inception_file)


@pytest.mark.parametrize("name", ["inception", "dinov2", "clip"])
def test_missing_weights_say_which_file_from_where_into_which_folder_and_what_meanwhile(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("ALPHAFLOW_WEIGHTS", raising=False)
    with pytest.raises(AlphaflowError) as caught:
        build_extractor(name, device=CPU, weights=None)
    text = str(caught.value)
    for part in ("https://", str(tmp_path / "hub" / "checkpoints"), " MB", f"--weights {name}=FILE", "fd-tiny"):
        assert part in text


def test_wrong_weight_files_are_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.safetensors"
    save_file({"conv1.weight": torch.zeros(3)}, wrong)
    for name in ("inception", "dinov2", "clip"):
        with pytest.raises(AlphaflowError, match=r"wrong\.safetensors"):
            build_extractor(name, device=CPU, weights=wrong)
    wrong.write_bytes(b"not at all")
    with pytest.raises(AlphaflowError, match="not a readable weight file"):
        build_extractor("dinov2", device=CPU, weights=wrong)


def test_a_weight_file_with_code_in_it_runs_nothing(tmp_path: Path) -> None:
    import pickle

    target = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (target,)  # type: ignore[return-value]

    path = tmp_path / "weights.pth"
    torch.save({"a": Evil()}, path, pickle_module=pickle)
    with pytest.raises(AlphaflowError, match="not a readable weight file"):
        load_weights(path)
    assert not target.exists()


# --- DINOv2 ---


class PlainVit(nn.Module):
    """A pre-norm ViT with layer scale, written out from the paper's description; nothing shared with timm."""

    def __init__(self, state: dict[str, Tensor], heads: int) -> None:
        super().__init__()
        self.state, self.heads = state, heads
        self.depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def attend(self, x: Tensor, name: str) -> Tensor:
        n, tokens, dim = x.shape
        q, k, v = self.linear(x, f"{name}.qkv").view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT / math.sqrt(dim // self.heads)).softmax(-1) @ v
        return self.linear(mixed.transpose(1, 2).reshape(n, tokens, dim), f"{name}.proj")

    def forward(self, images: Tensor) -> Tensor:
        """From uint8, with the papers' preprocessing: antialiased bicubic to 224, no clamp, ImageNet statistics."""
        x = nn.functional.interpolate(images.float() / 255, (224, 224), mode="bicubic", antialias=True)
        x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        patches = x.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        x = patches @ self.state["patch_embed.proj.weight"].flatten(1).T + self.state["patch_embed.proj.bias"]
        x = torch.cat([self.state["cls_token"].expand(len(x), -1, -1), x], 1) + self.positions()
        for i in range(self.depth):
            name = f"blocks.{i}"
            x = x + self.state[f"{name}.ls1.gamma"] * self.attend(self.norm(x, f"{name}.norm1"), f"{name}.attn")
            hidden = nn.functional.gelu(self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
            x = x + self.state[f"{name}.ls2.gamma"] * self.linear(hidden, f"{name}.mlp.fc2")
        return self.norm(x, "norm")[:, 0]

    def positions(self) -> Tensor:
        """The official code's rule: w0 = 16 + 0.1, scale w0/37, bicubic."""
        table = self.state["pos_embed"]
        grid = table[:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(grid, mode="bicubic", antialias=False, scale_factor=(16.1 / 37, 16.1 / 37))
        return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 256, -1)], 1)


def dino_state(dim: int, depth: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=draw) * scale

    state = {
        "cls_token": normal(1, 1, dim),
        "mask_token": torch.zeros(1, dim),
        "pos_embed": normal(1, 1 + 37 * 37, dim),
        "patch_embed.proj.weight": normal(dim, 3, 14, 14, scale=(3 * 14 * 14) ** -0.5),
        "patch_embed.proj.bias": normal(dim, scale=0.1),
        "norm.weight": 1 + normal(dim, scale=0.1),
        "norm.bias": normal(dim, scale=0.1),
    }
    layers = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    for i in range(depth):
        for name, (out, into) in layers.items():
            state[f"blocks.{i}.{name}.weight"] = normal(out, into, scale=into**-0.5)
            state[f"blocks.{i}.{name}.bias"] = normal(out, scale=0.1)
        for name in ("norm1", "norm2"):
            state[f"blocks.{i}.{name}.weight"] = 1 + normal(dim, scale=0.1)
            state[f"blocks.{i}.{name}.bias"] = normal(dim, scale=0.1)
        state[f"blocks.{i}.ls1.gamma"] = 1 + normal(dim, scale=0.1)
        state[f"blocks.{i}.ls2.gamma"] = 1 + normal(dim, scale=0.1)
    return state


def in_transformers_names(state: dict[str, Tensor], *, new: bool) -> dict[str, Tensor]:
    swaps = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "cls_token": "embeddings.cls_token"}
    swaps |= {"mask_token": "embeddings.mask_token", "pos_embed": "embeddings.position_embeddings"}
    swaps |= {"blocks.": "encoder.layer.", "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
    swaps["attn.proj"] = "attention.o_proj" if new else "attention.output.dense"
    parts = ("q_proj", "k_proj", "v_proj") if new else ("attention.query", "attention.key", "attention.value")
    found = {}
    for key, value in state.items():
        for old, other in swaps.items():
            key = key.replace(old, other)
        key = f"layer{key}" if key.startswith("norm.") else key
        if "attn.qkv" in key:
            for part, piece in zip(parts, value.chunk(3), strict=True):
                found[key.replace("attn.qkv", f"attention.{part}")] = piece.clone()
        else:
            found[key] = value
    return found


def test_dinov2_equals_a_plain_vit_with_the_papers_preprocessing() -> None:
    state, images = dino_state(128, 3), ruler.pictures(2)
    ours = DinoV2(state, sha256="0", source=HERE)
    torch.testing.assert_close(ours(images), PlainVit(state, 2)(images), rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_dinov2_equals_a_plain_vit_at_the_real_size(tmp_path: Path) -> None:
    state, images = dino_state(1024, 24), ruler.pictures(2)
    path = tmp_path / "dinov2_vitl14_pretrain.pth"
    torch.save(state, path)
    ours = build_extractor("dinov2", device=CPU, weights=path)
    assert ours.id == "dinov2-vit-l-14/cls"
    assert sum(value.numel() for value in ours.parameters()) == 304_368_640 - 1024 - 1024 * (37**2 - 16**2)
    torch.testing.assert_close(ours(images), PlainVit(state, 16)(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("new", [False, True])
def test_dinov2_reads_the_official_timms_and_transformers_names(new: bool, tmp_path: Path) -> None:
    state, images = dino_state(128, 2), ruler.pictures(1)
    official = DinoV2(state, sha256="0", source=HERE)(images)
    timms = {key: value for key, value in state.items() if key != "mask_token"}
    save_file(in_transformers_names(state, new=new), tmp_path / "model.safetensors")
    others = load_weights(tmp_path / "model.safetensors")
    assert torch.equal(DinoV2(timms, sha256="0", source=HERE)(images), official)
    assert torch.equal(DinoV2(others, sha256="0", source=HERE)(images), official)


def test_positions_are_not_resampled_as_timm_does() -> None:
    from timm.layers import resample_abs_pos_embed

    table = dino_state(64, 1)["pos_embed"]
    ours, timms = resample_positions(table), resample_abs_pos_embed(table, [16, 16])
    assert ours.shape == timms.shape == (1, 257, 64)
    assert torch.equal(ours[:, 0], table[:, 0])
    assert float((ours - timms).abs().mean()) > 0.05


def test_a_smaller_vit_is_not_taken_for_fdds(tmp_path: Path) -> None:
    save_file(dino_state(128, 2), tmp_path / "small.safetensors")
    with pytest.raises(AlphaflowError, match="FDD is measured with ViT-L/14"):
        build_extractor("dinov2", device=CPU, weights=tmp_path / "small.safetensors")


def test_bicubic_is_antialiased_and_not_clamped() -> None:
    edge = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    edge[..., 16:] = 255
    big = resize_bicubic(edge, 224)
    assert float(big.max()) > 255.5
    assert float(big.min()) < -0.5
    stripes = (torch.arange(448) % 2 * 255).to(torch.uint8).expand(1, 3, 448, 448)
    assert float(resize_bicubic(stripes, 224)[..., 8:-8].std()) < 1  # without antialias the stripes would survive


# --- CLIP ---


def test_clip_equals_torch_fidelitys_network_on_openais_weights() -> None:
    from torch_fidelity.feature_extractor_clip import CLIPVisual

    torch.manual_seed(0)
    theirs = CLIPVisual(48, 224, 2, 128, 14).eval()
    state = {key: value.detach() for key, value in theirs.state_dict().items()}
    ours, images = Clip(state, sha256="0", source=HERE), ruler.pictures(2, size=224)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        expected = theirs.visual((images / 255 - mean) / std)  # 224 px: no resize on either side
    torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-5)
    assert ours.dim == 48


# --- all ---


def test_only_bytes_are_measured() -> None:
    with pytest.raises(AlphaflowError, match="takes uint8 pictures"):
        Tiny()(torch.zeros(1, 3, 32, 32))


def test_tf32_is_off_inside_and_as_before_outside() -> None:
    if not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("this torch has the old switches only")
    before = torch.backends.cudnn.conv.fp32_precision
    with true_float32():
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cudnn.conv.fp32_precision == before


def test_fused_convolutions_give_the_same_features_up_to_rounding(
    inception_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where cuDNN's call takes the place of these three; a network of float64 is the measure."""
    calls = []

    def in_one(x: Tensor, weight: Tensor, bias: Tensor, *form: Any) -> Tensor:
        calls.append(weight.shape)
        return torch.conv2d(x, weight, bias, *form).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", in_one)
    plain, fused = (Inception.load(inception_file).eval() for _ in range(2))
    exact = Inception.load(inception_file).eval().double()
    exact.net.feature_extractor_internal_dtype = torch.float64
    fuse_convolutions(fused.net)
    images = ruler.pictures(3)
    with torch.inference_mode():
        truth = exact.net(images)[0].double()
    unit = truth.abs().mean()
    errors = [float((each(images) - truth).abs().max() / unit) for each in (plain, fused)]
    assert len(calls) == 94
    assert max(errors) < 3e-4
    assert errors[1] < 2 * errors[0]
    assert torch.equal(plain.logits(truth.float()), fused.logits(truth.float()))
