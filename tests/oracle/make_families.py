"""Writes tests/data/families: tiny models of every family, and their logits in transformers.

Needs the `parity` extra. Run from the root of the repository, for all families or some:

    python -m tests.oracle.make_families gptj bloom
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.oracle.random_models import write_case
from tests.parity.cases import CASES, config_json

FOLDER = Path(__file__).parents[1] / "data" / "families"
SHAPE = (4, 12)  # rows and tokens, as many as tests/support/families.py needs


def main(families: list[str]) -> None:
    """Rewrites every case of some families."""
    for family in families or CASES:
        for seed, name in enumerate(CASES[family]):
            write_case(FOLDER / family / name, config_json(family, name), SHAPE, seed)


if __name__ == "__main__":
    main(sys.argv[1:])
