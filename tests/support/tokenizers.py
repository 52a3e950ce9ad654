"""The tokenizers in tests/data/tokenizers, made by tests/oracle/make_tokenizers.py."""

from __future__ import annotations

import json
from pathlib import Path

from mtj_loader.generation.tokenizer import Tokenizer, load_tokenizer

FOLDER = Path(__file__).parents[1] / "data" / "tokenizers"
EXPECTED = json.loads((FOLDER / "expected.json").read_text("utf-8"))
TEXTS: list[str] = EXPECTED["texts"]
CASES: dict[str, dict] = EXPECTED["cases"]


def write_json(folder: Path, contents: dict[str, object]) -> dict[str, Path]:
    """Writes `name.json` for every name."""
    files = {f"{name}.json": folder / f"{name}.json" for name in contents}
    for path, content in zip(files.values(), contents.values(), strict=True):
        path.write_text(json.dumps(content))
    return files


def vocabulary(name: str) -> dict[str, Path]:
    """The files of a vocabulary: tokenizer.model, or vocab.json and merges.txt."""
    return {path.name: path for path in (FOLDER / name).iterdir()}


def load_case(name: str, folder: Path) -> Tokenizer:
    """Our tokenizer for a case."""
    case = CASES[name]
    files = write_json(folder, case["settings"]) | vocabulary(case["vocabulary"])
    tokenizer = load_tokenizer(files, case["model_type"])
    assert tokenizer is not None
    return tokenizer
