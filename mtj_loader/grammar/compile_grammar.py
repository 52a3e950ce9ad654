"""Compiles grammars and JSON schemas, within bounds: they come from untrusted requests."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from mtj_loader.errors import GrammarError, MachineError
from mtj_loader.grammar.gbnf import parse_gbnf
from mtj_loader.grammar.json_schema import read_json_schema
from mtj_loader.grammar.matcher import Matcher
from mtj_loader.grammar.to_lark import write_json_lark, write_lark
from mtj_loader.grammar.token_texts import (
    TextTokenizer,
    TokenTrie,
    get_token_trie,
    import_llguidance,
)

if TYPE_CHECKING:
    import llguidance

_SCRIPT = Path(__file__).with_name("trial_compile.py")
_KEPT = 16  # compiled grammars, of a few MB each

# Against llguidance's defaults: errors that do not quote whole grammars, no work ahead for regular
# expressions, and fewer lexer states (1 to 2 kB each, in every request).
_COMMON_LIMITS = {
    "max_lexer_states": 50_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
# An item is a place in a rule that the text may have reached. The time for a mask grows with all
# items and with the square of those at one place in the text. GBNF is parsed character by character
# and needs many in all; at one place, only ambiguous rules need many: `s ::= s s s | .` takes 0.6 s
# for a mask of 256,000 tokens until it is refused, and 20 s with 2,000. JSON schemas need one for
# each optional property, and few in all.
_GBNF_LIMITS = {**_COMMON_LIMITS, "max_items_in_row": 500, "step_max_items": 10_000_000}
_JSON_LIMITS = {**_COMMON_LIMITS, "max_items_in_row": 2_000, "step_max_items": 50_000}
_WALL_SECONDS = 30.0  # for a compilation of 2 s of CPU time; the machine may be busy


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar for one tokenizer and vocabulary; any number of requests can use it."""

    _ll_matcher: llguidance.LLMatcher
    _trie: TokenTrie
    _eos_ids: frozenset[int]

    def start(self) -> Matcher:
        """A matcher at the beginning of the grammar, for one output."""
        return Matcher(self._ll_matcher.deep_copy(), self._trie, self._eos_ids)


def read_grammar(
    grammar: str | None,
    json_schema: dict | str | bool | None,
    tokenizer: TextTokenizer,
    eos_ids: Iterable[int],
    vocab_size: int,
) -> Grammar:
    """Compiles the grammar of a request.

    Args:
      grammar: in GBNF, see `parse_gbnf`. Give this or `json_schema`.
      json_schema: a JSON schema, or its JSON; True for any JSON.
      tokenizer: decodes the tokens that the grammar constrains.
      eos_ids: the end-of-text tokens; those outside the vocabulary are ignored.
      vocab_size: the model's, which may differ from the tokenizer's.

    Raises:
      GrammarError: the grammar is at fault: not well-formed, not supported, too large, or it takes
        too much to compile.
      UsageError: llguidance is not installed.
      MachineError: no process can be started to compile it.
    """
    import_llguidance()
    if (grammar is None) == (json_schema is None):
        raise GrammarError("give either a grammar or a JSON schema", key="grammar, json_schema")
    if grammar is not None:
        lark, limits = write_lark(parse_gbnf(grammar)), json.dumps(_GBNF_LIMITS)
    else:
        lark, limits = write_json_lark(read_json_schema(json_schema)), json.dumps(_JSON_LIMITS)
    trie = get_token_trie(tokenizer, vocab_size)
    ends = frozenset(token for token in eos_ids if 0 <= token < vocab_size)
    return Grammar(_compile(lark, limits, trie), trie, ends)


@lru_cache(maxsize=_KEPT)
def _compile(lark: str, limits: str, trie: TokenTrie) -> llguidance.LLMatcher:
    llguidance = import_llguidance()
    _try_compile(lark, limits)
    ll_limits = llguidance.LLParserLimits(**json.loads(limits))
    matcher = llguidance.LLMatcher(trie.ll_tokenizer, lark, log_level=0, limits=ll_limits)
    if matcher.is_error():
        raise _make_error(matcher.get_error())
    return matcher


def _try_compile(lark: str, limits: str) -> None:
    """Compiles in a process that is ended if that takes too much, see `trial_compile`.

    Raises:
      GrammarError: the grammar cannot be compiled, or that takes too much.
      MachineError: the process cannot be started.
    """
    # -P: no module next to the script takes the place of another.
    command = [sys.executable, "-P", str(_SCRIPT), limits]
    try:
        result = subprocess.run(
            command, input=lark.encode(), capture_output=True, timeout=_WALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _too_much(f"no end after {_WALL_SECONDS:.0f} s") from error
    except OSError as error:
        raise MachineError("cannot start a process to compile a grammar", found=error) from error
    if result.returncode < 0:
        raise _too_much(f"ended by {signal.Signals(-result.returncode).name}")
    if not result.stdout:
        lines = result.stderr.decode(errors="replace").splitlines() or [""]
        raise MachineError("the process that compiles a grammar failed", found=lines[-1])
    if message := json.loads(result.stdout):
        raise _make_error(message)


def _too_much(found: str) -> GrammarError:
    what = "compiling the grammar takes too much time, memory or stack"
    return GrammarError(what, found=found, hint="use fewer and smaller rules and repetitions")


def _make_error(message: str) -> GrammarError:
    return GrammarError("llguidance rejects the grammar", found=message.split("\n", 1)[0])
