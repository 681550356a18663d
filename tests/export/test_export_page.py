"""The page: in a real browser it draws what `alphaflow sample` draws; its runtime is the very file that is known."""

import base64
import hashlib
import html
import io
import json
import re
import tarfile
import threading
import time
from contextlib import suppress
from socketserver import BaseRequestHandler, TCPServer, ThreadingTCPServer

import numpy as np
import pytest
import torch
from browser import CHROMIUM, browse, served
from exported_models import latent_checkpoint, same_pictures, sampled
from PIL import Image
from places import ROOT
from small_models import pixel_checkpoint

from alphaflow_cli.cli import run
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.export import web
from alphaflow_cli.remote import client
from alphaflow_cli.remote.registry import NpmPackage, fetch_package

NEEDS_BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
DRAWN = r'id="picture"[^>]*src="data:image/png;base64,([^"]+)"'


def small_archive():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as packed:
        for place in web.RUNTIME_FILES:
            member = tarfile.TarInfo(place)
            member.size = len(place)
            packed.addfile(member, io.BytesIO(place.encode()))
    return content.getvalue()


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    """A small archive in the place of the real one; an empty cache, and a registry that answers nothing."""
    archive = small_archive()
    checksum = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    monkeypatch.setattr(web, "RUNTIME", NpmPackage("onnxruntime-web", "1.2.3", checksum))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    return archive


def export(model, out, *more):
    return run(["export", str(model), "--to", "web", "-o", str(out), *map(str, more)])


@pytest.mark.slow
def test_the_page_has_all_its_files_and_the_runtime_is_fetched_once(runtime, tmp_path, monkeypatch, capsys):
    model = pixel_checkpoint(tmp_path / "m.safetensors")
    place = tmp_path / "registry" / "onnxruntime-web" / "-" / "onnxruntime-web-1.2.3.tgz"
    place.parent.mkdir(parents=True)
    place.write_bytes(runtime)
    with served(tmp_path / "registry") as address:
        monkeypatch.setenv("npm_config_registry", address)
        assert export(model, tmp_path / "page") == 0
    assert capsys.readouterr().err.count("checked on 5 pictures against the checkpoint: largest difference 0 of") == 2
    names = {path.relative_to(tmp_path / "page").as_posix() for path in (tmp_path / "page").rglob("*")}
    assert names == {
        *("index.html", "page.js", "noise.js", "model.json", "model-1.onnx", "model-2.onnx", "weights.bin", "ort"),
        *(f"ort/{name}" for name in web.RUNTIME_FILES.values()),
    }
    facts = json.loads((tmp_path / "page" / "model.json").read_text())
    assert (facts["classes"], facts["shape"], facts["side"]) == (10, [3, 8, 8], 8)
    assert facts["graphs"]["2"]["inputs"] == ["noise", "label"]
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")  # the cache has it now
    assert web.fetch_package(web.RUNTIME, None) == runtime


def test_without_a_network_one_line_says_how_to_bring_the_runtime(runtime, tmp_path, capsys):
    model = pixel_checkpoint(tmp_path / "m.safetensors")
    assert export(model, tmp_path / "page") == 1
    line = capsys.readouterr().err
    assert "http://127.0.0.1:9/onnxruntime-web/-/onnxruntime-web-1.2.3.tgz: cannot be fetched" in line
    assert "npm pack onnxruntime-web@1.2.3; then export with --runtime onnxruntime-web-1.2.3.tgz" in line
    assert not (tmp_path / "page").exists()


ANSWERS = {
    "no port": "http://127.0.0.1:abc",
    "no host": "http://[::1",
    "a blank": "http://127.0.0.1/a b",
    "noise": b"what is this?\r\n\r\n",
    "half an answer": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\nab",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_registry_that_is_none_is_one_line(runtime, answer, monkeypatch):
    class Answers(BaseRequestHandler):
        def handle(self):
            self.request.recv(4096)
            self.request.sendall(ANSWERS[answer])

    with TCPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        here = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("npm_config_registry", here if isinstance(ANSWERS[answer], bytes) else ANSWERS[answer])
        with pytest.raises(AlphaflowError, match=r"cannot be fetched \(.*then export with --runtime"):
            fetch_package(web.RUNTIME, None)
        server.shutdown()


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_registry_that_drips_is_left_in_time(runtime, part, monkeypatch):
    head = b"HTTP/1.1 200 OK\r\n" + (b"X: " if part == "head" else b"Content-Length: 99999\r\n\r\n")

    class Drips(BaseRequestHandler):
        def handle(self):
            self.request.recv(4096)
            self.request.sendall(head)
            with suppress(OSError):
                for _ in range(200):
                    time.sleep(0.05)
                    self.request.sendall(b"x")

    monkeypatch.setattr(client, "PATIENCE", 0.5)
    with ThreadingTCPServer(("127.0.0.1", 0), Drips) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_address[1]}")
        began = time.monotonic()
        with pytest.raises(AlphaflowError, match=r"cannot be fetched \(.*then export with --runtime"):
            fetch_package(web.RUNTIME, None)
        assert time.monotonic() - began < 8
        server.shutdown()


def test_another_file_than_the_known_one_is_refused(runtime, tmp_path, monkeypatch, capsys):
    model = pixel_checkpoint(tmp_path / "m.safetensors")
    place = tmp_path / "onnxruntime-web" / "-" / "onnxruntime-web-1.2.3.tgz"
    place.parent.mkdir(parents=True)
    place.write_bytes(runtime + b"?")
    assert export(model, tmp_path / "page", "--runtime", place) == 1
    assert "not onnxruntime-web-1.2.3.tgz, whose checksum is known" in capsys.readouterr().err
    with served(tmp_path) as address:
        monkeypatch.setenv("npm_config_registry", address)
        assert export(model, tmp_path / "page") == 1
    assert "sent another file than onnxruntime-web-1.2.3.tgz; nothing of it was kept" in capsys.readouterr().err
    assert not (tmp_path / "caches").exists()


def test_a_folder_that_is_no_page_is_kept(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    model = pixel_checkpoint(tmp_path / "m.safetensors")
    assert export(model, tmp_path) == 1
    assert "holds other files; nothing was overwritten" in capsys.readouterr().err


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_a_page_that_breaks_off_over_an_earlier_one_draws_nothing(runtime, tmp_path, monkeypatch):
    model, page = pixel_checkpoint(tmp_path / "m.safetensors"), tmp_path / "page"
    page.mkdir()
    (page / "model.json").write_text('{"made_by": "alphaflow 0.1.0"}')
    (page / "model-1.onnx").write_text("the graph of another model, beside whose weights the new ones would stand")
    (tmp_path / "runtime.tgz").write_bytes(runtime)
    monkeypatch.setattr(web, "build_model", interrupted)
    assert export(model, page, "--runtime", tmp_path / "runtime.tgz") == 130
    assert not list(page.glob("*.onnx"))


PROBE = """<script type="module">
  import { TorchRandom } from "./noise.js";
  const drawn = SEEDS.map((seed) => {
    const random = new TorchRandom(seed);
    return [Array.from(random.normals(100)), Array.from(random.wideNormals(100))];
  });
  document.body.textContent = JSON.stringify(drawn);
</script>"""


@NEEDS_BROWSER
def test_the_pages_noise_of_a_seed_is_torchs(tmp_path):
    seeds = [0, 7, 123456, 2**32 + 5, 2**64 - 1]
    (tmp_path / "noise.js").write_bytes((ROOT / "alphaflow_cli" / "export" / "page" / "noise.js").read_bytes())
    (tmp_path / "probe.html").write_text(PROBE.replace("SEEDS", json.dumps([str(seed) for seed in seeds])))
    with served(tmp_path) as address:
        page = browse(f"{address}/probe.html", tmp_path)
    drawn = json.loads(html.unescape(re.search(r"<body>(.*?)</body>", page, re.DOTALL)[1]))
    for seed, (plain, wide) in zip(seeds, drawn, strict=True):
        generator = torch.Generator().manual_seed(seed)
        wanted = torch.randn(100, generator=generator), torch.randn(100, generator=generator, dtype=torch.float64)
        apart = [float((torch.tensor(a) - b).abs().max()) for a, b in zip((plain, wide), wanted, strict=True)]
        print(f"seed {seed}: the noise is apart by {apart[0]:.1e}, in float64 by {apart[1]:.1e}")
        assert apart[0] <= 5e-7  # two of the last bits of a number between 2 and 4
        assert apart[1] <= 2e-7  # the rounding to float32


@NEEDS_BROWSER
@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_in_a_real_browser_a_seed_and_a_class_give_the_picture_of_sample(tmp_path, kind):
    two = {"two_step_sampler": "consistency", "two_step_times": (1.0, 0.5, 0.0)}
    if kind == "pixels":
        model = pixel_checkpoint(tmp_path / "m.safetensors", side=16)
    else:
        model = latent_checkpoint(tmp_path / "m.safetensors", sample=two)
    assert export(model, tmp_path / "page") == 0
    made, wanted = [], []
    with served(tmp_path / "page") as address:
        for seed, label, nfe in ((5, 3, 1), (5, 3, 2), (123456, 7, 1), (123456, 7, 2)):
            page = browse(f"{address}/?seed={seed}&class={label}&steps={nfe}", tmp_path)
            assert f'data-drawn="{seed}/{label}/{nfe}"' in page, re.search(r'id="status"[^>]*>([^<]*)', page)[1]
            made.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(re.search(DRAWN, page)[1]))).convert("RGB")))
            wanted.append(sampled(model, tmp_path, seeds=str(seed), classes=str(label), nfe=nfe)[0])
        wrong = browse(f"{address}/?seed=-1", tmp_path)
    assert "A seed is a whole number below 2^64." in wrong
    same_pictures(f"the page, {kind}, 1 and 2 steps", np.stack(made), np.stack(wanted))
