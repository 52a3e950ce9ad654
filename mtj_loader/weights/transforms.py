"""The transforms of a weight map, as view operations, and the tensor shapes that they imply."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from mtj_loader.parameters import Axis, ParamSpec, round_up
from mtj_loader.weights.view import View

# They are applied in this order, whatever the order in the map. `divide_by_shards` moves no
# element and is left to the loading.
TRANSFORMS = (
    "remove_first_two_rows",
    "divide_by_shards",
    "vocab_pad",
    "no_transpose",
    "qkv_blocks_to_heads",
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TransformContext:
    """What the transforms of one load have in common.

    Attributes:
      shards: n, the multiple that vocabularies are padded to.
      vocab_size: rows of the tensors that `vocab_pad` pads.
      transposed_linear: weights keep torch's [out, in].
    """

    shards: int
    vocab_size: int
    transposed_linear: bool

    def file_shape(self, spec: ParamSpec, transforms: Set[str]) -> Shape:
        """The shape that the tensor must have in the file, before any transform."""
        shape = list(spec.shape)
        if self._transposes(len(shape), transforms):
            shape[-1], shape[-2] = shape[-2], shape[-1]
        if "vocab_pad" in transforms:
            shape[0] = self.vocab_size
        if "remove_first_two_rows" in transforms:
            shape[0] += 2
        return tuple(shape)

    def inapplicable(self, spec: ParamSpec, transforms: Set[str]) -> str | None:
        """The first transform that makes no sense for this parameter."""
        names = [[axis.name for axis in group] for group in spec.groups]
        applies = {
            "vocab_pad": ["V"] in names,
            "divide_by_shards": spec.param == "b" and spec.split is None,
            "qkv_blocks_to_heads": ["h", "3", "k"] in names,
        }
        return next((op for op in transforms if not applies.get(op, True)), None)

    def apply(self, view: View, spec: ParamSpec, transforms: Set[str]) -> View:
        """The parameter's elements, from a tensor of `file_shape`."""
        view = self._change_rows(view, transforms)
        if self._transposes(len(view.shape), transforms):
            view = _swap_last_two(view)
        if "qkv_blocks_to_heads" in transforms:
            view = _blocks_to_heads(view, spec.groups)
        return view

    def apply_factors(
        self, b: View, a: View, spec: ParamSpec, transforms: Set[str]
    ) -> tuple[View, View]:
        """The factors of a low-rank term b · a, in the parameter's order.

        Args:
          b: [..., out, r].
          a: [..., r, in].
          spec: the parameter.
          transforms: those of the parameter's map entry.

        Returns:
          Views whose product equals `apply` of b · a: [..., rows, r] and [..., r, columns].
        """
        left, right = self._change_rows(b, transforms), a
        if self._transposes(len(spec.shape), transforms):
            left, right = _swap_last_two(right), _swap_last_two(left)
        if "qkv_blocks_to_heads" in transforms:
            left = _blocks_to_heads(left, spec.groups[:-1])
            right = _blocks_to_heads(right, spec.groups[-1:], first_dim=1)
        return left, right

    def _change_rows(self, view: View, transforms: Set[str]) -> View:
        """The view without the rows that are removed, and with the padding of the vocabulary."""
        if "remove_first_two_rows" in transforms:
            view = slice_rows(view, 2, view.shape[0])
        if "vocab_pad" in transforms:
            view = view.pad(0, round_up(view.shape[0], self.shards))
        return view

    def _transposes(self, ndim: int, transforms: Set[str]) -> bool:
        """Whether torch's [out, in] becomes Haiku's [in, out]; for experts, each one's matrix."""
        return ndim >= 2 and "no_transpose" not in transforms and not self.transposed_linear


def fused_shape(parts: Sequence[Shape]) -> Shape | None:
    """The shape of a tensor whose rows are those of the parts, in order.

    None if there is no such tensor: its parts are vectors, or matrices of the same width.
    """
    if len(parts) == 1:
        return parts[0]
    if any(len(part) > 2 or part[1:] != parts[0][1:] for part in parts):
        return None
    return (sum(part[0] for part in parts), *parts[0][1:])


def split_rows(view: View, parts: Sequence[Shape]) -> list[View]:
    """Cuts a view of `fused_shape(parts)`, or one with the same rows, into its parts."""
    if len(parts) == 1:
        return [view]
    stops = [sum(part[0] for part in parts[: i + 1]) for i in range(len(parts))]
    return [slice_rows(view, stop - part[0], stop) for part, stop in zip(parts, stops, strict=True)]


def slice_rows(view: View, start: int, stop: int) -> View:
    """The rows from `start` up to, but without, `stop`."""
    rest = view.shape[1:]
    return view.slice((start, *(0 for _ in rest)), (stop, *rest))


def _swap_last_two(view: View) -> View:
    """The view with its last two axes swapped."""
    ndim = len(view.shape)
    return view.transpose((*range(ndim - 2), ndim - 1, ndim - 2))


def _blocks_to_heads(view: View, groups: tuple[tuple[Axis, ...], ...], first_dim: int = 0) -> View:
    """Turns [Q; K; V] in whole blocks, as in MPT, into q, k, v of each head in turn.

    Args:
      view: with a dimension for each group, from `first_dim` on.
      groups: of a parameter; those that are not (h 3 k) are left unchanged.
      first_dim: see `view`.
    """
    for dim, group in enumerate(groups, first_dim):
        if [axis.name for axis in group] == ["h", "3", "k"]:
            heads, three, size = (axis.size for axis in group)
            view = view.split_axis(dim, (three, heads, size))
            order = list(range(len(view.shape)))
            order[dim], order[dim + 1] = dim + 1, dim
            return view.transpose(order)
    return view
