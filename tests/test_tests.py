"""The rules of the tests: they mirror the package, and what several of them use is a helper."""

import ast
import contextlib
import os
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import workers
from places import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

TESTS = ROOT / "tests"
ROOMS = {path.parent.name for path in (ROOT / "alphaflow_cli").glob("*/__init__.py")}
OTHERS = {
    "benchmarks": "mirrors the benchmarks, which are beside the package",
    "fuzz": "attacks whole commands, through several rooms at a time",
    "golden": "numbers, no tests",
    "help": "snapshots of --help, no tests",
    "helpers": "what several tests use",
}
ABOUT_ALL_ROOMS = {
    *("test_docs_commands.py", "test_docs_links.py", "test_house.py", "test_other_device.py", "test_tests.py"),
    "test_truth.py",
}
FILES = sorted(TESTS.rglob("*.py"))
NAMES = [str(path.relative_to(TESTS)) for path in FILES]


def imported(tree):
    """Every module that a file imports, by its full name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def changes_the_path(tree):
    """Whether a file adds to `sys.path`, or assigns to it."""
    for node in ast.walk(tree):
        call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value)
        if call == "sys.path" or (call == "monkeypatch" and node.func.attr == "syspath_prepend"):
            return True
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(target is not None and ast.unparse(target).startswith("sys.path") for target in targets):
            return True
    return False


def faults(name, text):
    """What is wrong with the tests' file of this name."""
    folder, _, file = name.rpartition("/")
    tree, found = ast.parse(text), []
    if file.startswith("test_") and folder == "" and file not in ABOUT_ALL_ROOMS:
        found.append("it tests all rooms, or belongs into the folder of one")
    if file.startswith("test_") and folder not in ROOMS | set(OTHERS) - {"golden", "help", "helpers"} | {""}:
        found.append("its folder is no room of the package")
    if not file.startswith("test_") and file != "conftest.py" and folder != "helpers":
        found.append("it is a helper, and belongs into helpers")
    if any(part.startswith("test_") or part == "conftest" for module in imported(tree) for part in module.split(".")):
        found.append("it imports a test module: what both need is a helper")
    if changes_the_path(tree):
        found.append("it changes sys.path: pyproject.toml says where helpers are")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_file_of_the_tests_is_where_it_belongs(name):
    assert faults(name, (TESTS / name).read_text(encoding="utf-8")) == []


def test_every_folder_is_a_room_of_the_package_or_has_a_reason():
    folders = {path.name for path in TESTS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - set(OTHERS) <= ROOMS
    assert set(OTHERS) <= folders
    assert {path.name for path in TESTS.glob("test_*.py")} == ABOUT_ALL_ROOMS


def test_the_tests_that_other_files_name_are_there():
    named = {
        (name, test)
        for name in (".pre-commit-config.yaml", ".ci/run", "CONTRIBUTING.md", "pyproject.toml")
        for test in re.findall(r"tests/[\w/]+\.py", (ROOT / name).read_text())
    }
    assert named
    assert [(name, test) for name, test in sorted(named) if not (ROOT / test).is_file()] == []


def test_no_two_test_files_have_one_name():
    """Test modules are imported by their bare names."""
    names = [path.name for path in FILES if path.name != "conftest.py"]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("test_new.py", ""),
        ("engine/test_new.py", ""),
        ("helpers/test_new.py", ""),
        ("train/tiny_runs.py", ""),
        ("tiny_runs.py", ""),
        ("train/test_new.py", "from test_train_parts import store"),
        ("train/test_new.py", "def f():\n    import tests.train.test_train_parts"),
        ("train/test_new.py", "from conftest import short"),
        ("train/test_new.py", "import sys\nsys.path.insert(0, 'x')"),
        ("train/test_new.py", "import sys\nsys.path[:0] = ['x']"),
        ("train/test_new.py", "import sys\nsys.path += ['x']"),
        ("helpers/new.py", "def f(monkeypatch):\n    monkeypatch.syspath_prepend('x')"),
    ],
)
def test_a_breach_of_the_rules_of_tests_is_found(name, text):
    assert len(faults(name, text)) == 1


@pytest.mark.parametrize("name", ["train/test_new.py", "benchmarks/test_new.py", "helpers/new.py", "train/conftest.py"])
def test_what_keeps_the_rules_of_tests_is_free(name):
    assert faults(name, "import sys\nfrom places import ROOT\nprint(sys.path, testing)\nimport torch.testing") == []


def processes(arguments, **options):
    option = SimpleNamespace(**{"capture": "fd", "collectonly": False, "markexpr": "not slow and not gpu", **options})
    place = SimpleNamespace(dir=ROOT)
    return workers.count_workers(SimpleNamespace(option=option, args=arguments, invocation_params=place))


def test_there_is_a_process_for_each_core_within_bounds(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    for gigabytes, count in ((512, 8), (8, 4), (2, 0)):
        monkeypatch.setattr(workers, "memory", lambda gigabytes=gigabytes: gigabytes << 30)
        assert processes(["tests"]) == count
    monkeypatch.setattr(workers, "memory", lambda: 64 << 30)
    for cores, count in ((1, 0), (2, 2), (6, 6)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)), raising=False)
        assert processes(["tests/core", "tests/nn"]) == count


def test_one_file_one_test_and_whoever_watches_gets_one_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(workers, "memory", lambda: 64 << 30)
    one = "tests/core/test_alpha.py"
    assert processes([one, "tests/core/test_ema.py"]) == 2
    assert processes([one]) == processes([f"{one}::test_x", f"{one}::test_y[a::b]"]) == processes(["nowhere"]) == 0
    for options in ({"capture": "no"}, {"collectonly": True}, {"markexpr": "gpu"}):
        assert processes(["tests"], **options) == 0


def test_the_tests_write_in_memory_only_where_there_is_room(tmp_path):
    assert workers.quick_folder(tmp_path / "none") == tempfile.gettempdir()
    assert workers.quick_folder("/proc") == tempfile.gettempdir(), "no room"
    assert Path(os.environ["PYTEST_DEBUG_TEMPROOT"]).is_dir()


def test_a_fork_can_run_backward_after_a_device_was_simulated():
    def backward():
        torch.ones(1, requires_grad=True).sum().backward()

    with FakeTensorMode():
        torch.ones(1)
    backward()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            backward()
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
