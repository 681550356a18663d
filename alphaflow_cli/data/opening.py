"""Which kind of source a command line names."""

from pathlib import Path

from alphaflow_cli.data.archives import open_archive
from alphaflow_cli.data.sources import Source, open_folder, parse_glyphs
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.text import brief


def open_source(text: str) -> Source:
    """A folder, a zip or tar file, hf://datasets/NAME, or glyphs:N; its pictures are listed, none is read."""
    if text.startswith("glyphs:"):
        return parse_glyphs(text)
    if text.startswith("hf://"):
        from alphaflow_cli.data.hub_images import open_hub

        return open_hub(text)
    try:
        path = Path(text).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
        path = path.resolve()
    except (OSError, RuntimeError) as fault:  # no permission, too long; no home folder of that name, links in circles
        raise AlphaflowError(f"{brief(text)}: cannot be opened ({getattr(fault, 'strerror', '') or fault})") from fault
    if is_folder:
        return open_folder(path)
    if is_file:
        return open_archive(path)
    raise AlphaflowError(f"{brief(text)}: no such folder or archive. Others: hf://datasets/USER/NAME, glyphs:4000")
