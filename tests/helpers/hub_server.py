"""A Hub on loopback for tests: real HTTP, git-like commits in memory, faults on demand. Standard library only.

    with HubServer() as hub: ...   hub.url, hub.repos, hub.requests, hub.faults

Speaks what huggingface_hub 1.33 and 2.x ask for: whoami, create, validate-yaml, preupload, LFS batch and PUT, commit,
model info, revisions, tree, resolve. A fault is ("PUT", "/lfs/") → Fault(status=500, times=1): it answers that many
matching requests wrongly, or drops the connection half way (status 0), or damages what it sends ("corrupt"), or never
answers ("silent"). A body of its own is sent as it is, drop by drop where `drip` says so; headers of a fault replace
those of a good answer too.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

LFS_FROM = 1024  # bytes; larger files and these endings go to LFS
LFS_ENDINGS = (".safetensors", ".png", ".pt", ".parquet")


@dataclass
class Fault:
    status: int = 500  # 0: drop the connection; 200 with corrupt: send damaged bytes
    times: int = 10**9
    code: str = ""  # X-Error-Code
    headers: dict = field(default_factory=dict)
    corrupt: bool = False
    body: bytes | None = None  # sent instead of the answer
    drip: float = 0.0  # seconds between its bytes
    silent: bool = False  # the request is read, and no answer comes


@dataclass
class Repository:
    private: bool
    owner: str
    commits: list = field(default_factory=list)  # (oid, {path: bytes})
    refs: dict = field(default_factory=dict)  # name → index of a commit

    def commit(self, files, ref="main"):
        oid = hashlib.sha1(f"{len(self.commits)}{sorted(files)}{ref}".encode()).hexdigest()
        self.commits.append((oid, dict(files)))
        self.refs[ref] = len(self.commits) - 1
        return oid

    def at(self, revision):
        if revision in self.refs:
            return self.commits[self.refs[revision]]
        return next((commit for commit in self.commits if commit[0] == revision), None)


def is_lfs(path, content):
    return len(content) >= LFS_FROM or path.endswith(LFS_ENDINGS)


def git_sha1(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """Users by token; `token-me` may write to me/…, `token-reader` to nothing."""

    def __init__(self):
        self.repos = {}
        self.blobs = {}  # sha256 → bytes, uploaded to LFS
        self.faults = {}  # (method, part of the path) → Fault
        self.requests = []  # (method, path)
        self.sends_on = False  # large files lie elsewhere, as on the real Hub, under addresses that may expire
        self.lock = threading.Lock()
        self.closing = threading.Event()
        hub = self

        class Handler(HubHandler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that hangs up is no fault of a test
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def add(self, name, files, *, private=False):
        self.repos[name] = Repository(private, name.split("/")[0])
        return self.repos[name].commit(files)

    def files(self, name, ref="main"):
        return self.repos[name].at(ref)[1]

    def count(self, method, part):
        return sum(m == method and part in p for m, p in self.requests)


class HubHandler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body waits 40 ms for what acknowledges its headers otherwise

    def log_message(self, *_):
        pass

    # Every request passes here: record it, read its body, let a fault answer, else the route.

    def handle_any(self):
        hub, path = self.server_hub, unquote(urlparse(self.path).path)
        path = re.sub(r"^(/api)?/spaces/([^/]+/[^/]+)", space_path, path)
        body = self.read_body()
        with hub.lock:
            hub.requests.append((self.command, path))
            self.fault = self.next_fault(hub, path)
        if self.fault and self.fault.silent:
            hub.closing.wait()
            return self.drop()
        if self.fault and self.fault.body is not None:
            return self.send_raw(self.fault)
        if self.fault and self.fault.status != 200:
            return self.drop() if self.fault.status == 0 else self.error(self.fault.status, self.fault.code)
        for pattern, method in ROUTES:
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                return getattr(self, method)(*match.groups(), body=body)
        return self.error(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def next_fault(self, hub, path):
        for (method, part), fault in hub.faults.items():
            if method == self.command and part in path and fault.times > 0:
                fault.times -= 1
                return fault
        return None

    def read_body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def drop(self):
        self.close_connection = True
        self.connection.close()

    def send_raw(self, fault):
        self.send_response(fault.status)
        for name, value in {"Content-Length": str(len(fault.body)), **fault.headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(OSError):  # the client has had enough
            for i in range(len(fault.body)) if fault.drip else ():
                time.sleep(fault.drip)
                self.wfile.write(fault.body[i : i + 1])
            self.wfile.write(b"" if fault.drip else fault.body)

    def send(self, status, content=b"", headers=None):
        content = json.dumps(content).encode() if isinstance(content, dict | list) else content
        self.send_response(status)
        own = self.fault.headers if self.fault and status < 400 else {}
        for name, value in {"Content-Length": str(len(content)), **(headers or {}), **own}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def error(self, status, code="", message="refused"):
        headers = {"X-Error-Message": message, "X-Request-Id": "test"} | (self.fault.headers if self.fault else {})
        self.send(status, {"error": message}, headers | ({"X-Error-Code": code} if code else {}))

    # Who is asking, and may they?

    def user(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return token.removeprefix("token-") if token.startswith("token-") else None

    def readable(self, name):
        repo = self.server_hub.repos.get(name)
        if repo is None or (repo.private and self.user() != repo.owner):
            self.error(404 if self.user() else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def revision(self, name, revision):
        repo = self.readable(name)
        if repo is None:
            return None, None
        found = repo.at(revision or "main")
        if found is None:
            self.error(404, "RevisionNotFound", "Invalid rev id")
        return repo, found

    # Routes.

    def whoami(self, *, body):
        if self.user() is None:
            return self.error(401, message="Invalid username or password.")
        return self.send(200, {"name": self.user(), "type": "user", "orgs": []})

    def create(self, *, body):
        asked = json.loads(body)
        owner = asked.get("organization") or self.user()
        name = f"{owner}/{asked['name']}"
        if self.user() is None:
            return self.error(401, message="Invalid username or password.")
        if self.user() != owner:
            return self.error(403, message="You don't have the rights to create a model under this namespace")
        name += ".space" * (asked.get("type") == "space")
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        if name in self.server_hub.repos:
            return self.send(
                409, {"error": "You already created this model repo", "url": f"{self.server_hub.url}/{name}"}
            )
        self.server_hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return self.send(200, {"url": f"{self.server_hub.url}/{name}", "name": name, "id": name})

    def validate_yaml(self, *, body):
        good = json.loads(body)["content"].startswith("---\n")
        return self.send(200 if good else 400, {"errors": [] if good else [{"message": "no metadata"}], "warnings": []})

    def preupload(self, name, revision, *, body):
        if self.readable(name) is None:
            return None
        if self.user() != name.split("/")[0] and not self.path.endswith("create_pr=1"):
            return self.error(403, message="Forbidden: you must use a write token to upload to a repository")
        files = []
        for file in json.loads(body)["files"]:
            lfs = file["size"] >= LFS_FROM or file["path"].endswith(LFS_ENDINGS)
            old = self.server_hub.repos[name].at(revision if revision in self.server_hub.repos[name].refs else "main")[
                1
            ]
            content = old.get(file["path"])
            oid = None
            if content is not None:
                oid = hashlib.sha256(content).hexdigest() if is_lfs(file["path"], content) else git_sha1(content)
            entry = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}
            files.append(entry)
        return self.send(200, {"files": files})

    def lfs_batch(self, name, *, body):
        objects = []
        for each in json.loads(body)["objects"]:
            entry = {"oid": each["oid"], "size": each["size"], "authenticated": True}
            if each["oid"] not in self.server_hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self.server_hub.url}/lfs/{each['oid']}", "header": {}}}
            objects.append(entry)
        answer = {"transfer": "basic", "objects": objects}
        return self.send(200, answer, {"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, oid, *, body):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.error(400, message="hash mismatch")
        self.server_hub.blobs[oid] = body
        return self.send(200)

    def commit(self, name, revision, *, body):
        repo = self.readable(name)
        if repo is None:
            return None
        files = dict(repo.at("main")[1])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.server_hub.blobs:
                    return self.error(400, message="LFS object missing")
                files[value["path"]] = self.server_hub.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
        answer = {"success": True}
        if "create_pr=1" in self.path:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
            oid = repo.commit(files, f"refs/pr/{number}")
            answer["pullRequestUrl"] = f"{self.server_hub.url}/{name}/discussions/{number}"
        else:
            oid = repo.commit(files, revision)
        answer |= {"commitOid": oid, "commitUrl": f"{self.server_hub.url}/{name}/commit/{oid}"}
        return self.send(200, answer)

    def info(self, name, revision=None, *, body):
        repo, found = self.revision(name, revision)
        if found is None:
            return None
        oid, files = found
        siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
        facts = {
            "_id": "0",
            "id": name.removeprefix("datasets/"),
            "modelId": name,
            "sha": oid,
            "private": repo.private,
            "siblings": siblings,
        }
        return self.send(200, facts | {"tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False})

    def tree(self, name, revision, *, body):
        _, found = self.revision(name, revision)
        if found is None:
            return None
        entries = []
        for path, content in found[1].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
            if is_lfs(path, content):
                sha = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha, "sha256": sha, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return self.send(200, entries)

    def resolve(self, name, revision, path, *, body):
        _, found = self.revision(name, revision)
        if found is None:
            return None
        oid, files = found
        if path not in files:
            return self.error(404, "EntryNotFound", "Entry not found")
        content = files[path]
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if is_lfs(path, content):
            sha = hashlib.sha256(content).hexdigest()
            if self.server_hub.sends_on:
                return self.send(302, b"", {"Location": f"{self.server_hub.url}/elsewhere/{name}/{oid}/{path}"})
            headers |= {"ETag": f'"{sha}"', "X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(content))}
        else:
            headers |= {"ETag": f'"{git_sha1(content)}"'}
        return self.send_content(content, headers)

    def elsewhere(self, name, oid, path, *, body):
        return self.send_content(self.server_hub.repos[name].at(oid)[1][path], {"Accept-Ranges": "bytes"})

    def send_content(self, content, headers):
        if self.fault and self.fault.corrupt and self.command == "GET":
            content = bytes([content[0] ^ 0xFF]) + content[1:]
        span = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span:
            first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.send(206, content[first : last + 1], headers)
        return self.send(200, content, headers)


def space_path(match):
    """Where a Space is kept: among the models, as user/name.space."""
    return f"{'/api/models' if match[1] else ''}/{match[2]}.space"


NAME = r"([\w.-]+/[\w.-]+)"
DATA = r"(datasets/[\w.-]+/[\w.-]+)"  # a data set is a repository of this name in `repos`
ROUTES = [
    ("GET /api/whoami-v2", "whoami"),
    ("POST /api/repos/create", "create"),
    ("POST /api/validate-yaml", "validate_yaml"),
    (rf"POST /api/models/{NAME}/preupload/(.+)", "preupload"),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /lfs/(\w+)", "lfs_put"),
    (rf"POST /api/models/{NAME}/commit/(.+)", "commit"),
    (rf"GET /api/{DATA}", "info"),
    (rf"GET /api/{DATA}/revision/(.+)", "info"),
    (rf"GET /api/{DATA}/tree/(refs/pr/\d+|[^/]+)(?:/.*)?", "tree"),
    (rf"(?:GET|HEAD) /{DATA}/resolve/(refs/pr/\d+|[^/]+)/(.+)", "resolve"),
    (rf"GET /elsewhere/{DATA}/([^/]+)/(.+)", "elsewhere"),
    (rf"GET /api/models/{NAME}", "info"),
    (rf"GET /api/models/{NAME}/revision/(.+)", "info"),
    (rf"GET /api/models/{NAME}/tree/(refs/pr/\d+|[^/]+)(?:/.*)?", "tree"),
    (rf"(?:GET|HEAD) /{NAME}/resolve/(refs/pr/\d+|[^/]+)/(.+)", "resolve"),
]
