"""Saving compiled programs in a folder, and loading them without tracing or compiling.

A folder holds `programs.json` and, for each program, XLA's own bytes in `<name>.xla`. Nothing is
pickled.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.stages import Compiled

from mtj_loader.errors import MtjLoaderError, ProgramError, UsageError
from mtj_loader.formats.typed_reader import format_value
from mtj_loader.programs.check_compiled import check_compiled
from mtj_loader.programs.facts import ProgramFacts
from mtj_loader.programs.jax_private import put_together, take_apart
from mtj_loader.programs.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_PROGRAM_BYTES,
    ProgramRecord,
    Row,
    check_name,
    format_manifest,
    parse_manifest,
)
from mtj_loader.programs.signature import Signature
from mtj_loader.programs.trusted_folder import open_trusted_folder, read_trusted_file
from mtj_loader.storage.create_folder import create_folder
from mtj_loader.storage.urls import is_url
from mtj_loader.storage.user_cache import user_cache_folder


def default_programs_folder(facts: ProgramFacts) -> Path:
    """Where programs are kept: `$XDG_CACHE_HOME/mtj_loader/programs/<digest>/<slots>x<context>`.

    The digest covers model and device, but not versions and settings: programs for new ones replace
    the old ones.

    Raises:
      RuntimeError: the user has no home folder.
    """
    return user_cache_folder("programs") / facts.folder_name / "x".join(facts.sizes)


@dataclass(frozen=True)
class CompiledProgram:
    """A program to save, with what it takes and returns."""

    compiled: Compiled
    signature: Signature


def save_programs(
    folder: Path, programs: Mapping[str, CompiledProgram], facts: ProgramFacts
) -> None:
    """Saves programs in a folder, which appears complete or not at all; replaces what it contains.

    Args:
      folder: belongs to these programs alone. Missing folders above are created. It gets mode 0700,
        its files 0600.
      programs: by name, compiled by `compile_all`, maybe for devices that are not there.
      facts: what they depend on.

    Raises:
      ProgramError: a program cannot be saved, or does not have its signature; or others may write
        to the folder above.
      StorageError: writing failed.
    """
    files, records = {}, {}
    for name, program in programs.items():
        check_name(name)
        files[f"{name}.xla"], records[name] = _serialize(name, program)
    files[MANIFEST] = format_manifest(records, facts)
    prepare_folder(folder)
    with create_folder(folder.absolute(), overwrite=True, mode=0o700) as new:
        for file, data in files.items():
            _write_private(new / file, data)


def prepare_folder(folder: Path) -> None:
    """Creates the folders above a folder of programs; to be called before a long compilation.

    Raises:
      ProgramError: it holds anything else, or others may write to the folder above.
    """
    folder = folder.absolute()
    _check_replaceable(folder)
    with _program_errors(folder.parent):
        _make_private_folders(folder.parent)
        with open_trusted_folder(folder.parent):
            pass


def _check_replaceable(folder: Path) -> None:
    """Refuses to replace anything but programs: `--out` may name any folder."""
    if not os.path.lexists(folder) or (folder / MANIFEST).is_file():
        return
    if folder.is_symlink() or not folder.is_dir() or any(folder.iterdir()):
        what = "the folder exists and holds no compiled programs, so it is not replaced"
        raise ProgramError(what, file=folder)


def _make_private_folders(folder: Path) -> None:
    if not folder.is_dir():
        _make_private_folders(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)  # `parents=True` would not use this mode for all


def _write_private(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:  # noqa: PTH123
        file.write(data)


def _serialize(name: str, program: CompiledProgram) -> tuple[bytes, ProgramRecord]:
    try:
        parts = take_apart(program.compiled)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise ProgramError(f"the program {name} cannot be saved", found=error) from error
    check_compiled(name, program.compiled, parts, program.signature)
    record = ProgramRecord(
        sha256=hashlib.sha256(parts.data).hexdigest(),
        size_bytes=len(parts.data),
        arguments=program.signature.argument_rows,
        results=program.signature.result_rows,
        used=parts.used,
    )
    return parts.data, record


@dataclass(frozen=True)
class StoredPrograms:
    """The programs of a folder, not yet loaded.

    Attributes:
      folder: where they are.
      facts: what they depend on; see `facts.differences`.
      records: for each name what the manifest says.
    """

    folder: Path
    facts: ProgramFacts
    records: Mapping[str, ProgramRecord]

    def load(self, name: str, signature: Signature) -> Compiled:
        """Loads a program, which then runs as `jax.stages.Compiled` does.

        The caller has compared the facts. The bytes are read once, and loaded only if they have the
        digest in the manifest.

        Args:
          name: of the program.
          signature: what the caller passes and expects; on the mesh where the program shall run.

        Raises:
          ProgramError: there is no such program, it has another signature, its file was changed, or
            others may write to it.
        """
        file = self.folder / f"{name}.xla"
        record = self.records.get(name)
        if record is None:
            found = ", ".join(sorted(self.records)) or "nothing"
            raise ProgramError("no such program is stored", file=self.folder, key=name, found=found)
        _check_rows(file, "argument", record.arguments, signature.argument_rows)
        _check_rows(file, "result", record.results, signature.result_rows)
        data = _read(self.folder, file.name, MAX_PROGRAM_BYTES, record.size_bytes)
        if (digest := hashlib.sha256(data).hexdigest()) != record.sha256:
            what = "the file was changed: it does not have the SHA-256 of the manifest"
            raise ProgramError(what, file=file, expected=record.sha256, found=digest)
        try:
            return put_together(
                data,
                name,
                signature.args,
                signature.results,
                used=record.used,
                donated=signature.donated,
            )
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            raise ProgramError("XLA cannot load the program", file=file, found=error) from error


def open_programs(folder: str | os.PathLike[str]) -> StoredPrograms:
    """Reads the manifest of a folder.

    Args:
      folder: the user's cache, or what the user names. Never one that a checkpoint brings along.

    Raises:
      UsageError: a URL.
      ProgramError: there is no manifest, it is damaged, or others may write to the folder.
    """
    if is_url(folder):
        what = "compiled programs are read only from folders of this machine"
        raise UsageError(what, file=folder)
    folder = Path(folder)
    data = _read(folder, MANIFEST, MAX_MANIFEST_BYTES)
    records, facts = parse_manifest(data, str(folder / MANIFEST))
    return StoredPrograms(folder, facts, records)


def _read(folder: Path, name: str, max_bytes: int, size_bytes: int | None = None) -> bytes:
    path = folder / name
    with _program_errors(path), open_trusted_folder(folder) as descriptor:
        return read_trusted_file(descriptor, name, path, max_bytes, size_bytes)


@contextmanager
def _program_errors(path: Path) -> Iterator[None]:
    """Converts an OSError to a ProgramError."""
    try:
        yield
    except MtjLoaderError:
        raise
    except OSError as error:
        found = error.strerror or str(error)
        raise ProgramError("cannot use compiled programs", file=path, found=found) from error


def _check_rows(file: Path, kind: str, stored: Sequence[Row], wanted: Sequence[Row]) -> None:
    if len(stored) != len(wanted):
        what = f"the program has another number of {kind}s"
        raise ProgramError(what, file=file, expected=len(wanted), found=len(stored))
    for old, new in zip(stored, wanted, strict=True):
        if old != new:
            raise ProgramError(
                f"the program has another {kind}",
                file=file,
                key=str(new["path"]),
                expected=format_value(new),
                found=format_value(old),
            )
