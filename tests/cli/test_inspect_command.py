"""`mtj-loader inspect`: its table, the order of tensors, and warnings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support import neox
from tests.support.checkpoints import write_checkpoint
from tests.support.command_line import FIXTURE, run


def test_inspect_folds_layers():
    result = run("inspect", FIXTURE)
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[:3] == [
        f"checkpoint  {FIXTURE}",
        "model       gpt_neox",
        "tensors     76 with 3,822,720 weights, 7.65 MB in 2 files",
    ]
    rows = [[cell.strip() for cell in line.split("  ") if cell] for line in lines[6:]]
    file = "model-00001-of-00002.safetensors"
    assert rows[0] == ["gpt_neox.embed_in.weight", "BF16", "[3003, 192]", file, "1.15 MB"]
    dense = "gpt_neox.layers.{0...5}.attention.dense.weight"
    assert [dense, "BF16", "[192, 192]", "2 files", "442.37 kB"] in rows
    assert rows[-1][0] == "embed_out.weight"


def test_inspect_cuts_no_name_and_has_no_color(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    stdout = run("inspect", FIXTURE).stdout
    assert "gpt_neox.layers.{0...5}.post_attention_layernorm.weight  " in stdout
    assert "\x1b" not in stdout


def test_topology_follows_the_model(tmp_path: Path):
    arrays = neox.tensors()
    alphabetical = {name: arrays[name] for name in sorted(arrays)}  # as files have them
    result = run("inspect", neox.write(tmp_path, alphabetical), "--topology")
    blocks = result.stdout.split("\n\n")
    assert len(blocks) == 4
    assert blocks[0] == "gpt_neox.embed_in.weight torch.Size([29, 24])"
    assert blocks[2].splitlines() == [
        "gpt_neox.layers.1.input_layernorm.weight torch.Size([24])",
        "gpt_neox.layers.1.input_layernorm.bias torch.Size([24])",
        "gpt_neox.layers.1.post_attention_layernorm.weight torch.Size([24])",
        "gpt_neox.layers.1.post_attention_layernorm.bias torch.Size([24])",
        "gpt_neox.layers.1.attention.query_key_value.weight torch.Size([72, 24])",
        "gpt_neox.layers.1.attention.query_key_value.bias torch.Size([72])",
        "gpt_neox.layers.1.attention.dense.weight torch.Size([24, 24])",
        "gpt_neox.layers.1.attention.dense.bias torch.Size([24])",
        "gpt_neox.layers.1.mlp.dense_h_to_4h.weight torch.Size([40, 24])",
        "gpt_neox.layers.1.mlp.dense_h_to_4h.bias torch.Size([40])",
        "gpt_neox.layers.1.mlp.dense_4h_to_h.weight torch.Size([24, 40])",
        "gpt_neox.layers.1.mlp.dense_4h_to_h.bias torch.Size([24])",
    ]
    assert blocks[3].splitlines() == [
        "gpt_neox.final_layer_norm.weight torch.Size([24])",
        "gpt_neox.final_layer_norm.bias torch.Size([24])",
        "embed_out.weight torch.Size([29, 24])",
    ]


def test_topology_without_base_prefix_and_with_unknown_tensors(tmp_path: Path):
    arrays = {name.removeprefix("gpt_neox."): array for name, array in neox.tensors().items()}
    arrays |= {"layers.0.extra": np.zeros(()), "extra": np.zeros((0, 2))}
    arrays = {name: array.astype(np.float32) for name, array in sorted(arrays.items())}
    blocks = run("inspect", neox.write(tmp_path, arrays), "--topology").stdout.split("\n\n")
    assert blocks[0] == "embed_in.weight torch.Size([29, 24])"
    assert blocks[1].endswith("\nlayers.0.extra torch.Size([])")
    assert blocks[3].endswith("\nextra torch.Size([0, 2])\n")


@pytest.mark.parametrize("model_type", ["no_such_family", "../gpt_neox", 7, None])
def test_topology_of_an_unknown_family_counts(tmp_path: Path, model_type: object):
    names = ["h.10.w", "h.2.w", "h.2.b", "a.weight"]
    tensors = {name: np.zeros((2,), np.float32) for name in names}
    folder = write_checkpoint(tmp_path, {"m.safetensors": tensors}, {"model_type": model_type})
    result = run("inspect", folder, "--topology")
    wanted = ["a.weight", "", "h.2.b", "h.2.w", "", "h.10.w"]
    assert result.stdout.splitlines() == [n and f"{n} torch.Size([2])" for n in wanted]


def test_inspect_warns_on_stderr(model: Path):
    (model / "other.safetensors").write_bytes(b"")
    result = run("inspect", model)
    assert result.stderr == (
        "warning: not read: other.safetensors; the weights are model.safetensors\n"
    )
    assert "other" not in result.stdout


def test_json_and_topology_exclude_each_other(model: Path):
    result = run("inspect", model, "--json", "--topology")
    assert result.exit_code == 2
    assert result.stderr == "error: --json and --topology cannot be combined\n"
