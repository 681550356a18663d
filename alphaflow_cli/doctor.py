"""What this machine has: versions, devices, caches, weights, disk; and what will not work on it, and why.

Nothing here asks the network, and a token is never shown.
"""

import os
import platform
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from alphaflow_cli import __version__
from alphaflow_cli.files import user_path
from alphaflow_cli.remote.cache import cache_folder, cached_file, has_token, is_offline

CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # of torch's builds without CUDA
CUDA_BUILD = (
    "torch is the build for CUDA {}, and sees no GPU. A GPU that is there needs its driver. On a machine without "
    f"one, the CPU's build is 4 GB smaller: pip install --force-reinstall torch torchvision --index-url {CPU_INDEX}"
)
NO_CODE = (
    "{} (compute capability {}) cannot be used: this torch has no code for it. A newer torch has code for newer GPUs, "
    "a build for an older CUDA for older ones: pip install --force-reinstall torch torchvision --index-url {}"
)
OLDER_INDEX = "https://download.pytorch.org/whl/cu126"
AUTOENCODERS = ("stabilityai/sd-vae-ft-ema", "stabilityai/sd-vae-ft-mse")
LITTLE_DISK = 20 * 10**9  # bytes: about what a run of XL/2 keeps


def examine() -> dict[str, Any]:
    """Look at versions, devices, caches, weights and disk; `doctor --json` prints this table as it is."""
    report: dict[str, Any] = {
        "alphaflow": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages(),
        "devices": devices(),
        "weights": [],
        "caches": caches(),
        "free_bytes": shutil.disk_usage(Path.cwd()).free,
        "hub": hub(),
    }
    if not report["devices"]["error"]:
        report["weights"] = weights()
    return {**report, "problems": problems(report)}


def packages() -> dict[str, str | None]:
    """The version of each package that alphaflow requires; None where it is missing."""
    try:
        needed = [line for line in requires("alphaflow-cli") or [] if "extra ==" not in line]
    except PackageNotFoundError:  # a clone that is not installed does not say what it requires
        return {}
    return {name: _version(name) for name in sorted(re.split(r"[^A-Za-z0-9_.-]", line)[0] for line in needed)}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def devices() -> dict[str, Any]:
    """What torch can compute on; `error` says why torch cannot be imported."""
    present: dict[str, Any] = {"cpu_cores": os.cpu_count(), "cuda": [], "mps": False, "built_for": "", "error": ""}
    try:
        import torch  # slow, and the one import that a broken installation fails on
    except (ImportError, OSError) as fault:
        return {**present, "error": f"torch cannot be imported: {str(fault).splitlines()[0]}"}
    from alphaflow_cli.model.compiling import can_compile

    present["mps"] = torch.backends.mps.is_available()
    present["built_for"] = torch.version.cuda or ""
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        facts = {"name": card.name, "bytes": card.total_memory, "bf16": card.major >= 8}
        facts["compiles"] = can_compile(torch.device("cuda", index))
        code = torch.version.hip is not None or has_code(card.major, card.minor, torch.cuda.get_arch_list())
        present["cuda"].append({**facts, "capability": f"{card.major}.{card.minor}", "code": code})
    return present


def has_code(major: int, minor: int, architectures: Sequence[str]) -> bool:
    """Whether a build of torch for these architectures (sm_80, compute_90, …) runs on an NVIDIA card.

    Code for sm_XY runs on the same X from minor number Y on; what is made for compute_XY, on all from there on.
    """
    built = [re.match(r"(sm|compute)_(\d+)(\d)", each) for each in architectures]
    kinds = [(each[1], int(each[2]), int(each[3])) for each in built if each]
    fits = [(kind == "compute" or x == major) and (x, y) <= (major, minor) for kind, x, y in kinds]
    return any(fits) or not kinds


def weights() -> list[dict[str, Any]]:
    """The weights that other projects published, and what each is needed for."""
    from alphaflow_cli.nn.autoencoder import has_weights
    from alphaflow_cli.nn.weights import FILES, missing_weights

    entries = []
    for wanted in FILES.values():
        present = missing_weights(wanted) is None
        entries.append({"what": wanted.title, "for": wanted.metrics, "present": present, "get": wanted.url})
    for name in AUTOENCODERS:
        config = cached_file(name, "config.json")
        present = config is not None and has_weights(config.parent)
        entries.append(
            {"what": name, "for": "prep-latents, sample and eval", "present": present, "get": "downloaded by use"}
        )
    return entries


def caches() -> list[dict[str, Any]]:
    """Folders that weights are kept in, by the libraries' documented variables."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    torch_home = user_path(os.environ.get("TORCH_HOME") or base / "torch")
    folders = {"torch": torch_home / "hub" / "checkpoints"}
    with suppress(ImportError):  # then huggingface_hub is listed as missing
        folders = {"Hugging Face": cache_folder(), **folders}
    if os.environ.get("ALPHAFLOW_WEIGHTS"):
        folders["$ALPHAFLOW_WEIGHTS"] = user_path(os.environ["ALPHAFLOW_WEIGHTS"])
    return [{"what": what, "path": str(path), "writable": _writable(path)} for what, path in folders.items()]


def _writable(folder: Path) -> bool:
    """Whether the folder, or the first parent that exists, takes files."""
    try:
        folder.stat()
    except FileNotFoundError:
        return _writable(folder.parent)
    except OSError:  # the path cannot be walked: no permission, a file on the way, a name too long
        return False
    return folder.is_dir() and os.access(folder, os.W_OK)


def hub() -> dict[str, bool]:
    """Whether there is a token, and whether the Hub may be asked, as huggingface_hub reads the environment."""
    try:
        return {"token": has_token(), "offline": is_offline()}
    except ImportError:  # then it is listed as missing
        return {"token": False, "offline": False}


def problems(report: dict[str, Any]) -> list[str]:
    """What will not work here, each with its reason and its remedy."""
    remarks = [
        f"{name} is not installed: pip install {name}" for name, number in report["packages"].items() if number is None
    ]
    if not report["packages"]:
        remarks.append("alphaflow is a clone here, not installed, so its packages are not listed: pip install .")
    devices = report["devices"]
    if devices["error"]:
        remarks.append(f"nothing that computes will work: {devices['error']}")
    elif not devices["cuda"] and not devices["mps"]:
        remarks.append(
            "no GPU: quickstart and other small recipes train here, the ImageNet recipes are out of its reach"
        )
        if devices.get("built_for"):
            remarks.append(CUDA_BUILD.format(devices["built_for"]))
    lacking = [c for c in devices["cuda"] if not c.get("code", True)]
    remarks += [NO_CODE.format(c["name"], c["capability"], OLDER_INDEX) for c in lacking]
    remarks += [f"{c['name']} has no bf16: set train.precision=fp32" for c in devices["cuda"] if not c["bf16"]]
    if slow := [card["name"] for card in devices["cuda"] if not card.get("compiles", True)]:
        from alphaflow_cli.model.compiling import EAGERLY

        remarks.append(f"{slow[0]}: {EAGERLY}")
    for entry in report["weights"]:
        if not entry["present"] and entry["get"].startswith("https:"):
            remarks.append(f"{entry['for']} will not be measured: {entry['what']} is missing. Get {entry['get']}")
        elif not entry["present"] and report["hub"]["offline"]:
            remarks.append(f"{entry['what']} is not in the cache, and HF_HUB_OFFLINE forbids to download it")
    remarks += [f"the cache {c['path']} cannot be written" for c in report["caches"] if not c["writable"]]
    if report["free_bytes"] < LITTLE_DISK:
        remarks.append(f"{report['free_bytes'] / 1e9:.1f} GB free here: what an XL/2 run keeps needs 22 GB")
    if not report["hub"]["token"]:
        remarks.append("push will not work without a Hugging Face token: run hf auth login")
    return remarks
