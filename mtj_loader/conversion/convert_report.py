"""What a conversion did, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from mtj_loader.conversion.casting import Losses
from mtj_loader.display import counted, show_bytes


@dataclass(frozen=True)
class TensorReport:
    """One tensor; dtypes as safetensors spells them, losses in elements."""

    name: str
    source_dtype: str
    dtype: str
    elements: int
    overflow: int
    underflow: int
    nonfinite: int


@dataclass(frozen=True)
class ConvertReport:
    """A finished conversion; sizes in bytes.

    Attributes:
      location: what was converted: a path, or `owner/name@commit`.
      out: the folder that was written.
      dtype: of its floats.
      files: its weights.
      tensors: every tensor, with the elements that overflowed (and were clamped), that became
        zero, and that were NaN or infinite.
      copied: other files that were copied as they are.
      left_out: what was not: other weights than those converted, large files, folders.
      bytes_read, bytes_written: weights.
      seconds: from the first read to the last byte on the disk.
      warnings: what was noticed and is no error.
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
        return sum((Losses(t.overflow, t.underflow, t.nonfinite) for t in self.tensors), Losses())

    def to_dict(self) -> dict[str, object]:
        """The report as JSON types; docs/json.md describes them."""
        return {**asdict(self), **asdict(self.losses)}

    def __str__(self) -> str:
        """The report in two lines."""
        losses = self.losses
        return (
            f"{counted(len(self.tensors), 'tensor')} to {self.dtype}: {show_bytes(self.bytes_read)}"
            f" read, {show_bytes(self.bytes_written)} written in {self.seconds:.2f} s,"
            f" {counted(len(self.files), 'file')} in {self.out}\n"
            f"{losses.overflow:,} overflowed, {losses.underflow:,} became zero, "
            f"{losses.nonfinite:,} are NaN or infinite"
        )
