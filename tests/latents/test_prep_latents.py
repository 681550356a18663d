"""`prep-latents`, end to end: the same store however it was made, resumable, and nothing awkward passes silently."""

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from awkward_pictures import GOOD, encoded, gradient, write_awkward
from click.testing import CliRunner
from huggingface_hub import constants
from latent_stores import prepare_latents
from new_process import alphaflow
from PIL import Image
from safetensors.numpy import load_file
from tiny_autoencoders import tiny_dc, tiny_kl

from alphaflow_cli.cli import run
from alphaflow_cli.data.manifest import read_manifest, read_plan
from alphaflow_cli.data.store import open_store, verify_store
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import free_bytes
from alphaflow_cli.latents import encode
from alphaflow_cli.latents.encode import choose_precision
from alphaflow_cli.latents.plan import default_out, shard_size
from alphaflow_cli.latents.prepare import begin_store, check_room, describe_store
from alphaflow_cli.nn.autoencoder import load_autoencoder
from alphaflow_cli.runtime.precision import encoder_precision

CIFAR = os.environ.get("ALPHAFLOW_CIFAR", "")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "tiny-kl"
    return folder, tiny_kl(folder)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Three classes of 30 real picture files, 70 × 50."""
    root = tmp_path_factory.mktemp("tree") / "set"
    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "cow"):
        (root / name).mkdir(parents=True)
        for index in range(30):
            image = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((70, 50))
            image.save(root / name / f"{index}.png")
    return root


def prepare(source, out, **options):
    options = {"size": 16, "autoencoder": "none", "shown": False, **options}
    return prepare_latents(str(source), out, **options)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def invoke(*args):
    """Exit code, stdout, stderr of the real command line."""
    done = alphaflow(args)
    return done.returncode, done.stdout, done.stderr


def direct(vae, tree, manifest_folder):
    """Moments by plain Pillow and diffusers, in the order of images.json."""
    images = json.loads((manifest_folder / "images.json").read_text())
    stacked = []
    for name, _ in images:
        image = Image.open(tree / name).convert("RGB").crop((10, 0, 60, 50)).resize((32, 32), Image.Resampling.LANCZOS)
        stacked.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() * 2 / 255 - 1)
    moments = []
    with torch.no_grad():
        for batch in torch.stack(stacked).split(16):  # of the size that is used on a CPU: kernels differ by the size
            posterior = vae.encode(batch).latent_dist
            moments.append(torch.cat([posterior.mean, posterior.std], dim=1))
    return torch.cat(moments).numpy(), np.array([label for _, label in images])


def all_rows(out, name):
    return np.concatenate([load_file(out / shard.file)[name] for shard in read_manifest(out).shards])


@pytest.mark.parametrize(("dtype", "atol"), [("fp32", 1e-6), ("fp16", 2e-3)])
def test_stored_moments_equal_a_direct_encode(vae, tree, tmp_path, dtype, atol):
    out = prepare(tree, tmp_path / "s", size=32, autoencoder=str(vae[0]), dtype=dtype)
    moments, labels = direct(vae[1], tree, out)
    np.testing.assert_allclose(all_rows(out, "moments"), moments, atol=atol, rtol=0)
    np.testing.assert_array_equal(all_rows(out, "label"), labels)
    np.testing.assert_array_equal(all_rows(out, "index"), np.arange(90))
    assert verify_store(out) == []


def test_statistics_match_a_direct_computation_on_all_samples(vae, tree, tmp_path):
    out = prepare(tree, tmp_path / "s", size=32, autoencoder=str(vae[0]), dtype="fp32")
    moments = direct(vae[1], tree, out)[0].astype(np.float64)
    mean, std = moments[:, :4], moments[:, 4:]
    found = open_store(out, "full").statistics["all"]
    np.testing.assert_allclose(found.mean, mean.mean(0), atol=1e-5)
    np.testing.assert_allclose(found.std, np.sqrt(mean.var(0) + (std**2).mean(0)), atol=1e-5)
    said = read_manifest(out).statistics
    np.testing.assert_allclose(said["channel_mean"], mean.mean((0, 2, 3)), atol=1e-5)


def test_flips_store_the_mirrored_pictures_moments(vae, tree, tmp_path):
    out = prepare(tree, tmp_path / "s", size=32, autoencoder=str(vae[0]), dtype="fp32", flips=True)
    mirrored = tmp_path / "mirrored"
    for name in (path.relative_to(tree) for path in tree.rglob("*.png")):
        (mirrored / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(tree / name).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored / name)
    other = prepare(mirrored, tmp_path / "m", size=32, autoencoder=str(vae[0]), dtype="fp32")
    np.testing.assert_allclose(all_rows(out, "moments_flip"), all_rows(other, "moments"), atol=1e-6, rtol=0)
    assert np.abs(all_rows(out, "moments_flip") - all_rows(out, "moments")).max() > 1e-3


def test_an_autoencoder_without_posterior_stores_means_only(tree, tmp_path):
    tiny_dc(tmp_path / "dc")
    out = prepare(tree, tmp_path / "s", size=32, autoencoder=str(tmp_path / "dc"), limit=10)
    assert all_rows(out, "mean").shape == (10, 4, 8, 8)
    assert read_manifest(out).plan.kind == "mean"


def test_pixels_are_stored_as_they_are(tree, tmp_path):
    out = prepare(tree, tmp_path / "s")
    image = Image.open(tree / "ant" / "0.png").crop((10, 0, 60, 50)).resize((16, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(all_rows(out, "pixels")[0], np.asarray(image).transpose(2, 0, 1))


def test_the_manifest_says_how_it_was_made(vae, tree, tmp_path):
    plan = read_manifest(prepare(tree, tmp_path / "s", size=32, autoencoder=str(vae[0]))).plan
    assert (plan.latent, plan.kind, plan.dtype, plan.classes) == ((4, 4, 4), "moments", "float16", 3)
    assert plan.source["name"] == "set"
    assert plan.transform["crop"] == "largest centred square"
    assert (plan.autoencoder.id, plan.autoencoder.scale, plan.autoencoder.precision) == ("tiny-kl", 0.18215, "fp32")
    assert plan.autoencoder.weights_sha256 == load_autoencoder(str(vae[0]), device=CPU).weights_sha256
    text = b"".join(contents(tmp_path / "s").values())
    assert str(tmp_path).encode() not in text, "a store must not carry the machine's folders"


def test_the_way_of_cropping_is_kept_and_another_one_is_refused(tree, tmp_path):
    line = ("prep-latents", tree, "--size", 16, "--autoencoder", "none", "--out", tmp_path / "s")
    assert invoke(*line, "--crop", "adm")[0] == 0
    plan = read_manifest(tmp_path / "s").plan
    assert (plan.crop, plan.transform["crop"]) == ("adm", "halved by box, short side bicubic, centred square")
    code, _, err = invoke(*line)
    assert code == 1
    assert "holds another preparation: transform" in err
    assert read_manifest(prepare(tree, tmp_path / "square")).plan.crop == "square"
    assert (all_rows(tmp_path / "s", "pixels") != all_rows(tmp_path / "square", "pixels")).any()


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.distributed
@pytest.mark.parametrize("encoder", ["none", pytest.param("vae", marks=pytest.mark.slow)])
def test_two_processes_give_the_same_bytes_as_one(vae, tmp_path, encoder):
    name = str(vae[0]) if encoder == "vae" else "none"
    one = prepare("glyphs:600", tmp_path / "one", autoencoder=name)
    line = ("prep-latents", "glyphs:600", "--size", 16, "--autoencoder", name, "--out", tmp_path / "two")
    code, out, err = invoke(*line, "--processes", 2)
    assert code == 0, err
    assert out.splitlines()[-1] == str(tmp_path / "two"), "the first process prints for both"
    assert err.count("600/600 img") == 1
    assert contents(one) == contents(tmp_path / "two")


def test_a_second_run_does_nothing(tree, tmp_path):
    out = prepare(tree, tmp_path / "s")
    times = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    prepare(tree, out)
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == times


@pytest.mark.parametrize(
    "lost",
    [
        ("train-00001.safetensors",),
        ("train-00002.json",),
        ("manifest.json", "train-00000.json"),
        ("stats.safetensors",),
        ("plan.json",),
        ("classes.json",),
        ("plan.json", "classes.json", "images.json", "train-00001.safetensors"),
    ],
)
def test_what_is_missing_is_made_again_to_the_same_bytes(tmp_path, lost):
    out = prepare("glyphs:700", tmp_path / "s")
    before = contents(out)
    for name in lost:
        (out / name).unlink()
    (out / ".train-00001.safetensors.tmp").write_bytes(b"half")
    prepare("glyphs:700", out)
    assert contents(out) == before


def test_a_store_without_its_plan_is_still_not_another_preparations(tree, tmp_path):
    out = prepare(tree, tmp_path / "s")
    (out / "plan.json").unlink()
    with pytest.raises(AlphaflowError, match="image_size is 8 in this command, 16 in the store"):
        prepare(tree, out, size=8)


def test_a_shard_of_another_length_than_its_sidecar_says_is_made_again(tmp_path):
    out = prepare("glyphs:300", tmp_path / "s")
    before = contents(out)
    (out / "train-00000.safetensors").write_bytes(before["train-00000.safetensors"][:-9])
    prepare("glyphs:300", out)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 8}, "image_size is 8 in this command, 16 in the store"),
        ({"flips": True}, "flips is True in this command, False in the store"),
        ({"limit": 5}, "source.images is 5 in this command, 90 in the store"),
    ],
)
def test_another_preparation_in_the_same_folder_is_refused_with_both_sides(tree, tmp_path, changes, words):
    out = prepare(tree, tmp_path / "s")
    with pytest.raises(AlphaflowError, match=words):
        prepare(tree, out, **changes)


def test_a_store_that_another_command_made_while_this_one_planned_is_left_alone(tree, tmp_path):
    ours = read_plan(prepare(tree, tmp_path / "elsewhere", size=8) / "plan.json")
    theirs = prepare(tree, tmp_path / "s")
    before = contents(theirs)
    with pytest.raises(AlphaflowError, match="holds another preparation: image_size is 8 in this command, 16 in the"):
        begin_store(theirs, ours, [b"[]"], {}, [])
    assert contents(theirs) == before


def test_another_preparation_is_refused_in_one_short_line(tree, tmp_path):
    out = prepare(tree, tmp_path / "s")
    with pytest.raises(AlphaflowError) as fault:
        prepare("glyphs:20", out, size=8, flips=True)
    text = str(fault.value).removeprefix(str(out))
    assert text.startswith(": holds another preparation: source.kind is 'glyphs' in this command, ")
    assert "; and " in text
    assert text.endswith(" more. Give another --out, or delete it")
    assert "sha256" not in text
    assert len(text) < 300


def test_an_autoencoder_that_cannot_be_fetched_names_the_way_without_one(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AlphaflowError, match=r"HF_HUB_OFFLINE is set.*--autoencoder none --size 32$"):
        prepare(tree, tmp_path / "s", autoencoder="stabilityai/sd-vae-ft-ema")


@pytest.mark.parametrize("lost", [("manifest.json", "train-00000.json"), ("train-00000.safetensors",)])
def test_other_weights_of_the_same_name_are_refused(vae, tree, tmp_path, lost):
    out = prepare(tree, tmp_path / "s", size=32, autoencoder=str(vae[0]), limit=4)
    for name in lost:
        (out / name).unlink()
    tiny_kl(tmp_path / "other" / "tiny-kl", seed=5)
    with pytest.raises(AlphaflowError, match=r"autoencoder\.weights_sha256 is"):
        prepare(tree, out, size=32, autoencoder=str(tmp_path / "other" / "tiny-kl"), limit=4)


def test_new_pictures_in_the_source_are_noticed(tree, tmp_path):
    source = shutil.copytree(tree, tmp_path / "tree")
    out = prepare(source, tmp_path / "s")
    (source / "ant" / "new.png").write_bytes((source / "ant" / "0.png").read_bytes())
    with pytest.raises(AlphaflowError, match=r"1 picture here not in the store, the first 'ant/new\.png'\. Give"):
        prepare(source, out)


def test_a_folder_with_other_things_in_it_is_not_written_to(tree, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.tex").touch()
    with pytest.raises(AlphaflowError, match="no latent store"):
        prepare(tree, tmp_path / "s")
    assert not (tmp_path / "s" / "plan.json").exists()


def test_a_bad_picture_stops_the_run_by_name(tmp_path):
    write_awkward(tmp_path / "root")
    with pytest.raises(AlphaflowError, match=r"'things/.*--bad skip"):
        prepare(tmp_path / "root", tmp_path / "s")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_bad_pictures_are_skipped_named_and_counted(tmp_path):
    bad = write_awkward(tmp_path / "root")
    out = prepare(tmp_path / "root", tmp_path / "s", bad="skip")
    manifest = read_manifest(out)
    assert {entry["name"].removeprefix("things/") for entry in manifest.bad} == bad
    assert all(entry["why"] for entry in manifest.bad)
    names = json.loads((out / "images.json").read_text())
    assert manifest.count == len(names) - len(bad) >= len(GOOD)
    assert sorted([*all_rows(out, "index"), *(entry["line"] for entry in manifest.bad)]) == list(range(len(names)))
    assert verify_store(out) == []


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_class_all_of_whose_pictures_are_bad_keeps_its_number_and_is_named(tmp_path, capfd):
    for name, good in (("ant", 3), ("bee", 0), ("cat", 2), ("dog", 0), ("eel", 1)):
        (tmp_path / "root" / name).mkdir(parents=True)
        for index in range(4):
            content = encoded(gradient(size=(8, 8)), "PNG") if index < good else b"no picture"
            (tmp_path / "root" / name / f"{index}.png").write_bytes(content)
    out = prepare(tmp_path / "root", tmp_path / "s", size=8, bad="skip")
    assert read_manifest(out).plan.classes == 5
    assert sorted(all_rows(out, "label")) == [0, 0, 0, 2, 2, 4]
    lines = describe_store(out)
    assert lines[-2] == (
        "no picture is left of 2 classes (1 = bee, 3 = dog): they stay classes, so that the others keep their numbers, "
        "and nothing is learnt of them"
    )
    (tmp_path / "root" / "dog" / "good.png").write_bytes(encoded(gradient(size=(8, 8)), "PNG"))
    lines = describe_store(prepare(tmp_path / "root", tmp_path / "t", size=8, bad="skip"))
    assert lines[-2].startswith("no picture is left of 1 class (1 = bee): it stays a class, so that the others keep")
    (tmp_path / "root" / "bee" / "good.png").write_bytes(encoded(gradient(size=(8, 8)), "PNG"))
    lines = describe_store(prepare(tmp_path / "root", tmp_path / "u", size=8, bad="skip"))
    assert lines[-2].startswith("left out: 14, the first 'ant/3.png': ")


def test_files_removed_between_two_runs_are_counted_as_bad(tmp_path):
    source = tmp_path / "set"
    source.mkdir()
    for index in range(300):
        encoded_picture = encoded(gradient(size=(8, 8)), "PNG")
        (source / f"{index:03d}.png").write_bytes(encoded_picture)
    out = prepare(source, tmp_path / "s", size=8, bad="skip")
    for name in ("manifest.json", "train-00001.json"):
        (out / name).unlink()
    (source / "299.png").unlink()
    with pytest.raises(AlphaflowError, match=r"not here, the first '299\.png'"):
        prepare(source, out, size=8)
    manifest = read_manifest(prepare(source, out, size=8, bad="skip"))
    assert (manifest.count, [entry["name"] for entry in manifest.bad]) == (299, ["299.png"])
    assert "No such file" in manifest.bad[0]["why"]


def test_a_source_without_one_good_picture_says_so(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(b"")
    with pytest.raises(AlphaflowError, match=r"no picture can be read; the first, 'a\.png': an empty file"):
        prepare(tmp_path / "set", tmp_path / "s", bad="skip")


def test_an_empty_folder_says_what_was_left_aside(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("1.HEIC", "2.heic", "3.HEIC", "a.txt", "b.txt", "Thumbs.db", "movie.mp4", ".hidden.png"):
        (tmp_path / "set" / name).touch()
    words = r"no pictures here \(8 other files left aside \(\.heic, \.txt, \.db, …\)\). JPEG, PNG, .* are read; convert"
    with pytest.raises(AlphaflowError, match=words):
        prepare(tmp_path / "set", tmp_path / "s")


def test_what_the_other_splits_hold_is_counted(tmp_path, capfd):
    for split, count in (("train", 3), ("val", 2)):
        for name in ("ant", "bee"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (16, 16)).save(tmp_path / "set" / split / name / f"{index}.png")
    prepare(tmp_path / "set", tmp_path / "s", shown=True)
    assert "set: 6 pictures, 4 pictures of other splits left aside" in capfd.readouterr().err


def test_a_store_whose_pictures_changed_names_one_that_did(tmp_path):
    source = tmp_path / "set"
    for name in ("ant", "bee"):
        (source / name).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (16, 16), (index, 0, 0)).save(source / name / f"{index}.png")
    out = prepare(source, tmp_path / "s")

    def fault(**options):
        with pytest.raises(AlphaflowError) as caught:
            prepare(source, out, **options)
        return str(caught.value).removeprefix(f"{out}: holds another preparation: ")

    give = "Give another --out, or delete it"
    (source / "ant" / "0.png").rename(tmp_path / "0.png")
    skip = "Leave such pictures out: --bad skip; or give another --out, or delete it"
    assert fault() == f"1 picture of the store not here, the first 'ant/0.png'. {skip}"
    (tmp_path / "0.png").rename(source / "bee" / "new.png")
    words = "1 picture of the store not here, the first 'ant/0.png'; 1 picture here not in the store, the first"
    assert fault() == f"{words} 'bee/new.png'. {give}"
    (source / "bee" / "new.png").rename(source / "ant" / "0.png")
    (source / "classes.json").write_text('["bee", "ant"]')
    assert fault() == f"6 pictures of another class, the first 'ant/0.png'. {give}"
    (source / "classes.json").unlink()
    assert prepare(source, out) == out


def test_a_limit_is_spread_over_all_classes(tree, tmp_path):
    out = prepare(tree, tmp_path / "s", limit=9)
    assert sorted(all_rows(out, "label")) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_no_room_is_found_out_before(tmp_path):
    with pytest.raises(AlphaflowError, match=r"needs .* are free"):
        check_room(tmp_path / "not" / "yet", free_bytes(tmp_path))
    check_room(tmp_path / "not" / "yet", 1)


def test_a_disk_that_fills_up_leaves_a_store_that_goes_on(tmp_path):
    """A file size limit stands in for the full disk: the kernel refuses the write in the middle of a shard."""
    reference = prepare("glyphs:600", tmp_path / "reference")
    out, soft = tmp_path / "s", resource.getrlimit(resource.RLIMIT_FSIZE)
    prepare("glyphs:600", out)
    for name in ("manifest.json", "train-00001.json", "train-00001.safetensors"):
        (out / name).unlink()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, soft[1]))
    try:
        with pytest.raises(AlphaflowError, match=r"no room left .*run the same command again"):
            prepare("glyphs:600", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert not list(out.glob(".*.tmp"))
    prepare("glyphs:600", out)
    assert contents(out) == contents(reference)


def test_a_size_that_the_autoencoder_cannot_take_is_refused(vae, tree, tmp_path):
    with pytest.raises(AlphaflowError, match="--size 20: tiny-kl needs a multiple of 8"):
        prepare(tree, tmp_path / "s", size=20, autoencoder=str(vae[0]))


def test_low_precision_is_measured_and_taken_only_where_its_error_is_small(vae, tmp_path):
    model = load_autoencoder(str(vae[0]), device=CPU)
    sample = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    name, error = choose_precision(model, sample, CPU, "bf16")
    pixels = torch.from_numpy(sample).float() * 2 / 255 - 1
    with encoder_precision("bf16", CPU):
        rough, _ = model.encode(pixels)
    mean, std = model.encode(pixels)
    expected = float((rough - mean).square().mean().sqrt() / std.square().mean().sqrt())
    assert name == "bf16"
    assert error == pytest.approx(expected, rel=1e-3)
    assert error > 0
    assert choose_precision(model, sample, CPU, "fp32") == ("fp32", 0.0)
    assert choose_precision(model, sample, CPU, "auto")[0] == ("bf16" if expected <= 0.25 else "tf32")


@pytest.mark.parametrize(("has", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_without_bf16_encodes_in_float32(vae, monkeypatch, has, chosen):
    model = load_autoencoder(str(vae[0]), device=CPU)
    monkeypatch.setattr(encode, "has_bf16", lambda device: has)
    monkeypatch.setattr(encode, "_moments", lambda *_: (torch.ones(1), torch.ones(1)))
    assert choose_precision(model, np.zeros(1), torch.device("cuda"), "auto") == (chosen, 0.0)


def test_bf16_encoding_is_recorded_with_its_error(vae, tree, tmp_path):
    record = read_manifest(
        prepare(tree, tmp_path / "s", size=32, autoencoder=str(vae[0]), limit=4, precision="bf16")
    ).plan.autoencoder
    assert record.precision == "bf16"
    assert record.precision_error > 0


@pytest.mark.parametrize(
    ("source", "size", "autoencoder", "out"),
    [
        ("glyphs:40", 32, "none", "latents/glyphs-40-32-pixels"),
        ("data/imagenet/", 256, "stabilityai/sd-vae-ft-ema", "latents/imagenet-256-sd-vae-ft-ema"),
        ("data/imagenet/train", 256, "none", "latents/imagenet-256-pixels"),
        ("photos.tar.gz", 64, "none", "latents/photos-64-pixels"),
        ("hf://datasets/user/cats@v1:train", 64, "none", "latents/cats-64-pixels"),
    ],
)
def test_the_stores_name_says_what_is_in_it(source, size, autoencoder, out):
    assert default_out(source, size, autoencoder) == Path(out)


def test_shards_are_cut_by_the_plan_alone():
    assert shard_size(10, 3088) == 256
    assert shard_size(50_000, 3088) == 3125
    assert shard_size(1_281_167, 16_400) == 8192
    assert shard_size(1_281_167, 65_552) * 65_552 <= 512_000_000


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_prints_the_store_last(here, capfd):
    assert run(["prep-latents", "glyphs:40"]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == [
        "40 pictures, 10 classes, pixels 3x32x32 uint8, 173.2 kB",
        "latents/glyphs-40-32-pixels",
    ]
    assert "prepare 40/40 img" in err
    assert "\r" not in err
    assert run(["prep-latents", "--verify", "latents/glyphs-40-32-pixels"]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "latents/glyphs-40-32-pixels"


def test_an_estimate_writes_nothing(here, capfd):
    assert run(["prep-latents", "glyphs:5000", "--out", "s", "--estimate"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "pictures: 5,000, 5,000 to do in 16 shards, pixels 3x32x32"
    assert lines[1].startswith("disk: 15.4 MB needed, ")
    assert lines[2].startswith("time: 0:")
    assert list(here.iterdir()) == []


def test_verify_names_the_broken_shard_and_fails(here, capfd):
    run(["prep-latents", "glyphs:40", "--out", "s"])
    path = here / "s" / "train-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    capfd.readouterr()
    assert run(["prep-latents", "--verify", "s"]) == 1
    assert "s/train-00000.safetensors: its bytes changed" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--size", "64", "--limit", "3"], "--size, --limit"),
        (["--estimate"], "--estimate"),
        (["--threads", "1"], "--thr"),
    ],
)
def test_verify_takes_no_other_option(options, named, here, capfd):
    assert run(["prep-latents", "--verify", "s", *options]) == 2
    assert (
        f"--verify reads the store that SOURCE names, and changes nothing: leave out {named}" in capfd.readouterr().err
    )


@pytest.mark.parametrize("args", [("--size", "0"), ("--dtype", "fp8"), ("--bad", "maybe"), ("--processes", "0")])
def test_a_wrong_option_is_a_usage_error(args):
    from alphaflow_cli.commands.prep_latents import command

    assert CliRunner().invoke(command, ["glyphs:4", *args]).exit_code == 2


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.distributed
def test_a_fault_in_a_worker_is_said_once_without_a_traceback(tmp_path):
    source = tmp_path / "set"
    source.mkdir()
    for index in range(600):
        (source / f"{index:03d}.png").write_bytes(GOOD["one-pixel.png"] if index != 400 else b"")
    code, _, err = invoke(
        "prep-latents", source, "--size", 8, "--autoencoder", "none", "--out", tmp_path / "s", "--processes", 2
    )
    assert code == 1
    assert err.count("'400.png': an empty file") == 1
    assert "Traceback" not in err
