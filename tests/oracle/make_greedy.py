"""Writes tests/data/shakespeare-greedy.json: transformers' greedy text for the fixture, in float32.

    python tests/oracle/make_greedy.py        (needs the `parity` extra)

For every prompt: its ids, the first 100 tokens that `generate(do_sample=False)` appends, how far
ahead the winner of each step is, and some of the logits. A gap that is wide against the 1e-4 that
the logits of two implementations may differ by makes the comparison of the tokens a fair one.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = Path(__file__).parents[1] / "data"
NEW_TOKENS = 100
LOGITS_KEPT = 8  # of 3003 in the vocabulary: enough to see a wrong layer, small in the repository
PROMPTS = (  # of unequal lengths on purpose: they also run as one batch
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
    """Runs one prompt; the vocabulary ids of the kept logits are spread over all of it."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        pad_token_id=0,  # a single prompt is never padded; this only silences a warning
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
