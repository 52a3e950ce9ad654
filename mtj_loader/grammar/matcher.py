"""One request's place in a grammar: which tokens may come next, advance, back up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mtj_loader.errors import GrammarError
from mtj_loader.grammar.token_texts import TokenTrie

if TYPE_CHECKING:
    import llguidance


class Matcher:
    """Follows one output through a grammar, token by token; not for several threads at a time."""

    def __init__(
        self, ll_matcher: llguidance.LLMatcher, trie: TokenTrie, eos_ids: frozenset[int]
    ) -> None:
        self._ll, self._trie, self._eos_ids = ll_matcher, trie, sorted(eos_ids)
        self._length = 0  # tokens so far, without end of text
        self._ends = 0  # end-of-text tokens so far
        self._allowed: np.ndarray | None = None  # bool [V] without end of text; None: not computed

    def mask(self, out: np.ndarray) -> None:
        """Writes which tokens may come next.

        End of text is allowed exactly where the grammar may end. If the grammar has ended and there
        are no end-of-text tokens, no token is allowed: look at `finished` first.

        Args:
          out: uint32 [ceil(V/32)]; receives bit t % 32 of word t // 32 for each token t.

        Raises:
          GrammarError: the grammar needs too much work, or no token of the vocabulary continues it.
        """
        allowed = self._allow().copy()
        allowed[self._eos_ids] = self._can_end()
        packed = np.zeros(4 * out.size, np.uint8)
        bits = np.packbits(allowed, bitorder="little")
        packed[: bits.size] = bits
        out[:] = packed.view("<u4")

    def advance(self, token: int) -> None:
        """Adds the output's next token.

        Raises:
          GrammarError: the grammar does not allow the token here, or needs too much work.
        """
        if token in self._eos_ids:
            if not self._can_end():
                raise GrammarError("the grammar does not allow end of text here")
            self._ends += 1
            return
        if self._ends or not 0 <= token < self._trie.vocab_size:
            raise GrammarError("the grammar does not allow this token here", found=token)
        known = token if self._length else int(self._trie.first_ids[token])
        self._allowed = None
        if self._ll.try_consume_tokens([known]) != 1:
            self._check()
            raise GrammarError("the grammar does not allow this token here", found=token)
        self._check()
        self._length += 1

    def rollback(self, count: int) -> None:
        """Takes back the last `count` tokens, end of text included.

        Raises:
          ValueError: there are fewer tokens.
        """
        if not 0 <= count <= self._length + self._ends:
            raise ValueError(f"cannot take back {count} of {self._length + self._ends} tokens")
        ends = min(count, self._ends)
        self._ends -= ends
        if count > ends:
            self._length -= count - ends
            self._allowed = None
            self._ll.rollback(count - ends)
            self._check()

    @property
    def finished(self) -> bool:
        """Whether nothing but end of text may follow.

        Raises:
          GrammarError: as `mask`.
        """
        return bool(self._ends) or (self._can_end() and not self._allow().any())

    def _can_end(self) -> bool:
        self._check()
        return self._ll.is_accepting()

    def _allow(self) -> np.ndarray:
        """The tokens that may come next, except end of text: bool [V]."""
        if self._ends:
            return np.zeros(self._trie.vocab_size, bool)
        if self._allowed is None:
            self._allowed = self._compute_allowed()
        return self._allowed

    def _compute_allowed(self) -> np.ndarray:
        # After an error, llguidance allows its end of text, so errors must be looked for.
        packed = np.frombuffer(self._ll.compute_bitmask(), np.uint8)
        self._check()
        bits = np.unpackbits(packed, bitorder="little").view(bool)
        allowed = bits[: self._trie.vocab_size] if self._length else bits[self._trie.first_ids]
        allowed[self._eos_ids] = False
        if not (allowed.any() or self._can_end()):
            raise GrammarError("no token of the vocabulary continues the text as the grammar wants")
        return allowed

    def _check(self) -> None:
        if self._ll.is_error():
            reason = self._ll.get_error()
            raise GrammarError("the grammar cannot be followed any further", found=reason)
