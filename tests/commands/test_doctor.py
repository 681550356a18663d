"""`alphaflow doctor`: it tells what is here, keeps the token to itself, and asks no server."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import click
import pytest
from huggingface_hub import constants
from places import ROOT

from alphaflow_cli import doctor
from alphaflow_cli.cli import run


def run_doctor(capsys, *options):
    assert run(["doctor", *options]) == 0
    return capsys.readouterr().out


def test_the_token_is_seen_and_never_shown(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))  # read when the program starts
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    assert "no token" in run_doctor(capsys)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for out in (run_doctor(capsys), run_doctor(capsys, "--json")):
        assert "hf_secret" not in out
        assert "no token" not in out
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("hf_secret")
    assert json.loads(run_doctor(capsys, "--json"))["hub"]["token"] is True


def test_weights_are_found_where_they_are_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("ALPHAFLOW_WEIGHTS", raising=False)
    before = json.loads(run_doctor(capsys, "--json"))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"")
    after = json.loads(run_doctor(capsys, "--json"))
    assert [w["present"] for w in before["weights"][:3]] == [False, False, False]
    assert [w["present"] for w in after["weights"][:3]] == [True, False, False]
    assert any("fid" in p for p in before["problems"])
    assert not any("fid," in p for p in after["problems"])


def test_a_cache_at_a_path_that_cannot_be_walked_is_listed_as_not_writable(monkeypatch, tmp_path, capsys):
    for name in ("HF_HUB_CACHE", "TORCH_HOME", "ALPHAFLOW_WEIGHTS"):
        monkeypatch.setenv(name, str(tmp_path / ("x" * 300) / "hub"))
    report = json.loads(run_doctor(capsys, "--json"))
    assert [cache["writable"] for cache in report["caches"]] == [False] * 3
    assert any("cannot be written" in problem for problem in report["problems"])


def test_no_server_is_asked(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("doctor opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert "packages" in run_doctor(capsys)


def test_a_missing_package_and_a_broken_torch_are_problems():
    found = {
        "packages": {"timm": None, "click": "8.5"},
        "devices": {"cuda": [], "mps": False, "error": "torch cannot be imported: libcudart is missing"},
        "weights": [],
        "caches": [{"what": "x", "path": "x", "writable": False}],
        "free_bytes": 10**9,
        "hub": {"token": True, "offline": False},
    }
    assert doctor.problems(found) == [
        "timm is not installed: pip install timm",
        "nothing that computes will work: torch cannot be imported: libcudart is missing",
        "the cache x cannot be written",
        "1.0 GB free here: what an XL/2 run keeps needs 22 GB",
    ]


def test_a_cuda_build_on_a_machine_without_gpu_is_told_with_the_smaller_one():
    devices = {"cuda": [], "mps": False, "built_for": "13.0", "error": ""}
    here = {"packages": {"click": "8"}, "weights": [], "caches": [], "free_bytes": 10**12, "devices": devices}
    here["hub"] = {"token": True, "offline": False}
    remarks = doctor.problems(here)
    assert remarks[0].startswith("no GPU: quickstart")
    assert "torch is the build for CUDA 13.0, and sees no GPU" in remarks[1]
    assert remarks[1].endswith("torch torchvision --index-url https://download.pytorch.org/whl/cpu")
    assert len(doctor.problems({**here, "devices": {**devices, "built_for": ""}})) == 1


def test_a_gpu_that_cannot_compile_is_named_with_what_it_lacks():
    card = {"name": "A100", "bytes": 4 * 10**10, "bf16": True, "compiles": False}
    devices = {"cuda": [card], "mps": False, "built_for": "13.0", "error": ""}
    here = {"packages": {"click": "8"}, "weights": [], "caches": [], "free_bytes": 10**12, "devices": devices}
    here["hub"] = {"token": True, "offline": False}
    (remark,) = doctor.problems(here)
    assert remark.startswith("A100: torch.compile lacks Triton, a C compiler such as gcc, or a newer GPU")
    card["compiles"] = True
    assert doctor.problems(here) == []


def test_every_required_package_is_listed_with_its_version():
    listed = doctor.packages()
    assert {"torch", "click", "pyyaml", "timm", "torch-fidelity", "pillow"} <= set(listed)
    assert "pytest" not in listed
    assert all(listed.values())


def clone(tmp_path, *line, packages=True):
    """A command line in a clone that is not installed, with or without the packages of this environment."""
    site = tmp_path / "site"
    site.mkdir()
    for entry in Path(click.__file__).parents[1].iterdir() if packages else ():
        if "alphaflow" not in entry.name and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    root = ROOT
    outside = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(site)])}
    command = [sys.executable, "-S", "-m", "alphaflow_cli", *line]
    return subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True, text=True, timeout=200)


def test_a_clone_that_is_not_installed_works_and_says_so(tmp_path):
    done = clone(tmp_path, "doctor")
    assert done.returncode == 0
    assert re.fullmatch(r"\S+ \S+ looking at this machine\n", done.stderr)
    assert "a clone here, not installed" in done.stdout


def test_a_clone_without_its_packages_is_one_line(tmp_path):
    done = clone(tmp_path, "--version", packages=False)
    assert done.returncode == 1
    assert done.stderr == "error: click is not installed. Run, in alphaflow's folder: pip install .\n"


ONE_ANSWER = """
import json, sys
import huggingface_hub
from alphaflow_cli import doctor
from alphaflow_cli.nn.autoencoder import is_offline
from alphaflow_cli.remote.cache import cache_folder, cached_file
print(json.dumps([doctor.hub()["offline"], is_offline(), huggingface_hub.constants.HF_HUB_OFFLINE]))
folders = [each["path"] for each in doctor.caches()]
print(json.dumps([folders, str(cache_folder()), str(cached_file("me/vae", "config.json"))]))
"""


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/huggingface/hub"),
        ({"XDG_CACHE_HOME": "xdg", "HF_HOME": "home"}, "home/hub"),
        ({"HF_HOME": "home", "HF_HUB_CACHE": "cache"}, "cache"),
    ],
)
def test_the_environment_has_one_answer_in_every_part(variables, place, tmp_path):
    snapshot = tmp_path / place / "models--me--vae" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    names = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "TORCH_HOME", "ALPHAFLOW_WEIGHTS")
    outside = {name: value for name, value in os.environ.items() if name not in names}
    outside |= {name: str(tmp_path / value) for name, value in variables.items()}
    script = [sys.executable, "-c", ONE_ANSWER]
    words = "false" if place == "cache" else "1"
    done = subprocess.run(script, env={**outside, "HF_HUB_OFFLINE": words}, capture_output=True, text=True, check=True)
    offline, (folders, cache, file) = map(json.loads, done.stdout.splitlines())
    assert offline == [words == "1"] * 3
    assert cache == folders[0] == str(tmp_path / place)
    assert file == str(snapshot / "config.json")
    if "XDG_CACHE_HOME" in variables:
        assert folders[1] == str(tmp_path / "xdg" / "torch" / "hub" / "checkpoints")
