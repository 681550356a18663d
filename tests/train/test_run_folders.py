"""What may happen to a run folder between two starts: flipped bits, copies, files that are none, lost pictures."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal

import pytest
import torch
from latent_stores import prepare_latents
from safetensors import safe_open
from safetensors.torch import save_file
from train_helpers import assert_same, begin, left_behind, make_recipe, make_store, row_values, train

from alphaflow_cli.cli import run as cli
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.model.checkpoint import load_checkpoint, save_checkpoint
from alphaflow_cli.nn.weights import fit_weights
from alphaflow_cli.tensors import SEAL
from alphaflow_cli.train import samples, start, state
from alphaflow_cli.train.run import texts_apart

FEW = ("train.steps=8", "alpha=0.5", "train.save_every=4", "train.log_every=2")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("latents") / "store")


@pytest.fixture(scope="module")
def half(store, tmp_path_factory):
    """A run that was killed after step 6; 4 was saved."""
    folder = tmp_path_factory.mktemp("half")
    return killed_at(make_recipe(folder, *FEW), store, folder / "run", 6)


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """The run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    return train(make_recipe(folder, *FEW), store, folder / "run")


def test_a_finished_run_is_one_document_with_json(whole, store, capsys):
    line = ["train", str(whole / "recipe.yaml"), "--data", str(store), "--out", str(whole), "--json"]
    assert cli(line) == 0
    model = whole / "model.safetensors"
    assert json.loads(capsys.readouterr().out) == {
        "run": str(whole), "samples": str(whole / "samples"), "best": [], "path": str(model)
    }  # fmt: skip


def killed_at(recipe, store, out, step, **more):
    from alphaflow_cli.train import start

    def work():
        start.StopFlag.__exit__ = lambda *_: None
        real = start.train_steps

        def steps(run, book, stop, *, trackers, after_save):
            def after(now):
                if now.step == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                after_save(now)

            return real(run, book, stop, trackers=trackers, after_save=after)

        start.train_steps = steps
        return start.train(recipe, start.TrainOptions(out, store))

    started = begin(recipe, store, out, work=work, **more)
    assert started.wait() == [-signal.SIGKILL], started.said()
    return out


@pytest.fixture
def run(half, tmp_path):
    return shutil.copytree(half, tmp_path / "run")


def refused(tmp_path, store, out, *texts):
    started = begin(make_recipe(tmp_path, *FEW), store, out)
    assert started.wait() == [1], started.said()
    message = json.loads((started.folder / "rank-0.json").read_text())
    assert message["user_fault"], message["traceback"]
    for text in texts:
        assert text in message["message"]
    assert "\n" not in message["message"]


# The checksum of a state.


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_bit_anywhere_in_a_state_is_refused(seed, run):
    path = state.newest_state(run)
    content = bytearray(path.read_bytes())
    rng = random.Random(seed)
    length = int.from_bytes(content[:8], "little")
    place = rng.choice([rng.randrange(8 + length), rng.randrange(len(content)), len(content) - 1 - rng.randrange(32)])
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    with pytest.raises(AlphaflowError) as refusal:
        state.newest_state(run)
    assert str(refusal.value).startswith(f"{path}: ")
    assert f"Go on from the weights: --init-from {run} with another --out" in str(refusal.value)


def test_a_changed_digit_of_its_facts_is_refused_in_one_line(run, store, tmp_path):
    path = state.newest_state(run)
    content = path.read_bytes()
    assert content.count(b'\\"step\\": 4') == 1
    path.write_bytes(content.replace(b'\\"step\\": 4', b'\\"step\\": 9'))
    refused(tmp_path, store, run, f"{path}: damaged: its bytes changed since it was written", "to begin anew")


def test_an_older_good_state_is_taken_and_it_is_said(run, store, tmp_path, whole):
    path = state.newest_state(run)
    damaged = bytearray(path.read_bytes())
    damaged[-100] ^= 4
    path.with_name("step-00000006.safetensors").write_bytes(damaged)
    started = begin(make_recipe(tmp_path, *FEW), store, run)
    assert started.wait() == [0], started.said()
    assert "step-00000006.safetensors: damaged: its bytes changed since it was written (checksum)." in started.said()
    assert f"going on from the older state of step {4:,}" in started.said()
    assert_same(whole, run)


def without_checksum(path, **facts):
    """The same state as former versions wrote it."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != SEAL}  # noqa: SIM118
        there = json.loads(file.metadata()["facts"])
    metadata = {"format": "alphaflow-state/1", "facts": json.dumps({**there, **facts})}
    save_file(tensors, path, metadata=metadata)


def test_a_state_of_a_former_version_is_read_and_it_is_said(run, store, tmp_path, whole):
    without_checksum(state.newest_state(run))
    started = begin(make_recipe(tmp_path, *FEW), store, run)
    assert started.wait() == [0], started.said()
    assert "an earlier version saved it without a checksum" in started.said()
    assert_same(whole, run)


@pytest.mark.parametrize("facts", [{"step": 92}, {"step": "4"}, {"store": None}, {"retries": 0.5}])
def test_what_a_former_state_says_of_itself_is_checked(facts, run, store, tmp_path):
    path = state.newest_state(run)
    without_checksum(path, **facts)
    refused(tmp_path, store, run, f"{path}: damaged: ")


@pytest.mark.parametrize("damage", ["missing", "another shape"])
def test_a_former_state_of_another_network_is_refused(damage, run, store, tmp_path):
    path = state.newest_state(run)
    without_checksum(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = "ema1.blocks.0.attn.qkv.bias"
    tensors = {k: v for k, v in tensors.items() if k != name} | ({name: torch.ones(1)} if damage != "missing" else {})
    save_file(tensors, path, metadata=metadata)
    refused(tmp_path, store, run, f"{name} is missing or of another shape")


def test_equal_runs_have_equal_files(store, tmp_path):
    one, other = (train(make_recipe(tmp_path, *FEW), store, tmp_path / name) for name in ("one", "other"))
    files = [p.relative_to(one) for p in sorted(one.rglob("*")) if p.is_file() and p.name != "metrics.jsonl"]
    assert len(files) > 6
    assert [name for name in files if (one / name).read_bytes() != (other / name).read_bytes()] == []


def test_a_checkpoint_read_and_written_again_has_the_same_bytes(half, tmp_path):
    save_checkpoint(tmp_path / "again.safetensors", load_checkpoint(half / "model.safetensors"))
    assert (tmp_path / "again.safetensors").read_bytes() == (half / "model.safetensors").read_bytes()


# Copies, and files that are none.


def test_copies_beside_what_was_saved_disturb_nothing_and_are_kept(run, store, tmp_path, whole):
    for folder, suffix in (("checkpoints", ""), ("state", ".safetensors")):
        there = run / folder / f"step-00000004{suffix}"
        for name in ("step-00000004 copy", "step-00000004 (1)", "step-100", "step-²", "step-"):
            (shutil.copytree if there.is_dir() else shutil.copyfile)(there, there.with_name(f"{name}{suffix}"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "00000004." not in path.name}
    before = {path: content for path, content in before.items() if path.parent.name.endswith(("(1)", "copy", "-100"))}
    train(make_recipe(tmp_path, *FEW), store, run)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert_same(whole, run)
    assert cli(["sample", str(run), "--weights", "raw", "--latents", str(tmp_path / "a.npy"), "--seeds", "0"]) == 0
    from alphaflow_cli.model.find import find_checkpoint

    assert find_checkpoint(str(run), weights="raw").parent.name == "step-00000008"


def put(path, kind):
    """Something that is no file of ours in its place."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    {
        "pipe": lambda: os.mkfifo(path),
        "folder": lambda: path.mkdir(),
        "binary": lambda: path.write_bytes(bytes(range(128, 256)) * 20),
        "device": lambda: path.symlink_to("/dev/zero"),
        "endless": lambda: path.symlink_to(path.name),
    }[kind]()
    return path


@pytest.mark.parametrize("kind", ["pipe", "folder", "binary", "device", "endless"])
@pytest.mark.parametrize("name", ["state/step-00000004.safetensors", "recipe.yaml", "model.safetensors"])
def test_what_is_no_file_in_a_run_is_one_line_and_never_waited_for(kind, name, run, store, tmp_path, capsys):
    path = put(run / name, kind)
    line = {
        "recipe.yaml": ["report", str(run), "-o", str(tmp_path / "page.html")],
        "model.safetensors": ["sample", str(path), "--latents", str(tmp_path / "a.npy")],
    }.get(name, ["train", str(run / "recipe.yaml"), "--data", str(store), "--out", str(run)])
    assert cli(line) == 1
    said = capsys.readouterr().err
    assert sum("error: " in text for text in said.splitlines()) == 1
    assert name.split("/")[-1] in said
    if name == "recipe.yaml" and kind != "endless":
        started = None
        with pytest.raises(AlphaflowError, match=r"recipe\.yaml"):
            started = begin(make_recipe(tmp_path, *FEW), store, run)
        assert started is None


DAMAGED_LINES = {
    "half a line": b'{"step": 2, "l": 0.',
    "deep": b'{"step": ' + b"[" * 100_000,
    "a huge step": b'{"step": 1e400}',
    "no rows": b'[1]\n"x"\nnull\n{"step": null}',
    "zeros": b"\0" * 5000,
}


@pytest.mark.parametrize("damage", DAMAGED_LINES)
def test_damaged_lines_of_a_journal_are_left_out_said_and_the_run_goes_on(damage, run, store, tmp_path, whole):
    path = run / "metrics.jsonl"
    path.write_bytes(DAMAGED_LINES[damage] + b"\n" + path.read_bytes())
    assert cli(["report", str(run), "-o", str(tmp_path / "page.html")]) == 0
    started = begin(make_recipe(tmp_path, *FEW), store, run)
    assert started.wait() == [0], started.said()
    assert "were not rows of a journal, and are left out" in started.said()
    assert_same(whole, run)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "binary"])
def test_a_journal_that_is_no_text_file_is_one_line_and_kept(kind, run, store, tmp_path):
    path = put(run / "metrics.jsonl", kind)
    line = "not the journal of a run" if kind == "binary" else "is a folder, a pipe or a device, not a file"
    refused(tmp_path, store, run, f"{path}: {line}", "Move it away")
    assert kind != "binary" or path.stat().st_size == 2560


# Pictures.


def test_a_grid_that_a_kill_took_is_drawn_when_the_run_resumes(tmp_path):
    store = prepare_latents("glyphs:60", tmp_path / "store", size=32, autoencoder="none")
    sets = (*FEW, "data.autoencoder=none", "data.channels=3", "data.latent_size=32", "model.patch=8")
    recipe = make_recipe(tmp_path, *sets, "train.sample_every=4")
    out = killed_at(recipe, store, tmp_path / "run", 4)
    assert not (out / "samples").exists()
    train(recipe, store, out)
    whole = train(recipe, store, tmp_path / "whole")
    names = sorted(path.relative_to(whole) for path in whole.rglob("*"))
    assert names == sorted(path.relative_to(out) for path in out.rglob("*"))
    for name in (path for path in names if path.suffix == ".png"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_grid_for_which_memory_is_short_costs_the_grids_and_the_run_goes_on(store, tmp_path):
    recipe = make_recipe(tmp_path, *FEW, "train.sample_every=4")

    def work():
        samples.pictures = run_out
        return start.train(recipe, start.TrainOptions(tmp_path / "run", store))

    def run_out(*_, **__):
        raise torch.OutOfMemoryError("simulated")

    started = begin(recipe, store, tmp_path / "run", work=work)
    assert started.wait() == [0], started.said()
    assert started.said().count("no sample grids: out of memory (simulated)") == 1


def test_a_checkpoint_that_is_read_while_it_is_removed_does_not_end_the_run(tmp_path, monkeypatch):
    """A network's file system keeps the name of an open file, so that its folder is not empty: the save had failed."""
    folder = tmp_path / "step-00000005"
    folder.mkdir()

    def busy(path, **_):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(os, "rmdir", busy)
    state.discard(folder)
    assert [path.name for path in tmp_path.iterdir()] == [".trash-step-00000005"]


def test_a_best_checkpoint_that_is_published_again_leaves_one_file(tmp_path):
    """After a kill between the two, a resumed run does so: a link that is renamed to another one of its file stays."""
    models = [tmp_path / "checkpoints" / step / "model.safetensors" for step in ("step-00000001", "step-00000002")]
    for model in models:
        model.parent.mkdir(parents=True)
        model.write_text(model.parent.name)
    for model in (models[0], models[0], models[1], models[1]):
        state.publish(tmp_path, model, "best-nfe1.safetensors")
        assert {path.name for path in tmp_path.iterdir()} == {"best-nfe1.safetensors", "checkpoints"}
        assert (tmp_path / "best-nfe1.safetensors").read_text() == model.parent.name


def test_averages_whose_half_lives_look_the_same_have_files_of_their_own(store, tmp_path):
    sets = ("train.steps=1", "alpha=0.5", "train.save_every=1", "ema.half_lives=[9, 50, 50.0000001, 7]")
    out = train(make_recipe(tmp_path, *sets), store, tmp_path / "run")
    names = {path.name for path in (out / "checkpoints" / "step-00000001").iterdir()}
    assert names == {f"{name}.safetensors" for name in ("model", "raw", "ema-50.0", "ema-50.0000001", "ema-7")}
    assert texts_apart([50.0, 0.5, 1000.0]) == ["50", "0.5", "1000"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_real_numbers_are_refused_by_name(dtype, half, tmp_path, capsys):
    path, name = tmp_path / "model.safetensors", "net.blocks.0.attn.qkv.weight"
    with safe_open(half / "model.safetensors", framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors | {name: tensors[name].to(dtype)}, path, metadata=metadata)
    assert cli(["sample", str(path), "--latents", str(tmp_path / "a.npy")]) == 1
    said = capsys.readouterr().err
    assert f"{path}: blocks.0.attn.qkv.weight holds {str(dtype).removeprefix('torch.')} values" in said


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_feature_weights_that_are_no_real_numbers_are_refused_by_name(dtype, tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))  # counts its batches in int64
    fit_weights(net, {name: value.clone() for name, value in net.state_dict().items()}, tmp_path)
    state = {**net.state_dict(), "0.weight": torch.ones(2, 2).to(dtype)}
    with pytest.raises(AlphaflowError, match=r"0\.weight holds \w+ values, a weight is a floating-point number"):
        fit_weights(net, state, tmp_path)


def test_equal_references_have_equal_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "other", "third"):
        assert cli(["reference", "glyphs:100", "--metrics", "fd-tiny", "-o", f"{name}.safetensors"]) == 0
    contents = {path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    assert len(contents) == 1


def test_left_behind_is_not_empty(half):
    assert row_values(half, "step") == [2, 4, 6]
    assert SEAL not in left_behind(half)
