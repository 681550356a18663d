"""The version stands in one place, and is known where nothing is installed."""

import re
import subprocess
import sys

from places import ROOT

import alphaflow_cli

CLONE = """
import importlib.metadata, sys
found = importlib.metadata.Distribution.from_name
def from_name(name):
    if name == "alphaflow-cli":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.Distribution.from_name = from_name
from alphaflow_cli.cli import run
sys.exit(run(sys.argv[1:]))
"""


def in_a_clone(*args):
    return subprocess.run([sys.executable, "-c", CLONE, *args], capture_output=True, text=True, check=False)


def test_a_clone_that_is_not_installed_knows_its_version():
    done = in_a_clone("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"alphaflow {alphaflow_cli.__version__}\n", "")


def test_doctor_says_that_a_clone_is_not_installed():
    done = in_a_clone("doctor")
    assert done.returncode == 0, done.stderr
    assert "alphaflow is a clone here, not installed" in done.stdout


def test_the_package_is_built_with_the_version_that_it_says():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in text
    assert not re.search(r"^version = ", text, re.MULTILINE)
    assert re.search(r'\[tool\.hatch\.version\]\npath = "alphaflow_cli/__init__\.py"', text)
