"""Linear layers: how a single row is multiplied, and outputs that are taken apart on a TPU."""

from __future__ import annotations

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from mtj_loader.models.layers.linears import Linear, contract
from mtj_loader.models.parameter_table import ParameterBuilder


def tpu_mesh() -> AbstractMesh:
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    return AbstractMesh((1, 8), ("dp", "mp"), abstract_device=device)


def rows_multiplied(x: jax.Array, w: jax.Array, axis: int) -> int:
    """The rows of the one product that `contract` traces."""
    equations = jax.make_jaxpr(contract, static_argnums=2)(x, w, axis).eqns
    (product,) = (e for e in equations if e.primitive.name == "dot_general")
    return product.outvars[0].aval.size // product.outvars[0].aval.shape[-1]


@pytest.mark.parametrize(("shape", "axis"), [((1, 1, 6), 0), ((6,), 0), ((1, 1, 6), 1)])
def test_a_single_row_is_padded_on_a_tpu_and_gives_the_same(shape: tuple[int, ...], axis: int):
    x = jnp.asarray(np.arange(6), jnp.float32).reshape(shape)
    w = jnp.asarray(np.arange(24).reshape(6, 4) - 11, jnp.float32)
    w = w.T if axis else w
    assert rows_multiplied(x, w, axis) == 1
    plain = contract(x, w, axis)
    with jax.sharding.use_abstract_mesh(tpu_mesh()):
        assert rows_multiplied(x, w, axis) == 8
        padded = contract(x, w, axis)
    assert padded.shape == plain.shape == (*shape[:-1], 4)
    assert (np.asarray(padded) == np.asarray(plain)).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_no_bfloat16_weight_is_converted_for_a_single_row_on_a_cpu(axis: int):
    x = jnp.asarray(np.arange(64) % 7, jnp.bfloat16).reshape(1, 1, 64)
    w = jnp.asarray((np.arange(64 * 96) % 11).reshape((64, 96) if not axis else (96, 64)), x.dtype)
    assert rows_multiplied(x, w, axis) == 2
    program = jax.jit(contract, static_argnums=2).lower(x, w, axis).compile()
    assert f"f32[{w.shape[0]},{w.shape[1]}]" not in program.as_text()
    exact = np.tensordot(np.asarray(x, np.float32), np.asarray(w, np.float32), (2, axis))
    assert (np.asarray(program(x, w)) == exact).all()


def test_several_rows_are_multiplied_as_they_are():
    x, w = jnp.zeros((2, 3, 6)), jnp.zeros((6, 4))
    with jax.sharding.use_abstract_mesh(tpu_mesh()):
        assert rows_multiplied(x, w, 0) == 6


@pytest.mark.parametrize(
    ("outs", "on_tpu", "expected"), [("(h k)", 1, 1), ("(h k)", 0, 0), ("f", 1, 0)]
)
def test_outputs_with_heads_are_computed_before_they_are_taken_apart(
    outs: str, on_tpu: int, expected: int
):
    params = ParameterBuilder({"d": 6, "h": 2, "k": 4, "f": 8}, 1, False, np.dtype(np.float32))

    def run(x: jax.Array) -> jax.Array:
        return Linear(params, "d", outs, split=outs.strip("( k)"), bias=True, name="linear")(x)

    model, x = hk.transform(run), jnp.ones((1, 3, 6))
    weights = model.init(jax.random.key(0), x)
    mesh = tpu_mesh() if on_tpu else AbstractMesh((), ())
    with jax.sharding.use_abstract_mesh(mesh):
        found = str(jax.make_jaxpr(model.apply)(weights, None, x))
    assert found.count("optimization_barrier") == expected
