"""`python -m mtj_loader.cli` runs `mtj-loader`."""

from mtj_loader.cli import main

main()
