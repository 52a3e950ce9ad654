"""The engine's arrays on the devices, and the calls of programs on them.

Axes: S slots, b rows, t tokens of a chunk, k steps, W = ceil(V / 32) words of a bitmask, p words
of a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtj_loader.engine.device import SlotSettings, State, Steps, Tree
from mtj_loader.engine.engine_programs import Programs, neutral_settings, state_shapes
from mtj_loader.engine.keys import INIT, Key, choose_key, prefill_key, round_key, step_key
from mtj_loader.engine.scheduler import Prefill, Slot, TokenSequence
from mtj_loader.engine.sizes import Sizes
from mtj_loader.models.forward import dispatch
from mtj_loader.models.passes import Rows
from mtj_loader.sampling.row_settings import RowSettings

_ALL_TOKENS = np.uint32(0xFFFFFFFF)  # a word of a bitmask


@dataclass(frozen=True)
class Turn:
    """A sequence that chooses its next token.

    Attributes:
      slot: of the sequence.
      length: of the sequence.
      chosen: how many tokens were chosen for it before.
      allowed: uint32 [W], the tokens that may be chosen; None for all.
    """

    slot: Slot
    length: int
    chosen: int
    allowed: np.ndarray | None = None


class DeviceState:
    """The state of the slots on the devices.

    Args:
      programs: of the model.
      params: its parameters.
      sizes: the state's sizes; nothing is allocated before it is needed.
    """

    def __init__(self, programs: Programs, params: object, sizes: Sizes) -> None:
        self.sizes = sizes
        self._programs, self._params = programs, params
        self._state: State | None = None
        self._settings = neutral_settings(programs.forward, sizes)  # on the host
        self._placed: SlotSettings | None = None  # the same on the devices
        self._no_masks: dict[int, jax.Array] = {}  # for each number of rows

    @property
    def empty(self) -> bool:
        """Whether nothing is allocated."""
        return self._state is None

    def reset(self) -> None:
        """Frees the arrays."""
        self._state = None

    def resize(self, sizes: Sizes) -> None:
        """Makes the arrays, or moves what they hold to larger ones."""
        forward = self._programs.forward
        shapes, old = state_shapes(forward, sizes), self._state
        if old is None:
            self._state = dispatch(forward.mesh, self._programs.get(sizes, INIT))
        elif sizes != self.sizes:
            self._state = jax.tree.map(lambda x, shape: _enlarge(x, shape, sizes), old, shapes)
        if sizes != self.sizes:
            settings, former = neutral_settings(forward, sizes), self._settings
            jax.tree.map(lambda new, x: _copy_slots(new, x, sizes.groups), settings, former)
            self._settings, self._placed = settings, None
        self.sizes = sizes

    def place(self, slot: Slot, sampling: RowSettings, frequencies: tuple[np.ndarray, ...]) -> None:
        """Sets what the request in a slot asks for.

        Args:
          slot: of the request.
          sampling: arrays without the axis b.
          frequencies: of each rotary embedding, float32 [1, r/2].
        """
        row = slot.group * self.sizes.slots + slot.index
        new = SlotSettings(sampling, tuple(x[0] for x in frequencies))

        def write(all_rows: np.ndarray, one: np.ndarray) -> None:
            all_rows[row] = one

        jax.tree.map(write, self._settings, new)
        self._placed = None

    def prefill(self, action: Prefill) -> tuple[jax.Array, tuple[int, ...]]:
        """Runs a part of some prompts.

        Returns:
          What is ready when they ran; with scores, int32 [t, b, p]. And the rows of the parts.
        """
        chunk, sequences = action.chunk, [part.sequence for part in action.parts]
        count = self.sizes.groups * chunk.rows
        rows = self._rows([_slot(sequence) for sequence in sequences], chunk.rows)
        tokens, following = np.zeros((2, count, chunk.tokens), np.int32)
        starts, counts, slots = np.zeros((3, count), np.int32)
        for row, part in zip(rows, action.parts, strict=True):
            prompt, end = part.sequence.prompt, part.start + part.count
            tokens[row, : part.count] = prompt[part.start : end]
            after = prompt[part.start + 1 : end + 1]
            following[row, : len(after)] = after
            starts[row], counts[row] = part.start, part.count
            slots[row] = _slot(part.sequence).index
        arrays = Rows(tokens, starts, counts, (), slots)
        optional = (following,) if action.scored else ()
        key = prefill_key(chunk, scored=action.scored)
        return self._run(key, arrays, *optional), rows

    def step(self, width: int, turns: Sequence[Turn]) -> None:
        """Runs the last tokens of sequences, at most `width` of each group."""
        self._run(step_key(width), self._steps(turns, self._rows_of(turns, width), width))

    def choose(self, width: int, turns: Sequence[Turn]) -> tuple[jax.Array, tuple[int, ...]]:
        """Chooses the next tokens after what ran last.

        Args:
          width: the rows for each group, at least as many as it has turns.
          turns: of the sequences.

        Returns:
          Results, int32 [1, b, p], and the rows of the turns.
        """
        rows = self._rows_of(turns, width)
        steps, allowed = self._steps(turns, rows, width), self._allowed(turns, rows, width)
        settings = self._settings_on_devices.sampling
        state, self._state = self._take_state(), None  # if the program fails, the arrays are lost
        arrays = state.tokens, state.mu, state.logits, settings
        (tokens, mu), packed = self._call(choose_key(width), *arrays, steps, allowed)
        self._state = replace(state, tokens=tokens, mu=mu)
        return packed, rows

    def decode(self, width: int, turns: Sequence[Turn]) -> tuple[jax.Array, tuple[int, ...]]:
        """Runs a round of several steps; results int32 [k, b, p], and the rows of the turns."""
        rows = self._rows_of(turns, width)
        return self._run(round_key(width), self._steps(turns, rows, width)), rows

    def _take_state(self) -> State:
        assert self._state is not None, "the engine makes it before anything runs"
        return self._state

    def _run(self, key: Key, *arguments: Tree) -> jax.Array:
        """Runs a program that replaces the state."""
        settings = self._settings_on_devices
        state, self._state = self._take_state(), None  # if the program fails, the arrays are lost
        self._state, packed = self._call(key, self._params, state, settings, *arguments)
        return packed

    def _call(self, key: Key, *arguments: Tree) -> tuple[Tree, jax.Array]:
        program = self._programs.get(self.sizes, key)
        new, packed = dispatch(self._programs.forward.mesh, program, *arguments)
        packed.copy_to_host_async()
        return new, packed

    def _rows(self, slots: Sequence[Slot], width: int) -> tuple[int, ...]:
        """A row for each slot, among the `width` rows of its group."""
        taken = [0] * self.sizes.groups
        rows = []
        for slot in slots:
            rows.append(slot.group * width + taken[slot.group])
            taken[slot.group] += 1
        return tuple(rows)

    def _rows_of(self, turns: Sequence[Turn], width: int) -> tuple[int, ...]:
        return self._rows([turn.slot for turn in turns], width)

    def _steps(self, turns: Sequence[Turn], rows: Sequence[int], width: int) -> Steps:
        count = self.sizes.groups * width
        slots, lengths = np.full(count, self.sizes.slots, np.int32), np.ones(count, np.int32)
        chosen, active = np.zeros((2, count), np.int32)
        for row, turn in zip(rows, turns, strict=True):
            slots[row], lengths[row] = turn.slot.index, turn.length
            chosen[row], active[row] = turn.chosen, 1
        return Steps(slots, lengths, chosen, active)

    def _allowed(
        self, turns: Sequence[Turn], rows: Sequence[int], width: int
    ) -> np.ndarray | jax.Array:
        """What the turns may choose, uint32 [b, W]."""
        allowed = self._allow_all(self.sizes.groups * width)
        if all(turn.allowed is None for turn in turns):
            return allowed
        masks = np.array(allowed)
        for row, turn in zip(rows, turns, strict=True):
            if turn.allowed is not None:
                masks[row] = turn.allowed
        return masks

    def _allow_all(self, count: int) -> jax.Array:
        """A bitmask that allows everything; it stays on the devices."""
        if count not in self._no_masks:
            forward = self._programs.forward
            words = np.full((count, -(-forward.config.vocab_size // 32)), _ALL_TOKENS)
            self._no_masks[count] = jax.device_put(words, NamedSharding(forward.mesh, P()))
        return self._no_masks[count]

    @property
    def _settings_on_devices(self) -> SlotSettings:
        placed = self._placed
        if placed is None:
            split = NamedSharding(self._programs.forward.mesh, P("dp"))
            # A copy, because devices may share the memory of what they are given.
            copied = jax.tree.map(np.copy, self._settings)
            self._placed = placed = jax.device_put(copied, split)
        return placed


def _slot(sequence: TokenSequence) -> Slot:
    assert sequence.slot is not None, "it runs"
    return sequence.slot


def _enlarge(x: jax.Array, shape: jax.ShapeDtypeStruct, sizes: Sizes) -> jax.Array:
    """Adds slots to every group, and room to every slot."""
    groups = sizes.groups

    def pad(x: jax.Array) -> jax.Array:
        by_group = x.reshape(groups, -1, *x.shape[1:])
        wanted = groups, shape.shape[0] // groups, *shape.shape[1:]
        room = [(0, new - old) for new, old in zip(wanted, by_group.shape, strict=True)]
        return jnp.pad(by_group, room).reshape(shape.shape)

    return jax.jit(pad, out_shardings=shape.sharding)(x)


def _copy_slots(new: np.ndarray, old: np.ndarray, groups: int) -> None:
    """Copies the settings of the slots of each group to the first slots of the larger group."""
    by_group = new.reshape(groups, -1, *new.shape[1:])
    former = old.reshape(groups, -1, *old.shape[1:])
    by_group[:, : former.shape[1]] = former
