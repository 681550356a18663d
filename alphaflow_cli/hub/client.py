"""The Hub's client, set by the environment at the moment of the call: HF_ENDPOINT, HF_HUB_CACHE, HF_TOKEN."""

import os
import sys
from typing import TYPE_CHECKING

from alphaflow_cli.errors import AlphaflowError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def hub_api() -> "HfApi":
    """A client; imported here, since most commands never need it."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if any(not "!" <= letter <= "~" for letter in get_token() or ""):
        raise AlphaflowError("the token holds a character no token has: copy it anew into HF_TOKEN, or: hf auth login")
    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="alphaflow")


def cache_folder() -> str | None:
    """Where downloads are kept; None: the client's own place."""
    return os.environ.get("HF_HUB_CACHE") or None
