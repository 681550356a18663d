"""`push --space`: a Space that samples the model that was pushed, by the app that `alphaflow demo` serves.

README.md          the Space's card: Gradio, the model that it samples
app.py             the app of alphaflow_cli/demo.py
requirements.txt   this package with its extra `demo`, and torch's build for CPUs
"""

from pathlib import Path

from alphaflow_cli import __version__
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import make_folder, write_whole
from alphaflow_cli.remote.cache import cache_folder
from alphaflow_cli.remote.client import hub_api
from alphaflow_cli.remote.faults import NotThere, hub_faults
from alphaflow_cli.text import for_terminal

GRADIO = "6.31.0"  # the version that the Space is built with; tested
PYTHON = "3.12"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SPACE_FILES = ("README.md", "app.py", "requirements.txt")
MARK = "from alphaflow_cli.demo import build_app"
APP = f'''"""A Space that samples REPO; the same app runs anywhere: alphaflow demo REPO"""

{MARK}

app = build_app("REPO")

if __name__ == "__main__":
    app.launch()
'''


def stage_space(folder: Path, *, repo: str, title: str, licence: str) -> dict[str, int]:
    """Write the Space's files for the model user/repo; returns their sizes."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} - {*SPACE_FILES}:
        raise AlphaflowError(f"{folder}: holds other files than a Space's. Nothing was overwritten.")
    make_folder(folder)
    write_whole(folder / "README.md", space_card(repo, title, licence))
    write_whole(folder / "app.py", APP.replace("REPO", repo))
    lines = [f"--extra-index-url {CPU_INDEX}", f"alphaflow-cli[demo]>={__version__}", ""]
    write_whole(folder / "requirements.txt", "\n".join(lines))
    return {name: (folder / name).stat().st_size for name in SPACE_FILES}


def space_card(repo: str, title: str, licence: str) -> str:
    """The Space's README.md, whose head tells the Hub how to run it."""
    from huggingface_hub import SpaceCardData

    head = SpaceCardData(
        title=for_terminal(title, limit=60) or repo.split("/")[1],
        sdk="gradio",
        sdk_version=GRADIO,
        python_version=PYTHON,
        app_file="app.py",
        license=None if licence == "unknown" else licence,
        models=[repo],
        tags=["alphaflow", "one-step-generation"],
    )
    return (
        f"---\n{head.to_yaml()}\n---\n\nSamples of [{repo}](https://huggingface.co/{repo}), in one step or two. "
        f"The same app on your machine:\n\n```bash\npip install 'alphaflow-cli[demo]'\nalphaflow demo {repo}\n```\n"
    )


def check_space(name: str) -> None:
    """Refuse a Space that is something else; makes nothing on the Hub."""
    api = hub_api()
    try:
        with hub_faults(name):
            files = set(api.list_repo_files(name, repo_type="space"))
            is_ours = files <= {".gitattributes", "README.md"}
            if "app.py" in files:
                app = api.hf_hub_download(name, "app.py", repo_type="space", cache_dir=cache_folder())
                is_ours = MARK in Path(app).read_text(encoding="utf-8", errors="replace")
    except NotThere:
        return
    if not is_ours:
        raise AlphaflowError(f"{name}: this Space is something else. Choose another name: --space=user/name")


def upload_space(folder: Path, name: str, *, private: bool, message: str) -> str:
    """Create the Space if need be and commit its files; returns its address."""
    api = hub_api()
    with hub_faults(name):
        api.create_repo(name, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True)
    with hub_faults(name, sending=True):
        api.upload_folder(
            repo_id=name, repo_type="space", folder_path=folder, allow_patterns=[*SPACE_FILES], commit_message=message
        )
    return f"{api.endpoint}/spaces/{name}"
