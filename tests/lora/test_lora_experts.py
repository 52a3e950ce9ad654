"""LoRA on the experts of Mixtral, for both layouts of the weights and all of the adapter."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import mtj_loader
from mtj_loader.errors import AdapterMismatchError
from tests.support.adapters import write_adapter
from tests.support.checkpoints import write_checkpoint

HIDDEN, WIDTH, EXPERTS, LAYERS, RANK, SCALE = 16, 12, 4, 2, 3, 5 / 3

CONFIG = {
    "model_type": "mixtral",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "vocab_size": 29,
    "max_position_embeddings": 32,
}

Arrays = dict[str, np.ndarray]
RANDOM = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def base_weights() -> Arrays:
    """Everything except the experts, under the names of transformers."""
    arrays = {
        "model.embed_tokens.weight": random(29, HIDDEN),
        "model.norm.weight": random(HIDDEN),
        "lm_head.weight": random(29, HIDDEN),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            arrays[f"{layer}{name}.weight"] = random(HIDDEN)
        for name, rows in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2), ("o", HIDDEN)):
            arrays[f"{layer}self_attn.{name}_proj.weight"] = random(rows, HIDDEN)
    return arrays


BASE = base_weights()
ROUTERS = [random(EXPERTS, HIDDEN) for _ in range(LAYERS)]
EXPERT_SHAPES = {"w1": (WIDTH, HIDDEN), "w2": (HIDDEN, WIDTH), "w3": (WIDTH, HIDDEN)}
EXPERT_WEIGHTS = {
    (i, e, w): random(*shape)
    for i in range(LAYERS)
    for e in range(EXPERTS)
    for w, shape in EXPERT_SHAPES.items()
}


def one_by_one(experts: dict) -> Arrays:
    """The layout of transformers 4."""
    arrays = dict(BASE)
    for i, router in enumerate(ROUTERS):
        arrays[f"model.layers.{i}.block_sparse_moe.gate.weight"] = router
    for (i, e, w), array in experts.items():
        arrays[f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}.weight"] = array
    return arrays


def fused(experts: dict) -> Arrays:
    """The layout of transformers 5."""
    arrays = dict(BASE)
    for i, router in enumerate(ROUTERS):
        w1, w2, w3 = (np.stack([experts[i, e, w] for e in range(EXPERTS)]) for w in EXPERT_SHAPES)
        arrays[f"model.layers.{i}.mlp.gate.weight"] = router
        arrays[f"model.layers.{i}.mlp.experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
        arrays[f"model.layers.{i}.mlp.experts.down_proj"] = w2
    return arrays


LAYOUTS = {"one-by-one": one_by_one, "fused": fused}


def write(folder: Path, arrays: Arrays) -> Path:
    return write_checkpoint(folder, {"model.safetensors": arrays}, CONFIG)


def hand_merged(deltas: dict) -> dict:
    """Expert weights with `deltas[layer, expert, name]` added in float64."""
    return {
        key: (array + deltas.get(key, 0)).astype(np.float32)
        for key, array in EXPERT_WEIGHTS.items()
    }


def compare(base: Path, adapter: Path, expected: Path, mesh: str, **options: bool) -> None:
    options["dtype"] = "float32"  # type: ignore[assignment]
    found = mtj_loader.load(base, mesh, adapter=adapter, **options)
    wanted = mtj_loader.load(expected, mesh, **options)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-6),
        found.params,
        wanted.params,
    )
    assert found.report.bytes_read == found.report.bytes_needed


def old_adapter(ranks: dict) -> tuple[Arrays, dict]:
    """Factors for some experts, one module per expert, and what they add."""
    terms, deltas = {}, {}
    for (i, e, w), rank in ranks.items():
        outs, ins = EXPERT_SHAPES[w]
        a, b = random(rank, ins), random(outs, rank)
        name = f"base_model.model.model.layers.{i}.block_sparse_moe.experts.{e}.{w}"
        terms |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        deltas[i, e, w] = 5 / rank * (b.astype(np.float64) @ a)
    return terms, deltas


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("mp=1", {}),
        ("mp=4", {"transposed_linear": True}),
        ("dp=2,mp=2", {"expert_parallel": True}),
        ("mp=4", {"expert_parallel": True, "transposed_linear": True}),
    ],
)
def test_an_adapter_on_the_old_layout(
    layout: str, mesh: str, options: dict, tmp_path: Path
) -> None:
    terms, deltas = old_adapter(dict.fromkeys(EXPERT_WEIGHTS, RANK))
    adapter = write_adapter(tmp_path / "a", terms)
    base = write(tmp_path / "base", LAYOUTS[layout](EXPERT_WEIGHTS))
    hand = write(tmp_path / "hand", one_by_one(hand_merged(deltas)))
    compare(base, adapter, hand, mesh, **options)


def test_experts_may_have_different_ranks(tmp_path: Path) -> None:
    ranks = {(0, 2, "w1"): 1, (0, 2, "w3"): 4, (0, 3, "w3"): 2, (1, 0, "w2"): 5}
    terms, deltas = old_adapter(ranks)
    pattern = {f"layers.{i}.block_sparse_moe.experts.{e}.{w}": r for (i, e, w), r in ranks.items()}
    adapter = write_adapter(tmp_path / "a", terms, rank_pattern=pattern)
    base = write(tmp_path / "base", fused(EXPERT_WEIGHTS))
    hand = write(tmp_path / "hand", one_by_one(hand_merged(deltas)))
    compare(base, adapter, hand, "mp=2")


def new_adapter(rank: int) -> tuple[Arrays, dict]:
    """Factors of the fused parameters as PEFT stores them, and what they add."""
    terms, deltas = {}, {}
    for i in range(LAYERS):
        for nested, outs, ins in ((".base_layer", 2 * WIDTH, HIDDEN), ("", HIDDEN, WIDTH)):
            a, b = random(EXPERTS * rank, ins), random(outs, rank * EXPERTS)
            name = f"base_model.model.model.layers.{i}.mlp.experts{nested}"
            terms |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            left, right = b.reshape(outs, rank, EXPERTS), a.reshape(EXPERTS, rank, ins)
            for e in range(EXPERTS):
                delta = 5 / rank * (left[:, :, e].astype(np.float64) @ right[e])
                halves = {"w1": delta[:WIDTH], "w3": delta[WIDTH:]} if nested else {"w2": delta}
                deltas |= {(i, e, w): part for w, part in halves.items()}
    return terms, deltas


TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("targets", [TARGETS, ["down_proj", "gate_up_proj"]])
@pytest.mark.parametrize(("mesh", "expert_parallel"), [("mp=1", False), ("mp=2", True)])
def test_an_adapter_on_the_fused_parameters(
    layout: str, targets: list[str], mesh: str, expert_parallel: bool, tmp_path: Path
) -> None:
    terms, deltas = new_adapter(RANK)
    adapter = write_adapter(tmp_path / "a", terms, target_parameters=targets)
    base = write(tmp_path / "base", LAYOUTS[layout](EXPERT_WEIGHTS))
    hand = write(tmp_path / "hand", fused(hand_merged(deltas)))
    compare(base, adapter, hand, mesh, expert_parallel=expert_parallel)


def test_one_target_parameter_is_not_nested(tmp_path: Path) -> None:
    terms, deltas = new_adapter(RANK)
    only = {k.replace(".base_layer", ""): v for k, v in terms.items() if ".base_layer" in k}
    adapter = write_adapter(tmp_path / "a", only, target_parameters=TARGETS[:1])
    base = write(tmp_path / "base", fused(EXPERT_WEIGHTS))
    gates = {key: delta for key, delta in deltas.items() if key[2] != "w2"}
    hand = write(tmp_path / "hand", fused(hand_merged(gates)))
    compare(base, adapter, hand, "mp=2")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name: name.replace("experts.1.", "experts.7."), "no expert 7 among 4"),
        (lambda name: name.replace("layers.1.", "layers.5."), "no such parameter"),
    ],
)
def test_an_expert_that_does_not_exist_is_refused(change, words: str, tmp_path: Path) -> None:
    terms, _ = old_adapter(dict.fromkeys(EXPERT_WEIGHTS, RANK))
    adapter = write_adapter(tmp_path / "a", {change(name): a for name, a in terms.items()})
    base = write(tmp_path / "base", fused(EXPERT_WEIGHTS))
    with pytest.raises(AdapterMismatchError, match=words):
        mtj_loader.plan(base, "mp=2", adapter=adapter)


def test_factors_whose_ranks_differ_between_experts_are_refused(tmp_path: Path) -> None:
    terms, _ = new_adapter(RANK)
    wider = {k: np.pad(v, ((0, 0), (0, 1))) if "lora_B" in k else v for k, v in terms.items()}
    adapter = write_adapter(tmp_path / "a", wider, target_parameters=TARGETS)
    base = write(tmp_path / "base", fused(EXPERT_WEIGHTS))
    with pytest.raises(AdapterMismatchError, match=r"wrong rank(.|\n)*A \[3\], B \[13\]"):
        mtj_loader.plan(base, "mp=2", adapter=adapter)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ([], "wrong rank"),
        (TARGETS[1:], "fit none of target_parameters"),
    ],
)
def test_factors_that_fit_no_listed_parameter_are_refused(
    targets: list[str], words: str, tmp_path: Path
) -> None:
    terms, _ = new_adapter(RANK)
    adapter = write_adapter(tmp_path / "a", terms, target_parameters=targets)
    base = write(tmp_path / "base", fused(EXPERT_WEIGHTS))
    with pytest.raises(AdapterMismatchError, match=words):
        mtj_loader.plan(base, "mp=2", adapter=adapter)
