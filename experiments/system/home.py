"""Folders of the user, who may have none: services and containers run without a home."""

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """The cache folder; None without a home folder."""
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "crsam_jax"
    home = folder()
    return home and home / ".cache" / "crsam_jax"


def folder() -> Path | None:
    """The home folder, or None."""
    try:
        return Path.home()
    except RuntimeError:
        return None
