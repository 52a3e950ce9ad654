"""Token ids compared with transformers' AutoTokenizer; needs the `parity` extra (`make parity`)."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest

from mtj_loader.formats.sentencepiece import PieceType, parse_model
from mtj_loader.generation.tokenizer import choose_class, load_tokenizer
from mtj_loader.models.registry import FAMILIES
from tests.support.tokenizers import CASES, vocabulary

pytestmark = pytest.mark.parity

# The script imports torch and transformers, which only the `parity` extra installs.
SCRIPT = "tests.oracle.make_tokenizers"
PLAIN = "TokenizersBackend"
FIXTURE = Path(__file__).parents[1] / "data" / "shakespeare-neox"
TEXTS = (
    "To be, or not to be: that is the question.",
    " two  spaces\n\n\tand a tab ",
    "é e\u0301 😀 你好 \u00a0x<|endoftext|>y<|endoftext|>",
    "Hi",
    "don't 1234567 !!!",
)
SPECIAL = {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk", "pad")}


@pytest.mark.parametrize("name", CASES)
def test_committed_ids_are_those_of_transformers(name: str):
    case = CASES[name]
    files = {path.name: path.read_bytes() for path in vocabulary(case["vocabulary"]).values()}
    script = importlib.import_module(SCRIPT)
    made = script.run_case(case["model_type"], files, case["settings"])
    assert {"vocabulary": case["vocabulary"], **made} == case


@pytest.mark.parametrize("name", ["bpe", "bpe_plain", "unigram", "unigram_bytes"])
def test_pieces_are_those_of_sentencepiece(name: str):
    theirs = importlib.import_module("sentencepiece").SentencePieceProcessor()
    data = vocabulary(name)["tokenizer.model"].read_bytes()
    theirs.LoadFromSerializedProto(data)
    model = parse_model(data, file=name)
    assert len(model.pieces) == theirs.GetPieceSize()
    for number, piece in enumerate(model.pieces):
        assert (piece.text, piece.score) == (theirs.IdToPiece(number), theirs.GetScore(number))
        assert (piece.type is PieceType.CONTROL) == theirs.IsControl(number)
        assert (piece.type is PieceType.BYTE) == theirs.IsByte(number)
        assert (piece.type is PieceType.UNKNOWN) == theirs.IsUnknown(number)
    assert model.unk_id == theirs.unk_id()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_classes_of_families_are_those_of_transformers(model_type: str):
    auto = importlib.import_module("transformers.models.auto.tokenization_auto")
    usual = auto.TOKENIZER_MAPPING_NAMES.get(model_type) or PLAIN
    usual = PLAIN if usual == "MistralCommonBackend" else usual  # it is only for tekken.json
    assert choose_class(model_type, None) == usual
    overruled = model_type in auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    fixed = overruled or (usual == PLAIN and model_type in auto.TOKENIZER_MAPPING_NAMES)
    assert choose_class(model_type, "OtherTokenizer") == (usual if fixed else "OtherTokenizer")


def transformers_tokenizer(folder: Path):
    """Imported here because only the `parity` extra installs it."""
    from transformers import AutoTokenizer  # noqa: PLC0415

    return AutoTokenizer.from_pretrained(folder)


def write_vocab_and_merges(folder: Path) -> None:
    model = json.loads((FIXTURE / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "".join(f"{a} {b}\n" for a, b in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)


def assert_same_ids(folder: Path) -> None:
    shutil.copy(FIXTURE / "config.json", folder)
    ours = load_tokenizer({path.name: path for path in folder.iterdir()}, "gpt_neox")
    theirs = transformers_tokenizer(folder)
    assert ours is not None
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", [None, "GPT2Tokenizer", "GPTNeoXTokenizerFast"])
@pytest.mark.parametrize("add_bos_token", [False, True])
@pytest.mark.parametrize("add_prefix_space", [False, True])
def test_vocab_and_merges(tmp_path: Path, name, add_bos_token: bool, add_prefix_space: bool):
    write_vocab_and_merges(tmp_path)
    settings = {"add_bos_token": add_bos_token, "add_prefix_space": add_prefix_space, **SPECIAL}
    settings |= {"tokenizer_class": name} if name else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert_same_ids(tmp_path)


@pytest.mark.parametrize("name", ["TokenizersBackend", "GPT2Tokenizer", "GPTNeoXTokenizer"])
@pytest.mark.parametrize("settings", [{}, {"add_prefix_space": True}, {"add_bos_token": True}])
def test_tokenizer_json(tmp_path: Path, name: str, settings: dict):
    """With the Unicode normalization of all published GPT-NeoX tokenizers."""
    content = json.loads((FIXTURE / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"} if name == "GPTNeoXTokenizer" else None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    settings = settings | SPECIAL | {"tokenizer_class": name}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert_same_ids(tmp_path)
