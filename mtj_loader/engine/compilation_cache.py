"""JAX's persistent compilation cache: where compiled programs are kept for later processes."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from mtj_loader.storage.user_cache import user_cache_folder

# JAX by default keeps programs that take a second or more to compile. Reading one takes 20 ms, so
# five times that is worth a file; a sampler takes half a second to compile.
_MIN_STORED_SECONDS = 0.1
_JAX_MIN_STORED_SECONDS = 1.0
_FOLDER = "jax_compilation_cache_dir"
_MIN_SECONDS = "jax_persistent_cache_min_compile_time_secs"


def default_cache_folder() -> Path:
    """`$XDG_CACHE_HOME/mtj_loader/xla`, by default in `~/.cache`."""
    return user_cache_folder("xla")


def enable_compilation_cache() -> tuple[str, ...]:
    """Makes JAX keep what it compiles from now on, for later processes too.

    JAX has one such cache per process, so this also applies to programs that are not ours. Nothing
    changes if JAX is configured already, by `jax.config` or by environment variables: a folder is
    set, even an empty name, or the cache is off. See
    https://docs.jax.dev/en/latest/persistent_compilation_cache.html.

    Returns:
      A warning if the folder cannot be used.
    """
    if _is_set(_FOLDER, None) or not _get_setting("jax_enable_compilation_cache"):
        return ()
    try:
        folder = default_cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # only the user may add programs
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        return _warn_unusable(error)
    if not os.access(folder, os.W_OK | os.X_OK):
        return _warn_unusable(f"{folder} is not writable")
    jax.config.update(_FOLDER, str(folder))
    if not _is_set(_MIN_SECONDS, _JAX_MIN_STORED_SECONDS):
        jax.config.update(_MIN_SECONDS, _MIN_STORED_SECONDS)
    return ()


def compilation_cache_folder() -> str | None:
    """The folder in which JAX keeps what it compiles, None if it does not."""
    folder = _get_setting(_FOLDER) if _get_setting("jax_enable_compilation_cache") else None
    return str(folder) if folder else None


def _is_set(name: str, default: object) -> bool:
    """Whether the user has set an option of JAX, in the environment even to its default."""
    return _get_setting(name) != default or name.upper() in os.environ


def _get_setting(name: str) -> object:
    return getattr(jax.config, name)


def _warn_unusable(why: object) -> tuple[str]:
    return (f"compiled programs are not kept for the next start: {why}",)
