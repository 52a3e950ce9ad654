"""Where a text ends: at an end-of-text token, before a stop string, or at its length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mtj_loader.errors import UsageError

FinishReason = Literal["stop", "length"]  # the words of OpenAI's and koboldcpp's answers


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Brings what a caller may pass as `stop` to one form.

    Raises:
      UsageError: a stop string that is empty or not a string.
    """
    if stop is None:
        return ()
    for string in stop if isinstance(stop, list | tuple) else [stop]:
        if not isinstance(string, str) or not string:
            expected = "a string of at least one character, or a list of them"
            raise UsageError("not a stop string", key="stop", expected=expected, found=repr(string))
    return (stop,) if isinstance(stop, str) else tuple(stop)


@dataclass(frozen=True)
class StopMatch:
    """What is known of a text that may run into a stop string.

    Attributes:
      text: final: it comes before any stop string.
      held: may be the beginning of a stop string; scan it again with what follows.
      stopped: a stop string was found, right after `text`.
    """

    text: str
    held: str
    stopped: bool


def scan(text: str, stops: Sequence[str]) -> StopMatch:
    """Cuts a text before the stop string that ends first (of two such, before the longer one).

    That is where reading character by character would stop, so it does not matter how the text
    was cut into pieces: `scan(held + piece)` finds what a scan of the whole would.
    """
    starts = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    if starts:
        _, start = min(starts)
        return StopMatch(text[:start], "", stopped=True)
    held = max((_overlap(text, stop) for stop in stops), default=0)
    cut = len(text) - held
    return StopMatch(text[:cut], text[cut:], stopped=False)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that a stop string begins with."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
