"""The command line: `mtj-loader inspect | plan | load | generate | convert | digests`."""

from mtj_loader.cli.process import main

__all__ = ["main"]
