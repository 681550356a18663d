"""α-Flow and its family: from a folder of images to a published, measured one-step generator."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from alphaflow_cli.api import Model, Pictures, load
    from alphaflow_cli.errors import AlphaflowError
    from alphaflow_cli.recipe import load_recipe

    evaluate: Callable[..., list[Any]]
    train: Callable[..., Model]

__all__ = ["AlphaflowError", "Model", "Pictures", "__version__", "evaluate", "load", "load_recipe", "train"]
__version__ = "0.1.0"  # the one place that says it; known in a clone that is not installed, too
PLACES = {"AlphaflowError": "errors", "Model": "api", "Pictures": "api", "load": "api", "load_recipe": "recipe"}
CALLABLE = ("evaluate", "train")  # rooms of that name, which can be called: `alphaflow_cli.train("quickstart")`


class CallableRoom(ModuleType):
    """A room that is a door, too: calling it calls the function of its name in doors.py."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        doors = importlib.import_module("alphaflow_cli.doors")
        return getattr(doors, self.__name__.rpartition(".")[2])(*arguments, **options)


class Package(ModuleType):
    """This package: a room of CALLABLE becomes a door when it is imported, by whomever."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in CALLABLE and isinstance(value, ModuleType):
            value.__class__ = CallableRoom
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = Package


def __getattr__(name: str) -> object:
    """`alphaflow_cli.load` and the like, imported when they are used: the command line starts without torch."""
    if name in CALLABLE:
        return importlib.import_module(f"alphaflow_cli.{name}")
    if name in PLACES:
        return getattr(importlib.import_module(f"alphaflow_cli.{PLACES[name]}"), name)
    raise AttributeError(f"module 'alphaflow_cli' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
