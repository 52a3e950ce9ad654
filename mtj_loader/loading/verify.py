"""Verification after a load: compares every byte on every device with the files.

It shares only the views with the loader: each parameter is built whole, by numpy's indexing over
the list of pieces, converted whole, and compared bit by bit. Adapters are added in float64; those
parameters may differ in the last bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import ml_dtypes
import numpy as np

from mtj_loader.dtypes import FLOAT32
from mtj_loader.errors import NonFiniteError, VerifyError
from mtj_loader.formats.file_names import join_names
from mtj_loader.loading.load_failure import translate_errors
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.planning.param_plan import ParamPlan
from mtj_loader.storage.base import Storage
from mtj_loader.weights.read_layouts import read_layout
from mtj_loader.weights.view import ZEROS

_FLOAT32_TOLERANCE = 1e-6  # of the largest element; for sums of a few products in float32


@translate_errors()
def verify(plan: LoadPlan, params: Mapping[str, Mapping[str, jax.Array]]) -> int:
    """Compares every local shard with the checkpoint; returns the bytes compared.

    Raises:
      VerifyError: a shard differs; the message names the parameter, device and first element.
      NonFiniteError: weights are NaN or infinite and allow_nonfinite is off.
    """
    compared = 0
    for param in plan.params:
        whole = _expected(plan.checkpoint.storage, param.as_read)
        if not plan.options.allow_nonfinite and not np.isfinite(whole).all():
            raise NonFiniteError("weights are NaN or infinite", **_source(param))
        total = _add_terms(param, whole) if param.terms else whole
        for shard in params[param.spec.path][param.spec.param].addressable_shards:
            found, expected = np.asarray(shard.data), _shard(param, total, shard.index[0])
            differing = (
                _exceeds_rounding(param, found, expected)
                if param.terms
                else _bits_differ(found, expected)
            )
            if differing.any():
                raise _difference(param, shard, found, expected, differing)
            compared += shard.data.nbytes
    return compared


def _expected(storage: Storage, param: ParamPlan) -> np.ndarray:
    """The whole parameter [*view.shape], as it should be on the devices."""
    whole = np.zeros(param.view.shape, param.source_dtype)
    for piece in param.view.layout.pieces:
        if piece.source == ZEROS:
            continue
        record = param.view.records[piece.source]
        data = storage.read(record.file, record.offset_bytes, record.size_bytes)
        flat = np.frombuffer(data, param.source_dtype)[piece.offset :]
        strides = [stride * flat.itemsize for stride in piece.strides]
        box = tuple(slice(a, b) for a, b in zip(piece.start, piece.stop, strict=True))
        whole[box] = np.lib.stride_tricks.as_strided(flat, piece.shape, strides)
    if param.divisor != 1:
        return (whole.astype(FLOAT32) / np.float32(param.divisor)).astype(param.dtype)
    return whole.astype(param.dtype)


def _add_terms(param: ParamPlan, whole: np.ndarray) -> np.ndarray:
    """The whole parameter plus its adapters' terms, in float64."""
    total = whole.astype(np.float64).reshape(param.spec.shape)
    for term in param.terms:
        *lead, rows, columns = param.spec.shape
        rank = term.scales.shape[-1]
        left = read_layout(term.storage, term.left.records, term.left.layout)
        right = read_layout(term.storage, term.right.records, term.right.layout)
        scaled = left.reshape((*lead, rows, rank)).astype(np.float64) * term.scales[..., None, :]
        total += scaled @ right.reshape((*lead, rank, columns)).astype(np.float64)
    return total


def _bits_differ(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Where two arrays of one dtype differ in any bit."""
    bits = np.dtype(f"u{found.itemsize}")
    return np.ascontiguousarray(found).view(bits) != np.ascontiguousarray(expected).view(bits)


def _exceeds_rounding(param: ParamPlan, found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Where a sum with adapters' terms has a larger error than one rounding and float32 explain."""
    rounding = float(ml_dtypes.finfo(param.dtype).eps) * np.abs(expected)
    summing = _FLOAT32_TOLERANCE * np.abs(expected).max(initial=0)
    return ~(np.abs(found.astype(np.float64) - expected) <= rounding + summing)


def _shard(param: ParamPlan, whole: np.ndarray, index: slice) -> np.ndarray:
    """One shard of the whole parameter: splits the axes, takes part j, merges the axes again."""
    axes = [axis for group in param.spec.groups for axis in group]
    split = whole.reshape([axis.size for axis in axes])
    names = [axis.name for axis in axes]
    shards = len(param.shards)
    if param.spec.split is not None:
        at = names.index(param.spec.split)
        # An axis shorter than n (KV heads) has parts that several shards hold.
        first = (index.start or 0) * axes[at].size // shards
        part = slice(first, first + axes[at].part(shards))
        split = split[(*(slice(None) for _ in range(at)), part)]
    return split.reshape((1, *param.spec.shard_shape(shards)))


def _difference(
    param: ParamPlan,
    shard: jax.Shard,
    found: np.ndarray,
    expected: np.ndarray,
    differing: np.ndarray,
) -> VerifyError:
    at = tuple(int(i) for i in np.argwhere(differing)[0])
    return VerifyError(
        f"{int(differing.sum())} elements of a parameter differ from the checkpoint",
        **_source(param),
        key=f"{param.spec.path} {param.spec.param}, device {shard.device}, element {at}",
        expected=expected[at],
        found=found[at],
    )


def _source(param: ParamPlan) -> dict[str, str]:
    """The files and tensors that fill a parameter, as facts of an error."""
    records = param.view.records
    files = list(dict.fromkeys(record.file for record in records))
    return {"file": join_names(files), "tensor": join_names([record.name for record in records])}
