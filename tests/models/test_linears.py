"""Products of linear layers: what is computed on a TPU for a single row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from mtj_loader.models.layers.linears import contract


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
    x = jnp.asarray(np.arange(6), jnp.bfloat16).reshape(shape)
    w = jnp.asarray(np.arange(24).reshape(6, 4) - 11, jnp.bfloat16)
    w = w.T if axis else w
    assert rows_multiplied(x, w, axis) == 1
    plain = contract(x, w, axis)
    with jax.sharding.use_abstract_mesh(tpu_mesh()):
        assert rows_multiplied(x, w, axis) == 8
        padded = contract(x, w, axis)
    assert padded.shape == plain.shape == (*shape[:-1], 4)
    assert (np.asarray(padded) == np.asarray(plain)).all()


def test_several_rows_are_multiplied_as_they_are():
    x, w = jnp.zeros((2, 3, 6)), jnp.zeros((6, 4))
    with jax.sharding.use_abstract_mesh(tpu_mesh()):
        assert rows_multiplied(x, w, 0) == 6
