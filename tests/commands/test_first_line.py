"""What needs no torch is answered before torch is loaded, and every verb says at once what it begins."""

import json
import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete
from small_models import pixel_checkpoint

from alphaflow_cli.cli import group, run
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.model.find import check_address, default_grid, nearby

WRONG = {  # command line → what it is answered
    "sample runs/quikstart": "error: runs/quikstart: no such run or checkpoint here. Did you mean runs/quickstart?",
    "sample run/quickstart": "error: run/quickstart: no such run or checkpoint here. Did you mean runs/quickstart?",
    "sample quickstrt": "error: quickstrt: no such run or checkpoint here. Did you mean runs/quickstart?",
    "sample nowhere.safetensors": "error: nowhere.safetensors: no such checkpoint. Give a run folder",
    "eval runs/quikstart": "Did you mean runs/quickstart?",
    "eval pictures": "error: pictures: no such folder or archive.",
    "eval runs/quickstart --reference run": "error: run: no such folder or archive. Did you mean runs?",
    "analyze runs/quikstart": "Did you mean runs/quickstart?",
    "export runs/quikstart --to onnx -o x.onnx": "Did you mean runs/quickstart?",
    "ema runs/quikstart": "Did you mean runs/quickstart?",
    "demo runs/quikstart": "Did you mean runs/quickstart?",
    "import-latents nowhere --from repa": "error: nowhere: no such folder or file.",
    "report runs/quikstart": "not a run folder (no recipe.yaml in it). Did you mean runs/quickstart?",
    "report runs/other": "Make one: alphaflow train RECIPE --out runs/other",
    "report runs": "runs: not a run folder (no recipe.yaml in it). Runs in it: runs/quickstart",
    "sample runs": "runs: no checkpoint in this folder yet. Runs in it: runs/quickstart",
    "analyze runs/quickstart/checkpoints": "It is a part of the run runs/quickstart: give that.",
    "sample .": "Make one: alphaflow train RECIPE --out RUN",  # there are other things in the folder
    "push runs/quikstart": "Did you mean runs/quickstart?",
    "reference nowhere -o r.safetensors": "error: nowhere: no such folder or archive.",
    "prep-latents nowhere": "error: nowhere: no such folder or archive.",
    "prep-latents a.tar b.tar": "(b.tar). Many files are one SOURCE as a pattern in quotes, such as 'part-*.tar'",
    "train quickstrt": "Did you mean 'quickstart'?",
    "train runs/quickstart": "alphaflow train runs/quickstart/recipe.yaml --out runs/quickstart",
    "train quickstart --resume": "No such option '--resume'. Leave it out: the same command again goes on.",
    "train quickstart --batch-size=32": "No such option '--batch-size'. Write: --set train.batch=32",
    "train quickstart --gpus 8": "No such option '--gpus'. Write: --processes 8",
    "train quickstart train.steps=9": "Got unexpected extra argument (train.steps=9). Write: --set train.steps=9",
    "sample runs/quickstart --num-inference-steps 4": "Write: --nfe 4",
    "sample runs/quickstart --cfg": "No such option '--cfg'. Write: --guidance VALUE",
    "train quickstart --data nowhere": "error: nowhere: no latent store here (no manifest.json). Run:",
    "train quickstart --init-from nowhere.safetensors": "error: nowhere.safetensors: no such checkpoint.",
    "convert nowhere.pt -o x.safetensors": "error: nowhere.pt: no such file.",
    "convert me/model -o x.safetensors": "safetensors checkpoint. On the Hub say which file: hf://me/model/FILE",
}
LINES = (
    "sample {m}", "eval {m} --reference x.npz", "analyze {m}", "report {r}", "push {m}", "convert {m} -o x.safetensors",
    "reference glyphs:100 -o x.safetensors", "prep-latents glyphs:100 --estimate", "train quickstart", "doctor",
    "export {m} --to torch -o x.pt2", "ema {r} --half-life 2", "demo {m}", "pull user/repo",
)  # fmt: skip


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a run in it, and us there."""
    folder = tmp_path / "runs" / "quickstart"
    folder.mkdir(parents=True)
    pixel_checkpoint(folder / "model.safetensors")
    (folder / "checkpoints").mkdir()
    (folder / "recipe.yaml").write_text("name: quickstart\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_slip_is_answered_before_torch_is_loaded_and_the_hub_asked(project):
    script = (
        "import json, sys\nfrom alphaflow_cli.cli import run\n"
        f"codes = [run(line.split()) for line in {list(WRONG)!r}]\n"
        "heavy = sorted({'torch', 'numpy', 'PIL', 'accelerate', 'huggingface_hub'} & set(sys.modules))\n"
        "print(json.dumps([codes, heavy]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=project, capture_output=True, text=True, check=False)
    codes, heavy = json.loads(done.stdout)
    assert heavy == []
    assert set(codes) == {1, 2}
    for message in WRONG.values():
        assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in project.iterdir()} == {"runs"}


def test_a_class_that_is_not_there_is_answered_before_torch_is_loaded(project):
    script = (
        "import sys\nfrom alphaflow_cli.cli import run\n"
        "print(run('sample runs/quickstart --classes 3,typo'.split()), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=project, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "False"], done.stderr
    assert done.stderr.startswith("error: --classes typo: not a class of this model: 0 to 9, class 0, class 1, ")


def test_every_verb_says_what_it_begins_before_torch_is_loaded(project):
    script = (
        "import sys\nfrom alphaflow_cli import cli\nfrom alphaflow_cli.runtime import progress\n"
        "class Begun(BaseException): pass\n"
        "def say(text):\n"
        "    print(text, 'torch' in sys.modules)\n"
        "    raise Begun\n"
        "progress.say = say\n"
        "for line in sys.argv[1:]:\n"
        "    try:\n        print('silent', line, cli.run(line.split()))\n"
        "    except Begun:\n        pass\n"
    )
    places = {"m": "runs/quickstart/model.safetensors", "r": "runs/quickstart"}
    lines = [line.format(**places) for line in LINES]
    done = subprocess.run(
        [sys.executable, "-c", script, *lines], cwd=project, capture_output=True, text=True, check=False
    )
    shown = done.stdout.splitlines()
    assert len(shown) == len(lines), done.stderr
    for line, text in zip(lines, shown, strict=True):
        assert text.endswith(" False"), text
        assert text.split()[0] == line.split()[0] or line == "doctor", text


def test_only_what_is_alike_is_taken_for_a_slip(project):
    assert nearby(project / "runs" / "quickstrat") == str(project / "runs" / "quickstart")
    assert nearby(project / "runs" / "other") == ""
    check_address("me/quickstart")  # a model on the Hub, perhaps
    check_address("me/quickstart@v1")
    with pytest.raises(AlphaflowError, match=r"A model of that name on the Hub: hf://runs/quickstar\)"):
        check_address("runs/quickstar")


def test_a_grid_without_a_name_goes_into_the_run_or_beside_the_file(project):
    assert default_grid("runs/quickstart").as_posix() == "runs/quickstart/grid.png"
    assert default_grid("runs/quickstart/model.safetensors").as_posix() == "runs/quickstart/grid.png"
    (project / "model.safetensors").write_bytes(b"")
    assert default_grid("model.safetensors").as_posix() == "model-grid.png"
    assert default_grid("user/repo@v1").as_posix() == default_grid("hf://user/repo").as_posix() == "repo-grid.png"


def test_sample_without_a_destination_draws_a_grid(project, capsys):
    pixel_checkpoint(project / "lonely.safetensors")
    assert run(["sample", "lonely.safetensors", "--seeds", "0-3"]) == 0
    assert capsys.readouterr().out == "lonely-grid.png\n"
    assert (project / "lonely-grid.png").read_bytes().startswith(b"\x89PNG")
    assert run(["sample", "lonely.safetensors", "--seeds", "0-3", "--grid", "g.jpg"]) == 0
    assert (project / "g.jpg").read_bytes().startswith(b"\xff\xd8")
    assert run(["sample", "lonely.safetensors", "--seeds", "0-3", "--grid", "g.tiff"]) == 1
    assert "Give it a name that ends in .png, .jpg" in capsys.readouterr().err


PATHS = (
    "sample", "eval", "analyze", "push", "report", "convert", "prep-latents", "reference", "recipe show",
    "recipe check", "recipe cp b2", "train", "train b2 --init-from", "train b2 --data", "eval x --reference",
    "sample x --grid", "sample x --autoencoder", "recipe plot b2 -o",
)  # fmt: skip


@pytest.mark.parametrize("line", PATHS)
def test_paths_complete_wherever_one_goes(line):
    found = ShellComplete(group, {}, "alphaflow", "_ALPHAFLOW_COMPLETE").get_completions(line.split(), "ru")
    assert {"file", "dir"} & {item.type for item in found}
