"""Plans for models of the sizes that were published: all parameters found, none read twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mtj_loader
from tests.loading.test_real_shapes import write_sparse
from tests.models.test_decoder_configs import LLAMA_3_1_8B, MISTRAL_7B, MIXTRAL_8X7B, QWEN3_0_6B
from tests.parity.decoder_cases import MPT

Shapes = dict[str, tuple[int, ...]]

MPT_7B = MPT["mpt_7b"] | {
    "model_type": "mpt",
    "d_model": 4096,
    "max_seq_len": 2048,
    "n_heads": 32,
    "n_layers": 32,
    "vocab_size": 50432,
}


def llama_shapes(config: dict[str, Any]) -> Shapes:
    """What is published for Llama, Mistral, Qwen3, and Mixtral in its old layout."""
    d, f, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    k = config.get("head_dim", d // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * k, config["num_key_value_heads"] * k
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, d)
    experts = config.get("num_local_experts", 0)
    for i in range(config["num_hidden_layers"]):
        layer = {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
        layer |= {"self_attn.q_proj": (q, d), "self_attn.o_proj": (d, q)}
        layer |= {"self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
        if config["model_type"] == "qwen3":
            layer |= {"self_attn.q_norm": (k,), "self_attn.k_norm": (k,)}
        if experts:
            layer["block_sparse_moe.gate"] = (experts, d)
        else:
            layer |= {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
        for e in range(experts):
            expert = f"block_sparse_moe.experts.{e}."
            layer |= {expert + "w1": (f, d), expert + "w3": (f, d), expert + "w2": (d, f)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def mpt_shapes(config: dict[str, Any]) -> Shapes:
    d = config["d_model"]
    shapes: Shapes = {"transformer.wte.weight": (config["vocab_size"], d)}
    for i in range(config["n_layers"]):
        layer = {"norm_1": (d,), "attn.Wqkv": (3 * d, d), "attn.out_proj": (d, d), "norm_2": (d,)}
        layer |= {"ffn.up_proj": (4 * d, d), "ffn.down_proj": (d, 4 * d)}
        shapes |= {f"transformer.blocks.{i}.{name}.weight": shape for name, shape in layer.items()}
    return {**shapes, "transformer.norm_f.weight": (d,)}


# Tensors and parameters, as their makers count them.
PUBLISHED = {
    "llama_3_1_8b": (LLAMA_3_1_8B, llama_shapes, 291, 8_030_261_248),
    "mistral_7b": (MISTRAL_7B, llama_shapes, 291, 7_241_732_096),
    "mixtral_8x7b": (MIXTRAL_8X7B, llama_shapes, 995, 46_702_792_704),
    "qwen3_0_6b": (QWEN3_0_6B, llama_shapes, 310, 596_049_920),
    "mpt_7b": (MPT_7B, mpt_shapes, 194, 6_649_286_656),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_byte_is_needed_once(name: str, tmp_path: Path) -> None:
    """By one host that has the whole mesh; 16 shards are more than Llama has KV heads."""
    config, shapes_of, tensors, parameters = PUBLISHED[name]
    shapes = shapes_of(config)
    assert len(shapes) == tensors
    folder = write_sparse(tmp_path / name, shapes, config)
    for mesh in ("dp=2,mp=8", "dp=1,mp=16"):
        plan = mtj_loader.plan(folder, mtj_loader.make_abstract_mesh(mesh, hosts=1))
        assert plan.host_bytes(0) == 2 * parameters
