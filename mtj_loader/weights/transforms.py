"""The map's transforms, as view operations, and the shapes that they imply."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from mtj_loader.parameters import Axis, ParamSpec
from mtj_loader.weights.view import View

# Applied in this order, whatever the order in the map. `divide_by_shards` moves no element and is
# left to the loading.
TRANSFORMS = (
    "remove_first_two_rows",
    "divide_by_shards",
    "vocab_pad",
    "no_transpose",
    "qkv_blocks_to_heads",
)


@dataclass(frozen=True)
class Layout:
    """What all transforms of one load have in common.

    Attributes:
      shards: n, the multiple that vocabularies are padded to.
      vocab_size: rows of the tensors that `vocab_pad` pads.
      transposed_linear: weights keep torch's [out, in].
    """

    shards: int
    vocab_size: int
    transposed_linear: bool

    def file_shape(self, spec: ParamSpec, transforms: Set[str]) -> tuple[int, ...]:
        """The shape that the tensor must have in the file: what the transforms do, undone."""
        shape = list(spec.shape)
        if self._transposes(len(shape), transforms):
            shape[-2:] = shape[:-3:-1]
        if "vocab_pad" in transforms:
            shape[0] = self.vocab_size
        if "remove_first_two_rows" in transforms:
            shape[0] += 2
        return tuple(shape)

    def unfit(self, spec: ParamSpec, transforms: Set[str]) -> str | None:
        """A transform that makes no sense for this parameter."""
        names = [[axis.name for axis in group] for group in spec.groups]
        fits = {
            "vocab_pad": ["V"] in names,
            "divide_by_shards": spec.param == "b" and spec.split is None,
            "qkv_blocks_to_heads": ["h", "3", "k"] in names,
        }
        return next((op for op in transforms if not fits.get(op, True)), None)

    def apply(self, view: View, spec: ParamSpec, transforms: Set[str]) -> View:
        """The parameter's elements, from a tensor of `file_shape`."""
        if "remove_first_two_rows" in transforms:
            view = view.slice((2, *(0 for _ in view.shape[1:])), view.shape)
        if "vocab_pad" in transforms:
            view = view.pad(0, -(-view.shape[0] // self.shards) * self.shards)
        if self._transposes(len(view.shape), transforms):
            view = _swapped(view)
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
          Views whose product is what `apply` makes of b · a: [..., rows, r] and [..., r, columns].
        """
        if "remove_first_two_rows" in transforms:
            b = b.slice((2, 0), b.shape)
        if "vocab_pad" in transforms:
            b = b.pad(0, -(-b.shape[0] // self.shards) * self.shards)
        left, right = b, a
        if self._transposes(len(spec.shape), transforms):
            left, right = _swapped(a), _swapped(b)
        if "qkv_blocks_to_heads" in transforms:
            left = _blocks_to_heads(left, spec.groups[:-1])
            right = _blocks_to_heads(right, spec.groups[-1:], first_dim=1)
        return left, right

    def _transposes(self, ndim: int, transforms: Set[str]) -> bool:
        """Whether torch's [out, in] becomes Haiku's [in, out]; of experts, each for itself."""
        return ndim >= 2 and "no_transpose" not in transforms and not self.transposed_linear


def _swapped(view: View) -> View:
    """The last two axes the other way round."""
    ndim = len(view.shape)
    return view.transpose((*range(ndim - 2), ndim - 1, ndim - 2))


def _blocks_to_heads(view: View, groups: tuple[tuple[Axis, ...], ...], first_dim: int = 0) -> View:
    """[Q; K; V] in whole blocks, as MPT has it, to q, k, v of each head in turn.

    Args:
      view: with a dimension for each group, from `first_dim` on.
      groups: of a parameter; those that are not (h 3 k) are left as they are.
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
