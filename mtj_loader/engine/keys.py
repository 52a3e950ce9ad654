"""The names of an engine's programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mtj_loader.engine.sizes import ROUND_STEPS, Chunk, Sizes

Kind = Literal["init", "prefill", "score", "step", "choose", "decode"]


@dataclass(frozen=True, order=True)
class Key:
    """What a program runs.

    Attributes:
      kind: "init" makes an empty state, "prefill" and "score" run parts of prompts, "step" runs one
        token of each row, "choose" chooses one, and "decode" does both several times.
      rows: how many sequences of each group run.
      tokens: of each row of a chunk, or how many a round chooses.
    """

    kind: Kind
    rows: int
    tokens: int = 1

    def __str__(self) -> str:
        return f"{self.kind}-{self.rows}x{self.tokens}"


INIT = Key("init", 1)


def prefill_key(chunk: Chunk, *, scored: bool = False) -> Key:
    """The program that runs a chunk."""
    return Key("score" if scored else "prefill", chunk.rows, chunk.tokens)


def step_key(width: int) -> Key:
    """The program that runs one token of each row."""
    return Key("step", width)


def choose_key(rows: int) -> Key:
    """The program that chooses one token for each row."""
    return Key("choose", rows)


def round_key(width: int) -> Key:
    """The program of a round of several steps."""
    return Key("decode", width, ROUND_STEPS)


def all_keys(sizes: Sizes) -> tuple[Key, ...]:
    """Every program that an engine of these sizes can need, the first needed ones first."""
    single = [chunk for chunk in sizes.chunks if chunk.rows == 1]
    several = [chunk for chunk in sizes.chunks if chunk.rows > 1]
    return (
        INIT,
        *map(prefill_key, single),
        *(make(width) for width in sizes.widths for make in (choose_key, step_key)),
        *map(prefill_key, several),
        *map(round_key, sizes.widths),
        *(prefill_key(chunk, scored=True) for chunk in single),
    )
