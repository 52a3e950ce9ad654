"""Whether a compiled program has the signature that its caller gives."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import Sharding
from jax.stages import Compiled

from mtj_loader.errors import ProgramError
from mtj_loader.programs.jax_private import ExecutableParts
from mtj_loader.programs.signature import Signature, Tree

# Tables of positions are smaller, and weights that a program closes over are larger.
_MAX_CONSTANT_BYTES = 16 << 20
# In XLA's text: `constant.1 = f32[16,8]{1,0} constant({...})`.
_CONSTANT = re.compile(r" = [a-z]+(\d*)\w*\[([\d,]+)\]\S* constant\(")


def check_compiled(
    name: str, compiled: Compiled, parts: ExecutableParts, signature: Signature
) -> None:
    """Compares trees, shapes, dtypes, donation and placement of all arguments and results.

    Raises:
      ProgramError: they differ; names the program and the first argument or result that does. Or
        the program contains large constants.
    """
    what = f"the program {name} does not have the signature to save it with"
    _check_equal(what, "arguments", compiled.in_tree, jax.tree.structure((signature.args, {})))
    _check_equal(what, "results", compiled.out_tree, jax.tree.structure(signature.results))
    for info, row in zip(jax.tree.leaves(compiled.args_info), signature.argument_rows, strict=True):
        found = list(info.shape), np.dtype(info.dtype).name, info.donated
        _check_equal(what, row["path"], found, (row["shape"], row["dtype"], row["donated"]))
    for info, row in zip(jax.tree.leaves(compiled.out_info), signature.result_rows, strict=True):
        found = list(info.shape), np.dtype(info.dtype).name
        _check_equal(what, f"result{row['path']}", found, (row["shape"], row["dtype"]))
    args, results = jax.tree.leaves(signature.args), jax.tree.leaves(signature.results)
    _check_placement(what, "argument", parts.argument_shardings, [args[i] for i in parts.used])
    _check_placement(what, "result", parts.result_shardings, results)
    _check_constants(name, compiled.as_text() or "")
    if parts.weak_results:
        found = f"result {parts.weak_results[0]} is weakly typed, as a Python number"
        raise ProgramError(what, expected="results with a dtype of their own", found=found)


def _check_equal(what: str, key: object, found: object, expected: object) -> None:
    if found != expected:
        raise ProgramError(what, key=str(key), expected=expected, found=found)


def _check_placement(
    what: str, kind: str, shardings: Iterable[Sharding], leaves: Iterable[Tree]
) -> None:
    for number, (sharding, leaf) in enumerate(zip(shardings, leaves, strict=True)):
        if not sharding.is_equivalent_to(leaf.sharding, leaf.ndim):
            key = f"{kind} {number}"
            raise ProgramError(what, key=key, expected=leaf.sharding, found=sharding)


def _check_constants(name: str, text: str) -> None:
    """By default, JAX makes arrays that a function closes over constants of the program."""
    for match in _CONSTANT.finditer(text):
        bits, shape = match[1] or 8, map(int, match[2].split(","))  # `pred` has no bits in its name
        if (size := math.prod(shape) * int(bits) // 8) > _MAX_CONSTANT_BYTES:
            raise ProgramError(
                f"the program {name} cannot be saved: it contains a large constant",
                expected=f"constants of at most {_MAX_CONSTANT_BYTES:,} bytes",
                found=f"{size:,} bytes",
                hint="pass the arrays that the function closes over as arguments",
            )
