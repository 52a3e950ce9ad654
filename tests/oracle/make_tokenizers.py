"""Writes tests/data/tokenizers: small vocabularies, and transformers' ids and texts for them.

python -m tests.oracle.make_tokenizers    (needs transformers 5.23, sentencepiece and protobuf)

The vocabularies are trained on this repository's LICENSE, which does not change.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path

import sentencepiece
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, LlamaTokenizer, Qwen2Tokenizer

from tests.oracle.tokenizer_cases import CASES, TEXTS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "data" / "tokenizers"


def sentences() -> list[str]:
    return (ROOT / "LICENSE").read_text().split("\n")


def train_sentencepiece(**options: object) -> bytes:
    """A tokenizer.model with 500 pieces at most, and the options of Llama's."""
    model = io.BytesIO()
    usual = {
        "vocab_size": 500,
        "character_coverage": 0.9995,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "user_defined_symbols": ["[USER]"],
        "max_sentencepiece_length": 8,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()), model_writer=model, **{**usual, **options}
    )
    return model.getvalue()


def train_byte_level() -> dict[str, str]:
    """vocab.json and merges.txt with the words of Qwen2, so that "\\n\\n" is a token."""
    empty = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = empty.pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["\n".join(sentences())] * 2, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = "".join(f"{first} {second}\n" for first, second in model["merges"])
    vocab = json.dumps(model["vocab"], ensure_ascii=False)
    return {"vocab.json": vocab, "merges.txt": "#version: 0.2\n" + merges}


def as_json(files: dict[str, bytes]) -> dict[str, bytes]:
    """A tokenizer.json as in Llama 2's checkpoints, or as in Qwen2's, with the same vocabulary."""
    with tempfile.TemporaryDirectory() as name:
        for file, data in files.items():
            (Path(name) / file).write_bytes(data)
        is_llama = "tokenizer.model" in files
        kind = LlamaTokenizer if is_llama else Qwen2Tokenizer
        backend = kind.from_pretrained(name).backend_tokenizer
    if is_llama:
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        backend.post_processor = processors.TemplateProcessing(
            single=["<s>", "$A"], special_tokens=[("<s>", 1)]
        )
    return {"tokenizer.json": backend.to_str().encode()}


def vocabularies(rules: Path) -> dict[str, dict[str, bytes]]:
    """The files of each vocabulary.

    Args:
      rules: a file for a small charsmap; the usual one has 240 kB.
    """
    rules.write_text("FB01\t66 69\n65 301\tE9\n212B\tC5\n")
    spm = {
        "bpe": train_sentencepiece(model_type="bpe", byte_fallback=True),
        "bpe_plain": train_sentencepiece(model_type="bpe", vocab_size=300),
        "unigram": train_sentencepiece(
            model_type="unigram", vocab_size=300, normalization_rule_tsv=str(rules)
        ),
        "unigram_bytes": train_sentencepiece(model_type="unigram", byte_fallback=True),
    }
    made = {name: {"tokenizer.model": data} for name, data in spm.items()}
    made["byte_level"] = {name: text.encode() for name, text in train_byte_level().items()}
    for name in ("bpe", "bpe_plain", "byte_level"):
        made[f"{name}_json"] = as_json(made[name])
    return made


def run_case(model_type: str, files: dict[str, bytes], settings: dict[str, dict]) -> dict:
    """What transformers gives for a checkpoint with these files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, data in files.items():
            (folder / file).write_bytes(data)
        for file, value in {"config": {"model_type": model_type}, **settings}.items():
            (folder / f"{file}.json").write_text(json.dumps(value))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    return {
        "class": type(tokenizer).__name__,
        "model_type": model_type,
        "settings": settings,
        "ids": ids,
        "decoded": [tokenizer.decode(one, skip_special_tokens=True) for one in ids],
    }


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        made = vocabularies(Path("rules.tsv"))  # the path is stored in the tokenizer.model
    for vocabulary, files in made.items():
        (FOLDER / vocabulary).mkdir(parents=True)
        for name, data in files.items():
            (FOLDER / vocabulary / name).write_bytes(data)
    cases = {
        name: {"vocabulary": vocabulary, **run_case(model_type, made[vocabulary], settings)}
        for name, (model_type, vocabulary, settings) in CASES.items()
    }
    content = json.dumps({"texts": TEXTS, "cases": cases}, ensure_ascii=False)
    (FOLDER / "expected.json").write_text(content + "\n")


if __name__ == "__main__":
    main()
