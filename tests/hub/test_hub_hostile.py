"""Endpoints that lie: whatever a server answers, it is one clear line, soon, and nothing leaves the cache."""

import gzip
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
from hub_fixtures import alphaflow, hub, project_run, write_checkpoint  # noqa: F401 (fixtures)
from hub_server import Fault

from alphaflow_cli.hub.stage import open_publication, stage
from alphaflow_cli.remote import client
from alphaflow_cli.remote.download import resolve_checkpoint
from alphaflow_cli.remote.faults import Distrusted

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
LOGIN_PAGE = b"<!DOCTYPE html><html><title>Log in to the network</title></html>"


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    source = open_publication(write_checkpoint(folder / "m.safetensors"), with_results=False)
    stage(source, folder / "hub", repo="me/tiny", licence="unknown")
    return {path.name: path.read_bytes() for path in (folder / "hub").iterdir()}


@pytest.fixture
def published(hub, staged, monkeypatch):  # noqa: F811
    monkeypatch.setattr(client, "PATIENCE", 2.0)
    return hub.add("me/tiny", staged)


def everything_under(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


BODIES = {
    "a login page": (LOGIN_PAGE, "login page"),
    "nothing": (b"", "not whole JSON"),
    "half": (b'{"id": "me/tiny", "sha"', "not whole JSON"),
    "a list": (b"[]", "a table is wanted"),
    "a number": (b"3", "a table is wanted"),
    "null": (b"null", "a table is wanted"),
    "no commit": (b'{"id": "me/tiny"}', "sha: is missing"),
    "a commit of another kind": (b'{"id": "me/tiny", "sha": 3}', "sha: text is wanted"),
    "not UTF-8": (b"\xff\xfe", "not UTF-8"),
    "deep": (b"[" * 100_000, "levels deep"),
    "digits": (b'{"sha": ' + b"1" * 10_000 + b"}", "10,000 digits"),
    "half a letter": (b'{"id": "me/tiny", "sha": "\\ud800"}', "does not have the required form"),
    "half a letter in a name": (
        b'{"id": "me/tiny", "sha": "%s", "siblings": [{"rfilename": "\\ud800"}]}' % (b"a" * 40),
        "siblings[0].rfilename",
    ),
    "files of another kind": (b'{"id": "me/tiny", "sha": "%s", "siblings": [3]}' % (b"a" * 40), "siblings[0]"),
}


@pytest.mark.parametrize("verb", [("pull", "me/tiny"), ("sample", "me/tiny", "--seeds", "0", "--grid", "g.png")])
@pytest.mark.parametrize("what", BODIES)
def test_an_answer_that_is_none_of_the_hubs_is_one_line(published, hub, capsys, what, verb):  # noqa: F811
    body, said = BODIES[what]
    hub.faults["GET", "/api/models/"] = Fault(200, body=body)
    code, err = alphaflow(*verb, capsys=capsys)
    assert code == 1
    assert said in err
    assert "this answer does not come from a Hub" in err


@pytest.mark.parametrize("part", ["/tree/", "/resolve/"])
@pytest.mark.parametrize("what", BODIES)
def test_the_same_of_a_listing_and_of_a_file(published, hub, capsys, what, part):  # noqa: F811
    hub.faults["GET", part] = Fault(200, body=BODIES[what][0])
    hub.faults["HEAD", part] = Fault(200, body=BODIES[what][0])
    alphaflow("pull", "me/tiny", capsys=capsys)


UPLOADS = ["/whoami", "/repos/create", "/validate-yaml", "/preupload/", "/batch", "/commit/", "/lfs/"]


@pytest.mark.parametrize("part", UPLOADS)
@pytest.mark.parametrize("body", [LOGIN_PAGE, b"", b"[]", b'{"files": 3}', b'{"objects": [3]}'])
def test_a_push_to_such_a_server_is_one_line(hub, project_run, capsys, part, body):  # noqa: F811
    for method in ("GET", "POST"):
        hub.faults[method, part] = Fault(200, body=body)
    alphaflow("push", "runs/tiny", capsys=capsys)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_login_page_in_the_place_of_a_space_is_one_line(hub, project_run, capsys, method):  # noqa: F811
    hub.faults[method, "/me/tiny.space"] = Fault(200, body=LOGIN_PAGE)
    code, err = alphaflow("push", "runs/tiny", "me/tiny", "--space", capsys=capsys)
    assert code == 1
    assert "login page" in err


@pytest.mark.parametrize("commit", ["../" * 12 + "outside", "..", "x" * 40, "a" * 39, "A" * 40, "/outside", "a" * 300])
def test_a_commit_that_is_none_names_no_folder(published, hub, capsys, tmp_path, commit):  # noqa: F811
    (tmp_path / "cache").mkdir()
    before = everything_under(tmp_path)
    hub.faults["GET", "/api/models/"] = Fault(200, body=json.dumps({"id": "me/tiny", "sha": commit}).encode())
    code, err = alphaflow("pull", "me/tiny", capsys=capsys)
    assert code == 1
    assert "does not have the required form" in err
    assert everything_under(tmp_path) == before


@pytest.mark.parametrize("header", ["X-Repo-Commit", "ETag", "X-Linked-Etag"])
@pytest.mark.parametrize("value", ['"../../../../outside"', "/outside", '""', "x" * 64, "a" * 65])
def test_a_header_that_is_no_checksum_names_no_file(published, hub, capsys, tmp_path, header, value):  # noqa: F811
    before = everything_under(tmp_path.parent)
    for method in ("HEAD", "GET"):
        hub.faults[method, "/resolve/"] = Fault(200, headers={header: value})
    code, err = alphaflow("pull", "me/tiny", capsys=capsys)
    cache = {path for path in everything_under(tmp_path.parent) if f"{tmp_path.name}/cache/" in path}
    assert everything_under(tmp_path.parent) - cache <= before | {f"{tmp_path.name}/cache"}
    assert not any("/blobs/" in path or "outside" in path for path in cache)
    assert code == 1
    assert "no checksum" in err


@pytest.mark.parametrize("path", ["../../outside", "/outside", "autoencoder/../../../outside", "a/./b", "..", "a\x00b"])
def test_a_file_outside_its_folder_is_not_fetched(published, hub, capsys, tmp_path, path):  # noqa: F811
    entry = {"type": "file", "path": path, "size": 3, "oid": "a" * 40}
    hub.faults["GET", "/tree/"] = Fault(200, body=json.dumps([entry]).encode())
    code, err = alphaflow("pull", "me/tiny", capsys=capsys)
    assert (code, "[0].path" in err) == (1, True) or hub.count("GET", "/tree/") == 0  # 1.x lists by the model's info


def test_a_small_answer_does_not_grow_to_gigabytes(published, hub, capsys):  # noqa: F811
    bomb = gzip.compress(b" " * (200 << 20), 9)
    hub.faults["GET", "/api/models/"] = Fault(200, body=bomb, headers={"Content-Encoding": "gzip"})
    code, err = alphaflow("pull", "me/tiny", capsys=capsys)
    assert code == 1
    assert "compressed, although we did not ask for that" in err


@pytest.mark.parametrize("length", [{}, {"Content-Length": None, "Connection": "close"}])
@pytest.mark.parametrize("part", ["/api/models/", "/tree/", "/resolve/"])
def test_an_answer_of_any_length_is_not_held_in_memory(published, hub, capsys, monkeypatch, part, length):  # noqa: F811
    if part == "/resolve/" and not length:
        return  # a download that says its length goes to the disk
    monkeypatch.setattr(client, "LONGEST_ANSWER", 50_000)
    head = {"X-Repo-Commit": published, "ETag": f'"{"a" * 64}"', **length}
    hub.faults["GET", part] = Fault(200, body=b" " * 200_000, headers=head)
    code, err = alphaflow("pull", "me/tiny", capsys=capsys)
    assert code == 1
    assert "is longer than 50,000 bytes" in err


def test_a_short_answer_may_be_compressed(published, hub, staged):  # noqa: F811
    body = gzip.compress(json.dumps({"id": "me/tiny", "sha": published}).encode())
    hub.faults["GET", "/api/models/"] = Fault(200, times=1, body=body, headers={"Content-Encoding": "gzip"})
    assert resolve_checkpoint("me/tiny").read_bytes() == staged["model.safetensors"]


def test_an_unknown_compression_is_refused(published, hub, capsys):  # noqa: F811
    hub.faults["GET", "/api/models/"] = Fault(200, body=b"xx", headers={"Content-Encoding": "br"})
    assert "compressed, although we did not ask for that" in alphaflow("pull", "me/tiny", capsys=capsys)[1]


@pytest.mark.parametrize("part", ["/api/models/", "/resolve/"])
def test_a_server_that_drips_is_left_in_time(published, hub, capsys, monkeypatch, part):  # noqa: F811
    monkeypatch.setattr(client, "PATIENCE", 0.7)
    name = "model.safetensors"
    body = hub.files("me/tiny")[name] if part == "/resolve/" else b" " * 5_000
    hub.faults["GET", f"{part}{published}/{name}" if part == "/resolve/" else part] = Fault(200, body=body, drip=0.2)
    start = time.monotonic()
    code, err = alphaflow("pull", "me/tiny", capsys=capsys)
    assert code == 1
    assert "too slow" in err
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "request_", [("POST", "/repos/create"), ("POST", "/preupload/"), ("PUT", "/lfs/"), ("POST", "/commit/")]
)
def test_a_server_that_takes_an_upload_and_never_answers_is_left(hub, project_run, capsys, monkeypatch, request_):  # noqa: F811
    monkeypatch.setattr(client, "SENDING_PATIENCE", 0.7)
    hub.faults[request_] = Fault(silent=True)
    start = time.monotonic()
    code, err = alphaflow("push", "runs/tiny", "me/tiny", capsys=capsys)
    assert code == 1
    assert "no answer from http://127.0.0.1/" in err
    assert "what was sent is not sent twice" in err or request_ == ("POST", "/repos/create")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("target", ["ftp://x/y", "http://["])
def test_an_upload_that_is_sent_to_no_web_address_is_one_line(hub, project_run, capsys, target):  # noqa: F811
    hub.faults["PUT", "/lfs/"] = Fault(307, body=b"", headers={"Location": target})
    code, err = alphaflow("push", "runs/tiny", "me/tiny", capsys=capsys)
    assert code == 1
    assert "does not come from a Hub" in err


def test_the_cache_serves_where_a_server_drips(published, hub, capsys, monkeypatch):  # noqa: F811
    resolve_checkpoint("me/tiny")
    monkeypatch.setattr(client, "PATIENCE", 0.7)
    hub.faults["GET", "/api/models/"] = Fault(200, body=b" " * 5_000, drip=0.2)
    assert resolve_checkpoint("me/tiny").is_file()
    assert "using the cache" in capsys.readouterr().err


@pytest.mark.parametrize("wait", ["100000000", "²", "-3", "soon", "9" * 5_000])
def test_a_server_cannot_make_us_wait_for_ever(published, hub, capsys, wait):  # noqa: F811
    hub.faults["GET", "/resolve/"] = Fault(429, times=1, headers={"Retry-After": wait.encode().decode("latin-1")})
    start = time.monotonic()
    alphaflow("pull", "me/tiny", capsys=capsys)
    assert time.monotonic() - start < 30


def test_a_listing_without_an_end_is_left(published, hub, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(client, "PAGES", 5)
    again = f'<{hub.url}/api/models/me/tiny/tree/{published}?cursor=x>; rel="next"'
    hub.faults["GET", "/tree/"] = Fault(200, headers={"Link": again})
    code, err = alphaflow("sample", "me/tiny:no-such-file.safetensors", "--grid", "g.png", capsys=capsys)
    assert code == 1
    assert "more than 5 pages" in err
    hub.faults["GET", "/tree/"] = Fault(200, headers={"Link": '<http://127.0.0.2:9/next>; rel="next"'})
    assert "its list continues at" in alphaflow("sample", "me/tiny:no.safetensors", "--grid", "g.png", capsys=capsys)[1]


@pytest.fixture
def hurry(monkeypatch):
    """The library tries a broken download five times more; between them it waits 20 ms instead of 1 s."""

    class Clock:
        def sleep(self, seconds):
            time.sleep(seconds / 50)

        def __getattr__(self, name):
            return getattr(time, name)

    monkeypatch.setattr(huggingface_hub.file_download, "time", Clock())


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize("length", ["9" * 17, "9" * 18, "9" * 400, "-1", "many"])
def test_a_file_larger_than_the_disk_is_not_begun(published, hub, capsys, length):  # noqa: F811
    hub.faults["GET", "/resolve/"] = Fault(200, headers={"Content-Length": length})
    code, err = alphaflow("pull", "me/tiny", capsys=capsys)
    assert code == 1
    assert len(err) < 600, err
    assert ("cannot be written" in err) == (length in ("9" * 17, "9" * 18))


HEADS = {
    "X-Linked-Size": "outside",
    "Location": "/elsewhere",
    "Content-Range": "bytes x-y/z",
    "Set-Cookie": "a=b; Domain=²".encode().decode("latin-1"),
    "X-Error-Code": "²".encode().decode("latin-1"),
    "Link": "<",
}


@pytest.mark.parametrize("part", ["/api/models/", "/resolve/"])
@pytest.mark.parametrize("head", HEADS)
def test_a_strange_head_is_left_out_or_one_line(published, hub, capsys, part, head):  # noqa: F811
    for method in ("GET", "HEAD"):
        hub.faults[method, part] = Fault(200, headers={head: HEADS[head]})
    alphaflow("pull", "me/tiny", capsys=capsys)
    hub.faults.clear()
    assert alphaflow("pull", "me/tiny", capsys=capsys)[0] == 0  # nothing of it stays behind


@pytest.mark.parametrize(
    "body", [b"[]", b'"x"', b"\xff\xfe", b"3", b'{"error": [3]}', b'{"error": "\\u001b[2J"}', LOGIN_PAGE]
)
@pytest.mark.parametrize("status", [304, 400, 404, 409, 418, 503])
def test_a_refusal_of_any_shape_is_one_line(hub, project_run, capsys, status, body):  # noqa: F811
    hub.faults["GET", "/api/models/"] = Fault(status, body=body)
    hub.faults["POST", "/repos/create"] = Fault(status, body=body)
    assert alphaflow("pull", "me/tiny", capsys=capsys)[0] == 1
    code, err = alphaflow("push", "runs/tiny", capsys=capsys)
    assert code == 1
    assert all(line.isprintable() for line in err.splitlines())


def test_an_answer_about_other_files_is_one_line(hub, project_run, capsys):  # noqa: F811
    other = {"files": [{"path": "other.bin", "uploadMode": "regular", "shouldIgnore": False}]}
    hub.faults["POST", "/preupload/"] = Fault(200, body=json.dumps(other).encode())
    code, err = alphaflow("push", "runs/tiny", capsys=capsys)
    assert code == 1
    assert "it answers about other files than the request named" in err


# The token stays on the Hub.


@pytest.fixture
def elsewhere():
    """Another host, which remembers the heads of what it is asked."""
    seen = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(dict(self.headers))
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_POST = do_PUT = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.2", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.2:{server.server_port}", seen
        server.shutdown()


@pytest.mark.parametrize("part", ["/api/models/", "/resolve/", "/tree/"])
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_does_not_take_the_token_along(published, hub, capsys, elsewhere, part, status):  # noqa: F811
    address, seen = elsewhere
    for method in ("GET", "HEAD"):
        hub.faults[method, part] = Fault(status, body=b"", headers={"Location": f"{address}/x"})
    alphaflow("pull", "me/tiny", capsys=capsys)
    alphaflow("sample", "me/tiny:other.safetensors", "--grid", "g.png", capsys=capsys)
    assert not any("token-me" in value for head in seen for value in head.values())


@pytest.mark.skipif(not find_spec("hf_xet"), reason="Xet's client is not installed")
@pytest.mark.parametrize("verb", ["pull", "push"])
def test_nothing_goes_through_the_client_of_xet(published, hub, capsys, elsewhere, monkeypatch, project_run, verb):  # noqa: F811
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    address, seen = elsewhere
    headers = {"X-Xet-Hash": "a" * 64, "X-Xet-Refresh-Route": f"{address}/xet"}
    storage = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": "x", "X-Xet-Token-Expiration": "1"}
    hub.faults["HEAD", "/resolve/"] = Fault(200, headers=headers)
    hub.faults["GET", "/xet-"] = Fault(200, body=b"{}", headers=storage)
    code, err = alphaflow(verb, *["runs/tiny"] * (verb == "push"), "me/tiny", capsys=capsys)
    assert code == 0, err
    assert seen == []
    assert not hub.count("GET", "/xet-")


@pytest.mark.parametrize(
    ("address", "keeps_token"),
    [
        ("https://hub.example/a", True),
        ("https://hub.example:443/a", True),
        ("https://hub.example:8443/a", False),
        ("https://sub.hub.example/a", False),
        ("https://other.example/a", False),
        ("http://hub.example/a", None),
        ("http://other.example/a", None),
    ],
)
def test_the_token_goes_to_the_endpoint_and_nothing_leads_from_https_to_http(monkeypatch, address, keeps_token):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    request = client._library().Request("GET", address, headers={"Authorization": "Bearer token-me"})
    if keeps_token is None:
        with pytest.raises(Distrusted, match="not encrypted"):
            client._see_request(request)
        return
    client._see_request(request)
    assert ("Authorization" in request.headers) == keeps_token


@pytest.mark.parametrize("part", ["/api/models/", "/resolve/"])
@pytest.mark.parametrize(
    "target", ["", "/api/models/me/tiny", "file:///etc/passwd", "ftp://x/y", "//", "http://[", "\x01"]
)
def test_a_redirect_to_itself_or_to_no_web_address_is_one_line(published, hub, capsys, part, target):  # noqa: F811
    for method in ("GET", "HEAD"):
        hub.faults[method, part] = Fault(302, body=b"", headers={"Location": target or part})
    start = time.monotonic()
    assert alphaflow("pull", "me/tiny", capsys=capsys)[0] == 1
    assert time.monotonic() - start < 30


def test_what_a_server_says_does_not_rewrite_the_screen(published, hub, capsys):  # noqa: F811
    for status in (400, 403, 500):
        hub.faults["GET", "/api/models/"] = Fault(status, headers={"X-Error-Message": "\x1b[2J\x9b31m gone"})
        err = alphaflow("pull", "me/tiny", capsys=capsys)[1]
        assert all(line.isprintable() for line in err.splitlines())


# The environment.


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("HTTP_PROXY", "gopher://127.0.0.1:9", "HTTP_PROXY"),
        ("ALL_PROXY", "nonsense://x", "ALL_PROXY"),
        ("HTTP_PROXY", "http://[", "the connection to the Hub broke"),
        ("HF_ENDPOINT", "nonsense", "HF_ENDPOINT: nonsense is not an address"),
        ("HF_ENDPOINT", "file:///etc", "HF_ENDPOINT"),
        ("HF_ENDPOINT", "http://", "HF_ENDPOINT"),
        ("HF_ENDPOINT", "http://[", "HF_ENDPOINT"),
        ("HF_ENDPOINT", "http://127.0.0.1:99999", "HF_ENDPOINT"),
    ],
)
def test_an_environment_without_a_way_to_the_hub_is_one_line(published, hub, capsys, monkeypatch, name, value, said):  # noqa: F811
    for each in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, value)
    huggingface_hub.close_session()
    code, err = alphaflow("pull", "me/tiny", capsys=capsys)
    monkeypatch.undo()
    huggingface_hub.close_session()
    assert code == 1
    assert said in err
