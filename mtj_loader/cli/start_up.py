"""Options that shorten the time to the first token: ahead-of-time compilation and its cache."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtj_loader.errors import UsageError

if TYPE_CHECKING:
    from mtj_loader.generation.prompts import Prompt, PromptLike, PromptRules

_option = functools.partial(typer.Option, rich_help_panel="Start-up")
_SHAPE = re.compile(r"([0-9]{1,9})x([0-9]{1,9})(?:\+([0-9]{1,9}))?")


@dataclass(frozen=True)
class StartUp:
    """What is compiled while the weights are loaded, whether it is kept, and what is read."""

    warm_up: Annotated[
        list[str] | None,
        _option(
            metavar="BxT[+NEW]",
            help="While loading, compile for B prompts of up to T tokens and NEW generated tokens. "
            "May be repeated.",
        ),
    ] = None
    no_compilation_cache: Annotated[
        bool,
        _option(
            "--no-compilation-cache",
            help="Do not keep compiled programs in the user's cache folder.",
        ),
    ] = False

    programs: Annotated[
        Path | None,
        _option(
            metavar="DIR",
            file_okay=False,
            help="Use the compiled programs in this folder, from mtj-loader compile --out; by "
            "default those in the user's cache. Whoever can write to it can run code as you.",
        ),
    ] = None

    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes to compile for, as `mtj_loader.load` takes them.

        Raises:
          UsageError: a shape is malformed.
        """
        return [_parse_shape(text) for text in self.warm_up or ()]

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `mtj_loader.load`."""
        return {
            "warm_up": self.shapes(),
            "compilation_cache": not self.no_compilation_cache,
            "programs": self.programs,
        }

    def options_for(self, prompts: PendingPrompts) -> dict[str, Any]:
        """The same for known prompts: these are checked, and compiled for too."""
        shapes = self.shapes()
        return self.options() | {"warm_up": lambda rules: [*prompts.tokenize(rules), *shapes]}


class PendingPrompts:
    """Prompts that `load` tokenizes and checks before it reads weights.

    Args:
      inputs: texts or token ids.
      max_new_tokens: of each continuation.
      n: continuations of each prompt.

    Attributes:
      tokenized: after the load, the prompts for `Model.generate`.
    """

    def __init__(self, inputs: Sequence[PromptLike], max_new_tokens: int, n: int) -> None:
        self.tokenized: list[Prompt] = []
        self._inputs, self._max_new_tokens, self._n = list(inputs), max_new_tokens, n

    def tokenize(self, rules: PromptRules) -> list[tuple[int, int, int]]:
        """Tokenizes and checks the prompts; returns what to compile for them.

        Nothing for prompts that are only scored, whose programs are compiled when they are needed.
        """
        from mtj_loader.generation.prompts import read_prompts  # noqa: PLC0415 -- imports JAX

        self.tokenized, _ = read_prompts(self._inputs, rules, self._max_new_tokens)
        longest = max(len(prompt.ids) for prompt in self.tokenized)
        new = self._max_new_tokens
        return [(len(self.tokenized) * self._n, longest, new)] if new else []


def _parse_shape(text: str) -> tuple[int, ...]:
    found = _SHAPE.fullmatch(text)
    if found is None:
        expected = "prompts x tokens, for example 1x512, or 4x512+100 to generate 100 tokens"
        raise UsageError("not a shape", key="--warm-up", expected=expected, found=repr(text))
    return tuple(int(number) for number in found.groups() if number is not None)
