"""Reading weight maps: everything outside the documented vocabulary is refused by name."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from mtj_loader.errors import FormatError, MapError
from mtj_loader.models.registry import FAMILIES
from mtj_loader.weights.map_reader import find_map, parse_map, read_map
from mtj_loader.weights.map_schema import vocabulary
from mtj_loader.weights.transforms import TRANSFORMS
from mtj_loader.weights.weight_map import Target

SEED = Path(__file__).parents[1] / "data/seeds/gpt_neox.json"


def seed() -> dict:
    return json.loads(SEED.read_text())


def test_the_seed_loads_unmodified() -> None:
    weight_map = read_map(SEED)
    assert (weight_map.compat, weight_map.positions) == ("neox", "neox_rotary")
    target = Target("embedding_shard/~/linear", "w", frozenset({"no_transpose", "vocab_pad"}))
    assert weight_map.static["gpt_neox.embed_in.weight"] == (target,)
    assert weight_map.layer["gpt_neox.layers.{layer}.attention.bias"] == ()


def test_layers_are_expanded_in_names_and_modules() -> None:
    names = read_map(SEED).expand(3)
    target = Target("layer_2/~/linear_3", "b", frozenset({"divide_by_shards"}))
    assert names["gpt_neox.layers.2.attention.dense.bias"] == (target,)
    assert names["gpt_neox.layers.1.attention.masked_bias"] == ()
    assert "gpt_neox.layers.3.attention.dense.bias" not in names
    assert len(names) == 4 + 3 * 15


def test_our_map_has_the_seed_s_entries_and_skips_more_buffers() -> None:
    ours, theirs = find_map("gpt_neox"), read_map(SEED)
    for mine, seeds in ((ours.static, theirs.static), (ours.layer, theirs.layer)):
        assert mine.items() >= seeds.items()
        more = mine.keys() - seeds.keys()
        assert all("rotary_emb" in name and mine[name] == () for name in more)


def test_config_values_use_the_first_key_present_then_the_default() -> None:
    rules = {"d_embed": ["proj_dim", "width", 7], "d_model": "width", "layers": "l", "n_heads": "h"}
    weight_map = parse_map(seed() | {"mtj_config_map": rules}, file="m.json")
    config = {"width": 5, "proj_dim": 3, "l": 1, "h": 2}
    expected = {"d_embed": 3, "d_model": 5, "layers": 1, "n_heads": 2}
    assert weight_map.config_values(config, file="c") == expected
    del config["proj_dim"]
    assert weight_map.config_values(config, file="c") == expected | {"d_embed": 5}
    with pytest.raises(MapError, match=r"no key that m\.json reads(.|\n)*width"):
        weight_map.config_values({"l": 1, "h": 2}, file="c")


def broken(path: str, value: object) -> dict:
    raw = copy.deepcopy(seed())
    *parents, last = path.split("/")
    place = raw
    for key in parents:
        place = place[key]
    place[last] = value
    return raw


ENTRY = {"mtj": {"module": "m", "param": "w"}}
RULES = "mtj_config_map"
LAYER = "gpt_neox.layers.{layer}.attention.dense.bias"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        pytest.param(broken("more", 1), ["unknown key", "more"], id="unknown-top-key"),
        pytest.param(broken("mtj_compat", 7), ["mtj_compat", "7"], id="compat-no-text"),
        pytest.param(
            broken("static_weights", []), ["static_weights", "not an object"], id="no-table"
        ),
        pytest.param(
            broken("static_weights/t", 3), ["not an object", "static_weights.t"], id="no-entry"
        ),
        pytest.param(broken("static_weights/t", {"x": 1}), ["unknown key", "x"], id="entry-key"),
        pytest.param(
            broken("static_weights/t", {"mtj": {"module": "m"}}), ["param"], id="no-param"
        ),
        pytest.param(
            broken("static_weights/t", {"mtj": ENTRY["mtj"] | {"transforms": ["rotate"]}}),
            ["unknown transform", "vocab_pad", "rotate"],
            id="E71-unknown-transform",
        ),
        pytest.param(
            broken("static_weights/t", {"mtj": ENTRY["mtj"] | {"transforms": ["vocab_pad"] * 2}}),
            ["listed twice"],
            id="transform-twice",
        ),
        pytest.param(
            broken("static_weights/t", {"mtj": ENTRY["mtj"] | {"op": "x"}}),
            ["unknown key", "static_weights.t.mtj.op"],
            id="target-key",
        ),
        pytest.param(
            broken("static_weights/t", {"mtj": ENTRY["mtj"] | {"transforms": "vocab_pad"}}),
            ["not a legal value", "a list", '"vocab_pad"'],
            id="transforms-no-list",
        ),
        pytest.param(
            broken("zero_weights", [3]), ["not an object", "zero_weights[0]"], id="zero-no-entry"
        ),
        pytest.param(
            broken("zero_weights", [ENTRY["mtj"] | {"x": 1}]),
            ["unknown key", "zero_weights[0].x"],
            id="zero-key",
        ),
        pytest.param(
            broken("static_weights/t.{layer}", ENTRY),
            ["without placeholders"],
            id="static-with-layer",
        ),
        pytest.param(
            broken("layer_weights/t", ENTRY), ["{layer} once"], id="E71-layer-name-without-layer"
        ),
        pytest.param(
            broken(f"layer_weights/{LAYER}", ENTRY),
            ["not a module path", '"m"'],
            id="E71-two-layers-to-one-module",
        ),
        pytest.param(
            broken("layer_weights/t.{layer}.{expert}", {}), ["placeholders"], id="other-placeholder"
        ),
        pytest.param(broken(f"{RULES}/layers", []), ["config rule", "layers"], id="empty-rule"),
        pytest.param(
            broken(f"{RULES}/layers", [1, 2]), ["strings", "layers"], id="rule-of-numbers"
        ),
        pytest.param(broken(f"{RULES}/layers", ["a", {}]), ["one value"], id="default-an-object"),
        pytest.param(
            broken(f"{RULES}/d_modle", "x"), ["unknown key", "d_modle"], id="rule-unknown"
        ),
        pytest.param(broken(RULES, {"layers": "l"}), ["d_model", "config rule"], id="rule-missing"),
        pytest.param(broken("mtj_pe", "nonsense"), ["mtj_pe", '"nonsense"', "alibi"], id="mtj_pe"),
        pytest.param(broken("mtj_compat", "gpt5"), ["mtj_compat", "neox"], id="compat-unknown"),
        pytest.param(broken("$schema", 3), ["$schema", "a string"], id="schema"),
        pytest.param(
            broken("static_weights/t", {"mtj": ENTRY["mtj"] | {"transforms": [["vocab_pad"]]}}),
            ["unknown transform"],
            id="transform-a-list",
        ),
    ],
)
def test_anything_outside_the_vocabulary_is_refused(raw: dict, words: list[str]) -> None:
    with pytest.raises(MapError) as caught:
        parse_map(raw, file="broken.json")
    for word in ["broken.json", *words]:
        assert word in str(caught.value)


def test_a_tensor_with_a_static_and_a_layer_entry_is_refused() -> None:
    name = LAYER.replace("{layer}", "1")
    weight_map = parse_map(broken(f"static_weights/{name}", ENTRY), file="m")
    weight_map.expand(1)
    with pytest.raises(MapError, match="names the same tensor as a static entry") as caught:
        weight_map.expand(2)
    assert (caught.value.file, caught.value.key) == ("m", LAYER)


def test_a_map_with_one_tensor_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text('{"static_weights": {"a": {}, "a": {}}}')
    with pytest.raises(FormatError, match=r"duplicate key(.|\n)*static_weights\.a"):
        read_map(path)


def test_files_that_are_no_maps_are_named(tmp_path: Path) -> None:
    pipe, large = tmp_path / "pipe", tmp_path / "large"
    os.mkfifo(pipe)
    large.write_bytes(b" " * ((1 << 20) + 1))
    for path, found in {
        tmp_path / "none": "No such file or directory",
        tmp_path: "Is a directory",
        pipe: "not a regular file",
        Path("/dev/zero"): "not a regular file",
        large: "1,048,577 bytes",
        Path("\0"): "embedded null byte",
    }.items():
        with pytest.raises(MapError, match="cannot read the weight map") as caught:
            read_map(path)
        assert (caught.value.file, str(caught.value.found)) == (str(path), found)


@pytest.mark.parametrize("model_type", ["gpt_none", "../configs/llama", "x" * 300, "\0", ""])
def test_a_family_without_a_map_is_named(model_type: str) -> None:
    with pytest.raises(MapError, match="no weight map") as caught:
        find_map(model_type)
    assert caught.value.found == model_type


# The reader and the schema accept the same maps: each change of a value or a key of a map.

ROOT = Path(__file__).parents[2]
CHANGES = ["", "x", "w", "llama", 0, 9, True, None, [], {}, ["x"], ["vocab_pad"], [{"op": "x"}]]
KEYS = ["", "x", "x.{layer}", "mtj", "{layer}{layer}"]
TARGET = {"module": "layer_{layer}", "param": "b", "transforms": ["divide_by_shards"]}
HEADS = {"module": "layer_{layer}", "param": "w", "transforms": [{"op": "qkv_blocks_to_heads"}]}
STATIC = {"module": "embedding_shard/~/linear", "param": "w"}
MAP = {
    "$schema": "schema.json",
    "mtj_compat": "mixtral",
    "mtj_pe": "neox_rotary",
    "mtj_config_map": {"layers": "n", "d_model": ["d", "e", 3], "n_heads": "h"},
    "static_weights": {"a": {"mtj": STATIC}, "b": {"split_rows": [STATIC, STATIC]}},
    "zero_weights": [{"module": "embedding_shard/~/linear", "param": "b"}],
    "layer_prefix": "h.{layer}.",
    "conversions": [
        {"rename": "a", "to": "b"},
        {
            "source_patterns": ["*.a", "*.b"],
            "target_patterns": "c",
            "operations": [{"merge_modulelist": {"dim": 0}}, {"concatenate": {"dim": 1}}],
        },
        {
            "source_patterns": ["*.d"],
            "target_patterns": "e",
            "operations": [{"merge_modulelist": {"dim": 0}}],
        },
    ],
    "layer_weights": {
        "h.{layer}.c": {"mtj": TARGET},
        "h.{layer}.d": {"split_rows": [TARGET, HEADS]},
        "h.{layer}.e": {},
    },
}


def variants(raw: object, path: str = "") -> Iterator[tuple[str, object]]:
    """The JSON value with one value replaced, or one key removed, renamed or added."""
    yield from ((f"{path} = {value!r}", value) for value in CHANGES)
    children = raw.items() if isinstance(raw, dict) else ()
    children = enumerate(raw) if isinstance(raw, list) else children
    for key, child in children:
        for what, changed in variants(child, f"{path}/{key}"):
            copied = copy.copy(raw)
            copied[key] = changed
            yield what, copied
    if isinstance(raw, dict):
        for key in raw:
            rest = {k: v for k, v in raw.items() if k != key}
            yield f"{path} without {key}", rest
            yield from ((f"{path}: {new} for {key}", rest | {new: raw[key]}) for new in KEYS)
    elif isinstance(raw, list):
        yield f"{path} with its last item twice", [*raw, *raw[-1:]]


def accepts(raw: object) -> bool:
    try:
        parse_map(raw, file="m")
    except MapError:
        return False
    return True


def has_names_before_last(raw: dict[str, dict]) -> bool:
    """Whether all items of a config rule but the last are names, which JSON Schema cannot say."""
    lists = [rule for rule in raw.get("mtj_config_map", {}).values() if isinstance(rule, list)]
    return all(isinstance(item, str) and item for rule in lists for item in rule[:-1])


def test_the_reader_accepts_what_the_schema_accepts() -> None:
    document = json.loads((ROOT / "configs/schema.json").read_text())
    schema = jsonschema.Draft202012Validator(document)
    assert accepts(MAP)
    for what, raw in variants(MAP):
        if not isinstance(raw, dict):
            continue
        assert accepts(raw) == (schema.is_valid(raw) and has_names_before_last(raw)), what


def test_the_schema_lists_what_exists() -> None:
    known = vocabulary()
    maps = [read_map(file) for file in ROOT.glob("configs/*.json") if file.name != "schema.json"]
    assert set(known.families) == set(FAMILIES.values()) == {m.compat for m in maps}
    assert set(known.positions) == {m.positions for m in maps}
    assert set(known.config_keys) == {key for m in maps for key in m.config_rules}
    assert tuple(known.transforms) == TRANSFORMS
