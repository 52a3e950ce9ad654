"""What the TPU compiler says about a model on a slice, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self


@dataclass(frozen=True)
class Collectives:
    """The collectives of one kind in a program.

    Attributes:
      kind: such as "all-reduce".
      count: how many run.
      bytes: of their results on a device, all together.
    """

    kind: str
    count: int
    bytes: int


@dataclass(frozen=True)
class WeightCopy:
    """A weight that a program writes to HBM a second time, such as in another layout.

    Attributes:
      operation: the JAX operation that it is for.
      bytes: that are written.
    """

    operation: str
    bytes: int


@dataclass(frozen=True)
class OperationCost:
    """The operations of one kind in all layers.

    Attributes:
      name: the JAX operation, with the layers folded; "wait" for the time until a read is done.
      count: how many there are.
      seconds: their time along the schedule.
      hbm_bytes: that they read and write.
    """

    name: str
    count: int = 0
    seconds: float = 0.0
    hbm_bytes: int = 0


@dataclass(frozen=True)
class CompiledProgram:
    """One program of a model, compiled for a slice. Bytes are those of one device.

    Attributes:
      compile_seconds: time to compile it on this machine.
      parameter_bytes: of the model, as they lie in HBM, padding included.
      argument_bytes: everything that the program is given: parameters, KV cache, tokens.
      temporary_bytes: what it needs besides while it runs.
      program_bytes: its code.
      collectives: by kind.
      weight_copies: there should be none.
      xla_seconds: XLA's `optimal_seconds`: all bytes that operations access, also on the chip, over
        the bandwidth of HBM. Prefetched bytes count several times. None if XLA cannot tell.
      schedule_seconds: XLA's cycles of each operation along the schedule, with reads of HBM beside.
      hbm_bytes: that it reads and writes.
      operations: those that take most of `schedule_seconds`.
    """

    compile_seconds: float
    parameter_bytes: int
    argument_bytes: int
    temporary_bytes: int
    program_bytes: int
    collectives: tuple[Collectives, ...]
    weight_copies: tuple[WeightCopy, ...]
    xla_seconds: float | None
    schedule_seconds: float
    hbm_bytes: int
    operations: tuple[OperationCost, ...]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The program of `asdict`, as JSON types."""
        parts = {
            "collectives": tuple(Collectives(**one) for one in fields["collectives"]),
            "weight_copies": tuple(WeightCopy(**one) for one in fields["weight_copies"]),
            "operations": tuple(OperationCost(**one) for one in fields["operations"]),
        }
        return cls(**{**fields, **parts})


@dataclass(frozen=True)
class Memory:
    """The HBM of one device that serving takes, in bytes.

    Attributes:
      parameters: of the model.
      cache: keys and values of all slots, and the inputs of a step.
      temporaries: of the program that needs most.
      programs: the code of all programs.
    """

    parameters: int
    cache: int
    temporaries: int
    programs: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.cache + self.temporaries + self.programs


@dataclass(frozen=True)
class CompiledFit:
    """A model compiled for a slice, with as many shards as both allow.

    Attributes:
      name: of the slice.
      dp, mp: the mesh.
      slots: sequences at a time, over all replicas.
      context: tokens that each slot has room for.
      available_bytes: HBM of a device that XLA lets programs use.
      shortfall_bytes: how much more they need, as XLA says in hundredths of a GiB; 0 if they fit.
      memory: what they need; None if they do not fit.
      programs: "prefill" and "decode"; empty if they do not fit.
      largest_context: the longest context that fits with these slots, at most the model's; 0 if
        none does.
      largest_slots: the most slots that fit with this context; 0 if none do.
      limit_seconds: a decoding step at the least: parameters and cache over HBM's bandwidth.
      failure: why the compiler gave no answer: it crashed, or took too long; None if it answered.
    """

    name: str
    dp: int
    mp: int
    slots: int
    context: int
    available_bytes: int = 0
    shortfall_bytes: int = 0
    memory: Memory | None = None
    programs: Mapping[str, CompiledProgram] = field(default_factory=dict)
    largest_context: int = 0
    largest_slots: int = 0
    limit_seconds: float = 0.0
    failure: str | None = None

    @property
    def fits(self) -> bool:
        """Whether XLA has compiled all programs for these slots."""
        return self.memory is not None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The fit of `to_dict`."""
        names = {name for name in cls.__dataclass_fields__ if name in fields}
        given = {name: fields[name] for name in names}
        given["memory"] = Memory(**given["memory"]) if given["memory"] else None
        programs = given["programs"].items()
        given["programs"] = {name: CompiledProgram.from_dict(one) for name, one in programs}
        return cls(**given)

    def to_dict(self) -> dict[str, object]:
        """The fit as JSON types; docs/json.md describes them."""
        return {**asdict(self), "fits": self.fits}
