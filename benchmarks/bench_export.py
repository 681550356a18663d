"""What an export costs: bytes on the disk, and time per picture beside `alphaflow sample` on the same CPU, in one run.

    python benchmarks/bench_export.py CHECKPOINT [--page]

Each form is written as `alphaflow export` writes it, then draws pictures of one step at batch 1 and at batch 16, on one
thread. Each round runs every form once, in rotated order; round 0 is dropped. Reported are the medians of the process's
own CPU time. `sample` is the generator of `alphaflow sample`, which computes whole groups of 16 rows at any batch.

Before that, every form draws 16 seeds of each class (of ten at most), and the values that differ from those of `sample`
are counted.

--page adds the page in headless Chromium: wall-clock milliseconds of one graph run at each batch, median of 20.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime
import torch
from bench_step import Work, paired
from record import record

from alphaflow_cli.export.diffusers import export_diffusers
from alphaflow_cli.export.graph import Exported, export_torch, open_exported
from alphaflow_cli.export.onnx import export_onnx
from alphaflow_cli.export.web import export_web
from alphaflow_cli.model.find import find_checkpoint

BATCHES = (1, 16)
PROBE = """<!doctype html><script type="module">
import * as ort from "./ort/ort.wasm.min.mjs";
const facts = await (await fetch("model.json")).json();
ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
ort.env.wasm.numThreads = 1;
const data = new Uint8Array(await (await fetch(facts.weights)).arrayBuffer());
const session = await ort.InferenceSession.create(facts.graphs[1].file, {externalData: [{path: facts.weights, data}]});
const times = {};
for (const batch of BATCHES) {
  const count = batch * facts.shape.reduce((a, b) => a * b), given = {};
  given.noise = new ort.Tensor("float32", new Float32Array(count).fill(0.5), [batch, ...facts.shape]);
  if (facts.classes) given.label = new ort.Tensor("int64", new BigInt64Array(batch), [batch]);
  times[batch] = [];
  for (let i = 0; i < 21; i++) {
    const began = performance.now();
    await session.run(given);
    times[batch].push(performance.now() - began);
  }
}
await fetch("times", {method: "POST", body: JSON.stringify(times)});
</script>"""


def write_all(address: str, folder: Path) -> dict[str, int]:
    """Write every form but the page; returns their bytes."""
    for name, half in (("onnx", False), ("onnx fp16", True)):
        export_onnx(open_exported(address), folder / f"{name}.onnx", half=half)
    export_torch(open_exported(address), folder / "torch.pt2")
    export_diffusers(open_exported(address), folder / "diffusers")
    return {
        "onnx": size_of(folder / "onnx.onnx"),
        "onnx fp16": size_of(folder / "onnx fp16.onnx"),
        "torch": size_of(folder / "torch.pt2"),
        "diffusers": size_of(folder / "diffusers"),
    }


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    return sum(each.stat().st_size for each in ([path] if path.is_file() else path.rglob("*")) if each.is_file())


def differences(source: Exported, folder: Path) -> dict[str, dict[str, float]]:
    """How far every form is from `sample`: the largest difference of 255, and the share of the values that differ."""
    classes = min(10, max(1, source.generator.recipe.data.classes))
    works = drawing(source, folder, list(range(16)) * classes, [label for label in range(classes) for _ in range(16)])
    drawn = {name: torch.as_tensor(work()) for name, work in works.items()}
    apart = {name: (images.int() - drawn["sample"].int()).abs() for name, images in drawn.items() if name != "sample"}
    return {name: {"largest": int(a.max()), "share": float((a > 0).double().mean())} for name, a in apart.items()}


def makers(source: Exported, folder: Path, batch: int) -> dict[str, Callable[[int], Work]]:
    """One way to draw `batch` pictures for each form, as `paired` wants it."""
    works = drawing(source, folder, list(range(batch)), [0] * batch)
    return {name: partial(lambda work, _: work, work) for name, work in works.items()}


def drawing(source: Exported, folder: Path, seeds: list[int], labels: list[int]) -> dict[str, Callable[[], Any]]:
    """One way to draw these pictures for each form."""
    from diffusers import DiffusionPipeline

    given = dict(zip(source.names, source.inputs(seeds, labels), strict=True))
    arrays = {name: value.numpy() for name, value in given.items()}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = [onnxruntime.InferenceSession(folder / f"{name}.onnx", options) for name in ("onnx", "onnx fp16")]
    module = torch.export.load(folder / "torch.pt2").module()
    pipe = DiffusionPipeline.from_pretrained(folder / "diffusers", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    chosen: dict[str, Any] = {"class_labels": labels} if "label" in given else {"num_images": len(seeds)}

    def draw_by_diffusers() -> Any:
        return pipe(**chosen, generator=[torch.Generator().manual_seed(s) for s in seeds], output_type="pt").images

    return {
        "sample": lambda: source.generator.images(seeds, labels, source.walk),
        "onnx": lambda: sessions[0].run(None, arrays)[0],
        "onnx fp16": lambda: sessions[1].run(None, arrays)[0],
        "torch": lambda: module(*given.values()),
        "diffusers": draw_by_diffusers,
    }


class Probe(SimpleHTTPRequestHandler):
    """Serves the page's folder, and takes the times that the page measured."""

    times: dict[str, list[float]]
    done = threading.Event()

    def log_message(self, *_: object) -> None: ...

    def do_POST(self) -> None:
        Probe.times = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        Probe.done.set()


def page_times(folder: Path) -> dict[str, float]:
    """Milliseconds of one run of the page's graph by batch, in headless Chromium."""
    (folder / "probe.html").write_text(PROBE.replace("BATCHES", str(list(BATCHES))))
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("--page: no Chromium on the PATH")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Probe, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/probe.html"
        line = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
        running = subprocess.Popen([*line, "--remote-debugging-port=0", address], stderr=subprocess.DEVNULL)
        try:
            if not Probe.done.wait(300):
                raise SystemExit("--page: the page did not answer within 300 s")
        finally:
            running.terminate()
            running.wait(30)
            server.shutdown()
    return {batch: round(median(times[1:]), 2) for batch, times in Probe.times.items()}


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run, a file, or a model on the Hub")
    parser.add_argument("--rounds", type=int, default=15, help="kept rounds")
    parser.add_argument("--page", action="store_true", help="measure the page in Chromium, too")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and print one JSON line."""
    options = arguments(words)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = write_all(options.checkpoint, folder)
        sizes["checkpoint"] = size_of(find_checkpoint(options.checkpoint))
        page = {}
        if options.page:
            export_web(options.checkpoint, folder / "web", half=False)
            sizes["web"] = size_of(folder / "web")
            page = page_times(folder / "web")
        source = open_exported(options.checkpoint)
        apart = differences(source, folder)
        times = {}
        for batch in BATCHES:
            table = paired(makers(source, folder, batch), options.rounds, "cpu")
            times[batch] = {form: 1000 * median(row[form] for row in table) / batch for form in table[0]}
    figures: dict[str, object] = {
        "bytes": sizes,
        "apart": apart,
        "milliseconds_per_picture": times,
        "page_milliseconds_per_run": page,
    }
    record("export", "cpu", model=source.generator.recipe.name, rounds=options.rounds, **figures)


if __name__ == "__main__":
    main()
