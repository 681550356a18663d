"""Autoencoders behind one interface: the numbers are diffusers' own, whatever file they came from."""

import http.server
import json
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from tiny_autoencoders import tiny_dc, tiny_kl, tiny_taesd

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.nn.autoencoder import load_autoencoder, weights_sha256

CPU = torch.device("cpu")
MAKERS = {"kl": tiny_kl, "tiny": tiny_taesd, "dc": tiny_dc}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder and diffusers model by kind."""
    root = tmp_path_factory.mktemp("autoencoders")
    return {kind: (root / f"tiny-{kind}", make(root / f"tiny-{kind}")) for kind, make in MAKERS.items()}


@pytest.fixture
def pixels():
    return torch.rand((3, 3, 64, 64), generator=torch.Generator().manual_seed(1)) * 2 - 1


def load(name, **options):
    return load_autoencoder(str(name), device=CPU, **options)


@torch.no_grad()
def test_kl_moments_equal_diffusers(made, pixels):
    folder, model = made["kl"]
    mean, std = load(folder).encode(pixels)
    posterior = model.encode(pixels).latent_dist
    torch.testing.assert_close(mean, posterior.mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(std, posterior.std, atol=1e-6, rtol=0)
    assert std.min() > 0


@torch.no_grad()
@pytest.mark.parametrize("kind", ["tiny", "dc"])
def test_autoencoders_without_posterior_have_std_zero(made, pixels, kind):
    folder, model = made[kind]
    mean, std = load(folder).encode(pixels)
    encoded = model.encode(pixels)
    torch.testing.assert_close(mean, encoded.latents if kind == "tiny" else encoded.latent, atol=1e-6, rtol=0)
    assert std.abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("kind", MAKERS)
def test_decoding_equals_diffusers_and_gives_the_size_back(made, pixels, kind):
    folder, model = made[kind]
    found = load(folder)
    latents = found.encode(pixels)[0]
    assert latents.shape == (3, found.channels, 64 // found.downscale, 64 // found.downscale)
    assert found.decode(latents).shape == pixels.shape
    torch.testing.assert_close(found.decode(latents), model.decode(latents).sample, atol=1e-5, rtol=1e-5)


def test_facts_come_from_the_config(made):
    facts = {kind: load(folder) for kind, (folder, _) in made.items()}
    assert [(a.kind, a.channels, a.downscale) for a in facts.values()] == [("kl", 4, 8), ("tiny", 4, 8), ("dc", 4, 4)]
    assert [a.scale for a in facts.values()] == [0.18215, 1.0, 0.41407]
    assert [a.has_posterior for a in facts.values()] == [True, False, False]
    assert facts["kl"].id == "tiny-kl"


def test_none_is_the_identity(pixels):
    found = load("none")
    mean, std = found.encode(pixels)
    assert torch.equal(mean, pixels)
    assert torch.equal(std, torch.zeros_like(pixels))
    assert torch.equal(found.decode(pixels), pixels)
    assert (found.channels, found.downscale, found.scale, found.shift) == (3, 1, 1.0, 0.0)


@pytest.mark.parametrize("prefix", ["", "model.", "autoencoder.model.model."])
def test_bare_weights_are_the_same_autoencoder_under_any_prefix(made, pixels, tmp_path, prefix):
    folder, model = made["kl"]
    path = tmp_path / "sd_vae_ft_ema.pt"
    torch.save({f"{prefix}{key}": value for key, value in model.state_dict().items()}, path)
    found, original = load(path), load(folder)
    assert found.weights_sha256 == original.weights_sha256
    assert (found.scale, found.shift) == (0.18215, 0.0)
    assert torch.equal(found.encode(pixels)[0], original.encode(pixels)[0])


def test_weights_inside_a_snapshot_and_old_attention_names_are_found(made, tmp_path):
    new = {"to_q": "query", "to_k": "key", "to_v": "value"}
    renamed = {}
    for key, value in made["kl"][1].state_dict().items():
        for name, old in new.items():
            key = key.replace(f".{name}.", f".{old}.")
        renamed[f"autoencoder.model.model.{key.replace('.to_out.0.', '.proj_attn.')}"] = value
    torch.save({"ema": {**renamed, "model.pos_embed": torch.zeros(3)}, "cfg": {"a": 1}}, tmp_path / "a.pt")
    assert load(tmp_path / "a.pt").weights_sha256 == weights_sha256(made["kl"][1])


def test_safetensors_files_load_and_hash_alike(made, tmp_path):
    shutil.copy(made["kl"][0] / "diffusion_pytorch_model.safetensors", tmp_path / "vae.safetensors")
    assert load(tmp_path / "vae.safetensors").weights_sha256 == load(made["kl"][0]).weights_sha256


def test_other_weights_have_another_hash(made, tmp_path):
    assert weights_sha256(tiny_kl(tmp_path / "other", seed=1)) != weights_sha256(made["kl"][1])


def test_a_machine_without_memory_is_not_blamed_on_the_file(tmp_path, monkeypatch):
    def full(*given, **more):
        raise MemoryError

    torch.save({"a": torch.zeros(1)}, tmp_path / "good.pt")
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError):
        load(tmp_path / "good.pt")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"a": Touch()}, tmp_path / "evil.pt")
    with pytest.raises(AlphaflowError, match=r"evil\.pt: not a readable weight file \(it is no file of weights, or"):
        load(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def test_another_layout_is_exact_and_bfloat16_is_close(made, pixels):
    folder, _ = made["kl"]
    exact = load(folder)
    latents = exact.encode(pixels)[0]
    reference = exact.decode(latents)
    other_layout = load(folder, channels_last=True).decode(latents)
    torch.testing.assert_close(other_layout, reference, atol=1e-4, rtol=1e-4)
    rough = load(folder, dtype=torch.bfloat16).decode(latents)
    assert rough.dtype == torch.float32
    assert (rough - reference).abs().mean() < 0.05 * reference.abs().mean()


def test_gradients_stay_out(made, pixels):
    found = load(made["kl"][0])
    assert not found.encode(pixels.requires_grad_())[0].requires_grad


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "config.json is missing"),
        ({"config.json": '{"_class_name": "UNet"}'}, ".UNet. is not one of AutoencoderKL"),
    ],
)
def test_a_folder_without_an_autoencoder_is_named(tmp_path, content, words):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(AlphaflowError, match=words):
        load(tmp_path)


ENTRY, EXIT, FIRST = (
    "encoder.conv_in.weight",
    "encoder.conv_out.weight",
    "encoder.down_blocks.0.resnets.{}.conv1.weight",
)
SMALL = {ENTRY: torch.zeros(4, 3, 3, 3), EXIT: torch.zeros(8, 4, 3, 3), FIRST.format(0): torch.zeros(4, 4, 3, 3)}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"weight": torch.zeros(3)}, "not the weights of an AutoencoderKL ('encoder.conv_out.weight' is missing)"),
        ({0: torch.zeros(3), 1: {}}, "not the weights of an AutoencoderKL ('encoder.conv_out.weight' is missing)"),
        ({**SMALL, EXIT: 5}, "not the weights of an AutoencoderKL ('encoder.conv_out.weight' is missing)"),
        ({**SMALL, FIRST.format(0): torch.tensor(1.0)}, "not the weights of an AutoencoderKL (tuple index out of"),
        ({**SMALL, FIRST.format(10**9): torch.zeros(1)}, "these are weights of another network ("),
        (SMALL, "missing, such as decoder.conv_in.bias)"),
        ([1, 2], "holds a list, not a table of weights"),
    ],
)  # fmt: skip
def test_weights_of_something_else_are_named(content, words, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(AlphaflowError, match=re.escape(words)) as fault:
        load(tmp_path / "x.pt")
    assert len(str(fault.value).splitlines()) == 1


def test_a_name_that_is_nothing_lists_what_it_could_be(tmp_path):
    with pytest.raises(AlphaflowError, match="a folder, a weights file, a Hub id user/repo, or none"):
        load(tmp_path / "missing.safetensors")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


def test_an_unreachable_hub_fails_fast_and_says_what_to_do(cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(AlphaflowError) as fault:
        load("stabilityai/sd-vae-ft-ema")
    assert time.monotonic() - start < 8
    for words in ("stabilityai/sd-vae-ft-ema", "http://127.0.0.1:9 cannot be reached", str(cache), "--autoencoder DIR"):
        assert words in str(fault.value)


def test_offline_mode_does_not_ask(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as HF_HUB_OFFLINE=1 does before the program starts
    with pytest.raises(AlphaflowError, match="HF_HUB_OFFLINE is set"):
        load("stabilityai/sd-vae-ft-ema")


def test_a_hub_that_does_not_know_it_is_quoted(cache, monkeypatch):
    class NotFound(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    with pytest.raises(AlphaflowError, match="answers 404"):
        load("nobody/nothing")
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("subfolder", ["", "/vae"])
def test_the_hubs_cache_is_enough_and_gives_the_commit(made, cache, monkeypatch, subfolder):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    root = cache / "models--stabilityai--sd-vae-ft-ema"
    shutil.copytree(made["kl"][0], root / "snapshots" / "abc123" / subfolder.strip("/"))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc123")
    found = load(f"stabilityai/sd-vae-ft-ema{subfolder}")
    assert (found.id, found.revision) == (f"stabilityai/sd-vae-ft-ema{subfolder}", "abc123")
    assert found.weights_sha256 == weights_sha256(made["kl"][1])
    assert load(f"stabilityai/sd-vae-ft-ema{subfolder}@abc123").revision == "abc123"


def test_the_config_is_json_as_diffusers_writes_it(made):
    assert json.loads((made["kl"][0] / "config.json").read_text())["_class_name"] == "AutoencoderKL"


CONFIGS = [
    b"",
    b"[]",
    b"3",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"_class_name": "AutoencoderKL", "_class_name": "AutoencoderKL"}',
]
CHANGES = [
    {"_class_name": 3},
    {"_class_name": "os"},
    {"block_out_channels": "wide"},
    {"block_out_channels": []},
    {"block_out_channels": [10**9]},
    {"latent_channels": -1},
    {"latent_channels": True},
    {"scaling_factor": "one"},
    {"scaling_factor": float("nan")},
    {"norm_num_groups": 0},
    {"norm_num_groups": "x"},
    {"down_block_types": 3},
    {"down_block_types": ["x"]},
    {"act_fn": []},
    {"layers_per_block": 10**9},
]


@pytest.mark.parametrize("change", [*CONFIGS, *CHANGES])
def test_a_strange_config_is_one_line_that_names_it(made, tmp_path, change):
    folder = shutil.copytree(made["kl"][0], tmp_path / "ae")
    path = folder / "config.json"
    text = json.dumps(json.loads(path.read_text()) | change).encode() if isinstance(change, dict) else change
    path.write_bytes(text)
    with pytest.raises(AlphaflowError) as fault:
        load(folder)
    assert str(folder) in str(fault.value)
    assert "\n" not in str(fault.value)
