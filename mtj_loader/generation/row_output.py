"""One row's output: tokens in, final pieces of text and ids out, until a stop condition holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mtj_loader.display import show_value
from mtj_loader.errors import UsageError
from mtj_loader.generation.tokenizer import Tokenizer
from mtj_loader.sampling.result import Chosen

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
      choices: of each id; with log-probabilities if they were asked for.
      prompt_choices: log-probabilities of the prompt's tokens, in order, if they were asked for.
    """

    row: int
    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    choices: tuple[Chosen, ...] = field(default=(), compare=False)
    prompt_choices: tuple[Chosen, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Completion:
    """The complete continuation of one prompt.

    Attributes:
      text: without end-of-text token and stop string; None if there is no tokenizer.
      ids: the tokens that are completely in the text: a stop string may begin inside a token.
      finish_reason: "stop" or "length", as in `TextPiece`.
      prompt_tokens: the number of tokens of the prompt.
      choices: of each id; with log-probabilities if they were asked for.
      prompt_choices: log-probabilities of the prompt's tokens from the second one on, if they were
        asked for.
    """

    text: str | None
    ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    choices: tuple[Chosen, ...] = field(default=(), compare=False)
    prompt_choices: tuple[Chosen, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class StopConditions:
    """The conditions that end a row.

    Attributes:
      max_new_tokens: the most tokens to generate.
      eos_ids: tokens that end the row and are not part of the output.
      stop_strings: strings that end the row and are not part of the output; they need a tokenizer.
      banned_strings: strings that the output must not contain, whatever their case; they need a
        tokenizer.
    """

    max_new_tokens: int
    eos_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    banned_strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Return:
    """A banned string came up, so that the row must go back.

    Attributes:
      count: how many ids are kept.
      token: the id after these, which began the banned string.
    """

    count: int
    token: int


class RowOutput:
    """Collects the output of one row until a stop condition holds.

    Attributes:
      finished: whether the last piece was returned.
      must_return: set by `push` if the row must go back to choose a token again.
    """

    def __init__(self, row: int, tokenizer: Tokenizer | None, conditions: StopConditions) -> None:
        self.finished = False
        self.must_return: Return | None = None
        self._row, self._tokenizer, self._conditions = row, tokenizer, conditions
        self._banned = tuple(_lower(string) for string in conditions.banned_strings)
        self._stream = TextStream(tokenizer) if tokenizer else None
        self._choices: list[Chosen] = []
        self._ids_returned = 0
        self._text = ""  # returned so far
        self._held = ""  # final, but may be the beginning of a stop string or a banned string
        self._scored = 0  # tokens of the prompt

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end the row."""
        return self._conditions.eos_ids

    def push(self, chosen: Chosen, *, complete: bool = False) -> TextPiece:
        """Adds the row's next token; not allowed after the last piece.

        Args:
          chosen: the token.
          complete: nothing may follow.
        """
        self.must_return = None
        if chosen.token in self.eos_ids:
            return self._finish("stop")
        self._choices.append(chosen)
        if self._stream:
            self._held += self._stream.push(chosen.token)
            start = _find_first(_lower(self._held), self._banned)
            if start is not None:
                return self._go_back(self._text + self._held[:start])
        if complete:
            return self._finish("stop")
        if len(self._choices) == self._conditions.max_new_tokens:
            return self._finish("length")
        return self._return_piece(None)

    def push_prompt(self, scores: Sequence[Chosen], prompt_tokens: int) -> TextPiece:
        """Adds log-probabilities of the prompt's next tokens.

        Args:
          scores: of what follows each token of a part of the prompt.
          prompt_tokens: of the prompt; nothing is known to follow the last one.
        """
        kept = scores[: prompt_tokens - 1 - self._scored]
        self._scored += len(scores)
        self.finished = self._scored == prompt_tokens and not self._conditions.max_new_tokens
        reason = "length" if self.finished else None
        return TextPiece(self._row, "", (), reason, prompt_choices=tuple(kept))

    def _go_back(self, text: str) -> TextPiece:
        """Drops the tokens after the last one that ends within a text."""
        count = self._ids_within(text)
        self.must_return = Return(count, self._choices[count].token)
        del self._choices[count:]
        assert self._tokenizer is not None, "banned strings need text"
        self._stream = TextStream(self._tokenizer)
        again = "".join(self._stream.push(chosen.token) for chosen in self._choices)
        self._held = again[len(self._text) :]
        return TextPiece(self._row, "", ())

    def _finish(self, reason: FinishReason) -> TextPiece:
        if self._stream:
            self._held += self._stream.finish()
        return self._return_piece(reason)

    def _return_piece(self, reason: FinishReason | None) -> TextPiece:
        match = find_stop_string(self._held, self._conditions.stop_strings)
        if match.stopped:
            reason = "stop"
        text, held = match.text, match.held
        if reason is None:
            banned = _longest_overlap(self._held, _lower(self._held), self._banned)
            held = max(held, banned, key=len)
            text = self._held[: len(self._held) - len(held)]
        elif not match.stopped:
            text = self._held
        self._held = "" if reason else held
        self._text += text
        self.finished = reason is not None
        choices = self._next_choices(match.stopped)
        ids = tuple(chosen.token for chosen in choices)
        return TextPiece(self._row, text, ids, reason, choices)

    def _next_choices(self, stopped: bool) -> tuple[Chosen, ...]:
        if stopped:
            end = self._ids_within(self._text)
        elif self.finished or not (self._held or (self._stream and self._stream.holds)):
            end = len(self._choices)
        else:
            end = self._ids_returned
        start, self._ids_returned = self._ids_returned, end
        return tuple(self._choices[start:end])

    def _ids_within(self, text: str) -> int:
        """The number of ids whose text is within a text; the next one may reach beyond it."""
        assert self._tokenizer is not None, "this needs text"
        end = len(self._choices)
        ids = [chosen.token for chosen in self._choices]
        while end > self._ids_returned and not text.startswith(self._tokenizer.decode(ids[:end])):
            end -= 1
        return end


def read_strings(name: str, value: str | Sequence[str] | None) -> tuple[str, ...]:
    """Reads `stop` or `banned_strings`.

    Raises:
      UsageError: a string is empty or not a string.
    """
    if value is None:
        return ()
    for string in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(string, str) or not string:
            expected = "a string of at least one character, or a list of them"
            what = f"not a string for {name}"
            raise UsageError(what, key=name, expected=expected, found=show_value(string))
    return (value,) if isinstance(value, str) else tuple(value)


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
    held = _longest_overlap(text, text, stops)
    return StopMatch(text[: len(text) - len(held)], held, stopped=False)


def _longest_overlap(text: str, searched: str, strings: Sequence[str]) -> str:
    """The end of a text that may be the beginning of one of the strings.

    Args:
      text: of which the end is returned.
      searched: the same in the case of the strings.
      strings: to look for.
    """
    length = max((_overlap(searched, string) for string in strings), default=0)
    return text[len(text) - length :]


def _find_first(text: str, strings: Sequence[str]) -> int | None:
    """Where the first of the strings begins in a text; None if it has none of them."""
    return min((start for s in strings if (start := text.find(s)) >= 0), default=None)


def _lower(text: str) -> str:
    """The text in lower case, character by character: its length does not change."""
    return "".join(low if len(low := character.lower()) == 1 else character for character in text)


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
