"""Writes tests/data/shakespeare-greedy.json: transformers' greedy text for the fixture, in float32.

    python tests/oracle/make_greedy.py        (needs the `parity` extra)

For every prompt: its ids, the first 100 tokens that `generate(do_sample=False)` appends, the
smallest lead of a chosen token, and some of the logits. Tokens can only be compared if that lead is
much larger than 1e-4, the allowed difference between the logits of two implementations.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = Path(__file__).parents[1] / "data"
NEW_TOKENS = 100
LOGITS_KEPT = 8  # of 3003 in the vocabulary; enough to notice a wrong layer
PROMPTS = (  # of different lengths, because they also run as one batch
    "ROMEO.\n",
    "To be, or not to be",
    "Enter the KING, with his train.\n\nKING.\nMy lords, we are",
    "HAMLET.\nO",
    (
        "Now is the winter of our discontent made glorious summer by this sun of York; and all the "
        "clouds that lour'd upon our house in the deep bosom of the ocean buried."
    ),
)


def greedy_case(model, tokenizer, prompt: str) -> dict[str, object]:
    """Runs one prompt; keeps logits of ids spread over the vocabulary."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        pad_token_id=0,  # silences a warning; a single prompt is never padded
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(out.logits, dim=1)[0]  # [t, V]
    best_two = logits.topk(2, dim=-1).values
    kept = torch.linspace(0, logits.shape[-1] - 1, LOGITS_KEPT).long()
    return {
        "prompt": prompt,
        "prompt_ids": ids[0].tolist(),
        "new_ids": out.sequences[0, ids.shape[1] :].tolist(),
        "smallest_gap": float((best_two[:, 0] - best_two[:, 1]).min()),
        "logit_ids": kept.tolist(),
        "first_logits": logits[0, kept].tolist(),
        "last_logits": logits[-1, kept].tolist(),
    }


def main() -> None:
    folder = DATA / "shakespeare-neox"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        cases = [greedy_case(model, tokenizer, prompt) for prompt in PROMPTS]
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    (DATA / "shakespeare-greedy.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
