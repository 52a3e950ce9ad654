"""llama.cpp through llama-cpp-python: a GGUF file in float32 with the same weights."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import gguf
import llama_cpp
import ml_dtypes
import numpy as np
from safetensors import safe_open

from benchmarks.decoders.common import Decode, Decoded, Prompts, from_times

_ROWS = 16  # sequences of a batch, at most

# Names in a layer; the others are in `_GLOBAL`. Both from gguf's table for GPT-NeoX.
_LAYER = {
    "input_layernorm": "attn_norm",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
_GLOBAL = {
    "gpt_neox.embed_in": "token_embd",
    "gpt_neox.final_layer_norm": "output_norm",
    "embed_out": "output",
}


def start(folder: Path, context: int) -> Decode:
    """Loads the GGUF file, which is written once beside the checkpoint's files."""
    llama_cpp.llama_log_set(_quiet, None)
    options = llama_cpp.llama_model_default_params()
    options.use_mmap = False
    model = llama_cpp.llama_model_load_from_file(os.fsencode(_gguf_file(folder)), options)
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_seq_max = context * _ROWS, _ROWS
    options.n_threads = options.n_threads_batch = os.cpu_count() or 1
    options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
    made = llama_cpp.llama_init_from_model(model, options)
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    n_batch = llama_cpp.llama_n_batch(made)
    batch = llama_cpp.llama_batch_init(n_batch, 0, 1)

    def run(tokens: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Runs (row, position, token, whether to choose) and returns the choices by row."""
        chosen = {}
        for begin in range(0, len(tokens), n_batch):
            part = tokens[begin : begin + n_batch]
            batch.n_tokens = len(part)
            for i, (row, position, token, choose) in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, choose
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            if llama_cpp.llama_decode(made, batch):
                raise RuntimeError("llama_decode failed")
            for i, (row, *_, choose) in enumerate(part):
                if choose:
                    logits = llama_cpp.llama_get_logits_ith(made, i)
                    chosen[row] = int(np.ctypeslib.as_array(logits, (vocab_size,)).argmax())
        return chosen

    def decode(prompts: Prompts, new: int) -> Decoded:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(made), True)
        length = len(prompts[0])
        started = time.perf_counter()
        last = run(
            [
                (row, i, token, i == length - 1)
                for row, prompt in enumerate(prompts)
                for i, token in enumerate(prompt)
            ]
        )
        times, ids = [time.perf_counter()], [last[0]]
        for place in range(length, length + new - 1):
            last = run([(row, place, token, True) for row, token in last.items()])
            times.append(time.perf_counter())
            ids.append(last[0])
        return from_times(started, times, ids)

    return decode


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, data: object) -> None:
    pass


def _gguf_file(folder: Path) -> Path:
    """The checkpoint as a GGUF file in float32, written if it does not exist."""
    path = folder / "model-f32.gguf"
    if path.exists():
        return path
    config = json.loads((folder / "config.json").read_text())
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "gptneox")
    _add_config(writer, config)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 -- not a mapping
                writer.add_tensor(*_convert(name, tensors.get_tensor(name), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return part.rename(path)


def _add_config(writer: gguf.GGUFWriter, config: dict) -> None:
    d, heads = config["hidden_size"], config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(d)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(int(config["rotary_pct"] * d // heads))
    writer.add_head_count(heads)
    writer.add_parallel_residual(config["use_parallel_residual"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _convert(name: str, tensor: np.ndarray, config: dict) -> tuple[str, np.ndarray]:
    """The name in GGUF, and the values: llama.cpp splits queries, keys and values first."""
    values = tensor.view(ml_dtypes.bfloat16).astype(np.float32)
    module, _, kind = name.rpartition(".")
    if module in _GLOBAL:
        return f"{_GLOBAL[module]}.{kind}", values
    layer, _, inner = module.removeprefix("gpt_neox.layers.").partition(".")
    if inner == "attention.query_key_value":  # [heads, (q k v), head_dim, …]
        by_head = values.reshape(config["num_attention_heads"], 3, -1, *values.shape[1:])
        values = by_head.swapaxes(0, 1).reshape(values.shape)
    return f"blk.{layer}.{_LAYER[inner]}.{kind}", values
