"""Every command line of README.md and docs/ runs as it stands, or is listed with what it needs and this machine lacks.

A line runs in its own copy of a folder in which the names that the pages use exist in small: pictures in `imagenet/`,
`photos.zip`, a tiny autoencoder where sd-vae-ft-ema is looked for, a store, two finished runs, converted checkpoints, a
Hub on loopback. A new line in the pages that is in neither list fails here.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_fixtures import hub, write_checkpoint  # noqa: F401 (a fixture)
from packed_forms import parquet_files, pictures, table_of, webdataset, write_files
from PIL import Image
from snapshots import HEADS, published_snapshot, sit_weights, tiny_autoencoder
from tiny_autoencoders import tiny_kl

from alphaflow_cli.cli import run

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = re.compile(r"(eval \"|(\w+=\S+ )*(alphaflow|python3?|torchrun|accelerate|srun|curl|pip|hf|tensorboard) )\S")
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

# What cannot run here: its beginning → what it needs.
ELSEWHERE = {
    "python3 -m venv": "the network: it installs the package",
    "pip install": "the network",
    "curl -L": "the network",
    "hf auth login": "Hub",
    "tensorboard --logdir": "a package of its own, and it never ends",
    "torchrun": "cluster",
    "accelerate launch": "cluster",
    "srun": "cluster",
    "alphaflow train b2 --data": "GPU",
    "alphaflow train b2-cfg --data": "GPU",
    "alphaflow train cifar10 --data": "GPU",
    "alphaflow sample runs/b2 --seeds 0-49999": "GPU",
    "alphaflow train b2 --set train.conflict_every": "GPU",
    "alphaflow train xl2-cfg": "GPU",
    "alphaflow reference imagenet/": "ImageNet, and another system's file: the weights of Inception and DINOv2",
    "alphaflow eval samples/ --reference imagenet256": "another system's file: the weights of Inception and DINOv2",
    "alphaflow eval alphaflow-": "GPU, and another system's file: the weights of Inception and DINOv2",
    "alphaflow eval admnet": "another system's file",
    "alphaflow import-latents vae-sd/": "another system's latents; test_import_latents.py writes and reads each form",
    "alphaflow convert SiT": "another system's file",
    "alphaflow convert SoFlow": "another system's file",
    "alphaflow sample soflow-b2": "another system's file",
    "alphaflow convert hf://snap-research": "Hub",
    "alphaflow export runs/quickstart --to onnx": "nothing: the snippet of Python beside it runs it, once",
    "alphaflow export runs/quickstart --to web": "the network; tests/export/test_export_page.py runs it",
    "python -m http.server": "somebody to end it",
    "alphaflow demo": "somebody to end it, and a package of its own; tests/hub/test_hub_space.py runs the app",
    "alphaflow convert hf://Lyy0725": "Hub",
    "alphaflow sample imf-xl2": "another system's file",
    "alphaflow train imf-b2 --init-from": "GPU, and another system's file",
    "python benchmarks/gpu.py": "GPU; test_gpu_benchmark.py runs it at toy size",
    "python benchmarks/bench_load.py": "minutes on an idle machine; test_bench_load.py runs it in small",
    "python benchmarks/bench_precision.py": "minutes on an idle machine; test_bench_precision.py runs it in small",
    "python benchmarks/bench_ruler.py": "another system's file",
    "python benchmarks/bench_scaling.py": "an idle machine for minutes; test_benchmarks.py runs it in small",
}
SLOW = ("alphaflow train quickstart", "alphaflow analyze runs/")
SMALL = " --set train.steps=2 --set train.batch=4 --set model.dim=16"
TOY = {  # what would take minutes runs in small
    "alphaflow train quickstart --data": SMALL,
    "alphaflow train own.yaml": SMALL,
    "alphaflow recipe new latents/mine -o own.yaml --like b2 --hours": SMALL
    + " --set model.depth=1 --set model.heads=2",
}
MAKES = {  # what a line makes must not be there before
    "alphaflow prep-latents imagenet/ --out latents/imagenet": "latents/imagenet",
    "alphaflow train quickstart --data latents/mine": "runs/mine",
    "alphaflow recipe cp b2 mine.yaml": "mine.yaml",
    "alphaflow recipe new latents/mine": "mine.yaml",
    "alphaflow recipe new latents/mine -o own.yaml": "own.yaml",
    "alphaflow train quickstart": "runs/quickstart",
    "alphaflow pull user/repo@COMMIT -o DIR": "DIR",
}


def commands():
    """(page, line) of every command: in fences, in indented blocks, and whole ones between back-ticks."""
    for page in PAGES:
        text, fenced = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8")), False
        for line in text.splitlines():
            fenced ^= line.startswith("```")
            found = [line.strip()] if fenced or line.startswith("    ") else re.findall(r"`([^`]+)`", line)
            for each in found:
                whole = PROGRAM.match(each) and "…" not in each
                if whole and (fenced or line.startswith("    ") or len(each.split()) > 2):
                    yield page.name, re.sub(r"\s+# .*", "", each.replace("\\|", "|"))


COMMANDS = sorted(set(commands()))
LINES = sorted({line for _, line in COMMANDS})
HERE = [line for line in LINES if not line.startswith(tuple(ELSEWHERE))]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder with everything in small; made once, by the package's own commands."""
    folder = tmp_path_factory.mktemp("docs")
    before = Path.cwd()
    os.chdir(folder)
    try:
        write_pictures()
        write_runs()
        write_models()
    finally:
        os.chdir(before)
    return folder


def write_pictures():
    rng = np.random.default_rng(0)
    for split in ("train/n01440764", "train/n01443537"):
        Path("imagenet", split).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(f"imagenet/{split}/{i}.png")
    for i in range(102):  # a score needs 100
        path = Path("photos", ("cat", "frog", "ship")[i % 3], f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(path)
    Path("samples").mkdir()
    for i in range(100):  # a score needs as many
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(f"samples/{i}.png")
    write_packed(pictures(12, side=40))
    with zipfile.ZipFile("photos.zip", "w") as archive:
        for path in sorted(Path("imagenet/train").rglob("*.png")):
            archive.write(path, path.relative_to("imagenet/train"))


def write_packed(rows):
    """tables/, shards/ and flat/ with labels.csv beside it."""
    write_files(Path("tables"), parquet_files(rows, 2))
    tars = webdataset(rows, 3)
    write_files(Path("shards"), {f"part-00{index}.tar": tars[f"part-{index}.tar"] for index in range(3)})
    flat = table_of(rows)
    Path("labels.csv").write_bytes(flat.pop("metadata.csv"))
    write_files(Path("flat"), flat)


RECIPES = {
    "b2": """
data: {store: latents/imagenet, image_size: 32, latent_size: 4, classes: 2}
model: {dim: 32, depth: 1, heads: 2, patch: 2}
""",
    "quickstart": """
data:
  {source: "glyphs:40", autoencoder: none, image_size: 32, channels: 3, latent_size: 32, classes: 10, normalise: scale}
model: {dim: 32, depth: 1, heads: 2, patch: 8}
""",
}
TRAINING = """
alpha: {kind: linear, start: 1, end: 3}
train: {steps: 4, batch: 8, precision: fp32, save_every: 2, log_every: 1, sample_every: 4}
optim: {warmup_steps: 1}
eval: {metrics: [fd-tiny], images: 100, draw: balanced, nfe: [1], reference: "glyphs:100", every: 2, quick_images: 100}
"""


def write_runs():
    """runs/b2 on latents of a local autoencoder, runs/quickstart on glyphs, both of four steps."""
    tiny_kl(Path("stabilityai/sd-vae-ft-ema"))
    works("prep-latents imagenet/ --size 32 --out latents/imagenet")
    for name, text in RECIPES.items():
        Path(f"{name}.yaml").write_text(f"name: {name}\n{text}{TRAINING}")
        works(f"train ./{name}.yaml --out runs/{name}")
    works("prep-latents photos/ --size 32 --autoencoder none --out latents/mine")
    works(f"train quickstart --data latents/mine --out runs/mine {TOY['alphaflow train quickstart --data']}")
    shutil.copytree("runs/b2", "RUN")
    works("reference glyphs:100 --size 32 --metrics fd-tiny -o ref.safetensors")
    shutil.copytree("stabilityai/sd-vae-ft-ema", "DIR")
    Path("mine.yaml").write_text("train: {steps: 10}\n")
    works("recipe new latents/mine -o own.yaml")


def write_models():
    """Checkpoints of other systems, converted; and snapshots in the published form."""
    torch.save({"ema": sit_weights()}, "sit.pt")

    works(f"convert sit.pt --from sit --set model.heads={HEADS} -o sit-xl2.safetensors")
    for name in ("alphaflow-B-2.pt", "alphaflow-XL-2-cfg.pt", "SRC"):
        torch.save(published_snapshot(dropout=0.1 * ("cfg" in name), autoencoder=tiny_autoencoder()), name)

    works("convert alphaflow-XL-2-cfg.pt -o xl2.safetensors")


def works(line):
    assert run(shlex.split(line)) == 0, line


@pytest.fixture
def here(tmp_path, place, monkeypatch, hub):  # noqa: F811
    """A copy of it, where we are; the Hub holds user/repo and lab/b2, and nothing else is reached."""
    shutil.copytree(place, tmp_path / "project")
    model = write_checkpoint(tmp_path / "model.safetensors").read_bytes()
    hub.add("user/repo", {"model.safetensors": model, "config.json": b"{}", "recipe.yaml": b"name: x\n"})
    hub.repos["user/repo"].refs |= {"v1.0": 0, "revision": 0, "COMMIT": 0}
    hub.add("lab/b2", {"README.md": b"# b2\n"})
    hub.add("datasets/uoft-cs/cifar10", parquet_files(pictures(12, side=32), 1, image="img"))
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


WHOLE = [pytest.mark.slow, pytest.mark.timeout(3600)]  # the quickstart, from its first step to its last score


def marks_of(line):
    return WHOLE if line.startswith(SLOW) and not line.startswith(tuple(TOY)) else []


@pytest.mark.parametrize("line", [pytest.param(x, marks=marks_of(x), id=x) for x in HERE])
def test_the_command_line_runs_as_it_stands(line, here, capfd):
    line += next((more for start, more in TOY.items() if line.startswith(start)), "")
    for command, made in MAKES.items():
        if line.startswith(command):
            shutil.rmtree(made) if Path(made).is_dir() else Path(made).unlink()
    if "|" in line or "=" in line.split()[0] or line.startswith('eval "'):  # for a shell
        code = in_shell(line, here)
    else:
        code = run(shlex.split(line, comments=True)[1:])
    assert code == 0, capfd.readouterr().err


def in_shell(line, folder):
    """With an `alphaflow` on the PATH that is this one; lines for the start-up of zsh and fish lose their eval."""
    starter = folder / "bin" / "alphaflow"
    starter.parent.mkdir()
    found = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    starter.write_text(f"#!{sys.executable}\n{found}from alphaflow_cli.__main__ import main\nmain()\n")
    starter.chmod(0o755)
    env = {**os.environ, "PATH": f"{starter.parent}{os.pathsep}{os.environ['PATH']}"}
    shell = "bash" if "bash" in line else "sh"
    if "zsh" in line or "fish" in line:
        line = re.search(r"_ALPHAFLOW_COMPLETE=\w+ alphaflow", line)[0]
    return subprocess.run([shell, "-c", line], env=env, check=False).returncode


def test_every_command_line_is_run_or_says_what_it_needs():
    assert len(HERE) > 40
    assert len(LINES) > 75
    assert {page for page, _ in COMMANDS} >= {page.name for page in PAGES} - {"method.md", "architecture.md"}
    assert [start for start in ELSEWHERE if not any(line.startswith(start) for line in LINES)] == []
    assert [line for line in [*SLOW, *MAKES] if not any(each.startswith(line) for each in HERE)] == []


# Snippets of Python.


def snippets():
    """(page, number, text)."""
    for page in PAGES:
        for i, text in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)):
            yield pytest.param(text, id=f"{page.name}-{i}")


SNIPPET_NEEDS = {  # what a snippet names → the line on its page that makes it
    '"model.onnx"': "export runs/quickstart --to onnx -o model.onnx",
    '"pipeline"': "export runs/quickstart --to diffusers -o pipeline",
}


@pytest.mark.parametrize("text", [*snippets()])
def test_the_snippet_runs_as_it_stands(text, here):
    for name, line in SNIPPET_NEEDS.items():
        if name in text:
            works(line)
    exec(compile(text, "snippet", "exec"), {})
