"""Linear layers, and the base of all modules with parameters. Each computes one shard's part.

Modules run inside `jax.shard_map` over the mesh axis "mp". Products accumulate in float32 with
`Precision.HIGHEST`. A linear layer returns that float32 result; the caller casts it to the
parameters' dtype once, after the sum over shards if there is one.

  n shards   d model   i inputs   o outputs   b batch   t time
"""

from __future__ import annotations

import haiku as hk
import jax
import jax.numpy as jnp

from mtj_loader.models.parameter_table import ParameterBuilder
from mtj_loader.parameters import ParamSpec

SHARDS = "mp"  # the mesh axis over which parameters are split

# XLA multiplies a single row on the vector unit of a TPU, which takes four times as long as reading
# the weights. With several rows it uses the matrix unit; it pads to 8 anyway.
TPU_ROWS = 8
# On CPUs, XLA converts bfloat16 weights to float32 for a single row, and not for several.
_CPU_ROWS = 2


class ParameterizedModule(hk.Module):
    """A module that declares its parameters in `__init__`, with `declare` or `declare_matrix`."""

    def __init__(self, params: ParameterBuilder, name: str) -> None:
        super().__init__(name=name)
        self._params = params
        self._specs: dict[str, ParamSpec] = {}

    def declare(self, param: str, pattern: str, split: str | None = None) -> None:
        """Declares a parameter; see `ParameterBuilder.declare`."""
        self._specs[param] = self._params.declare(self.module_name, param, pattern, split)

    def declare_matrix(
        self, param: str, *, ins: str, outs: str, split: str | None, stack: str = ""
    ) -> None:
        """Declares a linear weight; see `ParameterBuilder.declare_matrix`."""
        self._specs[param] = self._params.declare_matrix(
            self.module_name, param, ins=ins, outs=outs, split=split, stack=stack
        )

    def parameter(self, name: str) -> jax.Array:
        """The parameter, in the shape that one shard holds."""
        shape = self._specs[name].shard_shape(self._params.shards)
        # Only the shape of the initial value is ever used: values come from a checkpoint.
        return hk.get_parameter(name, shape, self._params.dtype, init=jnp.zeros)

    def parameter32(self, name: str) -> jax.Array | None:
        """The parameter in float32; None if it is not declared."""
        return self.parameter(name).astype(jnp.float32) if name in self._specs else None

    def matmul(self, x: jax.Array, name: str) -> jax.Array:  # [..., i] -> float32 [..., o]
        """The product with a linear weight."""
        return contract(x, self.parameter(name), self.inputs_axis)

    @property
    def inputs_axis(self) -> int:
        """The axis of linear weights that is contracted with the inputs."""
        return 1 if self._params.transposed_linear else 0


class Linear(ParameterizedModule):
    """A linear layer over one shard's inputs or outputs.

    With its outputs split (column-parallel), the result is the shard's columns. With its inputs
    split (row-parallel), the result is a term of a sum that `sum_over_shards` completes. That sum
    adds the bias n times, so the loader divides it by n.

    Args:
      params: where parameters are declared.
      ins: axes of the inputs, such as "d".
      outs: axes of the outputs, such as "(h 3 k)".
      split: the axis that is split over the shards.
      bias: whether there is a bias.
      name: of the module.
    """

    def __init__(
        self, params: ParameterBuilder, ins: str, outs: str, *, split: str, bias: bool, name: str
    ) -> None:
        super().__init__(params, name)
        self._has_heads = " " in outs  # the caller takes the outputs apart
        self.declare_matrix("w", ins=ins, outs=outs, split=split)
        if bias:
            column_parallel = split in outs.strip("()").split()
            self.declare("b", outs, split if column_parallel else None)

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., i] -> float32 [..., o]
        """The shard's columns, or its term of the sum."""
        y, b = self.matmul(x, "w"), self.parameter32("b")
        y = y if b is None else y + b
        # XLA for TPUs would take the weight apart instead, and copy it to do so.
        return jax.lax.optimization_barrier(y) if self._has_heads and on_tpu() else y


def contract(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:  # [..., i] -> float32 [..., o]
    """The product of the last axis of `x` with one axis of the matrix `w`."""
    if x.size == x.shape[-1] and (on_tpu() or w.dtype == jnp.bfloat16):
        return _padded_product(x, w, axis, TPU_ROWS if on_tpu() else _CPU_ROWS)
    return _product(x, w, axis)


def on_tpu() -> bool:
    """Whether the program is traced for TPU devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "tpu"


def _product(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dot_general(
        x,
        w,
        (((x.ndim - 1,), (axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _padded_product(x: jax.Array, w: jax.Array, axis: int, rows: int) -> jax.Array:
    """The product of a single row, as the first of several."""
    padded = jnp.pad(x.reshape(1, -1), ((0, rows - 1), (0, 0)))
    return _product(padded, w, axis)[0].reshape(*x.shape[:-1], -1)


def sum_over_shards(x: jax.Array) -> jax.Array:  # float32 [..., d] -> float32 [..., d]
    """Completes a row-parallel product."""
    return jax.lax.psum(x, SHARDS)


def gather_columns(x: jax.Array) -> jax.Array:  # [..., d/n] -> [..., d]
    """Concatenates the columns of all shards."""
    return jax.lax.all_gather(x, SHARDS, axis=x.ndim - 1, tiled=True)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:  # float32 -> float32
    """Returns cap · tanh(x / cap) (Bello et al., 2016, arXiv:1611.09940); x without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def add_residual(x: jax.Array, y: jax.Array) -> jax.Array:  # [b, t, d], float32 [b, t, d]
    """Adds to the residual stream in float32 and rounds once."""
    return (x.astype(jnp.float32) + y).astype(x.dtype)
