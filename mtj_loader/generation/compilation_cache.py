"""Enables JAX's persistent compilation cache, in the user's cache folder unless one is set.

See https://docs.jax.dev/en/latest/persistent_compilation_cache.html for JAX's settings.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax

# JAX by default keeps programs that take a second or more to compile. Reading one takes 20 ms, so
# five times that is worth a file; a sampler takes half a second to compile.
_MIN_SECONDS = 0.1
_JAX_MIN_SECONDS = 1.0


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/mtj_loader/xla`, by default in `~/.cache` (XDG Base Directories, 0.8)."""
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(xdg) if Path(xdg).is_absolute() else Path.home() / ".cache"
    return base / "mtj_loader" / "xla"


def enable_compilation_cache() -> tuple[str, ...]:
    """Makes JAX keep what it compiles from now on, for later processes too.

    Does nothing if JAX is configured already: a folder is set (`JAX_COMPILATION_CACHE_DIR`), or the
    cache is off (`JAX_ENABLE_COMPILATION_CACHE=0`).

    Returns:
      A warning if the folder cannot be used.
    """
    if _setting("jax_compilation_cache_dir") or not _setting("jax_enable_compilation_cache"):
        return ()
    try:
        folder = default_folder()
        folder.mkdir(
            mode=0o700, parents=True, exist_ok=True
        )  # compiled programs: only the user may write here
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        return _warn_unusable(error)
    if not os.access(folder, os.W_OK | os.X_OK):
        return _warn_unusable(f"{folder} is not writable")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if _setting("jax_persistent_cache_min_compile_time_secs") == _JAX_MIN_SECONDS:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
    return ()


def _setting(name: str) -> object:
    return getattr(jax.config, name)


def _warn_unusable(why: object) -> tuple[str]:
    return (f"compiled programs are not kept for the next start: {why}",)
