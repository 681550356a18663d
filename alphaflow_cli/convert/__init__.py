"""Checkpoints of the neighbours to ours, and back (docs/interop.md). No byte of a foreign file is executed."""

from alphaflow_cli.convert.export import export
from alphaflow_cli.convert.imported import ConvertOptions
from alphaflow_cli.convert.main import Outcome, convert

__all__ = ["ConvertOptions", "Outcome", "convert", "export"]
