"""LoRA adapters: correct sums, only the needed rows and columns are read, the rest is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import mtj_loader
from mtj_loader.errors import (
    AdapterError,
    AdapterMismatchError,
    CheckpointError,
    FormatError,
    UsageError,
    VerifyError,
)
from mtj_loader.loading.verify import verify
from mtj_loader.lora import merge
from mtj_loader.lora.adapter import open_adapter
from tests.support import neox
from tests.support.adapters import CONFIG, linear, merged, write_adapter
from tests.support.command_line import run
from tests.support.torch_files import pickle_of, tensor, text, torch_zip

QKV = "gpt_neox.layers.{}.attention.query_key_value"
DENSE = "gpt_neox.layers.{}.attention.dense"
UP = "gpt_neox.layers.{}.mlp.dense_h_to_4h"
SCALE = 5 / 3

TERMS = (
    linear(QKV.format(0), 72, 24, seed=1)
    | linear(DENSE.format(1), 24, 24, seed=2)
    | linear(UP.format(1), 40, 24, seed=3)
    | linear("embed_out", 29, 24, seed=4)
)


def close(found: dict, expected: dict, rtol: float = 1e-6) -> None:
    """float32 sums of three products, rounded: a few units in the last place."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=2e-6), found, expected
    )


@pytest.mark.parametrize("transposed_linear", [False, True])
@pytest.mark.parametrize("mesh", ["mp=1", "mp=4", "dp=2,mp=2"])
def test_an_adapter_equals_a_merge_by_hand(
    mesh: str, transposed_linear: bool, tmp_path: Path
) -> None:
    # Small weights: with weights near 1 the logits are near 50, which magnifies the last bit.
    weights = {name: np.float32(0.2) * array for name, array in neox.tensors().items()}
    terms = {name: np.float32(0.4) * array for name, array in TERMS.items()}
    base = neox.write(tmp_path / "base", weights)
    by_hand = neox.write(tmp_path / "hand", merged(weights, terms, SCALE))
    adapter = write_adapter(tmp_path / "adapter", terms)
    options = {"dtype": "float32", "transposed_linear": transposed_linear}
    model = mtj_loader.load(base, mesh, adapter=adapter, **options)
    expected = mtj_loader.load(by_hand, mesh, **options)
    close(model.params, expected.params)
    assert model.report.bytes_read == model.report.bytes_needed
    factors = sum(array.nbytes for array in TERMS.values())
    assert model.report.bytes_needed == expected.report.bytes_needed + factors
    ids = np.arange(10).reshape(2, 5)
    np.testing.assert_allclose(model.logits(ids), expected.logits(ids), atol=1e-4)
    assert verify(model.plan, model.params)


def test_the_sum_is_rounded_once(tmp_path: Path) -> None:
    """A float32 checkpoint loaded as bfloat16: base and term are added in float32."""
    base, adapter = neox.write(tmp_path / "base"), write_adapter(tmp_path / "a", TERMS)
    wide = mtj_loader.load(base, "mp=2", dtype="float32", adapter=adapter)
    narrow = mtj_loader.load(base, "mp=2", adapter=adapter)
    rounded = jax.tree.map(lambda a: np.asarray(a).astype(ml_dtypes.bfloat16), wide.params)
    jax.tree.map(np.testing.assert_array_equal, narrow.params, rounded)


def test_a_shard_reads_only_its_rows_and_columns(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", TERMS)
    pod = mtj_loader.make_abstract_mesh("mp=4", hosts=4)
    plan = mtj_loader.plan(neox.write(tmp_path / "base"), pod, adapter=adapter)
    # Column-parallel: a fourth of B's rows and all of A; row-parallel (dense) the other way round.
    b_rows = 3 * (72 // 4 + 40 // 4 + 32 // 4) * 4
    a_whole = 3 * 24 * 3 * 4
    dense = 3 * (24 + 24 // 4) * 4
    assert plan.adapter_bytes(0) == b_rows + a_whole + dense
    assert plan.adapter_bytes(3) == plan.adapter_bytes(0) - 3 * 3 * 4  # three rows of padding


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 5 / 3),
        ({"use_rslora": True}, 5 / math.sqrt(3)),
        ({"lora_alpha": 7}, 7 / 3),
        ({"alpha_pattern": {"dense": 9}}, 9 / 3),
        ({"alpha_pattern": {r".*\.attention\.dense": 9, "dense": 2}}, 9 / 3),
        ({"alpha_pattern": {"ense": 9}}, 5 / 3),
        ({"alpha_pattern": {r"([a-z_0-9]+\.?)+!": 9}}, 5 / 3),  # which `re` would never finish
        ({"alpha_pattern": {r"gpt_neox\.layers\.[0-1]\..*\.(query_key_value|dense)": 9}}, 9 / 3),
        ({"r": 64, "rank_pattern": {"layers.1.attention.dense": 3}}, 5 / 3),
    ],
)
def test_the_scale_is_that_of_the_module(config: dict, scale: float, tmp_path: Path) -> None:  # F90
    term = linear(DENSE.format(1), 24, 24)
    adapter = write_adapter(tmp_path / "a", term, **config)
    model = mtj_loader.load(neox.write(tmp_path / "base"), "mp=2", dtype="float32", adapter=adapter)
    by_hand = neox.write(tmp_path / "hand", merged(neox.tensors(), term, scale))
    close(model.params, mtj_loader.load(by_hand, "mp=2", dtype="float32").params)


def test_adapters_add_up_with_their_weights(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", TERMS)
    other_terms = linear(QKV.format(0), 72, 24, rank=2, seed=9)
    two = write_adapter(tmp_path / "two", other_terms, r=2, lora_alpha=1)
    base = neox.write(tmp_path / "base")
    both = [(one, 0.5), (two, -2.0)]
    model = mtj_loader.load(base, "mp=4", dtype="float32", adapter=both)
    hand = merged(merged(neox.tensors(), TERMS, SCALE * 0.5), other_terms, -2.0 / 2)
    expected = mtj_loader.load(neox.write(tmp_path / "hand", hand), "mp=4", dtype="float32")
    close(model.params, expected.params)


def test_an_adapter_can_be_added_and_removed_after_loading(tmp_path: Path) -> None:
    base, adapter = neox.write(tmp_path / "base"), write_adapter(tmp_path / "a", TERMS)
    plain = mtj_loader.load(base, "mp=4", dtype="float32")
    before = jax.tree.map(np.array, plain.params)
    adapted = plain.with_adapter(adapter)
    at_load = mtj_loader.load(base, "mp=4", dtype="float32", adapter=adapter)
    close(adapted.params, at_load.params, rtol=0)
    norm = "causal_transformer_shard/~/layer_0/~/replicated_layer_norm"
    assert adapted.params[norm]["scale"] is plain.params[norm]["scale"]  # shared
    for model in (plain, adapted.without_adapter(), at_load.without_adapter()):
        jax.tree.map(np.testing.assert_array_equal, model.params, before)
    twice = adapted.with_adapter([(adapter, -1.0)])  # takes it back, up to rounding
    close(twice.params, before, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, twice.without_adapter().params, before)


def test_embeddings_can_be_adapted(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(3, 29)), random.normal(size=(24, 3))
    name = "base_model.model.gpt_neox.embed_in"
    terms = {
        f"{name}.lora_embedding_A": a.astype(np.float32),
        f"{name}.lora_embedding_B": b.astype(np.float32),
        f"{name}.base_layer.weight": neox.tensors()["gpt_neox.embed_in.weight"],
    }
    adapter = write_adapter(tmp_path / "a", terms)
    model = mtj_loader.load(neox.write(tmp_path / "c"), "mp=4", dtype="float32", adapter=adapter)
    found = np.asarray(model.params["causal_transformer_shard/~/embedding_shard/~/linear"]["w"])
    table = found.reshape(32, 24)
    expected = neox.tensors()["gpt_neox.embed_in.weight"] + SCALE * (b @ a).T
    np.testing.assert_allclose(table[:29], expected, atol=1e-5)
    np.testing.assert_array_equal(table[29:], 0)


def test_a_carried_base_weight_that_differs_is_refused(tmp_path: Path) -> None:
    carried = {
        f"base_model.model.{DENSE.format(1)}.base_layer.weight": np.ones((24, 24), np.float32)
    }
    adapter = write_adapter(tmp_path / "a", TERMS | carried)
    model = mtj_loader.load(neox.write(tmp_path / "base"), "mp=2")
    with pytest.raises(VerifyError, match="carries a base weight"):
        model.with_adapter(adapter)
    with pytest.raises(VerifyError, match=r"carries a base weight(.|\n)*layers\.1\.attention"):
        mtj_loader.load(neox.write(tmp_path / "c"), "mp=4", adapter=adapter)


def test_a_carried_base_weight_is_compared_with_what_was_loaded(tmp_path: Path) -> None:
    arrays = neox.tensors()
    name = f"{DENSE.format(1)}.weight"
    carried = {f"base_model.model.{DENSE.format(1)}.base_layer.weight": arrays[name]}
    adapter = write_adapter(tmp_path / "a", TERMS | carried)
    base = neox.write(tmp_path / "c")
    model = mtj_loader.load(base, "mp=2")
    neox.write(base, neox.tensors(seed=1))
    with pytest.raises(CheckpointError, match="changed after its header was read"):
        model.with_adapter(adapter)


def test_a_carried_base_weight_may_have_the_same_nan(tmp_path: Path) -> None:
    arrays = neox.tensors()
    name = f"{DENSE.format(1)}.weight"
    arrays[name][3, 4] = np.nan
    carried = {f"base_model.model.{DENSE.format(1)}.base_layer.weight": arrays[name]}
    adapter = write_adapter(tmp_path / "a", TERMS | carried)
    base = neox.write(tmp_path / "c", arrays)
    model = mtj_loader.load(base, "mp=2", allow_nonfinite=True, adapter=adapter)
    assert len(model.plan.carried) == 1


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
    "adapter", [["a"], [("a", math.nan)], [("a", 1, 2)], 5, [("a", "b")], [(5, 1.0)]]
)
def test_a_list_of_adapters_has_weights(adapter: list, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not an adapter"):
        mtj_loader.plan(neox.write(tmp_path), "mp=2", adapter=adapter)


def test_products_set_their_precision() -> None:
    left, right = np.zeros((2, 4, 3), np.float32), np.zeros((2, 3, 5), np.float32)
    sharding = jax.sharding.NamedSharding(
        mtj_loader.make_mesh("mp=2"), jax.sharding.PartitionSpec("mp")
    )

    def add(base: jax.Array) -> object:
        return merge._sum(base, [(left, right)], np.dtype(np.float32), sharding)

    text = str(jax.make_jaxpr(add)(np.zeros((2, 4, 5), np.float32)))
    assert "dot_general" in text
    assert text.count("HIGHEST") >= text.count("dot_general[")


def test_the_command_line_takes_adapters_with_weights(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", TERMS)
    base = neox.write(tmp_path / "base")
    arguments = [
        "plan",
        str(base),
        "--mesh",
        "mp=2",
        "--adapter",
        f"{one}=0.5",
        "--adapter",
        str(one),
    ]
    text = run(*arguments)
    assert text.exit_code == 0, text.stderr
    assert "2 adapters added" in text.stdout
    plan = json.loads(run(*arguments, "--json").stdout)
    changed = {p["module"] for p in plan["parameters"] if p["changes"]["adapters"] == 2}
    assert "causal_transformer_shard/~/layer_0/~/combined_qkv" in changed
    assert len(changed) == 4


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


def test_verify_finds_an_adapter_that_was_merged_wrongly(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", TERMS)
    model = mtj_loader.load(neox.write(tmp_path / "base"), "mp=2", adapter=adapter)
    verify(model.plan, model.params)
    without = model.without_adapter()
    with pytest.raises(VerifyError, match="query_key_value"):
        verify(model.plan, without.params)


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
    assert caught.value.key == "rank_pattern or alpha_pattern"


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
