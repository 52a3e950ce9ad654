"""Checkpoints with the shapes of real models, as sparse files."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np

import mtj_loader
from tests.support.command_line import run

TOPOLOGY = Path(__file__).parents[1] / "data/seeds/mpt_topology.txt"

Shapes = Mapping[str, tuple[int, ...]]


def write_sparse(folder: Path, shapes: Shapes, config: Mapping[str, object]) -> Path:
    """A checkpoint of bfloat16 zeros that takes no space on the disk."""
    folder.mkdir()
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def llama_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Those of Llama-3-8B, with fewer layers."""
    shapes = {"model.embed_tokens.weight": (128256, 4096)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}input_layernorm.weight": (4096,),
            f"{layer}mlp.down_proj.weight": (4096, 14336),
            f"{layer}mlp.gate_proj.weight": (14336, 4096),
            f"{layer}mlp.up_proj.weight": (14336, 4096),
            f"{layer}post_attention_layernorm.weight": (4096,),
            f"{layer}self_attn.k_proj.weight": (1024, 4096),
            f"{layer}self_attn.o_proj.weight": (4096, 4096),
            f"{layer}self_attn.q_proj.weight": (4096, 4096),
            f"{layer}self_attn.v_proj.weight": (1024, 4096),
        }
    return shapes | {"model.norm.weight": (4096,), "lm_head.weight": (128256, 4096)}


LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 1,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}


def test_llama_3_8b_shapes_load_with_nothing_read_twice(tmp_path: Path) -> None:
    shapes = llama_shapes(1)
    report = mtj_loader.load(write_sparse(tmp_path / "llama", shapes, LLAMA), "mp=8").report
    assert report.bytes_read == report.bytes_needed == sum(2 * prod(s) for s in shapes.values())


def mixtral_shapes(layers: int, experts: int, d: int, f: int) -> dict[str, tuple[int, ...]]:
    """The tensors of Mixtral-8x7B, narrower, in the published layout."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128, d)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        for e in range(experts):
            expert = f"{layer}block_sparse_moe.experts.{e}."
            shapes |= {f"{expert}w1.weight": (f, d), f"{expert}w2.weight": (d, f)}
            shapes[f"{expert}w3.weight"] = (f, d)
        shapes |= {
            f"{layer}block_sparse_moe.gate.weight": (experts, d),
            f"{layer}input_layernorm.weight": (d,),
            f"{layer}post_attention_layernorm.weight": (d,),
            f"{layer}self_attn.k_proj.weight": (d // 4, d),
            f"{layer}self_attn.o_proj.weight": (d, d),
            f"{layer}self_attn.q_proj.weight": (d, d),
            f"{layer}self_attn.v_proj.weight": (d // 4, d),
        }
    return shapes | {"model.norm.weight": (d,), "lm_head.weight": (128, d)}


def test_mixtral_with_all_its_tensors_loads_with_nothing_read_twice(tmp_path: Path) -> None:
    shapes = mixtral_shapes(layers=32, experts=8, d=64, f=112)
    assert len(shapes) == 995  # like Mixtral-8x7B
    config = {
        "model_type": "mixtral",
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_hidden_layers": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 128,
        "max_position_embeddings": 64,
    }
    folder = write_sparse(tmp_path / "mixtral", shapes, config)
    for expert_parallel in (False, True):
        report = mtj_loader.load(folder, "mp=8", expert_parallel=expert_parallel).report
        assert report.bytes_read == report.bytes_needed == sum(2 * prod(s) for s in shapes.values())


MPT = {
    "model_type": "mpt",
    "d_model": 4096,
    "n_heads": 32,
    "n_layers": 32,
    "vocab_size": 50432,
    "max_seq_len": 2048,
    "no_bias": True,
    "attn_config": {"alibi": True},
}


def test_the_topology_of_mpt_7b_is_the_published_list(tmp_path: Path) -> None:
    """Equal line by line. The list has no empty lines after its third block; ours has them between
    all blocks."""
    listed = TOPOLOGY.read_text().splitlines()
    found = [re.fullmatch(r"(\S+) torch\.Size\(\[([\d, ]+)\]\)", line) for line in listed if line]
    shapes = {m[1]: tuple(map(int, m[2].split(", "))) for m in found if m is not None}
    assert len(shapes) == len(found) == 194
    in_file_order = dict(sorted(shapes.items()))  # as safetensors writes them
    folder = write_sparse(tmp_path / "mpt", in_file_order, MPT)
    result = run("inspect", folder, "--topology")
    assert result.exit_code == 0, result.stderr
    printed = result.stdout.splitlines()
    assert [line for line in printed if line] == [line for line in listed if line]
    assert printed[:16] == listed[:16]
    blocks = [{block_of(line) for line in part} for part in split_at_empty(printed)]
    assert blocks == [{None}, *({i} for i in range(32)), {None}]


def block_of(line: str) -> int | None:
    found = re.match(r"transformer\.blocks\.(\d+)\.", line)
    return int(found[1]) if found else None


def split_at_empty(lines: list[str]) -> list[list[str]]:
    return [part.split("\n") for part in "\n".join(lines).split("\n\n")]


def test_gpt_neox_20b_is_planned_for_an_abstract_pod(tmp_path: Path) -> None:
    d, vocab = 6144, 50432
    shapes: dict[str, tuple[int, ...]] = {"gpt_neox.embed_in.weight": (vocab, d)}
    for i in range(44):
        layer = f"gpt_neox.layers.{i}."
        shapes |= {
            f"{layer}{norm}.{part}": (d,)
            for norm in ("input_layernorm", "post_attention_layernorm")
            for part in ("weight", "bias")
        }
        for name, outs, ins in (
            ("attention.query_key_value", 3 * d, d),
            ("attention.dense", d, d),
            ("mlp.dense_h_to_4h", 4 * d, d),
            ("mlp.dense_4h_to_h", d, 4 * d),
        ):
            shapes |= {f"{layer}{name}.weight": (outs, ins), f"{layer}{name}.bias": (outs,)}
    shapes |= {"gpt_neox.final_layer_norm.weight": (d,), "gpt_neox.final_layer_norm.bias": (d,)}
    shapes["embed_out.weight"] = (vocab, d)
    config = {
        "model_type": "gpt_neox",
        "hidden_size": d,
        "num_attention_heads": 64,
        "num_hidden_layers": 44,
        "intermediate_size": 4 * d,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "hidden_act": "gelu_fast",
    }
    folder = write_sparse(tmp_path / "neox", shapes, config)
    pod = mtj_loader.make_abstract_mesh("dp=4,mp=64", hosts=32)
    plan = mtj_loader.plan(folder, pod)
    per_host = np.array([plan.host_bytes(host) for host in range(32)])
    total = sum(2 * prod(s) for s in shapes.values())
    assert per_host.sum() == total
    assert (per_host == per_host[0]).all()
