"""What the Hub answers, and what is said of it: the cache serves where nobody answers, a refusal is one clear line."""

import huggingface_hub
import pytest
from hub_fixtures import alphaflow, hub, project_run, write_checkpoint  # noqa: F401 (fixtures)
from hub_server import Fault

from alphaflow_cli.remote import client
from alphaflow_cli.remote.download import resolve_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

# The cache serves where nobody answers, not where the Hub refuses.


@pytest.mark.parametrize(
    ("fault", "said"),
    [(Fault(503), "the Hub is in trouble; using the cache"), (Fault(0), "no connection to the Hub; using the cache")],
)
def test_the_cache_serves_aloud_where_nobody_answers(hub, project_run, capsys, fault, said):  # noqa: F811
    alphaflow("push", "runs/tiny", capsys=capsys)
    kept = resolve_checkpoint("me/tiny").read_bytes()
    hub.faults["GET", "/api/models/"] = Fault(**vars(fault))
    capsys.readouterr()
    assert resolve_checkpoint("me/tiny").read_bytes() == kept
    assert said in capsys.readouterr().err


def test_of_many_processes_one_names_the_commit(hub, project_run, capsys, monkeypatch):  # noqa: F811
    alphaflow("push", "runs/tiny", capsys=capsys)
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        resolve_checkpoint("me/tiny")
        assert capsys.readouterr().err.count("me/tiny@") == lines


def test_a_full_disk_stops_downloads_only_and_is_named(hub, project_run, capsys, monkeypatch):  # noqa: F811
    alphaflow("push", "runs/tiny", "me/tiny", capsys=capsys)
    alphaflow("push", "runs/tiny", "me/other", capsys=capsys)
    kept = resolve_checkpoint("me/tiny").read_bytes()
    monkeypatch.setattr(client, "free_bytes", lambda folder: 0)
    assert resolve_checkpoint("me/tiny").read_bytes() == kept
    code, err = alphaflow("pull", "me/other", capsys=capsys)
    assert (code, "0 are free). Free some room, or name another place: HF_HOME" in err) == (1, True), err
    assert alphaflow("push", "runs/tiny", "me/third", capsys=capsys)[0] == 0


def test_a_cache_that_cannot_be_written_is_named(hub, project_run, capsys, monkeypatch, tmp_path):  # noqa: F811
    alphaflow("push", "runs/tiny", capsys=capsys)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    code, err = alphaflow("pull", "me/tiny", capsys=capsys)
    assert (code, f"the cache, {tmp_path / 'file' / 'hub'}, cannot be written (Not a directory)" in err) == (1, True), (
        err
    )


def test_offline_is_what_forbids_it(hub, project_run, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for command in (["push", "runs/tiny"], ["pull", "me/tiny"]):
        code, err = alphaflow(*command, capsys=capsys)
        assert (code, "HF_HUB_OFFLINE forbids asking the Hub. Unset it" in err) == (1, True), err


@pytest.mark.parametrize("fault", [Fault(401), Fault(404, code="RepoNotFound"), Fault(403)])
def test_the_cache_does_not_hide_a_refusal(hub, project_run, capsys, fault):  # noqa: F811
    alphaflow("push", "runs/tiny", capsys=capsys)
    resolve_checkpoint("me/tiny")
    hub.faults["GET", "/api/models/"] = Fault(**vars(fault))
    code, said = alphaflow("sample", "me/tiny", "--seeds", "0", "--grid", "g.png", capsys=capsys)
    assert code == 1
    assert f"(HTTP {fault.status})" in said
    assert "cache" not in said


def test_an_older_commit_in_the_cache_is_never_served_silently(hub, project_run, capsys):  # noqa: F811
    alphaflow("push", "runs/tiny", capsys=capsys)
    resolve_checkpoint("me/tiny")
    write_checkpoint(project_run / "model.safetensors", seed=1)
    alphaflow("push", "runs/tiny", "--without-results", capsys=capsys)
    hub.faults["GET", "/tree/"] = Fault(503, times=1)  # the first answer is good, the next is not
    served = resolve_checkpoint("me/tiny").read_bytes()
    new = (project_run / "model.safetensors").read_bytes()
    assert served == new or "the Hub is in trouble; using the cache" in capsys.readouterr().err


# What is said.


def test_a_misspelt_run_is_first_of_all_no_folder(hub, project_run, capsys, monkeypatch):  # noqa: F811
    args = ("sample", "runs/tinny", "--seeds", "0", "--grid", "g.png")
    assert "runs/tinny: no such folder here, and no such repository on the Hub" in alphaflow(*args, capsys=capsys)[1]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    said = alphaflow(*args, capsys=capsys)[1]
    assert "runs/tinny: no such folder here, and the connection to the Hub broke" in said
    said = alphaflow("sample", "hf://runs/tinny", "--seeds", "0", "--grid", "g.png", capsys=capsys)[1]
    assert "no such folder" not in said


def test_only_an_upload_speaks_of_what_was_sent(hub, project_run, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    said = alphaflow("pull", "me/tiny", capsys=capsys)[1]
    assert "the connection to the Hub broke" in said
    assert "sent" not in said
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    hub.faults["POST", "/commit/"] = Fault(0, times=1)
    assert "what was sent is not sent twice" in alphaflow("push", "runs/tiny", capsys=capsys)[1]


@pytest.mark.parametrize("token", ["“token-me”", "token\x01me", "token me"])
@pytest.mark.parametrize("args", [("push", "runs/tiny"), ("pull", "me/tiny")])
def test_a_token_with_a_strange_character_is_one_clear_line(hub, project_run, capsys, monkeypatch, token, args):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", token)
    code, said = alphaflow(*args, capsys=capsys)
    assert code == 1
    assert "the token holds a character that no token has" in said
    assert hub.requests == []


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_runs_name_that_the_hub_does_not_take_is_refused(hub, project_run, capsys, dry):  # noqa: F811
    run = project_run.rename(project_run.with_name("b2+x"))
    code, said = alphaflow("push", "runs/b2+x", "--without-results", *dry, capsys=capsys)
    assert code == 1
    assert "b2+x: the Hub does not accept this name" in said
    assert not (run / "hub").exists()


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    "args", [("me/",), ("me",), ("me/ti ny",), ("me/a--b",), ("me/b2", "--license", "foo bar: x\n- y")]
)
def test_a_dry_run_refuses_what_a_push_refuses(hub, project_run, capsys, args, dry):  # noqa: F811
    assert alphaflow("push", "runs/tiny", *args, *dry, capsys=capsys)[0] == 2
    assert hub.requests == []
    assert not (project_run / "hub").exists()
