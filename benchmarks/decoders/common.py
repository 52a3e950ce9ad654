"""What a decoder measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Decoded:
    """The times of one greedy batch, in seconds.

    Attributes:
      first_token: until every row has its first token.
      step: of decoding alone: the time after that for each further token of all rows.
      ids: the first tokens of the first row, to compare.
    """

    first_token: float
    step: float
    ids: list[int]

    def as_dict(self) -> dict[str, object]:
        """In JSON types."""
        return asdict(self)


# Takes the prompts, all of one length, and the number of new tokens.
Decode = Callable[[Prompts, int], Decoded]

COMPARED_TOKENS = 8  # later ones may differ: sums are rounded in another order


def from_times(start: float, times: Sequence[float], ids: Sequence[int]) -> Decoded:
    """The result, given when each token was there for all rows."""
    step = (times[-1] - times[0]) / (len(times) - 1)
    return Decoded(times[0] - start, step, list(map(int, ids[:COMPARED_TOKENS])))
