"""The rules of the house, held over every module.

A newcomer who knows the verb knows the room. Verbs use each other downwards in the order of VERBS (train measures while
it trains), and all of them stand on the ground; the ground's own directions are in GROUND. Everybody may use the files
of FOR_ALL, which use nobody else. One dependency, one room: a library is imported where DEPENDENCIES says, and nowhere
else. A file holds one thing that a person would look for. A breach is named with its file and line. A rule has
exceptions only by name and with a reason, in the tables below.
"""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "alphaflow_cli"
MODULES = sorted(PACKAGE.rglob("*.py"))

VERBS = ("report", "hub", "export", "analyze", "ema", "train", "evaluate", "sample", "latents", "convert")
GROUND = {
    "model": {"nn", "data", "remote", "runtime", "recipe", "core"},
    "data": {"remote", "core"},
    "nn": {"remote", "core"},
    "recipe": {"core"},  # its files without torch
    "charts": set(),
    "runtime": set(),
    "core": set(),
    "remote": set(),  # the one client of the Hub
}
FOR_ALL = {"errors", "files", "documents", "text", "tensors"}
MAY_IMPORT = {
    **GROUND,
    **{verb: {*VERBS[i + 1 :], *GROUND} for i, verb in enumerate(VERBS)},
    **{name: set() for name in FOR_ALL},
    "api": {*VERBS, *GROUND},  # the door for Python users
    "doctor": {*VERBS, *GROUND},  # it looks into every room
    "doors": {*VERBS, *GROUND, "api"},  # more of it, which __init__.py finds when it is called
    "demo": {*VERBS, *GROUND, "api"},  # an app on top of the door for Python users
    "commands": {*VERBS, *GROUND, "doctor", "demo"},
    "cli": {"commands"},
}
DEPENDENCIES = {
    "accelerate": ("runtime/",),
    "click": ("cli.py", "commands/"),
    "timm": ("evaluate/networks.py",),
    "torch_fidelity": ("evaluate/networks.py",),
    "diffusers": ("nn/autoencoder", "export/"),
    "onnx_ir": ("export/onnx.py",),
    "onnxruntime": ("export/onnx.py",),
    "gradio": ("demo.py",),
    "huggingface_hub": ("remote/", "hub/"),
    "matplotlib": ("charts/",),
    "pyarrow": ("data/columns.py",),
    "PIL": ("data/", "sample/grid.py", "report/", "api.py"),
    "yaml": ("recipe/",),
}
WITHOUT_TORCH = (
    "cli.py",
    "commands/",
    "recipe/",
    "charts/",
    "errors.py",
    "files.py",
    "documents.py",
    "text.py",
    "core/alpha.py",
    "core/rates.py",
)
LONG_FILES: dict[str, str] = {}  # file under alphaflow_cli → the reason why it is longer than 400 lines
LONG_FUNCTIONS: dict[str, str] = {}  # file:function → the reason why it is longer than 40 lines
SHORT_FILES = {  # file → the reason why it is shorter than 80 lines though no two others need it
    "nn/clean.py": "a network of its own, as nn/noise.py is: what its last layer gives is its whole difference",
    "train/samples.py": "draws the pictures of a run while it trains: one thing to look for, apart from the loop",
}
MOST_SHORT_FILES = 12
TWO_THINGS = {  # public name → the reason why it stands for two things
    "command": "every file of commands/ holds the one command that is named like the file",
    "evaluate": "the room's work, and, for Python users, the door to it in doors.py",
    "train": "the room's work, and, for Python users, the door to it in doors.py",
    "Model": "the recipe's section `model`, and, for Python users, what `load` gives",
}
UNSAID = {"said", "told", "found", "asked", "how"}  # they do not say what the thing is
CIRCLES: dict[frozenset[str], str] = {}  # files that import each other → the reason why one of them does so lazily


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


def room_of(name):
    first = name.split("/")[0].removesuffix(".py")
    return {"__init__": "api", "__main__": "cli"}.get(first, first)


def imports_of(path):
    """(line, module) of every import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "alphaflow_cli":
                yield from ((node.lineno, f"alphaflow_cli.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def direction_breaches(name, imports):
    room = room_of(name)
    for line, module in imports:
        if module.startswith("alphaflow_cli."):
            other = module.split(".")[1]
            if other not in {room, "__version__"} | FOR_ALL | MAY_IMPORT[room]:
                yield f"{name}:{line}: {room} must not import {other}"


def dependency_breaches(name, imports):
    for line, module in imports:
        rooms = DEPENDENCIES.get(module.split(".")[0])
        if rooms and not name.startswith(rooms):
            yield f"{name}:{line}: {module} belongs to {' and '.join(rooms)}"
        if module.split(".")[0] == "torch" and name.startswith(WITHOUT_TORCH):
            yield f"{name}:{line}: this file starts without torch"


def function_breaches(name, tree, limit=40):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > limit and f"{name}:{node.name}" not in LONG_FUNCTIONS:
                yield f"{name}:{node.lineno}: {node.name} has {length} lines"


def lengths():
    return {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}


def file_of(module):
    """The file of a module of the package; None for a name within a module, or for another package's."""
    path = ROOT / module.replace(".", "/")
    files = [path.with_suffix(".py"), path / "__init__.py"]
    return next((name_of(file) for file in files if file in MODULES), None)


def import_graph():
    """File → the files of the package that it imports, those inside functions and under TYPE_CHECKING included."""
    graph = {}
    for path in MODULES:
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {file_of(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {file_of(f"{node.module}.{alias.name}") or file_of(node.module) for alias in node.names}
        graph[name_of(path)] = names - {None, name_of(path)}
    return graph


def circles(graph):
    """The groups of files each of which reaches the others by its imports."""
    reach = {name: set(needs) for name, needs in graph.items()}
    for middle in reach:
        for known in reach.values():
            if middle in known:
                known |= reach[middle]
    groups = [frozenset(other for other in reach[name] if name in reach[other]) for name in reach]
    return sorted({group for group in groups if group}, key=sorted)


def public_names(tree):
    """The public functions, classes and types (names in CamelCase that are assigned once) of a module."""
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    targets = [node.targets[0] for node in tree.body if isinstance(node, ast.Assign)]
    names += [t.id for t in targets if isinstance(t, ast.Name) and re.fullmatch(r"([A-Z][a-z0-9]+)+", t.id)]
    return [name for name in names if not name.startswith("_")]


def names_in(tree):
    """(line, name) of every variable, parameter, attribute, function and class."""
    for node in ast.walk(tree):
        name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None)
        name = node.arg if isinstance(node, ast.arg) else name
        if isinstance(name, str):
            yield node.lineno, name


def short_docstrings(tree):
    """(line, docstring) of every docstring that has fewer than four words: no sentence that helps is so short."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            text = ast.get_docstring(node)
            if text is not None and len(text.split()) < 4:
                yield node.lineno, text


def test_imports_point_one_way():
    assert [b for path in MODULES for b in direction_breaches(name_of(path), imports_of(path))] == []


def test_every_dependency_has_one_room():
    assert [b for path in MODULES for b in dependency_breaches(name_of(path), imports_of(path))] == []


def test_every_room_is_in_the_table():
    assert {room_of(name_of(path)) for path in MODULES} <= set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("core/x.py", "alphaflow_cli.recipe.schema"),
        ("nn/x.py", "alphaflow_cli.engine"),
        ("hub/x.py", "click"),
        ("report/x.py", "matplotlib.figure"),
    ],
)
def test_a_breach_is_found(name, module):
    assert [*direction_breaches(name, [(1, module)]), *dependency_breaches(name, [(1, module)])]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_imports_and_says_what_it_is(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if path.name != "__main__.py":
        assert importlib.import_module(module).__doc__


def test_no_file_is_longer_than_400_lines_without_a_reason():
    assert {name: n for name, n in lengths().items() if n > 400 and name not in LONG_FILES} == {}


def test_no_function_is_longer_than_40_lines_without_a_reason():
    trees = ((name_of(path), ast.parse(path.read_text(encoding="utf-8"))) for path in MODULES)
    assert [b for name, tree in trees for b in function_breaches(name, tree)] == []


def test_a_short_file_serves_two_others_or_has_a_reason():
    exempt = re.compile("core/|commands/|errors.py|(.*/)?__(init|main)__.py")
    short = {name for name, n in lengths().items() if n < 80 and not exempt.match(name)}
    graph = import_graph()
    lonely = {name for name in short if sum(name in needs for needs in graph.values()) < 2}
    assert lonely - set(SHORT_FILES) == set()
    assert len(short) < MOST_SHORT_FILES, sorted(short)


def test_no_files_import_each_other_in_a_circle():
    assert set(circles(import_graph())) - set(CIRCLES) == set()


def test_a_circle_of_imports_is_seen():
    graph = {"a.py": {"b.py"}, "b.py": {"c.py", "d.py"}, "c.py": {"a.py"}, "d.py": set(), "e.py": {"a.py"}}
    assert circles(graph) == [frozenset({"a.py", "b.py", "c.py"})]


def test_no_public_name_stands_for_two_things():
    places = {}
    for path in MODULES:
        for name in public_names(ast.parse(path.read_text(encoding="utf-8"))):
            places.setdefault(name, []).append(name_of(path))
    assert {name: files for name, files in places.items() if len(files) > 1 and name not in TWO_THINGS} == {}


def assigned_twice(tree):
    """The names of a module that two of its own statements give a value."""
    seen, twice = set(), []
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node] if hasattr(node, "name") else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        for target in targets:
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            for name in (getattr(each, "id", None) or getattr(each, "name", None) for each in names):
                twice += [name] if name in seen else []
                seen |= {name} - {None}
    return twice


def test_no_name_of_a_module_is_assigned_twice():
    trees = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
    assert [f"{name}: {twice}" for name, tree in trees.items() for twice in assigned_twice(tree)] == []
    assert assigned_twice(ast.parse("A = 1\nB, A = 2, 3\ndef f(): ...\nf: int = 4\n")) == ["A", "f"]


def test_a_name_says_what_the_thing_is():
    trees = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
    named = [f"{name}:{line}: {it}" for name, tree in trees.items() for line, it in names_in(tree) if it in UNSAID]
    assert named == []


def test_a_docstring_is_a_sentence():
    trees = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
    short = [f"{name}:{line}: {text}" for name, tree in trees.items() for line, text in short_docstrings(tree)]
    assert short == []


def test_functions_classes_and_types_are_public_names_and_constants_are_not():
    text = "def f(): ...\nclass C: ...\ndef _g(): ...\nKind = str\nT: type = int\nLIMIT = 3\nx = 4\n"
    assert public_names(ast.parse(text)) == ["f", "C", "Kind"]


def test_the_listed_reasons_are_still_needed():
    listed = {*LONG_FILES, *LONG_FUNCTIONS, *SHORT_FILES, *(name for circle in CIRCLES for name in circle)}
    assert all((PACKAGE / name.split(":")[0]).exists() for name in listed)


def test_help_and_recipe_errors_start_without_torch_or_numpy(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: {stpes: 3}\n")
    script = (
        "import sys\nfrom alphaflow_cli.cli import run\n"
        f"codes = [run(['--help']), run(['recipe', '--help']), run(['recipe', 'check', {str(broken)!r}])]\n"
        "heavy = {'torch', 'numpy', 'PIL', 'matplotlib', 'accelerate', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'{codes} {heavy}' if codes != [0, 0, 1] or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_file_holds_a_path_of_a_machine():
    pattern = re.compile("/(" + "|".join(["tmp", "work", "root", "home"]) + r")/[a-z]")
    folders = ["alphaflow_cli", "recipes", "tests", "docs", "benchmarks", ".ci"]
    files = [
        p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in {".py", ".md", ".yaml", ".txt", ".json", ""}
    ]
    files += [p for p in ROOT.iterdir() if p.suffix in {".md", ".toml", ".yaml"}]
    found = [p.relative_to(ROOT).as_posix() for p in files if p.is_file() and pattern.search(p.read_text("utf-8"))]
    assert found == []
