"""JAX's cache of compiled programs on disk, in the user's cache folder unless JAX has one already.

See https://docs.jax.dev/en/latest/persistent_compilation_cache.html for JAX's own settings.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax

# JAX writes what takes a second or more to compile. A program is read in a fiftieth of a second:
# what takes five times as long is worth its file. A sampler takes half a second.
_MIN_SECONDS = 0.1
_JAX_MIN_SECONDS = 1.0


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/mtj_loader/xla`, by default in `~/.cache` (XDG Base Directories, 0.8)."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if Path(given).is_absolute() else Path.home() / ".cache"
    return base / "mtj_loader" / "xla"


def keep_compiled() -> tuple[str, ...]:
    """Has JAX keep what it compiles from now on, also between processes.

    Does nothing where JAX is told already what to do: a folder of its own is set
    (`JAX_COMPILATION_CACHE_DIR`), or the cache is off (`JAX_ENABLE_COMPILATION_CACHE=0`).

    Returns:
      A warning where the folder cannot be used.
    """
    if _setting("jax_compilation_cache_dir") or not _setting("jax_enable_compilation_cache"):
        return ()
    try:
        folder = default_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # programs: nobody else may put some
    except (OSError, RuntimeError) as error:  # a RuntimeError where there is no home
        return _unusable(error)
    if not os.access(folder, os.W_OK | os.X_OK):
        return _unusable(f"{folder} is not writable")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if _setting("jax_persistent_cache_min_compile_time_secs") == _JAX_MIN_SECONDS:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
    return ()


def _setting(name: str) -> object:
    return getattr(jax.config, name)


def _unusable(why: object) -> tuple[str]:
    return (f"compiled programs are not kept for the next start: {why}",)
