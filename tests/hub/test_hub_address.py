"""An address is a path or a repository, never both, and never guessed."""

from pathlib import Path

import pytest

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.remote.address import Repo, parse_address

REPOSITORIES = {
    "user/model": Repo("user/model", None, None),
    "user/model@main": Repo("user/model", "main", None),
    "user/model@v1.0": Repo("user/model", "v1.0", None),
    "user/model@refs/pr/1": Repo("user/model", "refs/pr/1", None),
    "user/model:sub/a.safetensors": Repo("user/model", None, "sub/a.safetensors"),
    "user/model@abc123:a.safetensors": Repo("user/model", "abc123", "a.safetensors"),
    "hf://user/model": Repo("user/model", None, None),
    "hf://models/user/model": Repo("user/model", None, None),
    "hf://user/model@v1/a/b.pt": Repo("user/model", "v1", "a/b.pt"),
    "hf://user/model/alphaflow-B-2.pt": Repo("user/model", None, "alphaflow-B-2.pt"),
    "hf://user/model@refs%2Fpr%2F3/a.pt": Repo("user/model", "refs/pr/3", "a.pt"),
}
PATHS = ["model.safetensors", "runs/b2.safetensors", "a/b.pt", "./a/b", "../a/b", "~/a", "runs", "a/b/c", "a b/c"]
WRONG = ["hf://", "hf://user", "hf://user/model@", "hf://us er/model", "hf://user/..", "user/model:../../etc/passwd"]


@pytest.mark.parametrize("text", REPOSITORIES)
def test_an_address_on_the_hub(text):
    assert parse_address(text) == REPOSITORIES[text]


@pytest.mark.parametrize("text", PATHS)
def test_what_looks_like_a_path_is_never_a_repository(text):
    assert parse_address(text) == Path(text).expanduser()


def test_an_existing_path_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "model").mkdir(parents=True)
    assert parse_address("user/model") == Path("user/model")
    assert parse_address("hf://user/model") == Repo("user/model", None, None)


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_address_is_said_to_be_one(text):
    with pytest.raises(AlphaflowError, match=r"not an address on the Hub|not a file inside"):
        parse_address(text)
