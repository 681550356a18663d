"""Run folders in which one file is damaged, replaced or gone: every verb names it, none resumes to other weights."""

import os
import re
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from fuzzing import Trial, fuzz, in_child, mutate_bytes, mutate_json
from safetensors.numpy import load_file
from train_helpers import begin, make_recipe, saved_step, wait_for_step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600, method="thread")]

RECIPE = """
name: small
model: {dim: 32, depth: 1, heads: 2, patch: 4}
data:
  {source: "glyphs:40", autoencoder: none, image_size: 8, channels: 3, latent_size: 8, normalise: channel, classes: 10}
times: {equal_share: 0.25}
alpha: {kind: linear, start: 3, end: 9, clamp: 0.05}
optim: {lr: 1e-3, warmup_steps: 4}
ema: {half_lives: [5, 50], ramp: 0.5}
train:
  {steps: 14, batch: 8, precision: fp32, save_every: 4, keep: 2, milestone_every: 0, log_every: 3, sample_every: 7}
eval: {metrics: [fd-tiny], images: 100, draw: balanced, nfe: [1], reference: "glyphs:100"}
"""
EXTRA = [
    "checkpoints/.DS_Store",
    "checkpoints/step-x",
    "checkpoints/step-00000006 (copy)/model.safetensors",
    "state/notes.txt",
]
EXTRA += [
    "state/step-00000012 copy.safetensors",
    "state/step-.safetensors",
    "state/step-99999999.safetensors",
    "samples/step-x.png",
]
EXTRA += [
    "checkpoints/step-99999999/x",
    "analysis/conflict.json",
    "evals/x/y",
    "latents/train-x.safetensors",
    "trackers",
    ".x.tmp/y",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(recipe, a run that was stopped, its end, the same run finished and measured)."""
    root = tmp_path_factory.mktemp("run")
    recipe = make_recipe(root, text=RECIPE)
    path, stopped, done = root / "tiny.yaml", root / "stopped", root / "done"
    assert in_child(Trial(["train", str(path), "--out", str(done)]), 200, 100) == ""
    for argv in (
        ["eval", str(done), "--out", str(done)],
        ["analyze", str(done), "--batches", "1"],
        ["report", str(done)],
    ):
        in_child(Trial(argv), 200, 100)  # what it leaves is the material; whether it works is another test's question
    started = begin(recipe, None, stopped)
    wait_for_step(stopped, 4)
    started.signal(signal.SIGTERM)
    assert started.wait() == [143], started.said()
    assert 4 <= saved_step(stopped) < 14
    return path, stopped, load_file(done / "model.safetensors"), done


def flip_in_tensors(path, rng):
    """One bit behind the header of a safetensors file."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(8 + int.from_bytes(data[:8], "little"), len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def change_a_digit(path, rng):
    data = bytearray(path.read_bytes())
    digits = [i for i, byte in enumerate(data[:20_000]) if 48 <= byte <= 57 and i > 8]
    if digits:
        data[rng.choice(digits)] = 48 + rng.randrange(10)
    path.write_bytes(data)


def replaced(path, other):
    path.unlink()
    other(path)


def link_out(path):
    """The file lies elsewhere, with a word in it that must not be published."""
    other = Path(tempfile.mkdtemp(prefix="alphaflow-outside-")) / path.name
    other.write_bytes(path.read_bytes() + b"SECRET")
    replaced(path, lambda p: p.symlink_to(other))


def json_lines(path, rng):
    lines = path.read_bytes().splitlines()
    lines.insert(
        rng.randrange(len(lines) + 1),
        rng.choice((b"[" * 100_000, b"{", b"\xff\xfe", b"null", b"9" * 5000, b'{"step": "x"}', b"")),
    )
    path.write_bytes(b"\n".join(lines))


def other_json(path, rng):
    import json

    try:
        document = json.loads(path.read_text())
    except (ValueError, OSError):
        return json_lines(path, rng)
    return path.write_bytes(mutate_json(rng, document).encode("utf-8", "surrogatepass"))


CHANGES = {
    "truncated": lambda path, rng: os.truncate(path, rng.randrange(max(1, path.stat().st_size))),
    "empty": lambda path, rng: os.truncate(path, 0),
    "bytes": lambda path, rng: path.write_bytes(mutate_bytes(rng, path.read_bytes())),
    "a bit of the tensors": flip_in_tensors,
    "a digit": change_a_digit,
    "gone": lambda path, rng: path.unlink(),
    "a folder": lambda path, rng: replaced(path, lambda p: (p / "x").mkdir(parents=True)),
    "a pipe": lambda path, rng: replaced(path, os.mkfifo),
    "a link to itself": lambda path, rng: replaced(path, lambda p: p.symlink_to(p.name)),
    "a link to nowhere": lambda path, rng: replaced(path, lambda p: p.symlink_to("gone")),
    "a link out": lambda path, rng: link_out(path),
    "binary": lambda path, rng: path.write_bytes(rng.randbytes(3000)),
    "lines": json_lines,
    "JSON": other_json,
    "copied": lambda path, rng: shutil.copyfile(path, path.with_name(f"{path.stem} copy{path.suffix}")),
    "its folder copied": lambda path, rng: shutil.copytree(
        path.parent, path.parent.with_name(f"{path.parent.name} copy"), symlinks=True
    ),
    "its folder gone": lambda path, rng: shutil.rmtree(path.parent) if "step-" in path.parent.name else path.unlink(),
}
PARTS = [
    "recipe.yaml",
    "model.safetensors",
    "metrics.jsonl",
    "state",
    "checkpoints",
    "samples",
    "latents",
    "results.json",
    "evals",
    "analysis",
]


def test_run_folders(tmp_path, made):
    recipe, stopped, end, done = made
    examples = [(part, change) for change in CHANGES for part in PARTS] + [(name, "extra") for name in EXTRA] * 3
    verbs = re.findall(r"\w+", "train report train sample train report push train eval analyze sample train")

    def make(rng, number):
        part, change = examples[number % len(examples)]
        shutil.rmtree(tmp_path / "hub", ignore_errors=True)
        first = {"state": "train", "samples": "push"}.get(part) if number < len(examples) else None
        verb = first or verbs[(number + number // len(examples)) % len(verbs)]
        run = tmp_path / f"run-{number % 50}"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(stopped if verb == "train" else done, run)
        what = f"{verb}: {damage(run, part, change, rng)}"
        argv = {
            "train": ["train", str(recipe), "--out", str(run)],
            "report": ["report", str(run), "-o", str(tmp_path / "r.html")],
            "sample": ["sample", str(run), "--seeds", "0", "--grid", str(tmp_path / "g.png")],
            "push": ["push", str(run), "--dry-run", "--out", str(tmp_path / "hub")],
            "eval": ["eval", str(run), "--images", "100", "--out", str(run)],
            "analyze": ["analyze", str(run), "--batches", "1"],
        }[verb]

        def same_end(outcome):
            if verb == "push" and any(b"SECRET" in path.read_bytes() for path in files_below(tmp_path / "hub")):
                return "what a link points to was published"
            if verb != "train" or outcome.code:
                return ""
            now = load_file(run / "model.safetensors")
            same = now.keys() == end.keys() and all((now[name] == end[name]).all() for name in end)
            return "" if same else f"{outcome.err[-300:]}\nresumed to other weights: {part} {change}"

        return Trial(argv, what, check=same_end)

    torch.set_num_threads(1)
    fuzz("runs", make, 1_000, seconds=40, cpu=25, fork=True)


def files_below(path):
    return [p for p in sorted([path, *path.rglob("*")]) if p.is_file()]


def damage(run, part, change, rng):
    """Do it to one file of that part; returns its name."""
    if change == "extra":
        target = run / part
        target.parent.mkdir(parents=True, exist_ok=True)
        kind = rng.randrange(3)
        if kind == 0 and not target.exists():
            target.mkdir()
        elif kind == 1:
            target.write_bytes(rng.randbytes(200)) if not target.is_dir() else None
        elif not target.exists():
            target.symlink_to("gone")
        return f"extra {part}"
    files = files_below(run / part) or files_below(run)
    path = files[-1] if change == "a link out" else rng.choice(files)  # the newest picture is the one that is published
    if path.suffix != ".safetensors" and change == "a bit of the tensors":
        change = "bytes"
    CHANGES[change](path, rng)
    return f"{path.relative_to(run)} {change}"
