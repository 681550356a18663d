"""Run folders damaged at random: no traceback, no wait without end, whatever a verb is given. Seeds are printed."""

import contextlib
import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from train_helpers import make_recipe, make_store, train

from alphaflow_cli.cli import run as cli
from alphaflow_cli.sample.grid import grid_png

TRIALS = int(os.environ.get("ALPHAFLOW_FUZZ", "80"))
SECONDS = 60  # for one verb: far more than it takes, even on a busy machine
SETS = ("train.steps=2", "alpha=0.5", "train.save_every=1", "train.log_every=1", "train.milestone_every=1")
TEXTS = ["null", "[]", "{}", "-1", "1e400", "NaN", '"x"', "9" * 5000, "[" * 50_000, "\\ud800", "\x1b[2J", "true", "0.5"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("latents") / "store")


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """A run of two steps with everything in it that a run may have."""
    folder = tmp_path_factory.mktemp("whole")
    out = train(make_recipe(folder, *SETS), store, folder / "run")
    (out / "samples").mkdir()
    (out / "samples" / "step-00000002.png").write_bytes(grid_png([[np.zeros((8, 8, 3), np.uint8)]]))
    assert cli(["analyze", str(out), "--data", str(store), "--batch", "4", "--batches", "1"]) == 0
    return out


def damage(path: Path, rng: random.Random, files: list[Path]) -> str:
    """One accident to one file; says which."""
    content = path.read_bytes()
    kind = rng.choice(sorted(ACCIDENTS))
    path.unlink()
    ACCIDENTS[kind](path, content, rng, files)
    return f"{kind} {path.name}"


def flip(path, content, rng, files):
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 8])):
        changed[rng.randrange(min(len(content), rng.choice([8, 500, len(content)])))] ^= 1 << rng.randrange(8)
    path.write_bytes(changed)


def cut(path, content, rng, files):
    path.write_bytes(content[: rng.randrange(len(content))])


def insert(path, content, rng, files):
    at, text = rng.randrange(len(content)), rng.choice(TEXTS).encode()
    path.write_bytes(content[:at] + text + content[at + rng.choice([0, len(text)]) :])


def reword(path, content, rng, files):
    """Another value in its JSON or YAML, the header of a safetensors file included, lengths kept right."""
    length = int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else 0
    text = content[8 : 8 + length] if length else content
    words = text.split(b":")
    i = rng.randrange(len(words))
    words[i] = rng.choice([*TEXTS, words[rng.randrange(len(words))].decode(errors="replace")]).encode() + rng.choice(
        [b"", b",", b"}", words[i][-1:]]
    )
    text = b":".join(words)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :] if length else text)


def exchange(path, content, rng, files):
    shutil.copyfile(rng.choice([each for each in files if each != path]), path)


def copies(path, content, rng, files):
    path.write_bytes(content)
    for name in (f"{path.stem} copy{path.suffix}", f"{path.stem} (1){path.suffix}", f"{path.stem}0{path.suffix}"):
        path.with_name(name).write_bytes(content)
    shutil.copytree(path.parent, path.parent.parent / f"{path.parent.name} copy", dirs_exist_ok=True)


ACCIDENTS = {
    "flip": flip,
    "cut": cut,
    "insert": insert,
    "reword": reword,
    "exchange": exchange,
    "copies": copies,
    "gone": lambda path, content, rng, files: None,
    "empty": lambda path, content, rng, files: path.touch(),
    "pipe": lambda path, content, rng, files: os.mkfifo(path),
    "folder": lambda path, content, rng, files: path.mkdir(),
    "endless link": lambda path, content, rng, files: path.symlink_to(path.name),
    "device": lambda path, content, rng, files: path.symlink_to("/dev/zero"),
    "noise": lambda path, content, rng, files: path.write_bytes(rng.randbytes(rng.choice([1, 100, 5000]))),
}


@contextlib.contextmanager
def within(seconds):
    def late(number, frame):
        raise AssertionError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("seed", range(4))
def test_no_accident_to_a_run_folder_is_a_traceback_or_a_hang(seed, whole, store, tmp_path, capsys):
    recipe = tmp_path / "tiny.yaml"
    make_recipe(tmp_path, *SETS)
    sets = [part for value in SETS for part in ("--set", value)]
    faults = []
    for trial in range(TRIALS // 4):
        rng, run = random.Random(seed * 1_000_000 + trial), tmp_path / "run"
        shutil.copytree(whole, run, symlinks=True)
        if rng.random() < 0.7:
            (run / "state" / "step-00000002.safetensors").rename(run / "state" / "step-00000001.safetensors")
        files = sorted(path for path in run.rglob("*") if path.is_file())
        what = [damage(path, rng, files) for path in rng.sample(files, rng.choice([1, 1, 2]))]
        for line in (
            ["report", run, "-o", tmp_path / "page.html"],
            ["sample", run, "--weights", rng.choice(["ema", "raw"]), "--seeds", "0", "--latents", tmp_path / "a.npy"],
            ["analyze", run, "--data", store, "--batch", "4", "--batches", "1"],
            ["train", rng.choice([recipe, run / "recipe.yaml"]), *sets, "--data", store, "--out", run],
        ):
            try:
                with within(SECONDS):
                    code = cli([*map(str, line)])
                said = capsys.readouterr().err
                assert code in (0, 1, 2)
                assert code == 0 or sum("error: " in text for text in said.splitlines()) == 1, said[-2000:]
                assert max(map(len, said.splitlines()), default=0) < 3000, said[:3000]
            except Exception as fault:
                faults.append((seed, trial, what, line[0], json.dumps(str(fault))[:300], type(fault).__name__))
        shutil.rmtree(run)
    for fault in faults:
        print(*fault)
    assert not faults, f"{len(faults)} faults; the first: {faults[0]}"
