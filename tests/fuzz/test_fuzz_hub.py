"""A Hub on loopback that answers anything: other codes, headers, bodies, shapes, lengths. One line, no file astray."""

import functools
import json
import socketserver
import time
import zlib
from types import SimpleNamespace

import huggingface_hub.utils._http
import pytest
from fuzzing import Trial, fuzz, mutate_bytes, mutate_json
from hub_fixtures import hub, write_checkpoint  # noqa: F401 (a fixture)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600, method="thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

STATUS = [
    100,
    200,
    201,
    204,
    206,
    301,
    302,
    304,
    307,
    308,
    400,
    401,
    403,
    404,
    409,
    416,
    418,
    429,
    451,
    500,
    502,
    503,
    504,
    600,
    999,
]
HEADERS = [
    "ETag",
    "X-Repo-Commit",
    "X-Linked-Etag",
    "X-Linked-Size",
    "Content-Length",
    "Content-Type",
    "Content-Encoding",
    "Location",
    "Link",
]
HEADERS += ["Transfer-Encoding", "Content-Range", "X-Error-Code", "X-Error-Message", "Retry-After", "X-Request-Id"]
VALUES = [
    "",
    "x",
    '""',
    '"../../../astray"',
    "../../../astray",
    "0",
    "-1",
    "9" * 30,
    "gzip",
    "br",
    "chunked",
    "identity",
    "/",
    "http://",
]
VALUES += [
    "http://127.0.0.1:9/",
    "ftp://x/",
    "file:///etc/passwd",
    "\x7f",
    "a" * 9000,
    'W/"x"',
    "bytes 5-1/x",
    "text/html",
    "é",
]
BODIES = [
    b"",
    b"<html><script>portal</script></html>",
    b"null",
    b"[]",
    b"{}",
    b"[[]]",
    b'"x"',
    b"1",
    b"NaN",
    b"\xff\xfe",
    b"[" * 100_000,
]
BODIES += [
    b"9" * 5000,
    b"[1, 2]",
    b'{"sha": null}',
    b'{"sha": "../../../astray"}',
    b'{"siblings": 5}',
    b"x" * 100_000,
    b'[{"path": 5}]',
]


class Hostile:
    """Changes one kind of answer, chosen per trial, on its way out."""

    def __init__(self):
        self.part, self.change = "", None

    def send(self, handler, plain, status, content, headers):
        if self.change is None or self.part not in handler.path:
            return plain(status, content, headers)
        raw = json.dumps(content).encode() if isinstance(content, dict | list) else content
        return self.change(handler, status, raw, {"Content-Length": str(len(raw)), **(headers or {})})


def answer(handler, status, body, headers, *, cut=None):
    """Written by hand: http.server would correct some of it."""
    lines = [f"HTTP/1.1 {status} Fuzz", *(f"{name}: {value}" for name, value in headers.items()), "Connection: close"]
    raw = "\r\n".join(lines).encode("utf-8", "replace") + b"\r\n\r\n" + (b"" if handler.command == "HEAD" else body)
    handler.wfile.write(raw[:cut])
    handler.close_connection = True


def changes(rng):
    """(what, change) of one answer."""
    kind = rng.randrange(8)
    if kind == 0:
        status = rng.choice(STATUS)
        return f"status {status}", lambda h, s, b, head: answer(h, status, b, head)
    if kind == 1:
        name, value = rng.choice(HEADERS), rng.choice(VALUES)
        return f"{name}: {value[:60]}", lambda h, s, b, head: answer(h, s, b, {**head, name: value})
    if kind == 2:
        name = rng.choice(HEADERS)
        return f"no {name}", lambda h, s, b, head: answer(h, s, b, {k: v for k, v in head.items() if k != name})
    if kind == 3:
        body = rng.choice(BODIES)
        return f"body {body[:60]!r}", lambda h, s, b, head: answer(h, s, body, {**head, "Content-Length": len(body)})
    if kind == 4:
        cut, seed = rng.randrange(3000), rng.random()
        return f"cut at {cut}", lambda h, s, b, head: answer(h, s, b, head, cut=cut) if seed < 0.8 else h.drop()
    if kind == 5:
        status, where = rng.choice((301, 302, 303, 307, 308)), rng.choice(VALUES)
        return f"{status} to {where[:60]}", lambda h, s, b, head: answer(
            h, status, b"", {"Location": where, "Content-Length": 0}
        )
    seed = rng.random()
    return f"{'JSON' if kind < 7 else 'bytes'} {seed}", lambda h, s, b, head: altered(
        type(rng)(seed), h, s, b, head, kind == 7
    )


def altered(rng, handler, status, body, headers, raw):
    """The body itself, another document or other bytes."""
    try:
        document = None if raw else json.loads(body)
    except ValueError:
        document = None
    new = mutate_bytes(rng, body) if document is None else mutate_json(rng, document).encode("utf-8", "surrogatepass")
    return answer(handler, status, new, {**headers, "Content-Length": len(new)})


@functools.cache
def bomb_bytes():
    packer = zlib.compressobj(1, wbits=31)
    return b"".join([packer.compress(b" " * 10_000_000) for _ in range(60)]) + packer.flush()


def bomb(handler, status, body, headers):
    """Half a megabyte that grows to 600."""
    packed = bomb_bytes()
    return answer(handler, status, packed, {**headers, "Content-Length": len(packed), "Content-Encoding": "gzip"})


def drip(handler, status, body, headers):
    """A byte every half a second, with no end in sight."""
    answer(handler, status, b"", {**headers, "Content-Length": 100_000})
    for _ in range(200):
        time.sleep(0.5)
        handler.wfile.write(b" ")
        handler.wfile.flush()


PARTS = [
    "/api/models/",
    "/tree/",
    "/revision/",
    "/resolve/",
    "config.json",
    "model.safetensors",
    "whoami",
    "create",
    "preupload",
]
PARTS += ["validate-yaml", "lfs", "/commit/", "/api/"]


def test_hub_answers(tmp_path, monkeypatch, hub):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    model = write_checkpoint(tmp_path / "model.safetensors")
    files = {
        "model.safetensors": model.read_bytes(),
        "config.json": b"{}",
        "recipe.yaml": b"name: x\n",
        "README.md": b"# x",
    }
    hub.add("user/repo", files)
    hostile, handler = Hostile(), hub.server.RequestHandlerClass
    plain = handler.send

    def send(self, status, content=b"", headers=None):
        return hostile.send(self, lambda *args: plain(self, *args), status, content, headers)

    monkeypatch.setattr(handler, "send", send)
    quick = {**vars(time), "sleep": lambda seconds: time.sleep(min(seconds, 0.002))}  # between the client's attempts
    monkeypatch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(**quick))
    monkeypatch.setattr(socketserver.BaseServer, "handle_error", lambda *_: None)
    fixed = [("gzip bomb", bomb), *((f"body {b[:40]!r}", body_change(b)) for b in BODIES)]
    fixed += [
        (f"{name}: {value[:40]}", header_change(name, value))
        for name in ("X-Repo-Commit", "ETag", "X-Linked-Etag")
        for value in VALUES[:6]
    ]
    fixed += [(f"status {s}", status_change(s)) for s in STATUS]
    examples = [(part, *change) for part in PARTS[:6] for change in fixed]

    def make(rng, number):
        part, what, change = examples[number] if number < len(examples) else (rng.choice(PARTS), *changes(rng))
        hostile.part, hostile.change = part, change
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "caches" / f"c{number}"))
        argv = ["pull", "user/repo"] if number < len(examples) or rng.random() < 0.7 else None
        argv = argv or rng.choice(
            (["sample", "user/repo", "--seeds", "0", "--grid", "g.png"], ["push", "model.safetensors", f"me/r{number}"])
        )
        return Trial(argv, f"{argv[0]}, {part}, {what}", check=lambda outcome: astray(tmp_path))

    fuzz("hub", make, 800, seconds=30, cpu=6)


def header_change(name, value):
    return lambda h, s, b, head: answer(h, s, b, {**head, name: value})


def body_change(body):
    return lambda h, s, b, head: answer(h, s, body, {**head, "Content-Length": len(body)})


def status_change(status):
    return lambda h, s, b, head: answer(h, status, b, head)


def astray(folder):
    """A check: nothing was written beside the caches."""
    found = [p for where in (folder, folder / "caches", folder.parent) for p in where.glob("astray*")]
    for path in found:
        path.unlink() if path.is_file() else path.rename(path.with_name("moved"))
    return f"{found[0].name}\na file outside the cache" if found else ""
