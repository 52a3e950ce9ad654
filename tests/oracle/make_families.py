"""Writes tests/data/families: tiny models of every family, and the logits transformers gives.

Needs the `parity` extra. Run from the root of the repository, for all families or for some:

    python -m tests.oracle.make_families gptj bloom
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np

from tests.oracle.random_models import logits_of, random_ids, random_model
from tests.parity.cases import CASES, config_json

FOLDER = Path(__file__).parents[1] / "data" / "families"
SHAPE = (4, 12)  # rows and tokens: what tests/support/families.py needs, and little more


def _write(family: str, name: str, seed: int) -> None:
    folder = FOLDER / family / name
    shutil.rmtree(folder, ignore_errors=True)
    config = config_json(family, name)
    model, ids = random_model(config, seed), random_ids(config["vocab_size"], SHAPE, seed)
    logits = logits_of(model, ids)
    model.save_pretrained(folder)
    # As the case spells it: save_pretrained would bring it to today's spelling.
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.save(folder / "ids.npy", ids)
    np.save(folder / "logits.npy", logits)
    size_bytes = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{family}/{name}: {size_bytes:,} bytes, deviation of the logits {np.std(logits):.2f}")


def main(families: list[str]) -> None:
    """Writes every case of some families anew."""
    for family in families or CASES:
        for seed, name in enumerate(CASES[family]):
            _write(family, name, seed)


if __name__ == "__main__":
    main(sys.argv[1:])
