"""`alphaflow doctor`: it tells what is here, keeps the token to itself, and asks no server."""

import json
import socket

from alphaflow_cli.cli import run
from alphaflow_cli.engine import machine


def doctor(capsys, *options):
    assert run(["doctor", *options]) == 0
    return capsys.readouterr().out


def test_the_token_is_seen_and_never_shown(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    assert "no token" in doctor(capsys)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for out in (doctor(capsys), doctor(capsys, "--json")):
        assert "hf_secret" not in out
        assert "no token" not in out
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("hf_secret")
    assert json.loads(doctor(capsys, "--json"))["hub"]["token"] is True


def test_weights_are_found_where_they_are_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("ALPHAFLOW_WEIGHTS", raising=False)
    before = json.loads(doctor(capsys, "--json"))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"")
    after = json.loads(doctor(capsys, "--json"))
    assert [w["present"] for w in before["weights"][:3]] == [False, False, False]
    assert [w["present"] for w in after["weights"][:3]] == [True, False, False]
    assert any("fid" in p for p in before["problems"])
    assert not any("fid," in p for p in after["problems"])


def test_no_server_is_asked(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("doctor opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert "packages" in doctor(capsys)


def test_a_missing_package_and_a_broken_torch_are_problems():
    found = {
        "packages": {"timm": None, "click": "8.5"},
        "devices": {"cuda": [], "mps": False, "error": "torch cannot be imported: libcudart is missing"},
        "weights": [],
        "caches": [{"what": "x", "path": "x", "writable": False}],
        "free_bytes": 10**9,
        "hub": {"token": True, "offline": False},
    }
    assert machine.problems(found) == [
        "timm is not installed: pip install timm",
        "nothing that computes will work: torch cannot be imported: libcudart is missing",
        "the cache x cannot be written",
        "1.0 GB free here: two checkpoints of an XL/2 run need 22 GB",
    ]


def test_every_required_package_is_listed_with_its_version():
    listed = machine.packages()
    assert {"torch", "click", "pyyaml", "timm", "torch-fidelity", "pillow"} <= set(listed)
    assert "pytest" not in listed
    assert all(listed.values())
