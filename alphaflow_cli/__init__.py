"""α-Flow and its family: from a folder of images to a published, measured one-step generator."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alphaflow_cli.api import Model, load

__all__ = ["Model", "__version__", "load"]
__version__ = "0.1.0"  # the one place that says it; known in a clone that is not installed, too


def __getattr__(name: str) -> object:
    """`alphaflow_cli.load` and `.Model`, imported when they are asked for: the command line starts without torch."""
    if name in ("Model", "load"):
        from alphaflow_cli import api

        return getattr(api, name)
    raise AttributeError(f"module 'alphaflow_cli' has no attribute {name!r}")
