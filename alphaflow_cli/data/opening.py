"""Which kind of source a command line names."""

from pathlib import Path

from alphaflow_cli.data.archives import open_archive
from alphaflow_cli.data.sources import Source, open_folder, parse_glyphs
from alphaflow_cli.errors import AlphaflowError


def open_source(text: str) -> Source:
    """A folder, a zip or tar file, hf://datasets/NAME, or glyphs:N; its pictures are listed, none is read."""
    if text.startswith("glyphs:"):
        return parse_glyphs(text)
    if text.startswith("hf://"):
        from alphaflow_cli.data.hub_images import open_hub

        return open_hub(text)
    path = Path(text).expanduser()
    if path.is_dir():
        return open_folder(path.resolve())
    if path.is_file():
        return open_archive(path.resolve())
    raise AlphaflowError(f"{text}: no such folder or archive. Others: hf://datasets/USER/NAME, glyphs:4000")
