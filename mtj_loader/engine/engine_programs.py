"""The compiled programs of an engine, by what they run.

They are read from a folder or compiled when they are first needed, or ahead of that by
`compile_ahead`; nothing else in an engine compiles.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Lowered

from mtj_loader.engine import device
from mtj_loader.engine.device import Extends, SlotSettings, State, Steps
from mtj_loader.engine.keys import INIT, Key
from mtj_loader.engine.sizes import Sizes
from mtj_loader.errors import ProgramError
from mtj_loader.models.layers.attend import BLOCK
from mtj_loader.models.passes import Rows
from mtj_loader.programs import Signature, StoredPrograms
from mtj_loader.sampling.result import words_of_result
from mtj_loader.sampling.row_settings import neutral_rows

Tree = Any
Program = Callable[..., Any]


def state_shapes(forward: Extends, sizes: Sizes) -> State:
    """Shape, dtype and sharding of the state's arrays."""
    total, length = sizes.total_slots, sizes.cache_length(BLOCK)
    rows = partial(_shape, NamedSharding(forward.mesh, P("dp")))
    return State(
        cache=forward.cache_shapes(total, length),
        tokens=rows((total, length), np.int32),
        logits=rows((total, forward.config.vocab_size), np.float32),
        mu=rows((total,), np.float32),
    )


def neutral_settings(forward: Extends, sizes: Sizes) -> SlotSettings:
    """Numpy arrays for the settings of all slots, to be written to."""
    total = sizes.total_slots
    sampling = neutral_rows(total, vocab_size=forward.config.vocab_size)
    return SlotSettings(sampling, forward.frequencies([1] * total))


class Programs:
    """The compiled programs of a model, for engines of any sizes; any thread may use them.

    Args:
      forward: the model.
      params: its parameters, or their shapes, dtypes and shardings.

    Attributes:
      unreadable: why a stored program was compiled instead.
    """

    def __init__(self, forward: Extends, params: Tree) -> None:
        self.forward = forward
        self._params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
        )
        self._lock = threading.Lock()
        self._compiled: dict[tuple[Sizes, Key], Future[Program]] = {}
        self._stored: dict[Sizes, StoredPrograms] = {}
        self.unreadable: dict[Key, ProgramError] = {}

    def get(self, sizes: Sizes, key: Key) -> Program:
        """The compiled program; reads or compiles it, or waits for another thread that does."""
        future, mine = self._claim(sizes, key)
        if mine:
            self._fill(future, sizes, key, lambda: self._make(sizes, key))
        return future.result()

    def use_stored(self, sizes: Sizes, stored: StoredPrograms) -> None:
        """Has programs of these sizes read, where they are stored, instead of compiled.

        The caller has compared the facts.
        """
        self._stored[sizes] = stored

    def is_stored(self, sizes: Sizes, key: Key) -> bool:
        """Whether the program can be read instead of compiled."""
        return sizes in self._stored and str(key) in self._stored[sizes].records

    def is_ready(self, sizes: Sizes, key: Key) -> bool:
        """Whether the program can run without being compiled."""
        future = self._compiled.get((sizes, key))
        if future is None:
            return self.is_stored(sizes, key)
        return future.done() and future.exception() is None

    def put(self, sizes: Sizes, key: Key, make: Callable[[], Program]) -> None:
        """Adds a program that `make` compiles or reads, unless it is there or being made.

        Raises:
          Exception: what `make` raised; the program is then compiled when it is needed.
        """
        future, mine = self._claim(sizes, key)
        if mine:
            self._fill(future, sizes, key, make)
        future.result()

    def discard(self, sizes: Sizes, key: Key) -> None:
        """Forgets a program; it is compiled again when it is needed."""
        with self._lock:
            self._compiled.pop((sizes, key), None)

    def lower(self, sizes: Sizes, key: Key) -> Lowered:
        """Traces a program."""
        body, signature = self._describe(sizes, key)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, signature.results)
        program = jax.jit(body, donate_argnums=signature.donate_argnums, out_shardings=shardings)
        return program.lower(*signature.args)

    def signature(self, sizes: Sizes, key: Key) -> Signature:
        """What a program takes and returns; nothing is traced."""
        return self._describe(sizes, key)[1]

    def _make(self, sizes: Sizes, key: Key) -> Program:
        if self.is_stored(sizes, key):
            try:
                return self._stored[sizes].load(str(key), self.signature(sizes, key))
            except ProgramError as error:
                self.unreadable[key] = error
        return self.lower(sizes, key).compile()

    def _claim(self, sizes: Sizes, key: Key) -> tuple[Future[Program], bool]:
        with self._lock:
            found = self._compiled.get((sizes, key))
            if found is not None:
                return found, False
            mine: Future[Program] = Future()
            self._compiled[sizes, key] = mine
            return mine, True

    def _fill(
        self, future: Future[Program], sizes: Sizes, key: Key, make: Callable[[], Program]
    ) -> None:
        try:
            future.set_result(make())
        except BaseException as error:  # noqa: BLE001 -- another thread may be waiting
            self.discard(sizes, key)
            future.set_exception(error)

    def _describe(self, sizes: Sizes, key: Key) -> tuple[Program, Signature]:
        """The function of a program, and what it takes and returns."""
        forward, state = self.forward, state_shapes(self.forward, sizes)
        if key == INIT:
            return partial(_make_zeros, state), Signature((), state)
        settings = jax.tree.map(self._of_slots, neutral_settings(forward, sizes))
        count = sizes.groups * key.rows
        numbers = self._shape((count,))
        steps = Steps(numbers, numbers, numbers, numbers)
        packed = self._shape((key.tokens, count, words_of_result(forward.config.vocab_size)))
        if key.kind == "choose":
            changing = state.tokens, state.mu
            allowed = self._shape((count, -(-forward.config.vocab_size // 32)), np.uint32)
            arguments = *changing, state.logits, settings.sampling, steps, allowed
            body = partial(device.choose, forward)
            return body, Signature(arguments, (changing, packed), donate_argnums=(0, 1))
        common = self._params, state, settings

        def replacing_state(body: Program, arguments: tuple[Tree, ...], result: Tree) -> Any:  # noqa: ANN401
            signature = Signature((*common, *arguments), (state, result), donate_argnums=(1,))
            return partial(body, forward), signature

        if key.kind == "decode":
            return replacing_state(partial(device.decode, count=key.tokens), (steps,), packed)
        if key.kind == "step":
            return replacing_state(device.step, (steps,), numbers)
        rows = Rows(self._shape((count, key.tokens)), numbers, numbers, (), numbers)
        if key.kind == "score":
            return replacing_state(device.score, (rows, rows.tokens), packed)
        return replacing_state(device.prefill, (rows,), numbers)

    def _shape(self, shape: tuple[int, ...], dtype: type = np.int32) -> jax.ShapeDtypeStruct:
        """A small array that comes from the host, which all devices get."""
        return _shape(NamedSharding(self.forward.mesh, P()), shape, dtype)

    def _of_slots(self, array: np.ndarray) -> jax.ShapeDtypeStruct:
        return _shape(NamedSharding(self.forward.mesh, P("dp")), array.shape, array.dtype)


def _make_zeros(shapes: Tree) -> Tree:
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


def _shape(sharding: NamedSharding, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:  # noqa: ANN401
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
