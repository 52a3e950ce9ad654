"""transformers on torch: `generate` with its KV cache, in float32."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from transformers import GPTNeoXForCausalLM, StoppingCriteria

from benchmarks.decoders.common import Decode, Decoded, Prompts, from_times


class _Clock(StoppingCriteria):
    """Notes when each token is there; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def start(folder: Path, context: int) -> Decode:
    """Loads into memory; the context grows by itself."""
    torch.set_num_threads(os.cpu_count() or 1)
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # all rows run to the end

    @torch.inference_mode()
    def decode(prompts: Prompts, new: int) -> Decoded:
        ids, clock = torch.tensor(prompts), _Clock()
        started = time.perf_counter()
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            stopping_criteria=[clock],
        )
        return from_times(started, clock.times, found[0, ids.shape[1] :].tolist())

    return decode
