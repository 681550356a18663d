"""prep-latents as a pipeline: batches queued on a GPU, shards written beside, an encoder compiled where it pays.

The GPU is simulated (helpers/fake_gpu.py).
"""

import threading

import numpy as np
import pytest
import torch
from fake_gpu import GPU, TORCH, Event, fake_gpu
from PIL import Image
from safetensors.numpy import load_file
from tiny_autoencoders import tiny_kl

from alphaflow_cli.data.manifest import read_manifest
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.latents import encode
from alphaflow_cli.latents.encode import StoreRequest, encode_shards, load_encoder
from alphaflow_cli.latents.plan import plan_job
from alphaflow_cli.latents.prepare import prepare_store
from alphaflow_cli.model.compiling import compile_part
from alphaflow_cli.runtime.processes import Processes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "tiny-kl"
    tiny_kl(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """300 pictures: two shards."""
    root, rng = tmp_path_factory.mktemp("tree") / "set", np.random.default_rng(0)
    root.mkdir()
    for index in range(300):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / f"{index:03d}.png")
    return str(root)


def prepare(source, out, **options):
    request = StoreRequest(source, size=16, **{"autoencoder": "none", **options})
    return prepare_store(request, out, Processes(CPU), shown=False)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def all_rows(out, name):
    return np.concatenate([load_file(out / shard.file)[name] for shard in read_manifest(out).shards])


@pytest.mark.skipif(TORCH < (2, 11), reason="older torch asks the driver what a fake GPU can do")
def test_the_host_waits_once_for_a_batch_that_has_the_next_one_behind_it(vae, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(
        encode._Rows, "save", lambda rows, shard: saved.append((shard, threading.current_thread().name))
    )
    request = StoreRequest(tree, 16, vae, batch=64, flips=True, precision="fp32")
    job, saved, queued, ahead = plan_job(request, tmp_path / "s", Processes(CPU)), [], [], []
    rows_of, fetch = encode.encode_rows, encode.fetch_rows
    monkeypatch.setattr(encode, "encode_rows", lambda *given: (queued.append(1), rows_of(*given))[1])
    monkeypatch.setattr(encode, "fetch_rows", lambda *given: (ahead.append(sum(queued)), fetch(*given))[1])
    with fake_gpu(monkeypatch) as gpu:
        for part in job.encoder.module.modules():
            for name, value in part._parameters.items():
                part._parameters[name] = value.detach().to(GPU) if value is not None else None
        gpu.found.clear()
        encode_shards(job, [0, 1], load_encoder(job, GPU), GPU, lambda count: None)
    assert gpu.found == []
    assert gpu.on_device > 300
    assert len(Event.waits) == 4 + 1  # of 64 pictures: 256 in the first shard, 44 in the second
    assert ahead == [2, 3, 4, 4, 5]
    assert [shard for shard, _ in saved] == [0, 1]
    assert threading.current_thread().name not in {name for _, name in saved}


def test_an_error_of_the_thread_that_writes_is_the_commands(tree, tmp_path, monkeypatch):
    """The shard before it is kept, and the same command ends with the same bytes."""
    whole = prepare(tree, tmp_path / "whole")
    write = encode.write_shard

    def full(out, plan, shard, *rest):
        if shard == 1:
            raise OSError(28, "No space left on device", str(out))
        write(out, plan, shard, *rest)

    monkeypatch.setattr(encode, "write_shard", full)
    with pytest.raises(AlphaflowError, match="no room left"):
        prepare(tree, tmp_path / "s")
    assert (tmp_path / "s" / "train-00000.json").exists()
    monkeypatch.setattr(encode, "write_shard", write)
    assert contents(prepare(tree, tmp_path / "s")) == contents(whole)


def test_no_more_than_two_shards_are_held(tree, tmp_path, monkeypatch):
    monkeypatch.setattr("alphaflow_cli.latents.plan.SHARD_LEAST", 16)
    alive, most = [], []
    begin, save = encode._Rows.__init__, encode._Rows.save

    def begun(rows, *rest):
        begin(rows, *rest)
        alive.append(rows.span)
        most.append(len(alive))

    def saved(rows, shard):
        save(rows, shard)
        alive.remove(rows.span)

    monkeypatch.setattr(encode._Rows, "__init__", begun)
    monkeypatch.setattr(encode._Rows, "save", saved)
    prepare(tree, tmp_path / "s")
    assert len(most) == 16
    assert max(most) == 2  # the one that is written, and the next one


@pytest.fixture
def compiling(monkeypatch):
    """The encoder is compiled from the first picture on, by the quickest backend; yields the rows that it saw."""
    seen = []

    def backend(graph, inputs):
        return graph.forward

    def part(module, *_):
        module.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
        compile_part(module, backend)

    torch._dynamo.reset()
    monkeypatch.setattr(encode, "COMPILED_FROM", 1e-9)
    monkeypatch.setattr(encode, "can_compile", lambda device: True)
    monkeypatch.setattr(encode, "compile_part", part)
    return seen


def test_a_compiled_encoder_sees_whole_batches_and_gives_the_same_store(
    vae, tree, tmp_path, compiling, monkeypatch, capsys
):
    options = {"autoencoder": vae, "precision": "bf16", "batch": 16, "flips": True}
    with monkeypatch.context() as patch:
        patch.setattr(encode, "COMPILED_FROM", 1e9)
        plain = prepare(tree, tmp_path / "plain", **options)
    assert not compiling
    found = prepare(tree, tmp_path / "compiled", **options)
    assert set(compiling) == {16}
    assert len(compiling) == 1 + 2 * 19  # the first call, then 300 pictures and their mirror images
    assert "compiled the encoder in " in capsys.readouterr().err
    for name in ("moments", "moments_flip"):
        np.testing.assert_allclose(all_rows(found, name), all_rows(plain, name), atol=0.02)
    (found / "train-00000.safetensors").unlink()
    before = contents(found)
    prepare(tree, tmp_path / "compiled", **options)
    after = contents(found)
    assert {name: after[name] for name in before} == before


def test_where_the_encoder_cannot_be_compiled_a_line_says_so(vae, tree, tmp_path, compiling, monkeypatch, capsys):
    def broken(graph, inputs):
        raise ValueError("no such machine\nand more")

    monkeypatch.setattr(encode, "compile_part", lambda module: compile_part(module, broken))
    options = {"autoencoder": vae, "precision": "bf16"}
    found = prepare(tree, tmp_path / "s", **options)
    assert "torch.compile failed, so the encoder runs eagerly" in capsys.readouterr().err
    monkeypatch.setattr(encode, "can_compile", lambda device: False)
    plain = prepare(tree, tmp_path / "plain", **options)
    assert contents(found) == contents(plain)
