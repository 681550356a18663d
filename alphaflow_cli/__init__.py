"""α-Flow and its family: from a folder of images to a published, measured one-step generator."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alphaflow_cli.api import Model, Pictures, load
    from alphaflow_cli.errors import AlphaflowError

__all__ = ["AlphaflowError", "Model", "Pictures", "__version__", "load"]
__version__ = "0.1.0"  # the one place that says it; known in a clone that is not installed, too


def __getattr__(name: str) -> object:
    """`alphaflow_cli.load` and the like, imported when they are used: the command line starts without torch."""
    if name in ("Model", "Pictures", "load"):
        from alphaflow_cli import api

        return getattr(api, name)
    if name == "AlphaflowError":
        from alphaflow_cli import errors

        return errors.AlphaflowError
    raise AttributeError(f"module 'alphaflow_cli' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
