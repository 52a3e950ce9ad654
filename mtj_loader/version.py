"""Which version of mtj_loader this is."""

from __future__ import annotations


def version() -> str:
    """As installed; what a checkout is called that is not."""
    from importlib import metadata  # noqa: PLC0415 -- 40 ms, and few ask

    try:
        return metadata.version("mtj-loader")
    except metadata.PackageNotFoundError:
        return "0+unknown"
