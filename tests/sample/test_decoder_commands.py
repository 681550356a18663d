"""`sample` and `eval` with `--decoder`: it reaches every process, the protocol tells it, no pass mixes precisions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from latent_models import latent_models
from new_process import alphaflow
from small_models import pixel_checkpoint
from tiny_autoencoders import tiny_dc, tiny_kl

import alphaflow_cli
from alphaflow_cli import cli
from alphaflow_cli.commands import evaluate, sample
from alphaflow_cli.evaluate.measure import CHUNK
from alphaflow_cli.evaluate.pictures import GeneratedImages
from alphaflow_cli.model.checkpoint import load_checkpoint, save_checkpoint
from alphaflow_cli.sample.generator import DecoderChoice, Generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random latent model and its autoencoder."""
    return latent_models(tmp_path_factory.mktemp("latent"))


@pytest.fixture
def checkpoint(folder):
    return str(folder / "fp32.safetensors")


def drawn(checkpoint, out, *options):
    """Name → bytes of the files that `sample` writes."""
    assert cli.run(["sample", checkpoint, "--seeds", "0-20", *options, "--out", str(out)]) == 0
    return {file.name: file.read_bytes() for file in out.glob("*.png")}


def test_both_commands_offer_every_choice():
    for command in (sample.command, evaluate.command):
        (option,) = [each for each in command.params if each.name == "decoder"]
        assert tuple(option.type.choices) == get_args(DecoderChoice)


def test_eval_says_how_many_pictures_all_processes_will_decode(checkpoint, reference, tmp_path, monkeypatch):
    """`sample` does not: the picture of a seed is the same among few and among many."""
    told = []
    monkeypatch.setattr(Generator, "expect", lambda _, pictures, **more: told.append((pictures, more["compiled"])))
    drawn(checkpoint, tmp_path / "p", "--batch", "4")
    drawn(checkpoint, tmp_path / "c", "--compile")
    evaluation(checkpoint, reference, tmp_path / "e")
    assert told == [(0, False), (0, True), (300, False)]


def test_sample_says_where_nothing_can_be_compiled(checkpoint, tmp_path, capsys):
    plain = drawn(checkpoint, tmp_path / "p")
    assert drawn(checkpoint, tmp_path / "c", "--compile") == plain
    assert "--compile: nothing is compiled; that takes a bf16 decoder" in capsys.readouterr().err
    pixels = str(pixel_checkpoint(tmp_path / "pixels.safetensors"))
    assert cli.run(["sample", pixels, "--compile", "--grid", str(tmp_path / "g.png")]) == 1
    assert "this model makes pixels without a decoder" in capsys.readouterr().err


@pytest.mark.parametrize("decoder", ["fp32", "bf16"])
def test_a_picture_is_the_same_in_every_batch(checkpoint, tmp_path, decoder):
    one, seven, all_ = (
        drawn(checkpoint, tmp_path / batch, "--batch", batch, "--decoder", decoder) for batch in ("1", "7", "64")
    )
    assert len(one) == 21
    assert one == seven == all_


def test_bf16_pictures_are_close_to_float32_and_not_the_same(folder, checkpoint, tmp_path):
    exact, rough = (drawn(checkpoint, tmp_path / each, "--decoder", each) for each in ("fp32", "bf16"))
    assert exact == drawn(checkpoint, tmp_path / "auto")
    assert exact != rough
    model, other = (alphaflow_cli.load(checkpoint, device="cpu", decoder=each) for each in ("fp32", "bf16"))
    gap = (model.sample(21).tensor.int() - other.sample(21).tensor.int()).abs()
    assert 0 < gap.float().mean() < 2
    again = drawn(checkpoint, tmp_path / "own", "--decoder", "bf16", "--autoencoder", str(folder / "tiny-kl"))
    assert again == rough


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.distributed
def test_two_processes_decode_what_one_decodes(checkpoint, tmp_path):
    one, two = (
        drawn(checkpoint, tmp_path / n, "--decoder", "bf16", "--batch", "4", "--processes", n) for n in ("1", "2")
    )
    assert one == two


@pytest.fixture
def reference(tmp_path):
    """300 pictures of noise, 16 px."""
    pictures = np.random.default_rng(0).integers(0, 255, (300, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=pictures)
    return tmp_path / "real.npz"


def evaluation(checkpoint, reference, out: Path, *options) -> dict:
    """The one row of an evaluation of 300 pictures: two chunks."""
    line = ["eval", checkpoint, "--metrics", "fd-tiny", "--nfe", "1", "--images", "300", "--out", str(out)]
    assert cli.run([*line, "--reference", str(reference), *options]) == 0
    results = max(out.glob("*/results.json"), key=lambda path: path.stat().st_mtime_ns)
    (found,) = json.loads(results.read_text())["evaluations"]
    return found


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.distributed
def test_two_processes_measure_what_one_decodes(checkpoint, reference, tmp_path):
    alone = evaluation(checkpoint, reference, tmp_path / "1", "--decoder", "bf16")
    line = ["eval", checkpoint, "--metrics", "fd-tiny", "--nfe", "1", "--images", "300", "--reference", str(reference)]
    done = alphaflow([*line, "--decoder", "bf16", "--processes", "2", "--out", "two"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "two").glob("*/results.json")
    (found,) = json.loads(results.read_text())["evaluations"]
    assert found["processes"] == 2
    assert (found["id"], found["pictures_sha256"]) == (alone["id"], alone["pictures_sha256"])


def test_a_pass_begun_in_float32_is_not_continued_in_bf16(checkpoint, reference, tmp_path, monkeypatch):
    whole = {each: evaluation(checkpoint, reference, tmp_path / each, "--decoder", each) for each in ("fp32", "bf16")}
    told = {each: found["rows"][0]["pictures"]["precision"] for each, found in whole.items()}
    assert told == {"fp32": "fp32", "bf16": "fp32 network, bf16 decoder"}
    assert whole["fp32"]["rows"][0]["value"] != whole["bf16"]["rows"][0]["value"]

    images = GeneratedImages.images

    def stop(source, first, last):
        if first:
            raise KeyboardInterrupt
        return images(source, first, last)

    monkeypatch.setattr(GeneratedImages, "images", stop)
    line = ["eval", checkpoint, "--metrics", "fd-tiny", "--nfe", "1", "--images", "300", "--decoder", "fp32"]
    assert cli.run([*line, "--reference", str(reference), "--out", str(tmp_path / "cut")]) == 130
    monkeypatch.undo()
    finished = list((tmp_path / "cut").glob(f"*/features-0000000-{CHUNK:07d}.safetensors"))
    assert len(finished) == 2  # the reference's, and ours
    found = evaluation(checkpoint, reference, tmp_path / "cut", "--decoder", "bf16")
    assert found["rows"][0]["value"] == whole["bf16"]["rows"][0]["value"]
    assert found["pictures_sha256"] == whole["bf16"]["pictures_sha256"]


def test_pictures_of_another_autoencoder_are_not_taken_for_those_of_the_first(folder, checkpoint, reference, tmp_path):
    """A converted checkpoint does not know the weights of its autoencoder, so that any may be named."""
    tiny_kl(tmp_path / "other", seed=3)
    kept = load_checkpoint(Path(checkpoint))
    origin = {**kept.origin, "autoencoder": {"id": "tiny-kl", "revision": "", "weights_sha256": ""}}
    converted = str(tmp_path / "converted.safetensors")
    save_checkpoint(Path(converted), replace(kept, origin=origin))
    first, second = (("--autoencoder", str(place)) for place in (folder / "tiny-kl", tmp_path / "other"))

    drawn(converted, tmp_path / "p", *first)
    assert cli.run(["sample", converted, "--seeds", "0-20", *second, "--out", str(tmp_path / "p")]) == 1

    one, other = (evaluation(converted, reference, tmp_path / "e", *which) for which in (first, second))
    assert one["id"] != other["id"]
    assert one["pictures_sha256"] != other["pictures_sha256"]


def test_an_autoencoder_of_other_latents_or_for_a_model_of_pixels_is_refused(checkpoint, tmp_path, capsys):
    tiny_dc(tmp_path / "dc")
    kept = load_checkpoint(Path(checkpoint))
    converted = str(tmp_path / "converted.safetensors")
    save_checkpoint(Path(converted), replace(kept, origin={**kept.origin, "autoencoder": {"id": "tiny-kl"}}))
    pixels = str(pixel_checkpoint(tmp_path / "pixels.safetensors"))
    for path, fault in (
        (converted, "makes 8 px of 4×2×2 latents, and this model's are of 16 px"),
        (pixels, "this model makes pixels without one; leave it out"),
    ):
        line = ["sample", path, "--autoencoder", str(tmp_path / "dc"), "--grid", str(tmp_path / "g.png")]
        assert cli.run(line) == 1
        assert f"--autoencoder {tmp_path / 'dc'}: {fault}" in capsys.readouterr().err


def test_a_decoder_is_not_asked_of_who_has_none(tmp_path, reference, capsys):
    path = str(pixel_checkpoint(tmp_path / "c.safetensors"))
    for line in (["sample", path, "--grid", str(tmp_path / "g.png")], ["eval", path, "--reference", str(reference)]):
        assert cli.run([*line, "--decoder", "bf16"]) == 1
        assert "makes pixels without a decoder" in capsys.readouterr().err
    assert cli.run(["eval", str(reference), "--reference", str(reference), "--decoder", "fp32"]) == 2
    assert "--decoder are for checkpoints" in capsys.readouterr().err
