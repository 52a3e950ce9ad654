"""What happens to tensors on their way to a parameter, read off the plan that will be executed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtj_loader.display import counted
from mtj_loader.weights.view import ZEROS, Piece

if TYPE_CHECKING:
    from mtj_loader.planning.load_plan import ParamPlan


@dataclass(frozen=True)
class Changes:
    """How a parameter differs from the tensors that fill it, but for its dtype and its split.

    Attributes:
      transposed: torch's [out, in] becomes Haiku's [in, out].
      regrouped: whole blocks of queries, keys and values become q, k, v of each head in turn.
      zero_rows: rows of zeros that pad the vocabulary.
      dropped_rows: rows of the tensors that are not used.
      divided_by: what every element is divided by; 1 for nothing.
      adapters: how many LoRA adapters add to it.
    """

    transposed: bool
    regrouped: bool
    zero_rows: int
    dropped_rows: int
    divided_by: int
    adapters: int = 0

    def __str__(self) -> str:
        said = [
            (self.transposed, "transposed"),
            (self.regrouped, "regrouped by heads"),
            (self.zero_rows, f"{counted(self.zero_rows, 'row')} of zeros added"),
            (self.dropped_rows, f"{counted(self.dropped_rows, 'row')} dropped"),
            (self.divided_by != 1, f"divided by {self.divided_by}"),
            (self.adapters, f"{counted(self.adapters, 'adapter')} added"),
        ]
        return ", ".join(words for holds, words in said if holds)


def changes(param: ParamPlan) -> Changes:
    """The changes that the plan makes; a row is a row of the first tensor."""
    records, layout = param.view.records, param.view.layout
    row = (math.prod(records[0].shape[1:]) if records else math.prod(layout.shape[1:])) or 1
    zeros = sum(math.prod(piece.shape) for piece in layout.pieces if piece.source == ZEROS)
    stored = sum(math.prod(record.shape) for record in records)
    used = sum(math.prod(piece.shape) for piece in layout.pieces if piece.source != ZEROS)
    return Changes(
        transposed=any(map(_is_transposed, layout.pieces)),
        regrouped=any(map(_is_regrouped, layout.pieces)),
        zero_rows=zeros // row,
        dropped_rows=(stored - used) // row,
        divided_by=param.divisor,
        adapters=len(param.terms),
    )


def dtype_changes(params: Iterable[ParamPlan]) -> dict[str, int]:
    """How many parameters change their dtype on the way, by "from → to"."""
    changed = (p for p in params if p.source_dtype != p.dtype)
    return dict(Counter(f"{p.source_dtype.name} → {p.dtype.name}" for p in changed))


def _is_transposed(piece: Piece) -> bool:
    """Whether neighbors in the file are no longer neighbors along the last axis."""
    strides = _strides(piece)
    return bool(strides) and strides[-1] != min(strides)


def _is_regrouped(piece: Piece) -> bool:
    """Whether the slower axes come in another order than in the file."""
    strides = _strides(piece)
    slower = [stride for stride in strides if stride != min(strides)]
    return slower != sorted(slower, reverse=True)


def _strides(piece: Piece) -> list[int]:
    """Of the axes that move in the file; none for zeros."""
    return [s for n, s in zip(piece.shape, piece.strides, strict=True) if n > 1 and s]
