"""Every exception that mtj_loader raises on purpose, and the report that collects many of them.

Each class fixes the exit code of the command line: 2 wrong usage, 3 the checkpoint, the map or the
adapter is at fault, 4 the machine is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mtj_loader.names import blank_indices, fold_names

INTERRUPTED = 130  # as shells report what Ctrl-C ended
UNEXPECTED = 1  # what is no error of ours, as Python exits after a traceback


class MtjLoaderError(Exception):
    """Base of all errors raised here: one plain sentence, and the facts that belong to it.

    Attributes:
      what: the sentence, without a final period.
      file, tensor, key: where it happened, each None where it does not apply.
      expected, found: the two values that disagree, already fit to print.
      hint: what the reader can do about it.
    """

    exit_code = 3

    def __init__(
        self,
        what: str,
        *,
        file: object = None,
        tensor: str | None = None,
        key: str | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.file = None if file is None else str(file)
        self.tensor, self.key = tensor, key
        self.expected, self.found, self.hint = expected, found, hint
        super().__init__(self._message())

    def _message(self) -> str:
        facts = [("file", self.file), ("tensor", self.tensor), ("key", self.key)]
        facts += [("expected", self.expected), ("found", self.found), ("hint", self.hint)]
        lines = [f"  {name}: {_printable(value)}" for name, value in facts if value is not None]
        return "\n".join([self.what, *lines])


def _printable(value: object) -> str:
    """A stranger's text, which may not steer the terminal."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class UsageError(MtjLoaderError, ValueError):
    """The call itself is wrong: an option, a prompt, or a mesh that does not fit the model."""

    exit_code = 2


class MeshError(UsageError):
    """The mesh cannot hold this model; the message names shard counts that can."""


class PromptError(UsageError):
    """A prompt that cannot be run: ids outside the vocabulary, or a sequence that is too long."""


class TokenizerMissingError(UsageError):
    """Text was given or asked for, but the checkpoint brings no tokenizer."""


class CheckpointError(MtjLoaderError):
    """The checkpoint's files are damaged, incomplete, or not what they claim to be."""


class FormatError(CheckpointError):
    """Bytes that break the rules of their file format (safetensors, JSON, index)."""


class ConfigError(CheckpointError):
    """config.json asks for something that is malformed, contradictory or not supported."""


class MapError(MtjLoaderError):
    """The weight map (`configs/*.json` or `--map`) is malformed or does not fit the model."""


class AdapterError(MtjLoaderError):
    """A LoRA adapter that is malformed, does something unsupported, or fits another model."""


class NonFiniteError(CheckpointError):
    """NaN or infinity in the weights, or a dtype change that would make one."""


class VerifyError(CheckpointError):
    """A byte on a device is not the byte that the file and the map say it is."""


class MachineError(MtjLoaderError):
    """The machine cannot do it: memory, disk, network or too few devices."""

    exit_code = 4


class MemoryLimitError(MachineError, MemoryError):
    """Memory ran out, or `host_memory` is smaller than the least that works."""


class StorageError(MachineError, OSError):
    """A read or a write failed below us: disk, network, or a file that went away."""


class DeviceError(MachineError):
    """Fewer devices than the mesh asks for, or a device that refused an allocation."""


class HostError(MachineError):
    """Another host of the same load failed, died or did not come in time; or all differ.

    Attributes:
      host: which one; None where it is not known.
      exit_code: that host's own, where it failed by itself.
    """

    def __init__(
        self,
        what: str,
        *,
        host: int | None = None,
        exit_code: int = MachineError.exit_code,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.host, self.exit_code = host, exit_code
        super().__init__(what, found=found, hint=hint)


@dataclass(frozen=True)
class Problem:
    """One finding of a check that goes on after the first: what is wrong, and where."""

    what: str
    file: str | None = None
    tensor: str | None = None
    target: str | None = None  # "module param"
    expected: str | None = None
    found: str | None = None

    def __str__(self) -> str:
        names = ("file", "tensor", "target", "expected", "found")
        facts = [f"{n} {v}" for n in names if (v := getattr(self, n)) is not None]
        return f"{self.what}: {', '.join(facts)}" if facts else self.what


class CheckpointMismatchError(CheckpointError):
    """The checkpoint, the map and the model do not fit together; `problems` lists every finding."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(_listing(problems, "between checkpoint, map and model"))


class AdapterMismatchError(AdapterError):
    """An adapter does not fit the model; `problems` lists every finding."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(_listing(problems, "between adapter and model"))


def _listing(problems: Sequence[Problem], where: str) -> str:
    folded = fold_layers(problems)
    shown = [f"- {problem}" for problem in folded[:_PROBLEMS_SHOWN]]
    if len(folded) > _PROBLEMS_SHOWN:
        shown.append(f"- … and {len(folded) - _PROBLEMS_SHOWN} more (see .problems)")
    noun = "problem" if len(problems) == 1 else "problems"
    return "\n".join([f"{len(problems)} {noun} {where}", *shown])


_PROBLEMS_SHOWN = 30  # a screenful; the attribute has them all


def fold_layers(problems: Iterable[Problem]) -> list[Problem]:
    """Joins problems that differ only in numbers inside tensor and target names.

    `h.0.w`, `h.1.w`, `h.2.w` become `h.{0...2}.w`; the order of first appearance is kept.
    """
    groups: dict[object, list[Problem]] = {}
    for problem in problems:
        likeness = problem.what, problem.expected, problem.found
        names = _blank(problem.tensor), _blank(problem.target)
        groups.setdefault((likeness, names), []).append(problem)
    return [_joined(group) for group in groups.values()]


def _blank(name: str | None) -> str | None:
    return None if name is None else blank_indices(name)


def _joined(group: Sequence[Problem]) -> Problem:
    if len(group) == 1:
        return group[0]

    def join(field: str) -> str | None:
        values = [value for p in group if (value := getattr(p, field)) is not None]
        return fold_names(values) if values else None

    files = {p.file for p in group}
    file = group[0].file if len(files) == 1 else f"{len(files)} files"
    return replace(group[0], tensor=join("tensor"), target=join("target"), file=file)
