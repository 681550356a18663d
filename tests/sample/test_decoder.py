"""The decoder: bf16 in channels_last, compiled where it pays, in whole groups; and the words for it in a protocol."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from latent_models import latent_models
from small_models import checkpoint_m, pixel_checkpoint, recipe_m
from tiny_autoencoders import tiny_dc, tiny_kl, tiny_taesd

import alphaflow_cli
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.model import compiling
from alphaflow_cli.recipe import load_recipe
from alphaflow_cli.sample import generator as decoder
from alphaflow_cli.sample.generator import (
    Decoder,
    Generator,
    decode_in_groups,
    decoder_pays,
    open_generator,
    plan_decoder,
    precision_text,
)
from alphaflow_cli.sample.walk import plan_walk

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random latent model and its autoencoder."""
    return latent_models(tmp_path_factory.mktemp("latent"))


@pytest.fixture
def checkpoint(folder):
    return str(folder / "fp32.safetensors")


def latents(count):
    return torch.randn((count, 4, 2, 2), generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def tf32_mode():
    """Of convolutions."""
    cudnn = torch.backends.cudnn
    return cudnn.conv.fp32_precision if hasattr(cudnn, "conv") else cudnn.allow_tf32


@pytest.mark.parametrize(
    ("asked", "device", "compiled", "expected"),
    [
        ("auto", CPU, True, Decoder("fp32")),
        ("fp32", GPU, True, Decoder("fp32")),
        ("bf16", CPU, True, Decoder("bf16")),
        ("auto", GPU, False, Decoder("bf16", group=64)),
        ("auto", GPU, True, Decoder("bf16", compiled=True)),
        ("bf16", GPU, True, Decoder("bf16", compiled=True)),
    ],
)
def test_a_gpu_decodes_in_bf16_and_compiles_where_it_is_wanted(asked, device, compiled, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80e9))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(decoder, "can_compile", lambda there: there.type == "cuda")
    assert plan_decoder(asked, device, pictures=50_000, compiled=compiled) == expected
    monkeypatch.setattr(decoder, "can_compile", lambda there: False)
    eager = replace(expected, compiled=False, group=64 if expected.compiled else expected.group)
    assert plan_decoder(asked, device, pictures=50_000, compiled=compiled) == eager
    assert plan_decoder(asked, device, pictures=100, compiled=False).group == 16
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=16e9))
    assert plan_decoder(asked, device, pictures=50_000, compiled=False).group == 16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))  # a T4, which imitates bf16
    without = plan_decoder(asked, device, pictures=100, compiled=False)
    assert without == Decoder("bf16" if asked == "bf16" else "fp32")


@pytest.mark.parametrize(("triton", "compiler", "can"), [(True, "gcc", True), (True, "", False), (False, "gcc", False)])
def test_compiling_for_a_gpu_needs_triton_and_a_c_compiler(triton, compiler, can, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiling, "find_spec", lambda _: object() if triton else None)
    monkeypatch.setattr(compiling, "which", lambda name: name if name == compiler else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert compiling.can_compile(GPU) == can
    assert not compiling.can_compile(CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    assert not compiling.can_compile(GPU)


def test_bf16_means_weights_and_inputs_in_bf16_and_channels_last(folder):
    found, seen = Decoder("bf16").load(str(folder / "tiny-kl"), CPU), []
    assert found.module is not None
    assert {weight.dtype for weight in found.module.parameters()} == {torch.bfloat16}
    assert found.module.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    for part in (found.module.post_quant_conv, found.module.decoder.conv_in):
        part.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    pixels = decode_in_groups(found, latents(3))
    assert [(z.dtype, z.is_contiguous(memory_format=torch.channels_last), len(z)) for z in seen] == [
        (torch.bfloat16, True, 16)
    ] * 2
    assert pixels.is_contiguous()
    assert pixels.dtype == torch.float32


def test_fp32_decodes_as_diffusers_does_and_without_tf32(folder):
    found, modes = Decoder("fp32").load(str(folder / "tiny-kl"), CPU), []
    with torch.no_grad():
        expected = found.module.decode(latents(16).float()).sample
    other = Decoder("bf16").load(str(folder / "tiny-kl"), CPU)
    for each in (found, other):
        each.module.decoder.register_forward_pre_hook(lambda *_: modes.append(tf32_mode()))
    assert torch.equal(decode_in_groups(found, latents(16)), expected)
    decode_in_groups(other, latents(16))
    assert modes == ["ieee" if hasattr(torch.backends.cudnn, "conv") else False, tf32_mode()]


@pytest.mark.parametrize("make", [tiny_kl, tiny_taesd, tiny_dc])
def test_a_compiled_decoder_has_one_form_whatever_the_count_and_the_same_pictures(tmp_path, make):
    make(tmp_path / "a")
    forms = []

    def backend(graph, inputs):
        forms.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = Decoder("bf16", compiled=True, backend=backend).load(str(tmp_path / "a"), CPU)
    plain = Decoder("bf16").load(str(tmp_path / "a"), CPU)
    assert compiled.weights_sha256 == plain.weights_sha256
    first = decode_in_groups(compiled, latents(16))
    once = len(forms)
    for count in (1, 16, 40):
        assert torch.equal(decode_in_groups(compiled, latents(count)), decode_in_groups(plain, latents(count)))
    assert torch.equal(first, decode_in_groups(plain, latents(16)))
    assert len(forms) == once > 0


def test_a_generator_decodes_by_its_plan(checkpoint):
    seeds, labels, forms = list(range(5)), [0] * 5, []

    def backend(graph, inputs):
        forms.append(graph)
        return graph.forward

    plain, compiled = (open_generator(checkpoint, device=CPU, decoder="bf16") for _ in range(2))
    plain.expect(50_000, compiled=True, autoencoder="")
    compiled.decoder = replace(compiled.decoder, compiled=True, backend=backend)
    walk = plan_walk(plain.recipe, nfe=1)
    torch._dynamo.reset()
    expected = plain.images(seeds, labels, walk)
    assert not forms
    assert torch.equal(compiled.images(seeds, labels, walk), expected)
    assert forms


def test_where_compiling_fails_a_line_says_so_and_the_decoder_runs_eagerly(checkpoint, monkeypatch, capsys):
    def broken(graph, inputs):
        raise ValueError("no such machine\nand more")

    plain, failing = (open_generator(checkpoint, device=CPU, decoder="bf16") for _ in range(2))
    monkeypatch.setattr(decoder, "plan_decoder", lambda *_, **__: Decoder("bf16", compiled=True, backend=broken))
    torch._dynamo.reset()
    failing.expect(12_000, compiled=True, autoencoder="")
    assert "torch.compile failed, so the decoder runs eagerly" in capsys.readouterr().err
    assert failing.precision == "fp32 network, bf16 decoder"
    walk = plan_walk(plain.recipe, nfe=1)
    assert torch.equal(failing.images([1, 2], [0, 0], walk), plain.images([1, 2], [0, 0], walk))


@pytest.mark.parametrize(
    ("file", "decoder", "told"),
    [
        ("fp32", "auto", "fp32"),
        ("fp32", "bf16", "fp32 network, bf16 decoder"),
        ("bf16", "fp32", "fp32"),  # on a CPU the products are float32
        ("bf16", "bf16", "fp32 network, bf16 decoder"),
        ("fp64", "auto", "fp64 network, fp32 decoder"),
        ("fp64", "bf16", "fp64 network, bf16 decoder"),
    ],
)
def test_the_protocol_tells_both_precisions(folder, file, decoder, told):
    assert open_generator(str(folder / f"{file}.safetensors"), device=CPU, decoder=decoder).precision == told


def test_a_model_of_pixels_tells_no_decoder(tmp_path):
    assert open_generator(str(pixel_checkpoint(tmp_path / "c.safetensors")), device=CPU).precision == "fp32"
    told = [precision_text("bf16", decoder) for decoder in ("bf16", "fp32", None)]
    assert told == ["bf16 network, bf16 decoder", "bf16 network, fp32 decoder", "bf16 network"]
    assert Generator(checkpoint_m(recipe_m("fp64")), device=CPU).precision == "fp64 network"


def test_a_precision_that_is_none_is_named(checkpoint):
    with pytest.raises(AlphaflowError, match="'fp16': there are auto, fp32, bf16"):
        alphaflow_cli.load(checkpoint, device="cpu", decoder="fp16")  # type: ignore[arg-type]


def test_the_threshold_of_compiling_follows_from_the_pixels(folder):
    small = open_generator(str(folder / "bf16.safetensors"), device=CPU).recipe
    b2 = load_recipe("b2")
    assert [decoder_pays(b2, count) for count in (11_999, 12_000)] == [False, True]
    assert not decoder_pays(small, 1_000_000)  # 16 px
