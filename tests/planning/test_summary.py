"""A plan as text, as tables and as JSON types."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import mtj_loader
from mtj_loader import display
from mtj_loader.errors import fold_layers
from mtj_loader.formats.records import TensorRecord
from mtj_loader.planning import summary
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.planning.param_plan import Changes, ParamPlan
from mtj_loader.weights.view import Layout, Piece
from tests.support import neox

FIXTURE = Path(__file__).parents[1] / "data/shakespeare-neox"


def plan_of(path: Path, mesh: str = "mp=4", hosts: int = 1, **options) -> LoadPlan:
    made = mtj_loader.plan(path, mtj_loader.make_abstract_mesh(mesh, hosts), **options)
    made.checkpoint.storage.close()
    return made


def param_of(plan: LoadPlan, module: str, param: str) -> ParamPlan:
    return next(p for p in plan.params if (p.spec.module, p.spec.param) == (module, param))


@pytest.mark.parametrize(
    ("module", "param", "expected"),
    [
        ("embedding_shard/~/linear", "w", Changes(False, False, 3, 29, 29, 1)),
        ("projection_shard/~/linear", "w", Changes(True, False, 3, 29, 29, 1)),
        ("layer_1/~/combined_qkv", "w", Changes(True, False, 0, 72, 72, 1)),
        ("layer_1/~/combined_qkv", "b", Changes(False, False, 0, 72, 72, 1)),
        ("layer_1/~/linear_3", "b", Changes(False, False, 0, 24, 24, 4)),
    ],
)
def test_changes_follow_from_the_plan(tmp_path: Path, module: str, param: str, expected: Changes):
    assert param_of(plan_of(neox.write(tmp_path)), module, param).changes == expected


def test_changes_of_the_layout_that_transposes_nothing(tmp_path: Path):
    plan = plan_of(neox.write(tmp_path), transposed_linear=True)
    assert not any(param.changes.transposed for param in plan.params)


@pytest.mark.parametrize(
    ("shape", "strides", "words"),
    [
        ((6, 4), (4, 1), ""),
        ((4, 6), (1, 4), "transposed"),
        ((1, 6), (6, 1), ""),
        ((2, 3, 4), (4, 8, 1), "regrouped by heads"),  # a bias [3, h, k] as [h, 3, k]
        ((5, 2, 3, 4), (1, 20, 40, 5), "transposed, regrouped by heads"),
        ((7, 4, 6), (24, 1, 4), "transposed"),  # experts, each by itself
    ],
)
def test_orders_of_axes(
    tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...], words: str
):
    param = param_of(plan_of(neox.write(tmp_path)), "layer_0/~/linear_4", "w")
    piece = Piece((0,) * len(shape), shape, 0, 0, strides)
    record = TensorRecord("w", "f", 0, "F32", (math.prod(shape),))
    view = replace(param.view, records=(record,), layout=Layout(shape, (piece,)))
    assert str(replace(param, view=view).changes) == words


def test_rows_are_counted(tmp_path: Path):
    param = param_of(plan_of(neox.write(tmp_path)), "embedding_shard/~/linear", "w")
    longer = TensorRecord("w", "f", 0, "F32", (31, 24))
    changed = replace(param, view=replace(param.view, records=(longer,)))
    assert (changed.changes.stored_rows, changed.changes.used_rows) == (31, 29)
    assert str(changed.changes) == "3 rows of zeros added, 29 of 31 rows"


def test_summary_of_the_fixture():
    lines = plan_of(FIXTURE, "mp=8").summary().splitlines()
    assert lines[:2] == [
        f"checkpoint   {FIXTURE}: 2 files, 7.65 MB",
        "model        gpt_neox: 6 layers, d_model 192, 8 heads, vocabulary 3,003, padded to 3,008",
    ]
    assert lines[3:7] == [
        "mesh         dp=1, mp=8: 8 devices on 1 host",
        "parameters   76 arrays, linear weights [in, out]",
        "each device  holds 968.93 kB",
        "host 0       reads 7.65 MB",
    ]


@pytest.mark.parametrize(
    ("start", "cells"),
    [
        (
            "layer_{0...5}/~/combined_qkv w",
            [
                ["layer_{0...5}/~/combined_qkv w", "[192, 72] bfloat16", "heads / 8", "165.89 kB"],
                [
                    "← gpt_neox.layers.{0...5}.attention.query_key_value.weight",
                    "[576, 192] BF16",
                    "transposed",
                    "1.33 MB",
                ],
            ],
        ),
        (
            "layer_{0...5}/~/linear_3 b",
            [
                ["layer_{0...5}/~/linear_3 b", "[192] bfloat16", "a copy in each", "2.30 kB"],
                [
                    "← gpt_neox.layers.{0...5}.attention.dense.bias",
                    "[192] BF16",
                    "divided by 8",
                    "2.30 kB",
                ],
            ],
        ),
        (
            "embedding_shard/~/linear w",
            [
                [
                    "embedding_shard/~/linear w",
                    "[376, 192] bfloat16",
                    "vocabulary / 8",
                    "144.38 kB",
                ],
                [
                    "← gpt_neox.embed_in.weight",
                    "[3003, 192] BF16",
                    "5 rows of zeros added",
                    "1.15 MB",
                ],
            ],
        ),
    ],
)
def test_a_row_folds_the_layers(start: str, cells: list[list[str]]):
    lines = plan_of(FIXTURE, "mp=8").summary().splitlines()
    (i,) = (i for i, line in enumerate(lines) if line.strip().startswith(start + "  "))
    found = [[cell.strip() for cell in line.split("  ") if cell] for line in lines[i : i + 2]]
    assert found == cells


def test_rows_are_in_the_order_of_the_model():
    text = plan_of(FIXTURE).summary()
    order = ["embedding_shard", "layer_{0...5}/~/combined_qkv", "linear_3", "projection_shard"]
    positions = [text.index(module) for module in order]
    assert positions == sorted(positions)


def test_layers_that_differ_get_rows_of_their_own(tmp_path: Path):
    arrays = neox.tensors()
    name = "gpt_neox.layers.1.attention.dense.weight"
    arrays[name] = arrays[name].astype(np.float16)
    text = plan_of(neox.write(tmp_path, arrays)).summary()
    assert "layer_0/~/linear_3 w" in text
    assert "layer_1/~/linear_3 w" in text
    assert "layer_{0...1}/~/linear_4 w" in text


def test_dtype_changes_are_listed(tmp_path: Path):
    assert "float32 → bfloat16 in 28 arrays" in plan_of(neox.write(tmp_path)).summary()
    assert "→" not in plan_of(FIXTURE).summary()


def test_hosts_that_read_alike_share_a_line(tmp_path: Path):
    folder = neox.write(tmp_path, tie_word_embeddings=True)
    plan = plan_of(folder, "dp=4,mp=2", hosts=4).without_exchange
    each = plan.bytes_of_hosts
    assert each[0] > each[1] == each[3] == each[2]  # host 0 compares the tied copies too
    lines = [line.split("  ")[0] for line in plan.summary().splitlines() if line.startswith("host")]
    assert lines == ["host 0", "hosts {1...3}"]


def test_bytes_from_other_hosts_are_listed():
    assert (
        "hosts {0...1}  read 3.82 MB each, 3.82 MB more from other hosts"
        in plan_of(FIXTURE, "dp=2,mp=4", hosts=2).summary()
    )
    assert "more from" not in plan_of(FIXTURE, "dp=2,mp=4", hosts=1).summary()


def test_notes_list_what_is_skipped_and_compared(tmp_path: Path):
    arrays = neox.tensors()
    arrays["embed_out.weight"] = arrays["gpt_neox.embed_in.weight"]
    for i in range(2):
        arrays[f"gpt_neox.layers.{i}.attention.masked_bias"] = np.zeros((1,), np.float32)
    arrays["extra.weight"] = np.zeros((3,), np.float32)
    folder = neox.write(tmp_path, arrays, tie_word_embeddings=True)
    lines = plan_of(folder, allow_unmapped=True).summary().splitlines()
    assert lines[-3:] == [
        "tied: embed_out.weight must equal gpt_neox.embed_in.weight; compared while loading",
        "not needed: gpt_neox.layers.{0...1}.attention.masked_bias",
        "warning: skipped extra.weight: it is not in the weight map",
    ]


def test_one_shard_is_called_whole():
    text = plan_of(FIXTURE, "mp=1").summary()
    assert "whole" in text
    assert "a copy in each" not in text


def test_summary_has_no_color_and_cuts_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    text = plan_of(FIXTURE).summary()
    assert "\x1b" not in text
    assert "gpt_neox.layers.{0...5}.post_attention_layernorm.weight" in text
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_a_narrow_terminal_folds_names_and_cuts_none():
    file = io.StringIO()
    Console(file=file, width=60, force_terminal=True).print(summary.tables(plan_of(FIXTURE)))
    assert "…" not in file.getvalue()


def test_names_are_no_markup(tmp_path: Path):
    arrays = neox.tensors() | {"[bold]extra[/bold]": np.zeros((1,), np.float32)}
    plan = plan_of(neox.write(tmp_path, arrays), allow_unmapped=True)
    assert "[bold]extra[/bold]" in plan.summary()


def test_dict_is_made_of_json_types():
    made = plan_of(FIXTURE, "dp=2,mp=4", hosts=2).to_dict()
    assert json.loads(json.dumps(made)) == made
    assert made["mesh"] == {"dp": 2, "mp": 4, "hosts": [[0, 0, 0, 0], [1, 1, 1, 1]]}
    read = {"0": 3824640, "1": 3820800}  # 7,645,440 in all; padding of 5 rows is not read
    assert made["host_read_bytes"] == read
    assert made["host_received_bytes"] == {"0": read["1"], "1": read["0"]}
    assert {one["read"] for one in made["parameters"]} == {"blocks of each shard"}


def test_dict_of_a_parameter():
    parameters = plan_of(FIXTURE, "mp=8").to_dict()["parameters"]
    assert isinstance(parameters, list)
    assert parameters[0] == {
        "module": "causal_transformer_shard/~/embedding_shard/~/linear",
        "param": "w",
        "shape": [8, 376, 192],
        "dtype": "bfloat16",
        "split": "V",
        "device_bytes": 376 * 192 * 2,
        "read": "own shards",
        "changes": {
            "transposed": False,
            "regrouped": False,
            "zero_rows": 5,
            "stored_rows": 3003,
            "used_rows": 3003,
            "divided_by": 1,
            "adapters": 0,
        },
        "tensors": [
            {
                "name": "gpt_neox.embed_in.weight",
                "dtype": "BF16",
                "shape": [3003, 192],
                "file": "model-00001-of-00002.safetensors",
                "offset_bytes": 4664,
                "bytes": 3003 * 192 * 2,
            }
        ],
    }


def test_bytes_of_hosts_are_those_of_their_shards(tmp_path: Path):
    arrays = neox.tensors()
    name = "gpt_neox.layers.1.attention.dense.weight"
    arrays[name] = arrays[name].astype(np.float16)  # half the bytes of the other layer's
    plan = plan_of(neox.write(tmp_path, arrays), "mp=4", hosts=2)
    for host in range(2):
        shards = (2 * host, 2 * host + 1)
        assert plan.host_bytes(host) == sum(p.source_bytes(shards) for p in plan.params)


def test_many_layers_cost_no_more_than_one_of_each_kind(monkeypatch: pytest.MonkeyPatch):
    plan = plan_of(FIXTURE, "mp=8", hosts=8)
    many = replace(plan, params=plan.params * 100)
    calls = []
    original = ParamPlan.source_bytes
    monkeypatch.setattr(
        ParamPlan, "source_bytes", lambda self, n: calls.append(n) or original(self, n)
    )
    assert sum(many.bytes_of_hosts.values()) == 100 * sum(plan.bytes_of_hosts.values())
    assert len(calls) < 2 * 8 * len(plan.params)


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (7_645_440, "7.65 MB"), (4e13, "40.00 TB")],
)
def test_sizes_for_people(count: float, shown: str):
    assert display.show_bytes(count) == shown


def test_problems_fold_too():
    problems = [
        mtj_loader.Problem("missing", tensor=f"h.{i}.w", target=f"layer_{i}/~/linear w")
        for i in (0, 1, 2, 5)
    ]
    (folded,) = fold_layers(problems)
    assert folded.tensor == "h.{0...2,5}.w"
    assert folded.target == "layer_{0...2,5}/~/linear w"
