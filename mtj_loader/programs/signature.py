"""The arguments and results of a program: shapes, dtypes, partitions, and what is donated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mtj_loader.errors import ProgramError

Tree = Any  # a pytree of jax.ShapeDtypeStruct, each with a NamedSharding
Row = dict[str, object]


@dataclass(frozen=True)
class Signature:
    """What a caller passes to a program and gets from it; made from a config, without arrays.

    Attributes:
      args: a tree for each positional argument; the leaves are `jax.ShapeDtypeStruct`s, each with a
        NamedSharding, all on one mesh of devices.
      results: the same for the result.
      donate_argnums: the positions of donated arguments, as in `jax.jit`.

    Raises:
      ProgramError: an argument or result has no such sharding.
    """

    args: tuple[Tree, ...]
    results: Tree
    donate_argnums: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        meshes = {_mesh_of(leaf) for leaf in jax.tree.leaves((self.args, self.results))}
        if len(meshes) != 1:
            what = "the arguments and results of a program must be placed on one mesh"
            raise ProgramError(what, found=f"{len(meshes)} meshes")

    @property
    def donated(self) -> tuple[int, ...]:
        """The positions of donated arguments among all leaves."""
        return tuple(i for i, row in enumerate(self.argument_rows) if row["donated"])

    @property
    def argument_rows(self) -> tuple[Row, ...]:
        """For each argument, in JAX's order, as JSON types: path, shape, dtype, partition, donated.

        The path starts with the position: `[0]['linear']['w']`. The partition lists the mesh axes
        over which each axis is split, without None at the end.
        """
        return tuple(
            row | {"donated": number in self.donate_argnums}
            for number, arg in enumerate(self.args)
            for row in _rows(arg, f"[{number}]")
        )

    @property
    def result_rows(self) -> tuple[Row, ...]:
        """The same for each result, without `donated`."""
        return tuple(_rows(self.results, ""))


def _mesh_of(leaf: object) -> Mesh:
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        what = "an argument or result of a program has no NamedSharding on a mesh of devices"
        raise ProgramError(what, found=str(leaf))
    return sharding.mesh


def _rows(tree: Tree, prefix: str) -> Iterator[Row]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield {
            "path": prefix + jax.tree_util.keystr(path),
            "shape": list(leaf.shape),
            "dtype": np.dtype(leaf.dtype).name,
            "partition": _partition(leaf.sharding),
        }


def _partition(sharding: NamedSharding) -> list[object]:
    """The partition in one spelling: P("mp", None) and P(("mp",)) are ["mp"]."""
    axes = [_mesh_axes(axis) for axis in sharding.spec]
    while axes and axes[-1] is None:
        axes.pop()
    return axes


def _mesh_axes(axis: object) -> object:
    names = list(axis) if isinstance(axis, tuple) else axis
    if isinstance(names, list) and len(names) <= 1:
        return names[0] if names else None
    return names
