"""Executing a plan: files are written into a folder beside the target, which then gets its name."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import prod
from pathlib import Path

from mtj_loader.conversion.casting import Losses
from mtj_loader.conversion.convert_plan import ConvertPlan
from mtj_loader.conversion.convert_report import ConvertReport, TensorReport
from mtj_loader.conversion.convert_tensors import convert_tensors
from mtj_loader.conversion.output_folder import new_folder, write_at
from mtj_loader.conversion.output_layout import Move, index_document
from mtj_loader.conversion.small_files import copy_file, with_dtype, write_json
from mtj_loader.display import counted
from mtj_loader.errors import NonFiniteError
from mtj_loader.formats.checkpoint import CONFIG_FILE
from mtj_loader.formats.file_names import INDEX_FILE
from mtj_loader.loading.load_failure import clean_failure
from mtj_loader.loading.progress import progress_bar
from mtj_loader.storage.base import check_unchanged


@clean_failure()
def execute(
    plan: ConvertPlan, *, clamp: bool, allow_nonfinite: bool, overwrite: bool, progress: bool
) -> ConvertReport:
    """Converts as planned; see `convert` for the options.

    Raises:
      NonFiniteError: NaN, infinity or overflow that is not allowed; nothing is left behind.
      CheckpointError: a file of the source is damaged or changed meanwhile.
      StorageError: the disk is full, or reading or writing failed.
    """
    begun = time.perf_counter()
    storage = plan.checkpoint.storage
    with (
        storage,
        new_folder(plan.target, overwrite=overwrite) as folder,
        progress_bar(plan.source_bytes, shown=progress, verb="converting") as advance,
    ):
        _write_other_files(plan, folder)
        losses = convert_tensors(storage, plan.moves, folder, clamp=clamp, progress=advance)
        check_unchanged(storage, *plan.checkpoint.index.files.values())
        tensors = [_tensor_report(move, losses[move.source.name]) for move in plan.moves]
        _check(tensors, plan.dtype, clamp=clamp, allow_nonfinite=allow_nonfinite)
    return _report(plan, tensors, time.perf_counter() - begun)


def _write_other_files(plan: ConvertPlan, folder: Path) -> None:
    """Everything but tensors: small files, config, headers, and the index of several files."""
    for name in plan.copied:
        copy_file(plan.checkpoint.storage, name, folder / name)
    write_json(folder / CONFIG_FILE, with_dtype(plan.checkpoint.config, plan.dtype))
    for file in plan.files:
        write_at(folder / file.name, 0, memoryview(file.header))
    if len(plan.files) > 1:
        write_json(folder / INDEX_FILE, index_document(plan.files))


def _tensor_report(move: Move, losses: Losses) -> TensorReport:
    source, target = move.source, move.target
    counts = (losses.overflow, losses.underflow, losses.nonfinite)
    return TensorReport(source.name, source.dtype, target.dtype, prod(source.shape), *counts)


def _check(
    tensors: Sequence[TensorReport], dtype: str, *, clamp: bool, allow_nonfinite: bool
) -> None:
    nonfinite = {tensor.name: tensor.nonfinite for tensor in tensors if tensor.nonfinite}
    if nonfinite and not allow_nonfinite:
        what, hint = "weights are NaN or infinite", "allow_nonfinite converts them all the same"
        raise _refusal(what, nonfinite, hint)
    overflow = {tensor.name: tensor.overflow for tensor in tensors if tensor.overflow}
    if overflow and not clamp:
        what = f"finite weights are too large for {dtype}"
        raise _refusal(what, overflow, f"on_overflow=clamp makes them the largest of {dtype}")


def _refusal(what: str, counts: dict[str, int], hint: str) -> NonFiniteError:
    """Names the tensor that has the most, and says how many there are in all."""
    tensor = max(counts, key=lambda name: counts[name])
    found = (
        f"{counts[tensor]:,} there, {sum(counts.values()):,} in {counted(len(counts), 'tensor')}"
    )
    return NonFiniteError(what, tensor=tensor, found=found, hint=hint)


def _report(plan: ConvertPlan, tensors: Sequence[TensorReport], seconds: float) -> ConvertReport:
    return ConvertReport(
        location=plan.checkpoint.location,
        out=str(plan.target),
        dtype=plan.dtype,
        files=tuple(file.name for file in plan.files),
        tensors=tuple(tensors),
        copied=plan.copied,
        left_out=plan.left_out,
        bytes_read=plan.source_bytes,
        bytes_written=sum(file.data_bytes for file in plan.files),
        seconds=seconds,
        warnings=plan.warnings,
    )
