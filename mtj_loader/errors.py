"""Every exception that mtj_loader raises deliberately, and errors that list many problems at once.

Each class sets the exit code of the command line: 2 for wrong usage; 3 if the checkpoint, the map
or the adapter is at fault; 4 if the machine is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mtj_loader.names import blank_indices, escape, escape_lines, fold_names, group_by

INTERRUPTED = 130  # exit code after Ctrl-C, as in shells
UNEXPECTED = 1  # exit code for any other exception, as in Python

_MAX_FACT_CHARS = 1_000  # of a file, a value, …: a file may contain megabytes of either
_MAX_PROBLEMS_SHOWN = 30  # about one screen; the attribute has all


class MtjLoaderError(Exception):
    """Base class of all errors here: one plain sentence, and the facts that belong to it.

    Attributes:
      what: the sentence, without a final period.
      file, tensor, key: where it happened; each None if it does not apply.
      expected, found: the two values that disagree, formatted for printing.
      hint: what the user can do about it.
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
        lines = [f"  {name}: {_shorten(value)}" for name, value in facts if value is not None]
        return "\n".join([self._headline(), *lines])

    def _headline(self) -> str:
        """What comes before the facts."""
        return escape(self.what)


def _shorten(value: object) -> str:
    text = str(value)
    if len(text) > _MAX_FACT_CHARS:
        return f"{escape(text[:_MAX_FACT_CHARS])}… ({len(text):,} characters)"
    return escape(text)


class UsageError(MtjLoaderError, ValueError):
    """The call is wrong: an option, a prompt, or a mesh that does not fit the model."""

    exit_code = 2


class MeshError(UsageError):
    """The mesh does not fit the model; the message lists shard counts that do."""


class PromptError(UsageError):
    """A prompt cannot be run: ids are outside the vocabulary, or the sequence is too long."""


class TokenizerMissingError(UsageError):
    """Text was given or requested, but the checkpoint has no tokenizer."""


class GrammarError(UsageError):
    """A grammar or JSON schema is malformed, too large, or cannot be followed."""


class CheckpointError(MtjLoaderError):
    """The checkpoint's files are damaged, incomplete or inconsistent."""


class FormatError(CheckpointError):
    """A file violates its format (safetensors, JSON, index)."""


class ConfigError(CheckpointError):
    """A setting in config.json is malformed, contradictory or not supported."""


class ConfigMismatchError(ConfigError):
    """Several settings in config.json are at fault; `problems` has an error for each."""

    def __init__(self, problems: Sequence[ConfigError]) -> None:
        self.problems = tuple(problems)
        files = {problem.file for problem in problems}
        hints = [problem.hint for problem in problems if problem.hint]
        what = f"{len(problems)} settings cannot be used"
        file = problems[0].file if len(files) == 1 else None
        super().__init__(what, file=file, hint=hints[0] if hints else None)

    def _headline(self) -> str:
        names = ["key", "expected", "found"] if self.file else ["file", "key", "expected", "found"]
        return _bullets(self.what, [_in_one_line(error, names) for error in self.problems])


def _in_one_line(problem: MtjLoaderError | Problem, names: Iterable[str]) -> str:
    facts = [f"{n} {_shorten(v)}" for n in names if (v := getattr(problem, n)) is not None]
    return ": ".join([escape(problem.what), *([", ".join(facts)] if facts else [])])


def raise_all(problems: Sequence[ConfigError]) -> None:
    """Raises the problems as one error, if there are any."""
    if problems:
        raise problems[0] if len(problems) == 1 else ConfigMismatchError(problems)


class MapError(MtjLoaderError):
    """The weight map (`configs/*.json` or `--map`) is malformed or does not fit the model."""


class AdapterError(MtjLoaderError):
    """A LoRA adapter is malformed, unsupported or made for another model."""


class GenerationError(MtjLoaderError):
    """A request cannot go on: no token may be chosen, or its grammar or bans are at fault."""


class NonFiniteError(CheckpointError):
    """The weights contain NaN or infinity, or a dtype change would produce them."""


class VerifyError(CheckpointError):
    """A byte on a device differs from what the file and the map require."""


class MachineError(MtjLoaderError):
    """The machine is at fault: memory, disk, network or too few devices."""

    exit_code = 4


class MemoryLimitError(MachineError, MemoryError):
    """Memory ran out, or there is too little for the load."""


class QueueFullError(MachineError):
    """Too many requests are waiting already."""


class StorageError(MachineError, OSError):
    """A read or write failed: disk, network, or a file that disappeared."""


class ProgramError(MachineError):
    """A compiled program cannot be saved, or a saved one cannot be used."""


class DeviceError(MachineError):
    """There are fewer devices than the mesh needs, or a device refused an allocation."""


class HostError(MachineError):
    """Another host of the same load failed, died or timed out; or the hosts disagree.

    Attributes:
      host: its number; None if unknown.
      exit_code: the exit code of the host that failed, if it failed by itself.
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

    def _headline(self) -> str:
        return escape_lines(self.what)  # may be the message of another host's error


@dataclass(frozen=True)
class Problem:
    """One of several findings of a check: what is wrong, and where."""

    what: str
    file: str | None = None
    tensor: str | None = None
    target: str | None = None  # "module param"
    expected: str | None = None
    found: str | None = None

    def __str__(self) -> str:
        return _in_one_line(self, ("file", "tensor", "target", "expected", "found"))


class CheckpointMismatchError(CheckpointError):
    """The checkpoint, the map and the model do not match; `problems` lists every finding."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(_count(problems, "between checkpoint, map and model"))

    def _headline(self) -> str:
        return _listing(self.what, self.problems)


class AdapterMismatchError(AdapterError):
    """An adapter does not match the model; `problems` lists every finding."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(_count(problems, "between adapter and model"))

    def _headline(self) -> str:
        return _listing(self.what, self.problems)


def _count(problems: Sequence[Problem], where: str) -> str:
    noun = "problem" if len(problems) == 1 else "problems"
    return f"{len(problems)} {noun} {where}"


def _listing(what: str, problems: Sequence[Problem]) -> str:
    return _bullets(what, [str(problem) for problem in fold_layers(problems)])


def _bullets(what: str, problems: Sequence[str]) -> str:
    shown = [f"- {problem}" for problem in problems[:_MAX_PROBLEMS_SHOWN]]
    if len(problems) > _MAX_PROBLEMS_SHOWN:
        shown.append(f"- … and {len(problems) - _MAX_PROBLEMS_SHOWN} more (see .problems)")
    return "\n".join([what, *shown])


def fold_layers(problems: Iterable[Problem]) -> list[Problem]:
    """Joins problems that differ only in the layer numbers of tensor and target names.

    `h.0.w`, `h.1.w`, `h.2.w` become `h.{0...2}.w`, in the order of first appearance.
    """

    def likeness(problem: Problem) -> tuple[str | None, ...]:
        names = [name and blank_indices(name) for name in (problem.tensor, problem.target)]
        return problem.what, problem.expected, problem.found, *names

    return [_join(group) for group in group_by(problems, likeness)]


def _join(group: Sequence[Problem]) -> Problem:
    if len(group) == 1:
        return group[0]

    def join(field: str) -> str | None:
        values = [value for p in group if (value := getattr(p, field)) is not None]
        return fold_names(values) if values else None

    files = {p.file for p in group}
    file = group[0].file if len(files) == 1 else f"{len(files)} files"
    return replace(group[0], tensor=join("tensor"), target=join("target"), file=file)
