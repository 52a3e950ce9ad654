"""Converted checkpoints, compared with transformers and torch; needs the `parity` extra."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mtj_loader
from tests.support.models import DATA

pytestmark = pytest.mark.parity

FIXTURE = DATA / "shakespeare-neox"
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json"]


def tiny_model(family: str):
    """A random model in bfloat16 with the vocabulary size of the fixture's tokenizer."""
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    torch.manual_seed(3)
    if family == "mpt":
        config = transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=3003)
    else:
        config = transformers.GPTNeoXConfig(
            hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48,
            vocab_size=3003, max_position_embeddings=64,
        )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()


def save_model(family: str, folder: Path) -> Path:
    model = tiny_model(family)
    model.save_pretrained(folder, max_shard_size="200KB")
    for name in TOKENIZER_FILES:
        (folder / name).write_bytes((FIXTURE / name).read_bytes())
    return folder


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mpt", "gpt_neox"])
def test_loads_in_transformers(family, dtype, max_shard_size, tmp_path):
    """Every weight equals torch's conversion, and the logits are the same."""
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    source = save_model(family, tmp_path / family)
    report = mtj_loader.convert(source, dtype=dtype, max_shard_size=max_shard_size)
    assert len(report.files) > 1 or max_shard_size == "5GB"
    assert set(TOKENIZER_FILES) <= set(report.copied)
    wanted = getattr(torch, dtype)
    found, info = AutoModelForCausalLM.from_pretrained(
        report.out, dtype="auto", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert found.dtype == wanted
    expected = AutoModelForCausalLM.from_pretrained(source, dtype="auto").to(wanted)
    state = found.state_dict()
    for name, tensor in expected.state_dict().items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name
    ids = AutoTokenizer.from_pretrained(report.out)("ROMEO. I am", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(found(ids).logits, expected(ids).logits)


def test_config_has_the_dtype_where_transformers_writes_it(tmp_path):
    source = save_model("mpt", tmp_path / "mpt")
    report = mtj_loader.convert(source, dtype="float16")
    before, after = (
        json.loads((Path(folder) / "config.json").read_text()) for folder in (source, report.out)
    )
    assert before["dtype"] == "bfloat16"
    assert after == before | {"dtype": "float16"}


@pytest.mark.parametrize("target", ["float16", "bfloat16"])
def test_rounding_equals_torch(target, tmp_path):
    """A million float32 numbers of all magnitudes, converted by torch too."""
    import torch  # noqa: PLC0415
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    bits = np.random.default_rng(0).integers(0, 2**32, 1_000_000, np.uint32)
    values = torch.from_numpy(bits.view(np.float32).copy())
    values = values[torch.isfinite(values)]
    (tmp_path / "s").mkdir()
    save_file({"w": values}, tmp_path / "s/model.safetensors")
    (tmp_path / "s/config.json").write_text("{}")
    report = mtj_loader.convert(tmp_path / "s", dtype=target, on_overflow="clamp")
    found = load_file(Path(report.out) / "model.safetensors")["w"]
    expected = values.to(getattr(torch, target))
    largest = torch.finfo(expected.dtype).max
    assert torch.equal(found, expected.clamp(-largest, largest))
    assert report.losses.overflow == int(torch.isinf(expected).sum())
    assert report.losses.underflow == int(((expected == 0) & (values != 0)).sum())
