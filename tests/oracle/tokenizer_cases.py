"""The texts and the checkpoints of `make_tokenizers`."""

from __future__ import annotations

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
