"""The Hub: addresses, downloads that are checked, uploads that can be resumed, the model card."""

from alphaflow_cli.remote.address import Repo, parse_address
from alphaflow_cli.remote.download import Pulled, pull, resolve_checkpoint, resolve_file

__all__ = ["Pulled", "Repo", "parse_address", "pull", "resolve_checkpoint", "resolve_file"]
