"""Writes LoRA adapters, with PEFT or in the format of old versions. Needs the `parity` extra."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel


def write_adapter(model: PreTrainedModel, folder: Path, **config: Any) -> peft.PeftModel:
    """Gives a model a random adapter and writes it; returns the adapted model."""
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**config))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return adapted


def write_old_adapter(folder: Path, config: Any) -> Path:
    """Writes an adapter that names every expert, as in files made with transformers 4."""
    torch.manual_seed(0)
    d, f = config.hidden_size, config.intermediate_size
    shapes = {"w1": (f, d), "w2": (d, f), "w3": (f, d)}
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for expert in range(config.num_local_experts):
            for name, (outs, ins) in shapes.items():
                module = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                key = f"base_model.model.{module}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(3, ins) * 0.1
                tensors[f"{key}.lora_B.weight"] = torch.randn(outs, 3) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "target_modules": list(shapes)}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"task_type": "CAUSAL_LM"}))
    return folder
