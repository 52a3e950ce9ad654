"""Compiled programs on disk: saving them, checking who could have changed them, loading them."""

from mtj_loader.programs.compile_all import compile_all
from mtj_loader.programs.facts import ProgramFacts, differences
from mtj_loader.programs.program_store import (
    CompiledProgram,
    StoredPrograms,
    default_programs_folder,
    open_programs,
    prepare_folder,
    save_programs,
)
from mtj_loader.programs.signature import Signature

__all__ = [
    "CompiledProgram",
    "ProgramFacts",
    "Signature",
    "StoredPrograms",
    "compile_all",
    "default_programs_folder",
    "differences",
    "open_programs",
    "prepare_folder",
    "save_programs",
]
