"""Every family against recorded logits of Hugging Face transformers (tests/oracle)."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mtj_loader
from mtj_loader.errors import VerifyError
from mtj_loader.models import FAMILIES, parameters
from mtj_loader.models.forward import Forward
from mtj_loader.parameters import ParamSpec
from tests.parity.cases import CASES, NAMES
from tests.support.families import assert_cached_logits, assert_logits, meshes
from tests.support.models import DATA, GOLDENS, make_mesh

FOLDER = DATA / "families"
HIGHEST = jax.lax.Precision.HIGHEST
FIRST = [(model_type, next(iter(cases))) for model_type, cases in CASES.items()]
# `make parity` runs all cases with a cache; here the first cases of a family are enough.
CACHED = [(model_type, name) for model_type, cases in CASES.items() for name in list(cases)[:2]]


def load(
    model_type: str, name: str, mesh: str | None = None, *, transposed_linear: bool = False
) -> mtj_loader.Model:
    return mtj_loader.load(
        FOLDER / model_type / name, mesh, dtype="float32", transposed_linear=transposed_linear
    )


def oracle(model_type: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and their logits."""
    folder = FOLDER / model_type / name
    return np.load(folder / "ids.npy"), np.load(folder / "logits.npy")


def meshes_of(model_type: str, name: str) -> list[str]:
    return meshes(mtj_loader.plan(FOLDER / model_type / name, "mp=1").config)


def test_every_family_has_cases():
    assert CASES.keys() == FAMILIES.keys() - {"gpt_neox"}  # which has tests of its own
    assert all(len(cases) >= 3 for cases in CASES.values())


def test_the_cases_of_a_family_cover_shard_counts():
    for model_type, cases in CASES.items():
        used = {mesh for name in cases for mesh in meshes_of(model_type, name)}
        assert used >= {f"mp={n}" for n in (1, 2, 3, 4, 6, 8)} | {"dp=2,mp=4"}, model_type


@pytest.mark.parametrize(("model_type", "name"), NAMES)
def test_logits_on_the_largest_shard_count(model_type: str, name: str):
    """Alternates between the two layouts."""
    (*_, most) = [mesh for mesh in meshes_of(model_type, name) if mesh.startswith("mp")]
    turned = NAMES.index((model_type, name)) % 2 == 0
    model = load(model_type, name, most, transposed_linear=turned)
    assert_logits(model, *oracle(model_type, name))


@pytest.mark.parametrize(("model_type", "name"), CACHED)
def test_cached_logits(model_type: str, name: str):
    """On a mesh with both axes where there is one; the other layout than above."""
    turned = NAMES.index((model_type, name)) % 2 == 1
    model = load(model_type, name, meshes_of(model_type, name)[-1], transposed_linear=turned)
    assert_cached_logits(model, *oracle(model_type, name))


@pytest.mark.parametrize(("model_type", "name"), FIRST)
@pytest.mark.parametrize("transposed_linear", [False, True])
def test_logits_on_one_shard(model_type: str, name: str, transposed_linear: bool):
    model = load(model_type, name, "mp=1", transposed_linear=transposed_linear)
    assert_logits(model, *oracle(model_type, name))


@pytest.mark.parametrize("golden", ["gptj", "gpt_neo", "opt", "xglm", "bloom"])
def test_logits_of_the_goldens(golden: str):
    """Their trees are compared in test_load."""
    folder = GOLDENS / golden
    ids, expected = np.load(folder / "ids.npy"), np.load(folder / "logits.npy")
    assert_logits(mtj_loader.load(folder, "mp=8", dtype="float32"), ids, expected)


@pytest.mark.parametrize(("model_type", "name"), NAMES)
def test_haiku_has_the_parameters_that_are_declared(model_type: str, name: str):
    """Every declared parameter is used: an unused one would be missing here."""
    plan = mtj_loader.plan(FOLDER / model_type / name, "mp=1")
    for shards, turned in itertools.product((1, 2), (False, True)):
        if f"mp={shards}" not in meshes(plan.config):
            continue
        forward = Forward(plan.config, make_mesh(1, shards), turned, np.dtype(np.float32))
        specs = parameters(plan.config, shards, turned)
        assert shapes_of(forward) == {key(spec): spec.array_shape(shards) for spec in specs}


def shapes_of(forward: Forward) -> dict[tuple[str, str], tuple[int, ...]]:
    return {
        (module, param): shape.shape
        for module, params in forward.param_shapes().items()
        for param, shape in params.items()
    }


def key(spec: ParamSpec) -> tuple[str, str]:
    return spec.path, spec.param


@pytest.mark.parametrize(("model_type", "name"), NAMES)
def test_products_are_exact_to_float32(model_type: str, name: str):
    config = mtj_loader.plan(FOLDER / model_type / name, "mp=1").config
    forward = Forward(config, make_mesh(1, 1), False, np.dtype(jnp.bfloat16))
    ids = np.zeros((1, 3), np.int32)
    jaxpr = jax.make_jaxpr(lambda params: forward.logits(params, ids))(forward.param_shapes())
    products = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) > 6 * config.layers
    for product in products:
        assert product.params["precision"] == (HIGHEST, HIGHEST)
        assert product.params["preferred_element_type"] == jnp.float32


def equations(jaxpr):
    """All operations, also those inside jit, shard_map, cond and other calls."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, tuple) else [value]:  # cond has branches
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def rewritten(source: Path, folder: Path, rename, **more: np.ndarray) -> Path:
    """A copy of a checkpoint with other names and more tensors."""
    tensors = load_file(source / "model.safetensors")
    folder.mkdir(exist_ok=True)
    save_file({rename(n): t for n, t in tensors.items()} | more, folder / "model.safetensors")
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


BUFFER = np.ones((1, 1, 2, 2), np.uint8)
ROTARY = {f"rotary_emb.{name}": BUFFER for name in ("inv_freq", "cos_cached", "sin_cached")}
SPELLINGS = [
    (
        "gptj",
        "published",
        "transformer.",
        {
            "h.0.attn.bias": BUFFER,
            "h.1.attn.masked_bias": BUFFER,
            "h.0.attn.embed_positions": BUFFER,
            "embed_positions": BUFFER,
        },
    ),
    (
        "gpt_neo",
        "global_local",
        "transformer.",
        {"h.0.attn.attention.bias": BUFFER, "h.1.attn.attention.masked_bias": BUFFER},
    ),
    ("opt", "opt_350m", "model.", {}),
    ("xglm", "scaled", "model.", {"embed_positions.weights": BUFFER}),
    ("bloom", "published", "transformer.", {}),
    ("llama", "llama_2", "model.", {f"layers.0.self_attn.{name}": BUFFER for name in ROTARY}),
    ("mistral", "windowed", "model.", {"layers.1.self_attn.rotary_emb.inv_freq": BUFFER} | ROTARY),
    ("mixtral", "published", "model.", ROTARY),
    ("mpt", "mpt_7b", "transformer.", {}),
    ("gemma2", "published", "model.", ROTARY),
    ("gemma3_text", "published", "model.", ROTARY),
    ("phi3", "windowed", "model.", ROTARY),
    ("qwen2", "published", "model.", ROTARY),
    ("qwen3", "published", "model.", ROTARY),
    ("stablelm", "published", "model.", ROTARY),
]


@pytest.mark.parametrize(("model_type", "name", "prefix", "buffers"), SPELLINGS)
def test_published_spellings(model_type, name, prefix, buffers, tmp_path):
    """Names without the base model's prefix, and the buffers of old files."""
    source = FOLDER / model_type / name
    folder = rewritten(source, tmp_path, lambda n: n.removeprefix(prefix), **buffers)
    other = mtj_loader.load(folder, "mp=1", dtype="float32").params
    jax.tree.map(np.testing.assert_array_equal, other, load(model_type, name, "mp=1").params)


TIED = [
    ("gptj", "tied", "transformer.wte.weight"),
    ("gpt_neo", "global_local", "transformer.wte.weight"),
    ("opt", "pre_norm", "model.decoder.embed_tokens.weight"),
    ("xglm", "scaled", "model.embed_tokens.weight"),
    ("bloom", "published", "transformer.word_embeddings.weight"),
    ("llama", "yarn_tied", "model.embed_tokens.weight"),
    ("mistral", "no_window", "model.embed_tokens.weight"),
    ("mixtral", "top_one", "model.embed_tokens.weight"),
    ("mpt", "mpt_7b", "transformer.wte.weight"),
    ("gemma2", "published", "model.embed_tokens.weight"),
    ("gemma3_text", "published", "model.embed_tokens.weight"),
    ("phi3", "su_tied", "model.embed_tokens.weight"),
    ("qwen2", "published", "model.embed_tokens.weight"),
    ("qwen3", "published", "model.embed_tokens.weight"),
    ("stablelm", "normed_tied", "model.embed_tokens.weight"),
]


@pytest.mark.parametrize(("model_type", "name", "embedding"), TIED)
def test_a_tied_copy_must_be_equal(model_type, name, embedding, tmp_path):
    source = FOLDER / model_type / name
    table = load_file(source / "model.safetensors")[embedding]
    same = rewritten(source, tmp_path, str, **{"lm_head.weight": table})
    other = mtj_loader.load(same, "mp=1", dtype="float32").params
    jax.tree.map(np.testing.assert_array_equal, other, load(model_type, name, "mp=1").params)
    wrong = rewritten(source, tmp_path, str, **{"lm_head.weight": table + 1})
    with pytest.raises(VerifyError, match=f"ties this tensor to {embedding}, and they differ") as e:
        mtj_loader.load(wrong, "mp=1", dtype="float32")
    assert e.value.tensor == "lm_head.weight"


def test_every_shard_adds_its_embedding_bias():
    """GPT-J's bias, which MTJ has and transformers does not, so no file contains it."""
    model = load("gptj", "published", "mp=2")
    ids, _ = oracle("gptj", "published")
    module = "causal_transformer_shard/~/embedding_shard/~/linear"
    bias = np.random.default_rng(0).normal(size=(2, 42)).astype(np.float32)
    table = np.asarray(model.params[module]["w"])
    moved = {"w": table + bias.sum(0), "b": np.zeros_like(bias)}
    biased = {**model.params, module: {"w": table, "b": bias}}
    shifted = {**model.params, module: moved}
    expected = model.forward.logits(shifted, ids)
    np.testing.assert_allclose(model.forward.logits(biased, ids), expected, atol=1e-5)
    assert np.abs(model.logits(ids) - expected).max() > 0.1


def test_cases_cover_old_spellings():
    """Each case has its own config.json, so that old spellings stay covered."""
    texts = {json.dumps(config_of(*case), sort_keys=True) for case in NAMES}
    assert len(texts) == len(NAMES)
    keys = {key for case in NAMES for key in config_of(*case)}
    assert keys >= {"n_embed", "n_embd", "hidden_size", "d_model"}


def config_of(model_type: str, name: str) -> dict:
    return json.loads((FOLDER / model_type / name / "config.json").read_text())
