"""One line of JSON per measurement, with what a reader needs to believe it: date, hardware, versions, commit."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

import alphaflow_cli

ROOT = Path(__file__).parent.parent


def hardware(device: str) -> str:
    """The accelerator, or the processor with the threads in use."""
    if device == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used"


def processor() -> str:
    """The processor's name as Linux tells it, or as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git(*words: str) -> str:
    """What git says about the checkout, or nothing outside of one."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def describe(device: str) -> dict[str, object]:
    """Date, hardware, versions and commit."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": hardware(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "alphaflow": alphaflow_cli.__version__,
        },
        "commit": git("rev-parse", "HEAD") or None,
        "dirty": bool(git("status", "--porcelain")),
    }


def record(benchmark: str, device: str, **figures: object) -> dict[str, object]:
    """Prints the line on stdout, and returns what is in it."""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    line = {"benchmark": benchmark, "command": command, **describe(device), **figures}
    print(json.dumps(line, ensure_ascii=False), flush=True)
    return line
