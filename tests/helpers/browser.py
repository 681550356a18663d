"""A real browser without a window: what a page has made of itself, and a server for its files."""

import shutil
import subprocess
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]


class Quiet(SimpleHTTPRequestHandler):
    """What `python -m http.server` answers, without its lines."""

    def log_message(self, *_):
        pass


@contextmanager
def served(folder, handler=Quiet):
    """The address of a folder's files on loopback."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def browse(address, tmp_path, *options, milliseconds=20_000):
    """The page's DOM when its scripts are done."""
    line = [CHROMIUM, *FLAGS, f"--virtual-time-budget={milliseconds}", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*line, *options, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout
