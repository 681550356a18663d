"""The Space and the demo: pushed to a Hub on loopback, and run here, where a request gives the pictures of `sample`."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from exported_models import same_pictures, sampled
from hub_fixtures import alphaflow, hub, project_run  # noqa: F401 (fixtures)
from huggingface_hub import RepoCard
from PIL import Image
from places import ROOT

from alphaflow_cli import demo
from alphaflow_cli.cli import run

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
STAGED = {"README.md", "app.py", "requirements.txt"}


def test_a_space_is_pushed_beside_the_model_and_can_be_pushed_again(hub, project_run, capsys):  # noqa: F811
    for _ in range(2):
        assert run(["push", "runs/tiny", "me/tiny", "--license", "apache-2.0", "--space"]) == 0
        out = capsys.readouterr()
        assert out.out.split() == [f"{hub.url}/me/tiny", f"{hub.url}/spaces/me/tiny"]
    files = hub.files("me/tiny.space")
    assert set(files) - {".gitattributes"} == STAGED
    assert 'build_app("me/tiny")' in files["app.py"].decode()
    compile(files["app.py"], "app.py", "exec")
    assert b"alphaflow-cli[demo]>=" in files["requirements.txt"]
    head = RepoCard(files["README.md"].decode()).data.to_dict()
    wanted = {"sdk": "gradio", "app_file": "app.py", "models": ["me/tiny"], "license": "apache-2.0"}
    assert {name: head[name] for name in wanted} == wanted


@pytest.mark.parametrize("name", ["app.py", "index.html"])
def test_a_space_that_is_something_else_is_kept_and_nothing_is_sent(name, hub, project_run, capsys):  # noqa: F811
    hub.add("me/other.space", {name: b"print('mine')"})
    code, err = alphaflow("push", "runs/tiny", "me/tiny", "--space=me/other", capsys=capsys)
    assert code == 1
    assert "me/other: this Space is something else. Choose another name: --space=user/name" in err
    assert "me/tiny" not in hub.repos


def test_a_run_behind_a_bare_space_option_is_seen(hub, project_run, capsys):  # noqa: F811
    code, err = alphaflow("push", "--space", "runs/tiny", capsys=capsys)
    assert code == 2
    assert "runs/tiny lies here. Write --space at the end, or --space=user/name." in err


def test_a_dry_run_writes_the_space_beside_the_model(project_run, capsys):  # noqa: F811
    assert run(["push", "runs/tiny", "me/tiny", "--dry-run", "--space"]) == 0
    assert {path.name for path in (project_run / "hub-space").iterdir()} == STAGED
    assert "hub-space/app.py" in capsys.readouterr().out


def test_without_gradio_one_line_names_the_extra(project_run, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    code, err = alphaflow("demo", "runs/tiny", capsys=capsys)
    assert code == 1
    assert "demo: gradio is not installed. Run: pip install " in err


def test_a_port_that_is_taken_is_one_line_before_anything_is_loaded(project_run, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(demo, "find_spec", lambda name: name)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, err = alphaflow("demo", "runs/tiny", "--port", port, capsys=capsys)
    assert code == 1
    assert f"demo: port {port} cannot be used (Address already in use). Choose another one with --port" in err


def answer_of(address, data):
    """What the app's function gives for these inputs, over HTTP as Gradio's clients ask."""
    call = f"{address}/gradio_api/call/draw"
    request = urllib.request.Request(call, json.dumps({"data": data}).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{call}/{event}", timeout=60) as answer:
        stream = answer.read().decode()
    assert "event: complete" in stream, stream
    return json.loads(re.findall(r"data: (.*)", stream)[-1])


@pytest.mark.slow
def test_the_spaces_app_runs_and_a_request_gives_the_pictures_of_sample(hub, project_run, tmp_path):  # noqa: F811
    pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[demo]'")
    wanted = sampled(project_run, tmp_path, seeds="5-8")
    assert run(["push", "runs/tiny", "me/tiny"]) == 0
    assert run(["push", "runs/tiny", "me/tiny", "--dry-run", "--space"]) == 0
    more = {"GRADIO_SERVER_PORT": "7869", "GRADIO_SERVER_NAME": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    log = (tmp_path / "log").open("w")
    app = subprocess.Popen(
        [sys.executable, "app.py"], cwd=project_run / "hub-space", env={**os.environ, **more}, stdout=log, stderr=log
    )
    try:
        address, deadline = "http://127.0.0.1:7869", time.monotonic() + 120
        while time.monotonic() < deadline and app.poll() is None:
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        pictures, took = answer_of(address, [3, 5, 1, 4])
        made = []
        for each in pictures:
            with urllib.request.urlopen(each["image"]["url"], timeout=30) as answer, Image.open(answer) as image:
                made.append(np.asarray(image.convert("RGB").resize((16, 16), resample=0)))
        same_pictures("the Space's app", np.stack(made), wanted)
        assert [each["caption"] for each in pictures] == [f"seed {seed}, 3" for seed in range(5, 9)]
        assert "ms for 4 on cpu" in took
    finally:
        app.terminate()
        app.wait(30)
        log.close()
