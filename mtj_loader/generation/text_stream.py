"""Text that grows token by token, cut only where nothing that follows can change it."""

from __future__ import annotations

from mtj_loader.generation.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what decoders make of an unfinished character
_CONTEXT = 8  # tokens: a decoder looks back at one; a character has at most four bytes


class TextStream:
    """Decodes one row's tokens as they come.

    The pieces, put together, are the text that decoding all the tokens at once gives. A character
    whose bytes are spread over several tokens comes out with the last of them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # the latest tokens: decoding all of them again is quadratic
        self._text = ""  # of the window
        self._given = 0  # characters of `_text` that were handed out

    @property
    def holds(self) -> bool:
        """Whether some tokens' text was not handed out yet."""
        return self._given < len(self._text)

    def push(self, token: int) -> str:
        """Adds a token; returns the text that became final by it, which may be none."""
        self._window.append(token)
        self._text = self._tokenizer.decode(self._window)
        if self._tokenizer.spells_byte(token):  # only the end of a run of them tells what it says
            return ""
        piece = self._give(len(self._text.rstrip(_REPLACEMENT)))
        if not self.holds:
            self._trim()
        return piece

    def finish(self) -> str:
        """The rest: unfinished characters are U+FFFD now."""
        return self._give(len(self._text))

    def _give(self, end: int) -> str:
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _trim(self) -> None:
        """Forgets tokens that are too old to have a say in what comes next."""
        if len(self._window) >= 2 * _CONTEXT:
            self._window = self._window[-_CONTEXT:]
            self._text = self._tokenizer.decode(self._window)
            self._given = len(self._text)
