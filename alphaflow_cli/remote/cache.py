"""The Hub's cache on this machine: where it is, what lies in it, whether the Hub may be asked. Nothing is sent here.

huggingface_hub reads the environment (HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME, HF_HUB_OFFLINE, HF_TOKEN, …). Every part
of the program asks it through this file, so that all give one answer. It is imported inside the functions: most
commands never need it.
"""

import os
from pathlib import Path

from alphaflow_cli.files import user_path


def cache_folder() -> Path:
    """Where downloads are kept: $HF_HUB_CACHE as it is now, else huggingface_hub's own place."""
    from huggingface_hub import constants

    return user_path(os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE)


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids requests to the Hub; `0`, `false` and the like do not."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def has_token() -> bool:
    """Whether a token of the Hub is set or stored; it is shown nowhere."""
    from huggingface_hub import get_token

    return get_token() is not None


def cached_file(repo: str, file: str, revision: str = "main") -> Path | None:
    """A file of a model's repository where an earlier download left it, or None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(repo, file, cache_dir=cache_folder(), revision=revision)
    except HFValidationError:  # not a name the Hub takes, so nothing was ever downloaded under it
        return None
    return Path(path) if isinstance(path, str) else None
