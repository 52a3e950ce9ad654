"""One row's continuation: tokens in, final pieces of text and ids out."""

from __future__ import annotations

from dataclasses import dataclass

from mtj_loader.generation.stopping import FinishReason, scan
from mtj_loader.generation.text_stream import TextStream
from mtj_loader.generation.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """What one token added to one row; nothing that follows changes it any more.

    Attributes:
      row: which prompt it continues, counted from 0.
      text: may be empty: a character, or what may be a stop string, is not complete yet.
      ids: the tokens whose text is out by now; empty when `text` still waits for more.
      finish_reason: set on the last piece of the row: "stop" at an end-of-text token or a stop
        string, "length" at `max_new_tokens`.
    """

    row: int
    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Completion:
    """One prompt's whole continuation.

    Attributes:
      text: without end-of-text token and stop string; None if there is no tokenizer.
      ids: the tokens that lie wholly in the text: a stop string may begin inside a token.
      finish_reason: "stop" or "length", as in `Piece`.
      prompt_tokens: how many tokens the prompt has.
    """

    text: str | None
    ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int


@dataclass(frozen=True)
class StopConditions:
    """What ends a row.

    Attributes:
      max_new_tokens: the length at which it is cut.
      eos_ids: tokens that end it and are no part of it.
      stops: strings that end it and are no part of it; they need a tokenizer.
    """

    max_new_tokens: int
    eos_ids: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()


class RowOutput:
    """Follows one row until it ends."""

    def __init__(self, row: int, tokenizer: Tokenizer | None, ending: StopConditions) -> None:
        self.finished = False  # whether the last piece is out
        self._row, self._tokenizer, self._ending = row, tokenizer, ending
        self._stream = TextStream(tokenizer) if tokenizer else None
        self._ids: list[int] = []
        self._ids_out = 0  # how many of them were handed out
        self._text = ""  # all that was handed out
        self._held = ""  # final, but may be the beginning of a stop string

    def push(self, token: int) -> Piece:
        """Takes the row's next token; not to be called after the last piece."""
        if token in self._ending.eos_ids:
            return self._end("stop")
        self._ids.append(token)
        if self._stream:
            self._held += self._stream.push(token)
        if len(self._ids) == self._ending.max_new_tokens:
            return self._end("length")
        return self._hand_out(None)

    def _end(self, reason: FinishReason) -> Piece:
        if self._stream:
            self._held += self._stream.finish()
        return self._hand_out(reason)

    def _hand_out(self, reason: FinishReason | None) -> Piece:
        found = scan(self._held, self._ending.stops)
        if found.stopped:
            reason = "stop"
        text = self._held if reason and not found.stopped else found.text
        self._held = "" if reason else found.held
        self._text += text
        self.finished = reason is not None
        return Piece(self._row, text, self._next_ids(found.stopped), reason)

    def _next_ids(self, stopped: bool) -> tuple[int, ...]:
        if stopped:
            end = self._ids_within_text()
        elif self.finished or not (self._held or (self._stream and self._stream.holds)):
            end = len(self._ids)
        else:
            end = self._ids_out
        start, self._ids_out = self._ids_out, end
        return tuple(self._ids[start:end])

    def _ids_within_text(self) -> int:
        """How many ids make up text before the stop string: the last may reach into it."""
        assert self._tokenizer is not None, "stop strings are only found in text"
        end = len(self._ids)
        while end > self._ids_out:
            if self._text.startswith(self._tokenizer.decode(self._ids[:end])):
                break
            end -= 1
        return end
