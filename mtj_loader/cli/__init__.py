"""The command line: `mtj-loader inspect | plan | load | generate | convert | digests`.

This imports as little as possible, so that signals and limits are handled from the start.
"""

from mtj_loader.cli.process import main

__all__ = ["main"]
