"""Token embedding with learned or sinusoidal positions, and the projection to the vocabulary.

n shards   b batch   t time   p positions   d model   e embedding   V padded vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtj_loader.models.layers.linears import (
    SHARDS,
    Linear,
    ParameterizedModule,
    add_residual,
    contract,
    gather_columns,
    soft_cap,
)
from mtj_loader.models.layers.positions import Positions
from mtj_loader.models.parameter_table import ParameterBuilder

_WAVELENGTHS = 10_000.0  # ratio of the longest to the shortest (Vaswani et al., 2017)
FAIRSEQ_OFFSET = 2  # fairseq's first position is padding_idx + 1, and its padding_idx is 1
MIN_SINUSOIDAL_WIDTH = 4  # the frequencies' exponent divides by width/2 − 1


class _Table(ParameterizedModule):
    """The rows of the vocabulary that this shard holds."""

    def __init__(self, params: ParameterBuilder, name: str) -> None:
        super().__init__(params, name)
        self.declare("w", "V e", "V")

    def __call__(self) -> jax.Array:  # [V/n, e]
        return self.parameter("w")


class Embedding(ParameterizedModule):
    """Token embedding, rows of the vocabulary split over the shards.

    Args:
      params: where parameters are declared.
      scale: what enters the first layer is multiplied by this, rounded to the parameters' dtype.
      name: of the module.
    """

    def __init__(self, params: ParameterBuilder, name: str, *, scale: float = 1.0) -> None:
        super().__init__(params, name)
        self._scale = scale
        self.table = _Table(params, name="linear")

    def __call__(self, ids: jax.Array, positions: Positions) -> jax.Array:
        """What enters the first layer.

        Args:
          ids: int32 [b, t].
          positions: of these tokens; used by families whose positions are added here.

        Returns:
          [b, t, d].
        """
        tokens = self.tokens(ids)
        return tokens if self._scale == 1 else tokens * jnp.asarray(self._scale, tokens.dtype)

    def tokens(self, ids: jax.Array) -> jax.Array:  # int32 [b, t] -> [b, t, e]
        """The rows of these tokens."""
        table = self.table()
        row = ids - jax.lax.axis_index(SHARDS) * table.shape[0]
        own = (row >= 0) & (row < table.shape[0])
        found = jnp.where(own[..., None], table[jnp.where(own, row, 0)], 0)
        return jax.lax.psum(found, SHARDS)  # exact in any dtype: all terms but one are zero

    def attend(self, x: jax.Array) -> jax.Array:  # [..., e] -> float32 [..., V/n]
        """Logits of this shard's tokens with the table as projection (tied embeddings)."""
        return contract(x, self.table(), 1)


class PositionedEmbedding(Embedding):
    """Token embedding plus learned positions, whose columns are split as in MTJ; for d = e."""

    def __init__(self, params: ParameterBuilder, name: str) -> None:
        super().__init__(params, name)
        self.declare("pos_embs", "p d", "d")

    def __call__(self, ids: jax.Array, positions: Positions) -> jax.Array:  # [b, t, d]
        """The tokens plus their positions."""
        rows = gather_columns(self.position_columns(positions))
        return add_residual(self.tokens(ids), rows.astype(jnp.float32))

    def position_columns(self, positions: Positions) -> jax.Array:  # [b or 1, t, d/n]
        """This shard's columns of the rows of these positions."""
        return self.parameter("pos_embs")[positions.queries]


class ProjectedEmbedding(PositionedEmbedding):
    """Tokens projected from e to d, plus positions."""

    def __init__(self, params: ParameterBuilder, name: str) -> None:
        super().__init__(params, name)
        self.declare_matrix("project_in", ins="e", outs="d", split="d")

    def __call__(self, ids: jax.Array, positions: Positions) -> jax.Array:  # [b, t, d]
        """The projected tokens plus their positions."""
        tokens = self.tokens(ids)  # [b, t, e]
        columns = self.matmul(tokens, "project_in")  # float32 [b, t, d/n]
        columns = columns + self.position_columns(positions)
        return gather_columns(columns.astype(tokens.dtype))


def sinusoids(positions: jax.Array, width: int, pad_token_id: int) -> jax.Array:
    """Sinusoidal positions as in fairseq and tensor2tensor: sines, then cosines.

    Frequencies are 10000^(-i / (width/2 − 1)); an odd width ends in a zero. The row of fairseq's
    padding index is zero.

    Args:
      positions: int32 [b or 1, t], counted from 0.
      width: d, at least MIN_SINUSOIDAL_WIDTH.
      pad_token_id: fairseq's padding index, counted with its offset.

    Returns:
      float32 [b or 1, t, width].
    """
    half = width // 2
    exponents = np.arange(half, dtype=np.float32)
    frequencies = np.exp(exponents * np.float32(-math.log(_WAVELENGTHS) / (half - 1)))
    rows = positions[..., None] + FAIRSEQ_OFFSET
    angles = rows.astype(jnp.float32) * frequencies
    odd = jnp.zeros((*positions.shape, width % 2), jnp.float32)
    table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles), odd], axis=-1)
    return jnp.where(rows == pad_token_id, 0, table)


class _TiedLinear(ParameterizedModule):
    """The embedding's table as projection, with its own bias if there is one."""

    def __init__(
        self, params: ParameterBuilder, embedding: Embedding, *, bias: bool, name: str
    ) -> None:
        super().__init__(params, name)
        self._embedding = embedding
        if bias:
            self.declare("b", "V", "V")

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., e] -> float32 [..., V/n]
        y, b = self._embedding.attend(x), self.parameter32("b")
        return y if b is None else y + b


class Projection(ParameterizedModule):
    """The final norm, then the logits of this shard's tokens.

    Args:
      params: where parameters are declared.
      norm: creates the final norm under the name it is given; None for a model without one.
      tied_to: the embedding whose table is the projection; None if it has weights of its own.
      bias: whether the projection has a bias.
      scale: the logits are multiplied by this.
      cap: the soft bound of the logits; None for no bound.
      name: of the module.
    """

    def __init__(
        self,
        params: ParameterBuilder,
        *,
        norm: Callable[..., Callable[[jax.Array], jax.Array]] | None,
        tied_to: Embedding | None,
        bias: bool = False,
        scale: float = 1.0,
        cap: float | None = None,
        name: str,
    ) -> None:
        super().__init__(params, name)
        self._scale, self._cap = scale, cap
        self.norm = (lambda x: x) if norm is None else norm(name="replicated_layer_norm")
        if tied_to is None:
            self.linear = Linear(params, "e", "V", split="V", bias=bias, name="linear")
        else:
            self.linear = _TiedLinear(params, tied_to, bias=bias, name="linear")

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., d] -> float32 [..., V/n]
        """The logits, those of the padding included."""
        logits = self.linear(self.before_logits(self.norm(x)))
        return soft_cap(logits if self._scale == 1 else logits * self._scale, self._cap)

    def before_logits(self, x: jax.Array) -> jax.Array:  # [..., d] -> [..., e]
        """The input of the projection."""
        return x


class ProjectedProjection(Projection):
    """Projects the stream from d to e before the logits."""

    def __init__(self, params: ParameterBuilder, **options: Any) -> None:  # noqa: ANN401
        super().__init__(params, **options)
        self.declare_matrix("project_out", ins="d", outs="e", split="e")

    def before_logits(self, x: jax.Array) -> jax.Array:  # [..., d] -> [..., e]
        """The input of the projection."""
        columns = self.matmul(x, "project_out")  # float32 [..., e/n]
        return gather_columns(columns.astype(x.dtype))
