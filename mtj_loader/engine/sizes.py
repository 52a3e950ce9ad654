"""The sizes of an engine: how many slots of how many tokens, and the shapes of its programs.

A program is compiled for a shape, so there are only a few shapes; everything else is data.
"""

from __future__ import annotations

from dataclasses import dataclass

from mtj_loader.parameters import round_up

_WIDTHS = 4  # each number of rows in a round of decoding is so many times the one before
_CHUNK_TOKENS = (16, 128, 512)
_MIN_CONTEXT = 256  # less saves neither time nor much memory
# Tokens that a pass can run in the time in which the weights are read, roughly.
_FREE_TOKENS = 32

ROUND_STEPS = 8  # of decoding in one program, when nobody reads along


@dataclass(frozen=True, order=True)
class Chunk:
    """The shape of a program that extends sequences by parts of their prompts.

    Attributes:
      tokens: of each row.
      rows: of each group; one row runs a part of one prompt.
    """

    tokens: int
    rows: int = 1

    def efficiency(self, useful: int) -> float:
        """Tokens of prompts for the cost of a pass, given how many tokens are useful."""
        return useful / max(self.tokens * self.rows, _FREE_TOKENS)


@dataclass(frozen=True)
class Sizes:
    """The sizes of an engine.

    Attributes:
      groups: dp, the groups of devices over which slots are split.
      slots: of each group.
      context: tokens in each slot, at most.
    """

    groups: int
    slots: int
    context: int

    @property
    def total_slots(self) -> int:
        """S, the slots of all groups."""
        return self.groups * self.slots

    def cache_length(self, block: int) -> int:
        """T, the tokens that a slot of the cache has room for."""
        return self.context if self.context <= block else round_up(self.context, block)

    @property
    def widths(self) -> tuple[int, ...]:
        """The numbers of rows of each group that programs can run."""
        widths = [1]
        while widths[-1] < self.slots:
            widths.append(min(_WIDTHS * widths[-1], self.slots))
        return tuple(widths)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The shapes for prompts: parts of one prompt, or the beginnings of several."""
        least, *longer = _CHUNK_TOKENS
        single = [Chunk(min(least, self.context))]
        single += [Chunk(tokens) for tokens in longer if tokens <= self.context]
        return (*single, *(Chunk(single[0].tokens, width) for width in self.widths[1:]))

    def grown(self, slots: int, context: int, limit: Sizes) -> Sizes:
        """The next sizes with room for so many slots in each group, and this context.

        Args:
          slots: of each group.
          context: tokens of each slot.
          limit: the largest sizes.
        """
        width = 1
        while width < slots:
            width *= _WIDTHS
        length = max(_MIN_CONTEXT, 1 << (context - 1).bit_length())
        return Sizes(
            self.groups,
            self.slots if slots <= self.slots else min(width, limit.slots),
            self.context if context <= self.context else min(length, limit.context),
        )
