"""Where this package keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache_folder(kind: str) -> Path:
    """`$XDG_CACHE_HOME/mtj_loader/<kind>`, by default in `~/.cache` (XDG Base Directories, 0.8).

    Raises:
      RuntimeError: the user has no home folder.
    """
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(xdg) if Path(xdg).is_absolute() else Path.home() / ".cache"
    return base / "mtj_loader" / kind
