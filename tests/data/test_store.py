"""The latent store: what is written is what is read, and whatever was touched since is named."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
from latent_stores import moments_store, random_moments
from safetensors.numpy import load_file

from alphaflow_cli.data.manifest import digest_of
from alphaflow_cli.data.stats import Statistics, merge, statistics_of
from alphaflow_cli.data.store import open_store, verify_store
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import write_pieces, write_whole
from alphaflow_cli.tensors import open_tensors, write_tensors


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return moments_store(tmp_path_factory.mktemp("made") / "store")


@pytest.fixture
def store(made, tmp_path):
    return shutil.copytree(made, tmp_path / "store")


def refuse(store, *words, verify="full"):
    """Opening fails, and the message has all the words."""
    with pytest.raises(AlphaflowError) as fault:
        open_store(store, verify)
    for word in words:
        assert word in str(fault.value), str(fault.value)


def flip_byte(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document, indent=1))
    return document


def test_the_safetensors_library_reads_what_is_written(tmp_path):
    tensors = {
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "label": np.array([3, 1]),
        "none": np.zeros((0, 4), np.float32),
        "wide": np.array([1e-300]),
        "u8": np.array([[0, 255]], np.uint8),
    }
    write_tensors(tmp_path / "a.safetensors", tensors, {"format": "x"})
    theirs, ours = load_file(tmp_path / "a.safetensors"), open_tensors(tmp_path / "a.safetensors")
    for name, value in tensors.items():
        for found in (theirs[name], ours.read(name)):
            assert found.dtype == value.dtype
            np.testing.assert_array_equal(found, value)


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    def pieces():
        yield b"new"
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OSError, match="No space"):
        write_pieces(tmp_path / "a", pieces())
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"old")]


def test_a_pipe_or_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for write in (lambda path: write_pieces(path, [b"new"]), lambda path: write_whole(path, b"new")):
        with pytest.raises(AlphaflowError, match="pipe: is a folder, a pipe or a device, not a file"):
            write(tmp_path / "pipe")
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("size", [1, (1 << 20) + 3])
def test_a_stream_is_hashed_whether_its_pieces_are_small_or_large(size, tmp_path):
    pieces = [bytes([value]) * size for value in (1, 2)]
    written = write_pieces(tmp_path / "a", pieces)
    assert written == (2 * size, hashlib.sha256(b"".join(pieces)).hexdigest())
    assert (tmp_path / "a").read_bytes() == b"".join(pieces)


def test_files_have_the_users_mode(tmp_path):
    (tmp_path / "plain").touch()
    write_pieces(tmp_path / "a", [b"x"])
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_sound_store_opens_and_gives_every_row_back(store):
    opened, count = open_store(store, "full"), 100
    rows = np.random.default_rng(0).permutation(count)
    out = np.empty((count, 8, 4, 4), np.float16)
    opened.shards.gather("moments", rows, out, np.arange(count))
    np.testing.assert_array_equal(out, random_moments(count)[rows])
    np.testing.assert_array_equal(opened.labels, np.arange(count) % 10)
    assert verify_store(store) == []


def test_a_dozen_lines_of_numpy_read_a_store_without_this_project(store):
    def read(path):
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        codes = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "U8": "u1"}
        found = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                found[name] = np.frombuffer(data[end + start : end + stop], codes[entry["dtype"]]).reshape(
                    entry["shape"]
                )
        return found

    manifest = json.loads((store / "manifest.json").read_text())
    moments = np.concatenate([read(store / shard["file"])["moments"] for shard in manifest["shards"]])
    np.testing.assert_array_equal(moments, random_moments(100))


@pytest.mark.parametrize("at", [0, 40, 700, -1])
def test_a_corrupted_byte_is_refused_with_the_shard_named(store, at):
    flip_byte(store / "train-00003.safetensors", at)
    refuse(store, "train-00003.safetensors", "checksum")
    assert "train-00003.safetensors" in verify_store(store)[0]


def test_a_truncated_shard_is_refused_even_without_checksums(store):
    path = store / "train-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refuse(store, "train-00002.safetensors", "truncated", verify="sizes")


def test_all_faults_are_named_at_once(store):
    (store / "train-00001.safetensors").unlink()
    (store / "train-00004.safetensors").write_bytes(b"")
    refuse(store, "train-00001.safetensors: missing", "train-00004.safetensors: 0 bytes")


def test_corrupted_statistics_are_refused(store):
    flip_byte(store / "stats.safetensors", -1)
    refuse(store, "stats.safetensors", "checksum", verify="sizes")


def test_a_manifest_edited_to_another_autoencoder_is_refused_with_the_field(store):
    edit(store / "manifest.json", lambda d: d["autoencoder"].update(id="stabilityai/sd-vae-ft-mse"))
    refuse(store, "autoencoder.id", "sd-vae-ft-mse", "sd-vae-ft-ema")


def test_a_manifest_edited_where_the_plan_has_no_say_is_refused(store):
    edit(store / "manifest.json", lambda d: d.update(count=99))
    refuse(store, "manifest.json", "digest")


def test_a_manifest_of_a_later_version_is_refused_by_version(store):
    edit(store / "manifest.json", lambda d: d.update(version=2))
    refuse(store, "version 2", "version 1")


def test_a_missing_field_is_named(store):
    document = edit(store / "manifest.json", lambda d: d.pop("shards"))
    edit(store / "manifest.json", lambda d: d.update(digest=digest_of(document)))
    refuse(store, "shards: is missing")


def test_an_unfinished_store_says_how_far_it_is(store):
    (store / "manifest.json").unlink()
    (store / "train-00006.json").unlink()
    refuse(store, "unfinished, 6 of 7 shards")


def test_a_folder_that_is_no_store_says_what_to_run(tmp_path):
    refuse(tmp_path, "alphaflow prep-latents")


def test_statistics_follow_the_law_of_total_variance():
    rows = random_moments(1000, dtype=np.float32)
    mean, std = rows[:, :4].astype(np.float64), rows[:, 4:].astype(np.float64)
    found = statistics_of(rows, (4, 4, 4))
    np.testing.assert_allclose(found.mean, mean.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.std**2, mean.var(0) + (std**2).mean(0), rtol=1e-12)
    samples = mean + std * np.random.default_rng(1).normal(size=(200, *mean.shape)).astype(np.float32)
    np.testing.assert_allclose(found.channel_mean, samples.mean((0, 1, 3, 4)), atol=5e-3)
    np.testing.assert_allclose(found.channel_std, samples.std((0, 1, 3, 4)), rtol=2e-3)


def test_statistics_survive_a_large_offset_and_any_cut():
    rows = random_moments(300, dtype=np.float32)
    rows[:, :4] += 1e4
    whole = statistics_of(rows, (4, 4, 4))
    joined = Statistics(0, np.zeros((4, 4, 4)), np.zeros((4, 4, 4)))
    for start, stop in [(0, 1), (1, 1), (1, 130), (130, 300)]:
        joined = merge(joined, statistics_of(rows[start:stop], (4, 4, 4)))
    np.testing.assert_allclose(joined.std, whole.std, rtol=1e-10)
    np.testing.assert_allclose(
        whole.std**2, rows[:, :4].astype(np.float64).var(0) + (rows[:, 4:].astype(np.float64) ** 2).mean(0), rtol=1e-9
    )


def test_the_manifest_has_the_statistics_of_all_samples(store):
    rows = random_moments(100).astype(np.float64)
    spread = rows[:, :4].var(0) + (rows[:, 4:] ** 2).mean(0)
    opened = open_store(store, "full")
    np.testing.assert_allclose(opened.statistics["all"].std, np.sqrt(spread), rtol=1e-12)
    said = opened.manifest.statistics
    np.testing.assert_allclose(said["channel_mean"], rows[:, :4].mean((0, 2, 3)), atol=1e-12)
    np.testing.assert_allclose(
        said["channel_std"], np.sqrt(spread.mean((1, 2)) + rows[:, :4].mean(0).var((1, 2))), rtol=1e-12
    )


def test_a_tensor_without_rows_is_read_as_one(tmp_path):
    write_tensors(tmp_path / "empty", {"moments": random_moments(8)[:0], "label": np.zeros(0, np.int64)}, {})
    assert open_tensors(tmp_path / "empty").read("moments").shape == (0, 8, 4, 4)
