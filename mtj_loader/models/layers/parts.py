"""The Haiku modules that families are composed of. Each computes one shard's part.

They run inside `jax.shard_map` over the mesh axis "mp". Numbers: products accumulate in float32
and name `Precision.HIGHEST`; what a linear layer returns is that float32 accumulator, which is
cast to the parameters' dtype once, by the caller, after the sum over shards where there is one.

  n shards   d model   e embedding   V padded vocabulary   i inputs   o outputs   b batch   t time
"""

from __future__ import annotations

from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp

from mtj_loader.models.parameter_table import Declared

SHARDS = "mp"  # the mesh axis over which parameters are split


class Part(hk.Module):
    """A module with the parameters that are declared for its path, and no others."""

    def __init__(self, declared: Declared, name: str) -> None:
        super().__init__(name=name)
        self._declared = declared

    def parameter(self, name: str) -> jax.Array:
        """The parameter, in the shape that one shard holds."""
        shape = self._declared.shapes[self.module_name][name]
        # Only the shape of what init returns is ever used: values come from a checkpoint.
        return hk.get_parameter(name, shape, self._declared.dtype, init=jnp.zeros)

    def optional(self, name: str) -> jax.Array | None:
        """The parameter, or None where it is not declared."""
        declared = self._declared.shapes.get(self.module_name, {})
        return self.parameter(name) if name in declared else None

    def matrix(self, name: str, x: jax.Array) -> jax.Array:  # [..., i] -> float32 [..., o]
        """The product with a weight that is kept as the layout of linear weights says."""
        return contract(x, self.parameter(name), 1 if self._declared.transposed_linear else 0)


class LayerNorm(Part):
    """Layer normalization (Ba et al., 2016, arXiv:1607.06450), computed in float32.

    Scale and offset are applied where they are declared.
    """

    def __init__(self, declared: Declared, eps: float, name: str) -> None:
        super().__init__(declared, name)
        self._eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., d] -> [..., d]
        """Normalizes the last axis."""
        x32 = x.astype(jnp.float32)
        centered = x32 - self.mean(x32)
        y = centered * jax.lax.rsqrt(self.mean(jnp.square(centered)) + self._eps)
        scale, offset = self.optional("scale"), self.optional("offset")
        y = y if scale is None else y * scale.astype(jnp.float32)
        y = y if offset is None else y + offset.astype(jnp.float32)
        return y.astype(x.dtype)

    def mean(self, x: jax.Array) -> jax.Array:  # float32 [..., d] -> float32 [..., 1]
        """The mean over what is normalized."""
        return jnp.mean(x, axis=-1, keepdims=True)


class SplitLayerNorm(LayerNorm):
    """Layer normalization of a width that is split over the shards, with statistics of all of it.

    As the input, scale and offset are split.
    """

    def mean(self, x: jax.Array) -> jax.Array:  # float32 [..., d/n] -> float32 [..., 1]
        """The mean over the parts of all shards, which are equally wide."""
        return jax.lax.pmean(super().mean(x), SHARDS)


class RMSNorm(Part):
    """Root mean square normalization (Zhang and Sennrich, 2019, arXiv:1910.07467), in float32."""

    def __init__(self, declared: Declared, eps: float, name: str) -> None:
        super().__init__(declared, name)
        self._eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., d] -> [..., d]
        """Normalizes the last axis."""
        x32 = x.astype(jnp.float32)
        square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        scale = self.parameter("scale").astype(jnp.float32)
        return (x32 * jax.lax.rsqrt(square + self._eps) * scale).astype(x.dtype)


class Linear(Part):
    """A linear layer over one shard's inputs or outputs; which of them are split is declared.

    Column-parallel (outputs split), the result is the shard's columns. Row-parallel (inputs
    split), it is a term of a sum that `sum_over_shards` completes, the bias included: every shard
    holds bias / n.
    """

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., i] -> float32 [..., o]
        """The shard's columns, or its term of the sum; not rounded yet."""
        y, b = self.matrix("w", x), self.optional("b")
        return y if b is None else y + b.astype(jnp.float32)


class _Table(Part):
    """The rows of the vocabulary that this shard holds."""

    def __call__(self) -> jax.Array:  # [V/n, e]
        return self.parameter("w")


class Embedding(Part):
    """Token embedding, rows of the vocabulary split over the shards."""

    def __init__(self, declared: Declared, name: str) -> None:
        super().__init__(declared, name)
        self.table = _Table(declared, name="linear")

    def __call__(self, ids: jax.Array) -> jax.Array:  # int32 [b, t] -> [b, t, e]
        """The rows of these tokens."""
        table = self.table()
        row = ids - jax.lax.axis_index(SHARDS) * table.shape[0]
        own = (row >= 0) & (row < table.shape[0])
        found = jnp.where(own[..., None], table[jnp.where(own, row, 0)], 0)
        return jax.lax.psum(found, SHARDS)  # exact in any dtype: all terms but one are zero

    def attend(self, x: jax.Array) -> jax.Array:  # [..., e] -> float32 [..., V/n]
        """Logits of this shard's tokens with the table as projection (tied embeddings)."""
        return contract(x, self.table(), 1)


class _TiedLinear(Part):
    """The embedding's table as projection, with a bias of its own where one is declared."""

    def __init__(self, declared: Declared, embedding: Embedding, name: str) -> None:
        super().__init__(declared, name)
        self._embedding = embedding

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., e] -> float32 [..., V/n]
        y, b = self._embedding.attend(x), self.optional("b")
        return y if b is None else y + b.astype(jnp.float32)


class Projection(Part):
    """The final norm, then the logits of this shard's tokens.

    Args:
      norm: creates the final norm under the name it is given.
      tied_to: the embedding whose table is the projection; None where it has weights of its own.
    """

    def __init__(
        self,
        declared: Declared,
        *,
        norm: Callable[..., Callable[[jax.Array], jax.Array]],
        tied_to: Embedding | None,
        name: str,
    ) -> None:
        super().__init__(declared, name)
        self.norm = norm(name="replicated_layer_norm")
        if tied_to is None:
            self.logits = Linear(declared, name="linear")
        else:
            self.logits = _TiedLinear(declared, tied_to, name="linear")

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., d] -> float32 [..., V/n]
        """The logits, those of the padding included."""
        return self.logits(self.norm(x))


def contract(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:  # [..., i] -> float32 [..., o]
    """The product of the last axis of `x` with one axis of the matrix `w`."""
    return jax.lax.dot_general(
        x,
        w,
        (((x.ndim - 1,), (axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def sum_over_shards(x: jax.Array) -> jax.Array:  # float32 [..., d] -> float32 [..., d]
    """Completes a row-parallel product."""
    return jax.lax.psum(x, SHARDS)


def gather_columns(x: jax.Array) -> jax.Array:  # [..., d/n] -> [..., d]
    """Puts the columns of all shards side by side."""
    return jax.lax.all_gather(x, SHARDS, axis=x.ndim - 1, tiled=True)


def add_residual(x: jax.Array, y: jax.Array) -> jax.Array:  # [b, t, d], float32 [b, t, d]
    """Adds to the residual stream: in float32, rounded once."""
    return (x.astype(jnp.float32) + y).astype(x.dtype)
