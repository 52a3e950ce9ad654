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

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "data" / "tokenizers"

TEXTS = (
    "",
    " ",
    "   ",
    "\n",
    "\n\n",
    "\r\n \n\t x",
    "To load a checkpoint, read its index.",
    " two  spaces   three",
    "trailing space ",
    "don't DON'T we'll 1234567 3.14!!! (a)[b]{c}",
    "é e\u0301 ñ Å \u212b ﬁ",
    "你好 мир 😀👍🏽 \u00a0\u200b\ufeff x",
    "\x00\x07\x7f\u2028",
    "<s>",
    "</s> x",
    "a<s>b </s>c <unk> d<pad>",
    "<|endoftext|>x <|endoftext|> y<|im_start|>z",
    "<0x0A> <0x41>",
    "▁ a▁b ▁▁",
    "def f(x):\n    return x  # ok\n\n\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "[USER] hello [USER]there<mark> <mark>x",
    "x  [HOST]  y<pad>  z [HOST]",
)

TOKEN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
ENDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def added(content: str, **flags: bool) -> dict:
    return {"__type": "AddedToken", "content": content, **TOKEN, **flags}


# name → model_type, the vocabulary's files, and the other files.
CASES: dict[str, tuple[str, str, dict[str, dict]]] = {
    "llama": ("llama", "bpe", {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer"}}),
    "llama_fast_bos": (
        "llama",
        "bpe",
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}},
    ),
    "vicuna": (
        "llama",
        "bpe",
        {
            "tokenizer_config": {
                "add_bos_token": True,
                "add_eos_token": False,
                "bos_token": added("<s>", normalized=True),
                "clean_up_tokenization_spaces": False,
                "eos_token": added("</s>", normalized=True),
                "legacy": False,
                "model_max_length": 2048,
                "pad_token": None,
                "padding_side": "right",
                "sp_model_kwargs": {},
                "tokenizer_class": "LlamaTokenizer",
                "unk_token": added("<unk>", normalized=True),
            },
            "special_tokens_map": {
                **{key: {"content": text, **TOKEN} for key, text in ENDS.items()},
                "pad_token": "<unk>",
            },
        },
    ),
    "legacy": (
        "llama",
        "bpe",
        {
            "tokenizer_config": {
                "tokenizer_class": "LlamaTokenizer",
                "legacy": True,
                "add_bos_token": True,
                "add_eos_token": True,
            }
        },
    ),
    "legacy_null": (
        "llama",
        "bpe",
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "legacy": None}},
    ),
    "no_prefix_space": (
        "llama",
        "bpe",
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}},
    ),
    "llama_added": (
        "llama",
        "bpe",
        {
            "tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True},
            "special_tokens_map": {"additional_special_tokens": ["<mark>"], "pad_token": "<pad>"},
            "added_tokens": {"<pad>": 500, "[HOST]": 501, "<mark>": 502},
        },
    ),
    "llama_decoder": (
        "llama",
        "bpe",
        {
            "tokenizer_config": {
                "tokenizer_class": "LlamaTokenizer",
                "add_bos_token": True,
                "added_tokens_decoder": {
                    "0": {"content": "<unk>", **TOKEN, "special": True},
                    "1": {"content": "<s>", **TOKEN, "special": True},
                    "2": {"content": "</s>", **TOKEN, "special": True},
                    "500": {"content": "<pad>", **TOKEN, "rstrip": True, "special": False},
                    "501": {"content": "[HOST]", **TOKEN, "lstrip": True, "special": True},
                },
                "extra_special_tokens": ["<mark>"],
            },
            "special_tokens_map": {"bos_token": "</s>"},
        },
    ),
    "llama_named": (
        "llama",
        "bpe",
        {
            "tokenizer_config": {
                "tokenizer_class": "LlamaTokenizer",
                "extra_special_tokens": {"mark_token": "<mark>"},
            }
        },
    ),
    "no_settings": ("llama", "bpe", {}),
    "mistral": (
        "mistral",
        "bpe",
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **ENDS}},
    ),
    "renamed": (
        "mistral",
        "bpe",
        {
            "tokenizer_config": {
                "added_tokens_decoder": {"3": {"content": "<mark>", **TOKEN, "special": True}}
            }
        },
    ),
    "no_bytes": ("stablelm", "bpe_plain", {"tokenizer_config": {"add_bos_token": True}}),
    "gemma": (
        "gemma2",
        "bpe",
        {
            "tokenizer_config": {
                "tokenizer_class": "GemmaTokenizer",
                "add_bos_token": True,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "<pad>",
            }
        },
    ),
    "json_llama": (
        "llama",
        "bpe_json",
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer"}},
    ),
    "json_llama_legacy": (
        "llama",
        "bpe_json",
        {
            "tokenizer_config": {
                "tokenizer_class": "LlamaTokenizerFast",
                "legacy": True,
                "add_bos_token": True,
            }
        },
    ),
    "json_llama_no_space": (
        "llama",
        "bpe_json",
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}},
    ),
    "json_llama_without_bytes": (
        "llama",
        "bpe_plain_json",
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer"}},
    ),
    "json_plain": (
        "llama",
        "bpe_json",
        {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"}},
    ),
    "json_mistral": (
        "mistral",
        "bpe_json",
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer"}},
    ),
    "json_gemma": (
        "gemma2",
        "bpe_json",
        {
            "tokenizer_config": {
                "tokenizer_class": "GemmaTokenizer",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "<unk>",
                "mask_token": None,
            }
        },
    ),
    "json_llama_3": (
        "llama",
        "byte_level_json",
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast"}},
    ),
    "json_qwen2": (
        "qwen2",
        "byte_level_json",
        {"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer"}},
    ),
    "json_gpt2": (
        "gptj",
        "byte_level_json",
        {"tokenizer_config": {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}},
    ),
    "json_neox": ("gpt_neox", "byte_level_json", {}),
    "json_added": (
        "qwen2",
        "byte_level_json",
        {
            "tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer"},
            "added_tokens": {"<|im_start|>": 501},
        },
    ),
    "json_decoder": (
        "qwen3",
        "byte_level_json",
        {
            "tokenizer_config": {
                "tokenizer_class": "Qwen2Tokenizer",
                "added_tokens_decoder": {
                    "500": {"content": "<|endoftext|>", **TOKEN, "special": True},
                    "501": {"content": "<|im_start|>", **TOKEN, "special": True},
                },
            }
        },
    ),
    "json_flags": (
        "llama",
        "byte_level_json",
        {
            "tokenizer_config": {
                "added_tokens_decoder": {
                    "500": {
                        "content": "<|endoftext|>",
                        **TOKEN,
                        "lstrip": True,
                        "rstrip": True,
                        "special": True,
                    }
                },
            }
        },
    ),
    "json_neox_map": (
        "gpt_neox",
        "byte_level_json",
        {"special_tokens_map": {"eos_token": "<|im_start|>"}},
    ),
    "json_neox_pad": (
        "gpt_neox",
        "byte_level_json",
        {"tokenizer_config": {"pad_token": "<|im_start|>", "add_bos_token": True}},
    ),
    "json_mistral_eos": (
        "mistral",
        "bpe_json",
        {"tokenizer_config": {"eos_token": "<|im_start|>", "add_eos_token": True}},
    ),
    "json_llama_more": (
        "llama",
        "bpe_json",
        {
            "tokenizer_config": {
                "tokenizer_class": "LlamaTokenizer",
                "additional_special_tokens": ["<mark>"],
            }
        },
    ),
    "json_gemma_more": (
        "gemma2",
        "bpe_json",
        {
            "tokenizer_config": {
                "tokenizer_class": "GemmaTokenizer",
                "additional_special_tokens": ["<mark>"],
            }
        },
    ),
    "unigram": ("llama", "unigram", {}),
    "unigram_bytes": ("llama", "unigram_bytes", {"tokenizer_config": {"add_eos_token": True}}),
    "qwen2": (
        "qwen2",
        "byte_level",
        {
            "tokenizer_config": {
                "tokenizer_class": "Qwen2Tokenizer",
                "added_tokens_decoder": {
                    "500": {"content": "<|endoftext|>", **TOKEN, "special": True},
                    "501": {"content": "<|im_start|>", **TOKEN, "special": True},
                },
                "bos_token": None,
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "add_prefix_space": False,
                "unk_token": None,
            }
        },
    ),
    "qwen2_old_files": (
        "qwen2",
        "byte_level",
        {
            "special_tokens_map": {"additional_special_tokens": ["<|im_start|>"]},
            "added_tokens": {"<|im_start|>": 500},
        },
    ),
    "qwen3": ("qwen3", "byte_level", {"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer"}}),
    "qwen2_overruled": (
        "qwen2",
        "byte_level",
        {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}},
    ),
    "gpt2_of_qwen3": (
        "qwen3",
        "byte_level",
        {"tokenizer_config": {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}},
    ),
    "codegen": (
        "gptj",
        "byte_level",
        {"tokenizer_config": {"tokenizer_class": "CodeGenTokenizer", "add_bos_token": True}},
    ),
    "gpt2": ("gptj", "byte_level", {}),
    "opt": (
        "opt",
        "byte_level",
        {
            "tokenizer_config": {
                "tokenizer_class": "GPT2Tokenizer",
                "add_bos_token": True,
                "bos_token": added("</s>"),
                "eos_token": added("</s>"),
                "pad_token": added("<pad>"),
                "unk_token": added("</s>"),
            },
            "special_tokens_map": {"bos_token": {"content": "<s>", **TOKEN}},
        },
    ),
    "neox": (
        "gpt_neox",
        "byte_level",
        {
            "tokenizer_config": {"eot_token": "<mark>", "add_bos_token": True},
            "special_tokens_map": {"sep_token": "[USER]"},
        },
    ),
}


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
