"""The command line: `mtj-loader inspect | plan | load | generate | convert`."""

from mtj_loader.cli.app import app, main

__all__ = ["app", "main"]
