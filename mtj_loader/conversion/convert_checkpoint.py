"""Converting a checkpoint to another dtype: `mtj_loader.convert`, its steps and its report."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal, Unpack, get_args

from mtj_loader.conversion.casting import Losses
from mtj_loader.conversion.convert_plan import (
    ConvertPlan,
    TensorConversion,
    find_target,
    make_index,
    make_plan,
)
from mtj_loader.conversion.convert_tensors import convert_tensors
from mtj_loader.conversion.output_folder import check_target, write_at
from mtj_loader.display import counted, parse_bytes, show_bytes
from mtj_loader.errors import NonFiniteError, UsageError
from mtj_loader.formats.checkpoint import CONFIG_FILE
from mtj_loader.formats.file_names import INDEX_FILE
from mtj_loader.loading.load_failure import translate_errors
from mtj_loader.loading.progress import progress_bar
from mtj_loader.names import escape
from mtj_loader.options import PathLike, Source, SourceKeywords, takes_options
from mtj_loader.storage.base import Storage, check_unchanged
from mtj_loader.storage.create_folder import create_folder

NewDType = Literal["float16", "bfloat16", "float32"]
OnOverflow = Literal["refuse", "clamp"]

_DTYPE_KEYS = ("dtype", "torch_dtype")  # in config.json: since transformers 5, and before
_COPY_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class TensorReport:
    """A converted tensor; dtypes as safetensors spells them, losses in elements."""

    name: str
    source_dtype: str
    dtype: str
    elements: int
    overflow: int
    underflow: int
    nonfinite: int

    @property
    def losses(self) -> Losses:
        """Its losses."""
        return Losses(self.overflow, self.underflow, self.nonfinite)


@dataclass(frozen=True)
class ConvertReport:
    """A finished conversion; sizes in bytes.

    Attributes:
      location: the source: a path, or `owner/name@commit`.
      out: the output folder.
      dtype: of its floats.
      files: its weight files.
      tensors: all tensors, with the number of elements that overflowed (and were clamped), that
        became zero, and that were NaN or infinite.
      copied: other files that were copied unchanged.
      left_out: files that were not copied: other weights, large files, folders.
      bytes_read, bytes_written: of weights.
      seconds: from the first read until everything is on disk.
      warnings: conditions that did not stop the conversion.
    """

    location: str
    out: str
    dtype: str
    files: tuple[str, ...]
    tensors: tuple[TensorReport, ...]
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    seconds: float
    warnings: tuple[str, ...]

    @property
    def losses(self) -> Losses:
        """The sum over all tensors."""
        return sum((tensor.losses for tensor in self.tensors), Losses())

    def to_dict(self) -> dict[str, object]:
        """The report as JSON types; docs/json.md describes them."""
        return {**asdict(self), **asdict(self.losses)}

    def __repr__(self) -> str:
        return f"<ConvertReport: {self}>"

    def __str__(self) -> str:
        """The report in two lines."""
        losses = self.losses
        return (
            f"{counted(len(self.tensors), 'tensor')} to {self.dtype}: {show_bytes(self.bytes_read)}"
            f" read, {show_bytes(self.bytes_written)} written in {self.seconds:.2f} s,"
            f" {counted(len(self.files), 'file')} in {escape(self.out)}\n"
            f"{losses.overflow:,} overflowed, {losses.underflow:,} became zero, "
            f"{losses.nonfinite:,} are NaN or infinite"
        )


@takes_options(Source)
def convert(
    path: PathLike,
    out: PathLike | None = None,
    *,
    dtype: NewDType,
    on_overflow: OnOverflow = "refuse",
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
    progress: bool = True,
    **keywords: Unpack[SourceKeywords],
) -> ConvertReport:
    """Writes a copy of a checkpoint of any family with its floats in another dtype.

    Each number is rounded once, to nearest even; integers and booleans are kept. The config, with
    its dtype changed, the tokenizer and all other small files are copied too. The output folder
    appears complete or not at all.

    Args:
      path: {path}
      out: the output folder; by default `<name>-<dtype>` next to the source, or in the working
        folder if the source is not a local path.
      dtype: of the converted floats.
      on_overflow: "refuse" raises an error if numbers are too large for the dtype; "clamp" replaces
        them with the largest number of the dtype.
      allow_nonfinite: convert NaN and infinity instead of raising an error.
      overwrite: replace an existing checkpoint.
      max_shard_size: maximum size of the tensors in a file, such as "5GB"; a larger tensor gets its
        own file.
      progress: show a progress bar if there is a terminal.
      {options}

    Raises:
      UsageError: an invalid option, or a target that may not be written.
      CheckpointError: an invalid source; NonFiniteError for NaN, infinity and overflow.
      MachineError: a full disk, or a disk or network error.
    """
    _check_choice("dtype", dtype, get_args(NewDType))
    _check_choice("on_overflow", on_overflow, get_args(OnOverflow))
    max_shard_bytes = parse_bytes(max_shard_size)
    target = find_target(path, out, dtype)
    warnings = check_target(target, overwrite=overwrite)
    plan = make_plan(Source(path, **keywords), target, dtype, max_shard_bytes)
    return _execute(
        replace(plan, warnings=(*warnings, *plan.warnings)),
        clamp=on_overflow == "clamp",
        allow_nonfinite=allow_nonfinite,
        overwrite=overwrite,
        progress=progress,
    )


def _check_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        expected = ", ".join(choices)
        raise UsageError("unknown option", key=key, expected=expected, found=repr(value))


@translate_errors()
def _execute(
    plan: ConvertPlan, *, clamp: bool, allow_nonfinite: bool, overwrite: bool, progress: bool
) -> ConvertReport:
    started_at = time.perf_counter()
    storage = plan.checkpoint.storage
    with (
        storage,
        create_folder(plan.target, overwrite=overwrite) as folder,
        progress_bar(plan.source_bytes, shown=progress, verb="converting") as advance,
    ):
        _write_other_files(plan, folder)
        losses = convert_tensors(storage, plan.tensors, folder, clamp=clamp, progress=advance)
        check_unchanged(storage, *plan.checkpoint.index.files.values())
        tensors = [_report_tensor(tensor, losses[tensor.source.name]) for tensor in plan.tensors]
        _check_losses(plan, tensors, clamp=clamp, allow_nonfinite=allow_nonfinite)
    return _make_report(plan, tensors, time.perf_counter() - started_at)


def _write_other_files(plan: ConvertPlan, folder: Path) -> None:
    """Writes everything except tensors: small files, config, headers, and an index for shards."""
    for name in plan.copied:
        _copy_file(plan.checkpoint.storage, name, folder / name)
    _write_json(folder / CONFIG_FILE, _set_dtype(plan.checkpoint.config, plan.dtype))
    for file in plan.files:
        write_at(folder / file.name, 0, memoryview(file.header))
    if len(plan.files) > 1:
        _write_json(folder / INDEX_FILE, make_index(plan.files))


def _copy_file(storage: Storage, name: str, path: Path) -> None:
    size_bytes = storage.version(name).size_bytes
    write_at(path, 0, memoryview(b""))  # creates the file even if it is empty
    for start in range(0, size_bytes, _COPY_CHUNK_BYTES):
        data = storage.read(name, start, min(_COPY_CHUNK_BYTES, size_bytes - start))
        write_at(path, start, memoryview(data))


def _write_json(path: Path, document: Mapping[str, object]) -> None:
    """Writes JSON in the same layout as transformers."""
    write_at(path, 0, memoryview((json.dumps(document, indent=2) + "\n").encode()))


def _set_dtype(config: Mapping[str, object], dtype: str) -> dict[str, object]:
    """Returns the config with its dtype changed, under the keys that it already uses.

    If it has none, the older key is added, which all versions of transformers read.
    """
    keys = [key for key in _DTYPE_KEYS if key in config] or ["torch_dtype"]
    return {**config, **dict.fromkeys(keys, dtype)}


def _report_tensor(tensor: TensorConversion, losses: Losses) -> TensorReport:
    source, target = tensor.source, tensor.target
    elements = prod(source.shape)
    return TensorReport(source.name, source.dtype, target.dtype, elements, **asdict(losses))


def _check_losses(
    plan: ConvertPlan, tensors: Sequence[TensorReport], *, clamp: bool, allow_nonfinite: bool
) -> None:
    nonfinite = {tensor.name: tensor.nonfinite for tensor in tensors if tensor.nonfinite}
    if nonfinite and not allow_nonfinite:
        what, hint = "weights are NaN or infinite", "allow_nonfinite converts them anyway"
        raise _loss_error(plan, what, nonfinite, hint)
    overflow = {tensor.name: tensor.overflow for tensor in tensors if tensor.overflow}
    if overflow and not clamp:
        what = f"finite weights are too large for {plan.dtype}"
        hint = f"on_overflow=clamp replaces them with the largest {plan.dtype}"
        raise _loss_error(plan, what, overflow, hint)


def _loss_error(plan: ConvertPlan, what: str, counts: dict[str, int], hint: str) -> NonFiniteError:
    """Names the tensor with the highest count, and the total count."""
    tensor = max(counts, key=lambda name: counts[name])
    total, tensors = sum(counts.values()), counted(len(counts), "tensor")
    found = f"{counts[tensor]:,} in this tensor, {total:,} in {tensors}"
    file = plan.checkpoint.index.records[tensor].file
    return NonFiniteError(what, file=file, tensor=tensor, found=found, hint=hint)


def _make_report(
    plan: ConvertPlan, tensors: Sequence[TensorReport], seconds: float
) -> ConvertReport:
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
