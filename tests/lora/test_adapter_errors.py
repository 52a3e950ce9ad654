"""Adapters that are malformed, unsupported, or made for another model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mtj_loader
from mtj_loader.errors import (
    AdapterError,
    AdapterMismatchError,
    FormatError,
)
from mtj_loader.lora.adapter import open_adapter
from tests.support import neox
from tests.support.adapters import CONFIG, DENSE, TERMS, linear, write_adapter
from tests.support.torch_files import pickle_of, tensor, text, torch_zip


def test_an_embedding_that_is_tied_is_not_adapted(tmp_path: Path) -> None:
    name = "base_model.model.gpt_neox.embed_in"
    terms = {
        f"{name}.lora_embedding_A": np.ones((3, 29), np.float32),
        f"{name}.lora_embedding_B": np.ones((24, 3), np.float32),
    }
    adapter = write_adapter(tmp_path / "a", terms)
    arrays = {k: v for k, v in neox.tensors().items() if k != "embed_out.weight"}
    base = neox.write(tmp_path / "c", arrays, tie_word_embeddings=True)
    with pytest.raises(AdapterError, match="tied to the projection"):
        mtj_loader.plan(base, "mp=4", adapter=adapter)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param({"peft_type": None}, "not a LoRA adapter", id="F85-absent"),
        pytest.param({"peft_type": "IA3"}, "not a LoRA adapter(.|\n)*IA3", id="F85-other"),
        pytest.param({"r": 0}, r"not a legal value(.|\n)*key: r\n(.|\n)*number from 1", id="F86"),
        pytest.param(
            {"r": True}, r"not a legal value(.|\n)*key: r\n(.|\n)*number from 1", id="F86-bool"
        ),
        pytest.param(
            {"rank_pattern": {"dense": -1}},
            r"rank_pattern\.dense(.|\n)*number from 1",
            id="F86-pattern",
        ),
        pytest.param({"use_new_trick": True}, "not supported(.|\n)*use_new_trick", id="F87"),
        pytest.param({"layer_replication": [[0, 1]]}, "layer_replication", id="F87-layers"),
        pytest.param({"use_dora": True}, "not supported(.|\n)*use_dora", id="F92-dora"),
        pytest.param({"bias": "all"}, "biases are not supported", id="F92-bias"),
        pytest.param({"modules_to_save": ["embed_out"]}, "modules_to_save", id="F92-modules"),
        pytest.param({"init_lora_weights": "pissa_niter_4"}, "pissa", id="F92-pissa"),
        pytest.param({"init_lora_weights": "olora"}, "olora", id="F92-olora"),
        pytest.param({"init_lora_weights": "corda"}, "corda", id="F92-corda"),
        pytest.param({"init_lora_weights": "loftq"}, "loftq", id="F92-loftq"),
        pytest.param(
            {"rank_pattern": {"(": 3}}, "not a supported regular expression", id="pattern"
        ),
        pytest.param(
            {"target_parameters": ["w"] * 1001}, r"1,001 names(.|\n)*at most 1,000", id="many-names"
        ),
        pytest.param(
            {"rank_pattern": {f"{i}[ab]{{99}}": 3 for i in range(9999)}},
            r"'[0-9]+\[ab\]\{99\}': the patterns take too long(.|\n)*key: rank_pattern",
            id="many-patterns",
        ),
        pytest.param({"rank_pattern": [3]}, r"not an object(.|\n)*rank_pattern", id="patterns"),
        pytest.param(
            {"use_rslora": 1},
            r"not a legal value(.|\n)*use_rslora(.|\n)*true or false",
            id="no-bool",
        ),
        pytest.param(
            {"target_parameters": "w"}, "target_parameters(.|\\n)*a list", id="no-list-of-names"
        ),
        pytest.param(
            {"target_parameters": [1]}, "target_parameters(.|\\n)*a list of strings", id="no-names"
        ),
        pytest.param({"r": None}, r"not a legal value(.|\n)*key: r\n", id="null-rank"),
        pytest.param({"lora_alpha": None}, r"not a legal value(.|\n)*lora_alpha", id="null-alpha"),
        pytest.param(
            {"lora_alpha": "5"},
            r"not a legal value(.|\n)*lora_alpha(.|\n)*a number from",
            id="alpha",
        ),
    ],
)
def test_an_adapter_with_unsupported_settings_is_refused(
    config: dict, words: str, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "a", TERMS, **config)
    with pytest.raises(AdapterError, match=words) as caught:
        mtj_loader.plan(neox.write(tmp_path / "base"), "mp=2", adapter=adapter)
    assert "adapter_config.json" in str(caught.value)


def without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in TERMS.items() if not key.endswith(name)}


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        pytest.param({}, "no LoRA tensor", id="F88-empty"),
        pytest.param(linear("other.layer", 3, 3), "no such parameter", id="F88-no-match"),
        pytest.param(
            linear("gpt_neox.layers.2.attention.dense", 24, 24),
            "no such parameter(.|\n)*layers.2",
            id="F88-no-such-layer",
        ),
        pytest.param(
            without("embed_out.lora_A.weight"),
            "half of a pair(.|\n)*also lora_A",
            id="F89-a",
        ),
        pytest.param(
            without("embed_out.lora_B.weight"),
            "half of a pair(.|\n)*also lora_B",
            id="F89-b",
        ),
        pytest.param(linear(DENSE.format(0), 24, 24, rank=4), "wrong rank", id="F89-rank"),
        pytest.param(linear(DENSE.format(0), 20, 24), "another shape", id="wrong-shape"),
        pytest.param(
            {"base_model.model.embed_out.weight": np.zeros((29, 24), np.float32)},
            "would not be used",
            id="F92-saved-module",
        ),
        pytest.param(
            {f"base_model.model.{DENSE.format(0)}.lora_magnitude_vector": np.zeros(3, np.float32)},
            "would not be used",
            id="F92-dora-vector",
        ),
        pytest.param(
            {k.removeprefix("base_model.model."): v for k, v in TERMS.items()},
            "names of an adapter begin with",
            id="no-prefix",
        ),
        pytest.param(
            linear(DENSE.format(0) + ".bias", 24, 24), "no such parameter", id="not-a-weight"
        ),
        pytest.param(
            {k: v.astype(np.int32) for k, v in TERMS.items()}, "dtype", id="integer-factors"
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(terms: dict, words: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", terms)
    with pytest.raises(AdapterMismatchError, match=words):
        mtj_loader.plan(neox.write(tmp_path / "base"), "mp=2", adapter=adapter)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    terms = linear("a.0.b", 3, 3) | linear("a.1.b", 3, 3) | linear(DENSE.format(0), 20, 24)
    with pytest.raises(AdapterMismatchError) as caught:
        mtj_loader.plan(
            neox.write(tmp_path / "base"), "mp=2", adapter=write_adapter(tmp_path / "a", terms)
        )
    assert "3 problems between adapter and model" in str(caught.value)
    assert "a.{0...1}.b" in str(caught.value)


def test_a_folder_without_an_adapter_is_named(tmp_path: Path) -> None:
    base = neox.write(tmp_path / "base")
    with pytest.raises(AdapterError, match=r"not the folder of an adapter(.|\n)*adapter_config"):
        mtj_loader.plan(base, "mp=2", adapter=tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(AdapterError, match=r"no weights(.|\n)*adapter_model\.safetensors"):
        mtj_loader.plan(base, "mp=2", adapter=tmp_path)


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        pytest.param(
            linear(DENSE.format(0), 24, 24)
            | linear(DENSE.format(0).removeprefix("gpt_neox."), 24, 24, seed=1),
            "two pairs of factors for one parameter",
            id="two-spellings",
        ),
        pytest.param(
            linear(DENSE.format(0), 24, 24)
            | {f"base_model.model.{DENSE.format(0)}.lora_A": np.zeros((3, 24), np.float32)},
            "two tensors for one factor",
            id="two-factors",
        ),
        pytest.param(
            {
                f"base_model.model.{DENSE.format(0)}.lora_embedding_A": np.ones(
                    (3, 24), np.float32
                ),
                f"base_model.model.{DENSE.format(0)}.lora_B.weight": np.ones((24, 3), np.float32),
            },
            "only one of the two factors is an embedding",
            id="mixed-pair",
        ),
        pytest.param(
            {
                f"base_model.model.{DENSE.format(0)}.lora_embedding_A": np.ones(
                    (3, 24), np.float32
                ),
                f"base_model.model.{DENSE.format(0)}.lora_embedding_B": np.ones(
                    (24, 3), np.float32
                ),
            },
            "are for embeddings, and only for them",
            id="embedding-pair-of-a-linear-layer",
        ),
        pytest.param(
            linear("gpt_neox.embed_in", 29, 24),
            "are for embeddings, and only for them",
            id="linear-pair",
        ),
        pytest.param(
            {
                f"base_model.model.{DENSE.format(0)}.lora_A.weight": np.ones(3, np.float32),
                f"base_model.model.{DENSE.format(0)}.lora_B.weight": np.ones((24, 3), np.float32),
            },
            r"a factor is a matrix(.|\n)*\[3\]",
            id="one-dimension",
        ),
    ],
)
def test_ambiguous_or_mixed_factors_are_refused(terms: dict, words: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", terms)
    with pytest.raises(AdapterMismatchError, match=words):
        mtj_loader.plan(neox.write(tmp_path / "base"), "mp=2", adapter=adapter)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rank_pattern": {"(?i)dense": 3}}, "not a supported regular expression"),
        ({"rank_pattern": {"a{4294967296}": 3}}, "not a supported regular expression"),
        ({"alpha_pattern": {r"(?=dense)dense": 3}}, r"from character 1 on: '\(\?=dense"),
        ({"alpha_pattern": {"(" * 3000 + ")" * 3000: 3}}, "more than 512 characters"),
        ({"lora_alpha": 1e308}, r"lora_alpha(.|\n)*a number from"),
        ({"lora_alpha": float(10**30)}, r"lora_alpha(.|\n)*a number from"),
    ],
)
def test_settings_that_cannot_be_computed_are_refused(
    config: dict, words: str, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "a", TERMS, **config)
    with pytest.raises(AdapterError, match=words):
        mtj_loader.plan(neox.write(tmp_path / "base"), "mp=2", adapter=adapter)


def test_patterns_that_take_too_long_to_match_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtj_loader.lora.patterns.MAX_WORK", 500)
    model = neox.write(tmp_path / "model")
    terms = linear("gpt_neox.layers.0.attention.dense", 24, 24)
    folder = write_adapter(tmp_path / "a", terms, alpha_pattern={"(a|b)*dense": 1})
    with pytest.raises(AdapterError, match="the patterns take too long") as caught:
        mtj_loader.plan(model, "mp=1", adapter=folder)
    assert caught.value.file == f"{folder}/adapter_config.json"
    assert caught.value.key is not None
    assert caught.value.key.startswith("rank_pattern or alpha_pattern or ")


def test_a_flipped_bit_in_the_data_of_a_bin_adapter_is_found(tmp_path: Path) -> None:  # C51
    write_adapter(tmp_path, {})
    (tmp_path / "adapter_model.safetensors").unlink()
    raw = bytearray(torch_zip(pickle_of(text("base_model.model.x.lora_A.weight"), tensor())))
    file = tmp_path / "adapter_model.bin"
    file.write_bytes(raw)
    assert open_adapter(tmp_path).file.path == file.name
    raw[raw.index(b"pad", raw.index(b"m/data/0")) + len("pad")] ^= 1
    file.write_bytes(raw)
    with pytest.raises(FormatError, match=r"wrong checksum\n(.|\n)*key: m/data/0"):
        open_adapter(tmp_path)
