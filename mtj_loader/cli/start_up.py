"""Options that shorten the time to the first token: ahead-of-time compilation and its cache."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtj_loader.errors import UsageError

if TYPE_CHECKING:
    from mtj_loader.generation.prompts import Prompt, PromptLike, PromptRules

_option = functools.partial(typer.Option, rich_help_panel="Start-up")
_SHAPE = re.compile(r"([0-9]{1,9})x([0-9]{1,9})(?:\+([0-9]{1,9}))?")


@dataclass(frozen=True)
class StartUp:
    """What is compiled while the weights are loaded, and whether it is kept."""

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

    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes to compile for, as `mtj_loader.load` takes them.

        Raises:
          UsageError: a shape is malformed.
        """
        return [_parse_shape(text) for text in self.warm_up or ()]

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `mtj_loader.load`."""
        return {"warm_up": self.shapes(), "compilation_cache": not self.no_compilation_cache}

    def options_for(self, prompts: PendingPrompts) -> dict[str, Any]:
        """The same for known prompts: these are checked, and compiled for too."""
        shapes = self.shapes()
        return self.options() | {"warm_up": lambda rules: [prompts.tokenize(rules), *shapes]}


class PendingPrompts:
    """Prompts that `load` tokenizes and checks before it reads weights.

    Attributes:
      tokenized: after the load, the prompts for `Model.generate`.
    """

    def __init__(self, inputs: Sequence[PromptLike], sampling: Mapping[str, Any]) -> None:
        self.tokenized: list[Prompt] = []
        self._inputs, self._sampling = list(inputs), sampling

    def tokenize(self, rules: PromptRules) -> tuple[int, int, int]:
        """Tokenizes and checks the prompts; returns the shape to compile for them."""
        from mtj_loader.generation.prompts import read_prompts  # noqa: PLC0415 -- imports JAX
        from mtj_loader.generation.sampling import SamplingParams  # noqa: PLC0415

        new = SamplingParams(**self._sampling).max_new_tokens
        self.tokenized, _ = read_prompts(self._inputs, rules, new)
        longest = max(len(prompt.ids) for prompt in self.tokenized)
        return len(self.tokenized), longest, new


def _parse_shape(text: str) -> tuple[int, ...]:
    found = _SHAPE.fullmatch(text)
    if found is None:
        expected = "prompts x tokens, for example 1x512, or 4x512+100 to generate 100 tokens"
        raise UsageError("not a shape", key="--warm-up", expected=expected, found=repr(text))
    return tuple(int(number) for number in found.groups() if number is not None)
