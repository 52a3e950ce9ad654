"""Running a model on a mesh: logits of whole sequences, and more tokens of cached sequences.

Everything is `jax.jit` around `jax.shard_map`, with explicit shardings. Parameters are split over
"mp" and replicated over "dp"; sequences are split over "dp".

  n shards   S slots   b rows   t time   T cache length   g KV heads   k head_dim   r rotated dims
  V padded vocabulary
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import haiku as hk
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import ArrayLike

from mtj_loader.models import passes
from mtj_loader.models.config import ModelConfig
from mtj_loader.models.layers.linears import SHARDS
from mtj_loader.models.layers.rope import frequency_table
from mtj_loader.models.parameter_table import ParameterBuilder
from mtj_loader.models.passes import Cache, Rows
from mtj_loader.models.registry import family

_T = TypeVar("_T")
Params = dict[str, dict[str, jax.Array]]
Tree = Any  # a pytree of arrays, or of their partitions

_PARAMS = P(SHARDS)  # [n, …]
_ROWS = P("dp")  # [b, …]
_HEADS = P("dp", SHARDS)  # [S, g, T, k]
_LOGITS = P("dp", SHARDS)  # [b, V]

_dispatch_lock = threading.Lock()


def dispatch(mesh: Mesh, program: Callable[..., _T], *args: Tree) -> _T:
    """Runs a program on the devices of a mesh, from any thread.

    The devices must run the programs of all threads in the same order: two programs whose
    collectives wait for each other never end. So threads start them one after another. CPU devices
    of one process share a pool of threads, which waiting programs could use up, so there one has to
    end before the next one starts.

    Args:
      mesh: the devices.
      program: a compiled function.
      args: its arguments.
    """
    with _dispatch_lock:
        result = program(*args)
        on_cpus = mesh.devices.flat[0].platform == "cpu"
        if on_cpus and mesh.size > 1 and not mesh.is_multi_process:
            jax.block_until_ready(result)
        return result


@dataclass(frozen=True)
class Forward:
    """A model as compiled functions; it holds no weights.

    Attributes:
      config: of any family.
      mesh: with the Auto axes "dp" and "mp".
      transposed_linear: whether linear weights are [out, in].
      dtype: of the parameters, the residual stream and the cache.
    """

    config: ModelConfig
    mesh: Mesh
    transposed_linear: bool
    dtype: np.dtype

    def param_shapes(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Shape, dtype and sharding of every parameter, [n, …], from Haiku's init."""
        example = np.zeros((1, 1), np.int32), self.frequencies([1])

        def init() -> hk.MutableParams:
            return jax.tree.map(
                lambda x: x[None], self._transformed(passes.whole).init(None, *example)
            )

        sharding = NamedSharding(self.mesh, _PARAMS)
        placed = jax.shard_map(init, mesh=self.mesh, in_specs=(), out_specs=_PARAMS)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            jax.eval_shape(placed),
        )

    def cache_shapes(self, slots: int, length: int) -> Cache:
        """Shape, dtype and sharding of the cache's arrays, [S, g, T, k].

        Args:
          slots: S, a multiple of dp.
          length: T; if it is more than `attend.BLOCK`, a multiple of it.
        """
        config, shards = self.config, self.mesh.shape[SHARDS]
        heads = shards * max(1, config.n_kv_heads // shards)  # shared heads are in every shard
        sharding = NamedSharding(self.mesh, _HEADS)
        shape = slots, heads, length, config.head_dim
        layer = jax.ShapeDtypeStruct(shape, self.dtype, sharding=sharding)
        return Cache([layer] * config.layers, [layer] * config.layers)

    def logits(self, params: Params, ids: ArrayLike) -> jax.Array:
        """Logits of whole sequences.

        Args:
          params: with the shapes of `param_shapes`.
          ids: [b, t], any b.

        Returns:
          float32 [b, t, vocab_size].
        """
        rows = np.asarray(ids, np.int32)
        padded = np.pad(rows, ((0, -len(rows) % self.mesh.shape["dp"]), (0, 0)))
        frequencies = self.frequencies([rows.shape[1]] * len(padded))

        def run() -> jax.Array:
            logits = self._run_whole(params, padded, frequencies)[: len(rows)]
            return self._replicate(logits) if self.mesh.is_multi_process else logits

        return dispatch(self.mesh, run)

    def extend(self, params: Params, cache: Cache, rows: Rows) -> tuple[jax.Array, Cache]:
        """Runs more tokens of sequences that are in the cache; to be called inside `jax.jit`.

        Args:
          params: with the shapes of `param_shapes`.
          cache: with the shapes of `cache_shapes`.
          rows: as many for each group of dp; slots are counted within their group.

        Returns:
          float32 [b, vocab_size], the logits after each row's last token, and the cache.
        """
        return self._extend(passes.extend_last, _LOGITS, params, cache, rows)

    def extend_all(self, params: Params, cache: Cache, rows: Rows) -> tuple[jax.Array, Cache]:
        """Like `extend`, with the logits after every token, float32 [b, t, vocab_size]."""
        return self._extend(passes.extend_all, P("dp", None, SHARDS), params, cache, rows)

    def frequencies(self, totals: Sequence[int]) -> tuple[np.ndarray, ...]:
        """The inverse frequencies of each rotary embedding, float32 [b, r/2].

        Args:
          totals: how many tokens each row may reach; some frequencies depend on it.
        """
        return tuple(frequency_table(rope, totals) for rope in self.config.ropes)

    def _extend(
        self, body: Callable[..., Any], logits: P, params: Params, cache: Cache, rows: Rows
    ) -> tuple[jax.Array, Cache]:
        heads = jax.tree.map(lambda _: _HEADS, cache)
        inputs = heads, jax.tree.map(lambda _: _ROWS, rows)
        found, cache = self._on_mesh(body, inputs, (logits, heads))(params, cache, rows)
        return found[..., : self.config.vocab_size], cache

    @functools.cached_property
    def _run_whole(self) -> jax.stages.Wrapped:
        run = self._on_mesh(passes.whole, (_ROWS, _ROWS), P("dp", None, SHARDS))

        def logits(*args: Tree) -> jax.Array:
            return run(*args)[..., : self.config.vocab_size]

        split = [NamedSharding(self.mesh, spec) for spec in (_PARAMS, _ROWS)]
        return jax.jit(logits, in_shardings=(split[0], None, None), out_shardings=split[1])

    @functools.cached_property
    def _replicate(self) -> jax.stages.Wrapped:
        """Replicates rows, so that every host can read them."""
        return jax.jit(lambda rows: rows, out_shardings=NamedSharding(self.mesh, P()))

    def _on_mesh(
        self, body: Callable[..., Any], inputs: tuple[Tree, ...], outputs: Tree
    ) -> Callable[..., Any]:
        """One of the `passes`, as a function of whole arrays.

        Args:
          body: what one shard computes, from the model and the inputs.
          inputs: the partition of each input after the parameters.
          outputs: the partitions of the results.
        """

        def shard(params: Params, *local: Tree) -> Tree:
            mine = jax.tree.map(lambda x: x[0], params)
            return self._transformed(body).apply(mine, None, *local)

        specs = (_PARAMS, *inputs)
        return jax.shard_map(shard, mesh=self.mesh, in_specs=specs, out_specs=outputs)

    def _transformed(self, body: Callable[..., Any]) -> hk.Transformed:
        """The body as a pair of pure functions, applied to this family's model."""
        make_model = family(self.config.model_type).make_model
        shards = self.mesh.shape[SHARDS]
        sizes = self.config.axis_sizes(shards)

        def run(*args: Tree) -> Tree:
            params = ParameterBuilder(sizes, shards, self.transposed_linear, self.dtype)
            with hk.config.context(module_auto_repr=False):  # nobody reads the texts
                return body(make_model(self.config, params), *args)

        return hk.transform(run)
