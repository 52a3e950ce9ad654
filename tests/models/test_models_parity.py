"""Logits and modules against recorded outputs of Hugging Face transformers (tests/oracle)."""

from __future__ import annotations

import json

import haiku as hk
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from mtj_loader.models import usable_shards
from mtj_loader.models.families.gpt_neox import make_model
from mtj_loader.models.layers.linears import sum_over_shards
from mtj_loader.models.layers.positions import Positions, rotation
from mtj_loader.models.parameter_table import ParameterBuilder
from tests.oracle.neox_cases import CASES, WITH_MODULES
from tests.support.models import GOLDENS, PARITY, config_of, make_forward, make_mesh, params_of
from tests.support.mtj_tree import neox_tree, sha256

MODEL_TOLERANCE = 1e-4  # of logits in float32
MODULE_TOLERANCE = 1e-5  # of one module's output in float32

FOLDERS = {name: PARITY / name for name in CASES}
FOLDERS |= {name: GOLDENS / name for name in ("gpt_neox", "gpt_neox_serial")}


def layouts():
    """Each case on one shard and on as many as it allows; three cases on all counts."""
    for name, folder in FOLDERS.items():
        counts = usable_shards(config_of(folder), 8)
        for shards in counts if name in EVERY_COUNT else {counts[0], counts[-1]}:
            yield name, shards, name.startswith("rope") == (shards == 1)
    yield from (("odd_rotary", shards, turned) for shards in (1, 8) for turned in (False, True))


EVERY_COUNT = ("pythia_like", "odd_rotary", "serial")  # 6, 8 and 12 heads
LAYOUTS = sorted(set(layouts()))


def assert_logits(folder, forward):
    ids, expected = np.load(folder / "ids.npy"), np.load(folder / "logits.npy")
    logits = forward.logits(params_of(folder, forward), ids)
    assert logits.dtype == np.float32
    assert logits.shape == expected.shape
    np.testing.assert_allclose(logits, expected, rtol=0, atol=MODEL_TOLERANCE)


def test_cases_cover_the_shard_counts():
    assert {shards for _, shards, _ in LAYOUTS} == {1, 2, 3, 4, 6, 8}


@pytest.mark.parametrize(("name", "shards", "transposed"), LAYOUTS)
def test_logits(name, shards, transposed):
    folder = FOLDERS[name]
    assert_logits(folder, make_forward(config_of(folder), mp=shards, transposed_linear=transposed))


@pytest.mark.parametrize("name", ["neox_20b_like", "tied", "serial", "rope_dynamic"])
def test_logits_on_two_by_four(name):
    """Three rows, which dp=2 does not divide."""
    folder = FOLDERS[name]
    assert_logits(folder, make_forward(config_of(folder), dp=2, mp=4))


@pytest.mark.parametrize("dp", [3, 8])
def test_logits_on_data_parallel_meshes(dp):
    folder = FOLDERS["pythia_like"]
    assert_logits(folder, make_forward(config_of(folder), dp=dp, mp=1))


@pytest.mark.parametrize("name", ["gpt_neox", "gpt_neox_serial"])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_reference_tree_is_mtjs(name, shards, transposed):
    folder = GOLDENS / name
    golden = json.loads((folder / "mtj_tree.json").read_text())
    expected = golden[f"shards={shards},transposed_linear={str(transposed).lower()}"]
    tree = neox_tree(
        load_file(folder / "model.safetensors"),
        layers=2,
        shards=shards,
        transposed_linear=transposed,
    )
    assert expected == {
        module: {
            param: {"shape": list(array.shape), "sha256": sha256(array)}
            for param, array in params.items()
        }
        for module, params in tree.items()
    }


@pytest.mark.parametrize("name", WITH_MODULES)
@pytest.mark.parametrize("shards", [1, 3])
def test_modules(name, shards):
    """Every module alone, with the inputs of the same module in transformers."""
    seen = dict(np.load(PARITY / name / "modules.npz"))
    seen["ids"] = np.load(PARITY / name / "ids.npy")[:1]
    outputs = run_modules(PARITY / name, shards, seen)
    assert outputs.keys() == {key[:-4] for key in seen if key.endswith(".out")}
    for module, output in outputs.items():
        error = np.abs(output - seen[f"{module}.out"]).max()
        assert error < MODULE_TOLERANCE, f"{module} is off by {error}"


def run_modules(folder, shards, seen):
    """The output of each of our modules for recorded inputs, in every shard."""
    config = config_of(folder)
    frequencies = config.rope.frequencies(seen["ids"].shape[1])[None]

    def body(seen, frequencies):
        params = ParameterBuilder(config.axis_sizes(shards), shards, False, np.dtype(np.float32))
        model = make_model(config, params)
        keys = np.arange(seen["ids"].shape[1])
        positions = Positions(keys[None], (rotation(frequencies, keys[None], 1.0),), end=len(keys))
        outputs = {"embedding": model.embedding(seen["ids"], positions)}
        outputs["final_norm"] = model.projection.norm(seen["final_norm.in"])
        for i, layer in enumerate(model.layers):
            at = f"layer_{i}"
            outputs[at] = layer(seen[f"{at}.in"], positions, None)[0]
            norms = {"attention_norm": layer.attention_norm, "mlp_norm": layer.feed_forward_norm}
            for norm, module in norms.items():
                outputs[f"{at}.{norm}"] = module(seen[f"{at}.{norm}.in"])
            attention, _ = layer.attention(seen[f"{at}.attention.in"], positions, None)
            outputs[f"{at}.attention"] = sum_over_shards(attention)
            outputs[f"{at}.mlp"] = sum_over_shards(layer.feed_forward(seen[f"{at}.mlp.in"]))
        return outputs

    def local(params, seen, frequencies):
        mine = jax.tree.map(lambda x: x[0], params)
        outputs = hk.transform(body).apply(mine, None, seen, frequencies)
        return jax.tree.map(lambda x: x[None], outputs)

    forward = make_forward(config, mp=shards)
    run = jax.shard_map(
        local, mesh=make_mesh(1, shards), in_specs=(P("mp"), P(), P()), out_specs=P("mp")
    )
    return jax.jit(run)(params_of(folder, forward), seen, frequencies)
