"""The Hub: addresses, downloads that are checked, uploads that can be resumed, the model card."""

from alphaflow_cli.hub.address import Repo, parse_address
from alphaflow_cli.hub.transfer import Pulled, pull, resolve_checkpoint, resolve_file

__all__ = ["Pulled", "Repo", "parse_address", "pull", "resolve_checkpoint", "resolve_file"]
