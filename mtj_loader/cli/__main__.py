"""`python -m mtj_loader.cli` is `mtj-loader`."""

from mtj_loader.cli import main

main()
