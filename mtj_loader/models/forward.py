"""Running a model on a mesh: logits of whole sequences, and prefill and steps with a cache.

Everything is compiled once per shape: `jax.jit` around `jax.shard_map`, with explicit shardings.
Parameters are split over "mp" and replicated over "dp"; a batch is split over "dp".

  n shards   b batch   t time   T cache length   d model   h heads of one shard   k head_dim
  r rotated dims   V padded vocabulary
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
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
from mtj_loader.models.passes import Cache
from mtj_loader.models.registry import family

_T = TypeVar("_T")
Params = dict[str, dict[str, jax.Array]]
Tree = Any  # a pytree of arrays, or of their partitions

_PARAMS = P(SHARDS)  # [n, …]
_BATCH = P("dp")  # [b, …]
_CACHE = Cache(keys=P("dp", None, SHARDS), values=P("dp", None, SHARDS), frequencies=_BATCH)


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
        ids = np.zeros((1, 1), np.int32)
        example = ids, self._frequencies(np.ones(1))

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
        frequencies = self._frequencies(np.full(len(padded), rows.shape[1]))

        def run() -> jax.Array:
            logits = self._run_whole(params, padded, frequencies)[0][: len(rows)]
            return self._replicate(logits) if self.mesh.is_multi_process else logits

        return dispatch(self.mesh, run)

    def prefill(
        self,
        params: Params,
        ids: ArrayLike,
        lengths: ArrayLike,
        totals: ArrayLike,
        cache_length: int,
    ) -> tuple[jax.Array, Cache]:
        """Runs the prompts.

        Args:
          params: with the shapes of `param_shapes`.
          ids: int32 [b, t], padded on the right; dp divides b.
          lengths: int32 [b], the tokens of each row.
          totals: [b], on the host: how many tokens each row may reach. Rotary frequencies that
            depend on the length are computed for these.
          cache_length: T, at least t.

        Returns:
          float32 [b, vocab_size], the logits after each row's last token, and the cache.
        """
        frequencies = self._frequencies(np.asarray(totals))
        return dispatch(
            self.mesh, self._run_prefill, params, ids, lengths, frequencies, cache_length
        )

    def step(
        self, params: Params, cache: Cache, tokens: ArrayLike, positions: ArrayLike
    ) -> tuple[jax.Array, Cache]:
        """Runs one more token of each row.

        Args:
          params: with the shapes of `param_shapes`.
          cache: from prefill or the last step; donated.
          tokens: int32 [b].
          positions: int32 [b], the number of tokens before each. A token beyond the cache does not
            change it.

        Returns:
          float32 [b, vocab_size], the logits after these tokens, and the cache.
        """
        return dispatch(self.mesh, self._run_step, params, cache, tokens, positions)

    def lower_prefill(
        self, params: Tree, rows: int, prompt: int, cache_length: int
    ) -> jax.stages.Lowered:
        """Lowers `prefill` before the parameters exist; compiling the result speeds up later calls.

        JAX reuses the compiled program as long as this object exists.

        Args:
          params: shapes, dtypes and shardings, from `param_shapes`.
          rows: b, a multiple of dp.
          prompt: t.
          cache_length: T, at least t.
        """
        ids, lengths = np.zeros((rows, prompt), np.int32), np.ones(rows, np.int32)
        frequencies = self._frequencies(lengths)
        return self._run_prefill.lower(params, ids, lengths, frequencies, cache_length)

    def lower_step(self, params: Tree, cache: Cache, tokens: Tree) -> jax.stages.Lowered:
        """Lowers `step` before its arrays exist; see `lower_prefill`.

        Args:
          params: shapes, dtypes and shardings, from `param_shapes`.
          cache: the same of the cache that `prefill` returns.
          tokens: the same of the tokens; positions have the same.
        """
        return self._run_step.lower(params, cache, tokens, tokens)

    @functools.cached_property
    def _run_whole(self) -> jax.stages.Wrapped:
        return self._compiled(passes.whole, (_BATCH, _BATCH), (P("dp", None, SHARDS), None))

    @functools.cached_property
    def _replicate(self) -> jax.stages.Wrapped:
        """Replicates rows, so that every host can read them."""
        return jax.jit(lambda rows: rows, out_shardings=NamedSharding(self.mesh, P()))

    @functools.cached_property
    def _run_prefill(self) -> jax.stages.Wrapped:
        outputs = P("dp", SHARDS), _CACHE
        return self._compiled(passes.prefill, (_BATCH, _BATCH, _BATCH), outputs, static_argnums=4)

    @functools.cached_property
    def _run_step(self) -> jax.stages.Wrapped:
        outputs = P("dp", SHARDS), _CACHE
        return self._compiled(passes.step, (_CACHE, _BATCH, _BATCH), outputs, donate_argnums=1)

    def _compiled(
        self, body: Callable[..., Any], inputs: tuple[Tree, ...], outputs: Tree, **options: Tree
    ) -> jax.stages.Wrapped:
        """Jits one of the `passes` for whole arrays.

        Args:
          body: what one shard computes, from the model, the inputs and static arguments.
          inputs: the partition of each input after the parameters.
          outputs: the partitions of the logits, [b, …, V], and of the cache.
          **options: static and donated arguments, for `jax.jit`.
        """
        specs = (_PARAMS, *inputs)

        def run(*args: Tree) -> tuple[jax.Array, Tree]:
            arrays, static = args[: len(specs)], args[len(specs) :]

            def shard(params: Params, *local: Tree) -> tuple[jax.Array, Tree]:
                mine = jax.tree.map(lambda x: x[0], params)
                return self._transformed(body).apply(mine, None, *local, *static)

            on_mesh = jax.shard_map(shard, mesh=self.mesh, in_specs=specs, out_specs=outputs)
            logits, cache = on_mesh(*arrays)
            return logits[..., : self.config.vocab_size], cache

        # Tokens may come from the host or from a sampler's devices: their placement is not fixed.
        placed = [None if spec == _BATCH else self._shardings(spec) for spec in specs]
        return jax.jit(
            run,
            in_shardings=tuple(placed),
            out_shardings=self._shardings((_BATCH, outputs[1])),
            **options,
        )

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

    def _shardings(self, specs: Tree) -> Tree:
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)

    def _frequencies(self, totals: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(frequency_table(rope, totals) for rope in self.config.ropes)
