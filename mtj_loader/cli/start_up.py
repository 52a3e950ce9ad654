"""Options about the time until there is text: what is compiled beside the load, and kept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtj_loader.errors import UsageError

if TYPE_CHECKING:
    from mtj_loader.generation.prompts import PromptLike, PromptRules

_START_UP = "How it starts"
_SHAPE = re.compile(r"([0-9]{1,9})x([0-9]{1,9})(?:\+([0-9]{1,9}))?")


@dataclass(frozen=True)
class StartUp:
    """What is compiled while weights are read."""

    warm_up: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BxT[+NEW]",
            help="Compile, while loading, for B prompts of up to T tokens and NEW that follow; "
            "repeatable.",
            rich_help_panel=_START_UP,
        ),
    ] = None
    no_compilation_cache: Annotated[
        bool,
        typer.Option(
            "--no-compilation-cache",
            help="Do not keep compiled programs in the user's cache folder.",
            rich_help_panel=_START_UP,
        ),
    ] = False

    def shapes(self) -> list[tuple[int, ...]]:
        """What `mtj_loader.load` takes as `warm_up`.

        Raises:
          UsageError: a shape that cannot be read.
        """
        return [_read(text) for text in self.warm_up or ()]

    def options(self) -> dict[str, Any]:
        """As keyword arguments of `mtj_loader.load`."""
        return {"warm_up": self.shapes(), "compilation_cache": not self.no_compilation_cache}

    def options_for(
        self, prompts: Sequence[PromptLike], sampling: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The same where it is known what to generate: that is checked, and compiled for, too.

        Args:
          prompts: the texts or token ids.
          sampling: the fields of SamplingParams.
        """
        shapes = self.shapes()

        def with_prompts(rules: PromptRules) -> list[tuple[int, ...]]:
            from mtj_loader.generation.prompts import read_prompts  # noqa: PLC0415 -- brings JAX
            from mtj_loader.generation.sampling import SamplingParams  # noqa: PLC0415

            new = SamplingParams(**sampling).max_new_tokens
            read, _ = read_prompts(list(prompts), rules, new)
            return [(len(read), max(len(prompt.ids) for prompt in read), new), *shapes]

        return self.options() | {"warm_up": with_prompts}


def _read(text: str) -> tuple[int, ...]:
    found = _SHAPE.fullmatch(text)
    if found is None:
        expected = "prompts x tokens, such as 1x512, or 4x512+100 for 100 new ones"
        raise UsageError("not a shape", key="--warm-up", expected=expected, found=repr(text))
    return tuple(int(number) for number in found.groups() if number is not None)
