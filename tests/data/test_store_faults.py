"""A store that strangers wrote, or that changes while a run reads it: one line, whatever is wrong."""

import copy
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_stores import moments_store, prepare_latents
from train_helpers import begin, make_recipe, make_store, saved_step, wait_for_step

from alphaflow_cli.cli import run
from alphaflow_cli.data.batches import LatentStream
from alphaflow_cli.data.classes import parse_classes
from alphaflow_cli.data.manifest import digest_of
from alphaflow_cli.data.store import open_store, verify_store
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import to_json
from alphaflow_cli.tensors import open_tensors

OTHERS = (None, True, -1, 0, 1.5, 10**30, "x", "../../x", [], [[]], {}, {"a": 1}, float("nan"))
STREAM = {
    "batch": 24,
    "seed": 0,
    "posterior": "mean",
    "flips": False,
    "normalise": "scale",
    "scale": 1.0,
    "shift": 0.0,
    "stats_images": 0,
    "device": torch.device("cpu"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return moments_store(tmp_path_factory.mktemp("made") / "store")


@pytest.fixture
def store(made, tmp_path):
    return shutil.copytree(made, tmp_path / "store")


def places(document, path=()):
    """Every place in a document."""
    yield path
    entries = document.items() if isinstance(document, dict) else enumerate(document[:2])
    for key, value in entries:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from list(places(value, (*path, key)))[1:]


def with_value(document, path, value):
    changed = copy.deepcopy(document)
    if not path:
        return value
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return changed


def tried(action, what):
    """It works, or it is one line."""
    text = ""
    try:
        action()
    except AlphaflowError as fault:
        text = str(fault)
    assert text.count("\n") < 4, (what, text)
    assert len(text) < 2000, (what, text)
    return bool(text)


def test_a_manifest_with_any_value_of_another_shape_opens_or_is_one_line(store):
    document, plan = (json.loads((store / f"{name}.json").read_text()) for name in ("manifest", "plan"))
    refused = 0
    for path in places(document):
        for value in OTHERS:
            changed = with_value(document, path, value)
            if isinstance(changed, dict):
                changed["digest"] = digest_of(changed)
            (store / "manifest.json").write_bytes(to_json(changed))
            if path and path[0] in plan:
                (store / "plan.json").write_bytes(to_json(with_value(plan, path, value)))
            refused += tried(lambda: open_store(store, "sizes"), (path, value))
            (store / "plan.json").write_bytes(to_json(plan))
    assert refused > 500


def test_a_plan_or_a_sidecar_with_any_value_of_another_shape_is_one_line(made, tmp_path):
    def prepare():
        prepare_latents("glyphs:40", out, size=32, autoencoder="none", shown=False, bad="skip")

    out = tmp_path / "s"
    prepare()
    (out / "manifest.json").unlink()
    for name in ("plan.json", "train-00000.json", "images.json", "classes.json"):
        before = (out / name).read_bytes()
        document = json.loads(before)
        for path in list(places(document))[:24]:
            for value in OTHERS[::3]:
                (out / name).write_bytes(to_json(with_value(document, path, value)))
                tried(prepare, (name, path, value))
                tried(lambda: open_store(out, "sizes"), (name, path, value))
                (out / name).write_bytes(before)
                (out / "manifest.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "plan.json", "classes.json", "images.json", "stats.safetensors", "train-00002.safetensors"],
)
@pytest.mark.parametrize("kind", ["binary", "empty", "deep", "a folder", "a pipe", "two documents", "a huge number"])
def test_a_document_that_is_none_is_one_line(store, name, kind):
    path = store / name
    path.unlink()
    contents = {"binary": os.urandom(300), "empty": b"", "deep": b"[" * 100_000, "two documents": b"{}{}"}
    contents["a huge number"] = b'{"format": ' + b"9" * 5000 + b"}"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(contents[kind])
    with pytest.raises(AlphaflowError, match=name):
        open_store(store, "full")
    assert len(verify_store(store)) == 1


@pytest.mark.parametrize(
    "given",
    [
        b'{"cat": 0, "cat": 1}',
        b'{"cat": true}',
        b'{"cat": 0.5}',
        b'{"cat": Infinity}',
        b'{"cat": {"index": 0, "name": 5}}',
        b'["cat", 1]',
        b'["cat", "cat"]',
        b'["cat", ["dog"]]',
        b'"cat"',
        b"null",
        b"[" * 100_000,
        b'{"cat": ' + b"1" * 5000 + b"}",
        b"\xff\xfe\x00",
    ],
)
def test_a_class_list_of_another_shape_is_one_line(given):
    with pytest.raises(AlphaflowError, match=r"classes\.json: "):
        parse_classes(given, "classes.json")


@pytest.mark.parametrize("seed", range(3))
def test_a_shard_with_any_header_opens_or_is_one_line(store, seed):
    rng, path = np.random.default_rng(seed), store / "train-00000.safetensors"
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(300):
        data = bytearray(whole[: rng.integers(0, len(whole))] if rng.random() < 0.2 else whole)
        for _ in range(rng.integers(1, 6)):
            if data:
                data[rng.integers(0, min(end, len(data)))] = rng.integers(0, 256)
        path.write_bytes(data)

        def read():
            file = open_tensors(path)
            for name in file.places:
                file.read(name)

        tried(read, (seed, bytes(data[:end])))
        tried(lambda: open_store(store, "sizes"), (seed, bytes(data[:end])))


CHANGES = {
    "written over": lambda path: path.write_bytes(path.read_bytes()[:-40] + b"\x11" * 40),
    "cut short": lambda path: os.truncate(path, 100),
    "emptied": lambda path: os.truncate(path, 0),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 8),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("prefetch", [False, True])
def test_a_shard_that_changes_under_a_stream_ends_it_by_name(store, change, prefetch):
    stream = LatentStream(store, **STREAM, prefetch=prefetch)
    stream.batch_at(0, slice(None))
    CHANGES[change](store / "train-00002.safetensors")
    with pytest.raises(AlphaflowError, match=r"train-00002\.safetensors: was changed or replaced while it was read"):
        [stream.batch_at(step, slice(None)) for step in range(1, 6)]
    stream.close()


def test_a_shard_that_is_replaced_as_a_whole_is_read_on_as_it_was(store):
    """The open file is still the one whose checksum was taken."""
    stream, path = LatentStream(store, **STREAM), store / "train-00002.safetensors"
    before = [stream.batch_at(step, slice(None)).latents for step in range(5)]
    (store / "other").write_bytes(bytes(len(path.read_bytes())))
    (store / "other").replace(path)
    assert all(torch.equal(stream.batch_at(step, slice(None)).latents, before[step]) for step in range(5))


def test_a_store_on_the_device_does_not_see_a_later_change(store):
    stream = LatentStream(store, **STREAM, resident=True)
    before = stream.batch_at(3, slice(None)).latents
    os.truncate(store / "train-00002.safetensors", 0)
    assert torch.equal(stream.batch_at(3, slice(None)).latents, before)


def test_a_shard_that_changes_while_the_checksums_are_taken_is_refused(store, monkeypatch):
    from alphaflow_cli.data import store as module

    def sums(paths):
        found = sha256_of_all(paths)
        CHANGES["written over"](store / "train-00000.safetensors")
        return found

    sha256_of_all = module.sha256_of_all
    monkeypatch.setattr(module, "sha256_of_all", sums)
    with pytest.raises(AlphaflowError, match="was changed or replaced while it was read"):
        open_store(store, "full")


@pytest.mark.parametrize("change", ["written over", "cut short"])
def test_a_shard_that_changes_during_a_run_ends_it_with_one_line_and_the_run_goes_on_when_it_is_whole(tmp_path, change):
    store, recipe, out = make_store(tmp_path / "store"), make_recipe(tmp_path, "train.steps=4000"), tmp_path / "run"
    shard = store / "train-00001.safetensors"
    whole, started = shard.read_bytes(), begin(recipe, store, out)
    wait_for_step(out, 10)
    CHANGES[change](shard)
    assert started.wait() == [1], started.said()
    assert "train-00001.safetensors: was changed or replaced" in started.said()
    shard.write_bytes(whole)
    step = saved_step(out)
    assert step >= 10
    started = begin(recipe, store, out)
    wait_for_step(out, step + 5)
    started.signal(signal.SIGTERM)
    assert started.wait() == [143], started.said()


def test_many_open_stores_hold_one_file_each_and_give_it_back(store):
    def count():
        return len(list(Path("/proc/self/fd").iterdir()))

    if sys.platform != "linux":
        pytest.skip("open files are counted in /proc")
    before = count()
    opened = open_store(store, "sizes")
    assert count() == before + len(opened.shards.files)
    del opened
    assert count() == before


def test_the_verify_command_names_a_store_that_cannot_be_reached(tmp_path, capfd):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "store", tmp_path / ("x" * 5000)):
        assert run(["prep-latents", "--verify", str(path)]) == 1
        err = capfd.readouterr().err
        assert "no latent store here" in err
        assert "Traceback" not in err
