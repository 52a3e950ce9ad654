"""Reading weight maps: everything outside the documented vocabulary is refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from mtj_loader.errors import FormatError, MapError
from mtj_loader.weights.map_reader import find_map, parse_map, read_map
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
    raw = seed() | {"mtj_config_map": {"e": ["proj_dim", "width", 7], "d_model": "width"}}
    weight_map = parse_map(raw, file="m.json")
    both = {"width": 5, "proj_dim": 3}
    assert weight_map.config_values(both, file="c") == {"e": 3, "d_model": 5}
    assert weight_map.config_values({"width": 5}, file="c") == {"e": 5, "d_model": 5}
    with pytest.raises(MapError, match=r"no key that m\.json reads(.|\n)*width"):
        weight_map.config_values({}, file="c")


def broken(path: str, value: object) -> dict:
    raw = copy.deepcopy(seed())
    *parents, last = path.split("/")
    place = raw
    for key in parents:
        place = place[key]
    place[last] = value
    return raw


ENTRY = {"mtj": {"module": "m", "param": "w"}}
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
            broken("static_weights/t.{layer}", ENTRY), ["no placeholder"], id="static-with-layer"
        ),
        pytest.param(
            broken("layer_weights/t", ENTRY), ["{layer} once"], id="E71-layer-name-without-layer"
        ),
        pytest.param(
            broken(f"layer_weights/{LAYER}", ENTRY),
            ["{layer} once", "'m'"],
            id="E71-two-layers-to-one-module",
        ),
        pytest.param(
            broken("layer_weights/t.{layer}.{expert}", {}), ["placeholders"], id="other-placeholder"
        ),
        pytest.param(broken("mtj_config_map/x", []), ["config rule", "x"], id="empty-rule"),
        pytest.param(broken("mtj_config_map/x", [1, 2]), ["strings", "x"], id="rule-of-numbers"),
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


def test_a_missing_map_is_named(tmp_path: Path) -> None:
    with pytest.raises(MapError, match=r"cannot read the weight map(.|\n)*none\.json"):
        read_map(tmp_path / "none.json")


def test_a_family_without_a_map_is_named() -> None:
    with pytest.raises(MapError, match=r"no weight map(.|\n)*gpt_none"):
        find_map("gpt_none")
