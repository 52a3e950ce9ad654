"""One row's output: tokens in, final pieces of text and ids out, until a stop condition holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mtj_loader.display import show_value
from mtj_loader.errors import UsageError
from mtj_loader.generation.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]  # as in the responses of OpenAI's API and koboldcpp

_REPLACEMENT = "\ufffd"  # what decoders return for an incomplete character
_CONTEXT = 8  # tokens: a decoder looks back at one; a character has at most four bytes


@dataclass(frozen=True)
class TextPiece:
    """The output that one token added to one row; it is final.

    Attributes:
      row: the index of the prompt it continues.
      text: empty while a character or a possible stop string is incomplete.
      ids: the tokens whose text has been returned completely by now.
      finish_reason: set on the last piece of the row: "stop" at an end-of-text token or a stop
        string, "length" at `max_new_tokens`.
    """

    row: int
    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Completion:
    """The complete continuation of one prompt.

    Attributes:
      text: without end-of-text token and stop string; None if there is no tokenizer.
      ids: the tokens that are completely in the text: a stop string may begin inside a token.
      finish_reason: "stop" or "length", as in `TextPiece`.
      prompt_tokens: the number of tokens of the prompt.
    """

    text: str | None
    ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int


@dataclass(frozen=True)
class StopConditions:
    """The conditions that end a row.

    Attributes:
      max_new_tokens: the most tokens to generate.
      eos_ids: tokens that end the row and are not part of the output.
      stop_strings: strings that end the row and are not part of the output; they need a tokenizer.
    """

    max_new_tokens: int
    eos_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()


class RowOutput:
    """Collects the output of one row until a stop condition holds."""

    def __init__(self, row: int, tokenizer: Tokenizer | None, conditions: StopConditions) -> None:
        self.finished = False  # whether the last piece was returned
        self._row, self._tokenizer, self._conditions = row, tokenizer, conditions
        self._stream = TextStream(tokenizer) if tokenizer else None
        self._ids: list[int] = []
        self._ids_returned = 0
        self._text = ""  # returned so far
        self._held = ""  # final, but may be the beginning of a stop string

    def push(self, token: int) -> TextPiece:
        """Adds the row's next token; not allowed after the last piece."""
        if token in self._conditions.eos_ids:
            return self._finish("stop")
        self._ids.append(token)
        if self._stream:
            self._held += self._stream.push(token)
        if len(self._ids) == self._conditions.max_new_tokens:
            return self._finish("length")
        return self._return_piece(None)

    def _finish(self, reason: FinishReason) -> TextPiece:
        if self._stream:
            self._held += self._stream.finish()
        return self._return_piece(reason)

    def _return_piece(self, reason: FinishReason | None) -> TextPiece:
        match = find_stop_string(self._held, self._conditions.stop_strings)
        if match.stopped:
            reason = "stop"
        text = self._held if reason and not match.stopped else match.text
        self._held = "" if reason else match.held
        self._text += text
        self.finished = reason is not None
        return TextPiece(self._row, text, self._next_ids(match.stopped), reason)

    def _next_ids(self, stopped: bool) -> tuple[int, ...]:
        if stopped:
            end = self._ids_within_text()
        elif self.finished or not (self._held or (self._stream and self._stream.holds)):
            end = len(self._ids)
        else:
            end = self._ids_returned
        start, self._ids_returned = self._ids_returned, end
        return tuple(self._ids[start:end])

    def _ids_within_text(self) -> int:
        """The number of ids before the stop string; the last token may reach into it."""
        assert self._tokenizer is not None, "stop strings need text"
        end = len(self._ids)
        while end > self._ids_returned:
            if self._text.startswith(self._tokenizer.decode(self._ids[:end])):
                break
            end -= 1
        return end


def read_stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Reads the `stop` argument of `generate`.

    Raises:
      UsageError: a stop string is empty or not a string.
    """
    if stop is None:
        return ()
    for string in stop if isinstance(stop, list | tuple) else [stop]:
        if not isinstance(string, str) or not string:
            expected = "a string of at least one character, or a list of them"
            raise UsageError(
                "not a stop string", key="stop", expected=expected, found=show_value(string)
            )
    return (stop,) if isinstance(stop, str) else tuple(stop)


@dataclass(frozen=True)
class StopMatch:
    """The result of searching a growing text for stop strings.

    Attributes:
      text: the final part, before any stop string.
      held: may be the beginning of a stop string; search it again with the text that follows.
      stopped: a stop string follows `text`.
    """

    text: str
    held: str
    stopped: bool


def find_stop_string(text: str, stops: Sequence[str]) -> StopMatch:
    """Finds the stop string that ends first (of two that end there, the longer one).

    Reading character by character would stop at the same place, so the result does not depend on
    how the text is cut into pieces: `find_stop_string(held + piece)` finds the same as a search of
    the whole text.
    """
    starts = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    if starts:
        _, start = min(starts)
        return StopMatch(text[:start], "", stopped=True)
    held = max((_overlap(text, stop) for stop in stops), default=0)
    cut = len(text) - held
    return StopMatch(text[:cut], text[cut:], stopped=False)


def _overlap(text: str, stop: str) -> int:
    """The number of characters at the end of the text that are the beginning of a stop string."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class TextStream:
    """Decodes the tokens of one row incrementally.

    The pieces joined are the text of decoding all tokens at once. A character whose bytes are
    spread over several tokens is returned with the last of them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # the latest tokens; decoding all of them is quadratic
        self._text = ""  # of the window
        self._returned = 0  # characters of `_text`

    @property
    def holds(self) -> bool:
        """Whether some text has not been returned yet."""
        return self._returned < len(self._text)

    def push(self, token: int) -> str:
        """Adds a token; returns the text that has become final, which may be empty."""
        if self._tokenizer.is_skipped(token):  # it does not end a run of byte tokens either
            return ""
        self._window.append(token)
        self._text = self._tokenizer.decode(self._window)
        if self._tokenizer.is_byte(token):  # final only at the end of a run of byte tokens
            return ""
        piece = self._take(len(self._text.rstrip(_REPLACEMENT)))
        if not self.holds:
            self._trim()
        return piece

    def finish(self) -> str:
        """Returns the rest, with U+FFFD for incomplete characters."""
        return self._take(len(self._text))

    def _take(self, end: int) -> str:
        piece = self._text[self._returned : end]
        self._returned = max(self._returned, end)
        return piece

    def _trim(self) -> None:
        """Drops tokens that can no longer affect the decoding of later ones."""
        if len(self._window) >= 2 * _CONTEXT:
            self._window = self._window[-_CONTEXT:]
            self._text = self._tokenizer.decode(self._window)
            self._returned = len(self._text)
