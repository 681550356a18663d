"""α-Flow and its family: from a folder of images to a published, measured one-step generator."""

from importlib.metadata import version

__version__ = version("alphaflow")
