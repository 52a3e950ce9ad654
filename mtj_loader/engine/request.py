"""A request while it waits and runs: what it asks for, and where its results go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mtj_loader.engine.scheduler import TokenSequence
from mtj_loader.errors import GenerationError, NonFiniteError
from mtj_loader.generation.row_output import Return, RowOutput, TextPiece
from mtj_loader.sampling.choose import NO_TOKEN, NOT_FINITE
from mtj_loader.sampling.result import Chosen
from mtj_loader.sampling.row_settings import RowSettings, bitmask

# Each return bans one more token at one place, so it ends; but in a text that says the same thing
# in many ways, after too long.
_MAX_RETURNS = 200


class Matcher(Protocol):
    """What a grammar allows next."""

    def mask(self, out: np.ndarray) -> None:
        """Writes the allowed tokens, uint32 [W]: bit t % 32 of word t // 32."""
        ...

    def advance(self, token: int) -> None:
        """Goes on after a token."""
        ...

    def rollback(self, count: int) -> None:
        """Forgets the last tokens."""
        ...

    @property
    def finished(self) -> bool:
        """Whether nothing but end of text may follow."""
        ...


@dataclass(eq=False)
class RunningRequest:
    """A request in an engine.

    Attributes:
      sequence: its tokens, for the scheduler.
      settings: for the samplers, arrays without the axis b.
      frequencies: of each rotary embedding, float32 [1, r/2].
      vocab_size: V.
      output: turns tokens into text and finds the end.
      listener: is called with every piece, or with the error that ended the request, by the
        thread that runs the engine. It must not block. What it raises ends the request.
      matcher: what a grammar allows; None without one.
      top: how many of the most likely tokens to report.
      placed: whether the settings are on the devices.
      cancelled: set it to end the request; no more pieces will come.
      epoch: changes when chosen tokens become void.
    """

    sequence: TokenSequence
    settings: RowSettings
    frequencies: tuple[np.ndarray, ...]
    vocab_size: int
    output: RowOutput
    listener: Callable[[TextPiece | BaseException], None]
    matcher: Matcher | None = None
    top: int = 0
    placed: bool = False
    cancelled: bool = False
    epoch: int = 0
    _banned: dict[int, set[int]] = field(default_factory=dict)  # by place among the chosen tokens

    def allowed(self, chosen: int) -> np.ndarray | None:
        """The tokens that may follow so many chosen ones, uint32 [W]; None for all."""
        banned = self._banned.get(chosen)
        if self.matcher is None and not banned:
            return None
        words = np.full(-(-self.vocab_size // 32), 0xFFFFFFFF, np.uint32)
        if self.matcher is not None:
            self.matcher.mask(words)
        return words & ~bitmask(banned or (), self.vocab_size)

    def accept(self, chosen: Chosen) -> bool:
        """Takes the next token; returns whether it ended the request.

        Raises:
          NonFiniteError: the model computed NaN or infinity.
          GenerationError: no token may be chosen.
        """
        _check(chosen.token)
        if chosen.token not in self.output.eos_ids:
            self.sequence.tokens.append(chosen.token)
            if self.matcher is not None:
                self.matcher.advance(chosen.token)
        complete = self.matcher is not None and self.matcher.finished
        piece = self.output.push(chosen, complete=complete)
        if self.output.must_return is not None:
            self._return_to(self.output.must_return)
        self.listener(piece)
        return self.output.finished

    def score(self, scores: Sequence[Chosen]) -> bool:
        """Takes log-probabilities of the prompt; returns whether that ended the request."""
        self.listener(self.output.push_prompt(scores, len(self.sequence.prompt)))
        return self.output.finished

    def fail(self, error: BaseException) -> None:
        """Ends it with an error."""
        self.cancelled = True
        with suppress(Exception):  # the error may be the listener's own
            self.listener(error)

    def _return_to(self, back: Return) -> None:
        """Goes back to choose a token again, and bans the one that was chosen there."""
        self._banned.setdefault(back.count, set()).add(back.token)
        if sum(map(len, self._banned.values())) > _MAX_RETURNS:
            raise GenerationError(
                "the banned strings come up too often",
                found=f"{_MAX_RETURNS} times",
                hint="ban fewer strings, or use a higher temperature",
            )
        sequence = self.sequence
        if self.matcher is not None:
            self.matcher.rollback(len(sequence.tokens) - len(sequence.prompt) - back.count)
        sequence.rewind(len(sequence.prompt) + back.count)
        self.epoch += 1


def _check(token: int) -> None:
    if token == NOT_FINITE:
        hint = "load with dtype='float32', or with check_finite=True to find damaged weights"
        raise NonFiniteError("the model computed logits that are NaN or infinite", hint=hint)
    if token == NO_TOKEN:
        what = "no token may be chosen"
        raise GenerationError(what, hint="the bans or the grammar exclude every token")
