"""The version of mtj_loader."""

from __future__ import annotations


def version() -> str:
    """The installed version; `0+unknown` for a checkout that is not installed."""
    from importlib import metadata  # noqa: PLC0415 -- takes 40 ms and is rarely needed

    try:
        return metadata.version("mtj-loader")
    except metadata.PackageNotFoundError:
        return "0+unknown"
