"""Turns functions into commands: groups of options, error messages and exit codes."""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer

from mtj_loader.cli.shared_options import option_hints
from mtj_loader.cli.streams import print_to_stderr
from mtj_loader.errors import UNEXPECTED, MachineError, MtjLoaderError
from mtj_loader.names import escape, escape_lines

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Adapts a function for `typer.Typer.command`.

    A parameter whose type is a dataclass becomes one option for each of its fields, so that
    commands share options without repeating them. Adds `--debug`; turns errors into exit codes.
    """
    hints = get_type_hints(function, include_extras=True)
    hints.pop("return", None)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}

    @functools.wraps(function)
    def run(*, debug: bool, **given: object) -> None:
        for name, group in groups.items():
            given[name] = group(**{f.name: given.pop(f.name) for f in fields(group)})
        with exit_codes(debug=debug):
            function(**given)

    run.__signature__ = inspect.Signature(list(_parameters(function, hints)))  # pyright: ignore[reportAttributeAccessIssue]
    return run


def _parameters(
    function: Callable[..., None], hints: dict[str, Any]
) -> Iterator[inspect.Parameter]:
    """The function's parameters, with the fields of a dataclass in place of it."""
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if is_dataclass(hint):
            field_hints = option_hints(hints[parameter.name])
            for field in fields(hint):
                default = inspect.Parameter.empty if field.default is MISSING else field.default
                yield _keyword(field.name, field_hints[field.name], default)
        else:
            yield _keyword(parameter.name, hint, parameter.default)
    yield _keyword("debug", Debug, False)


def _keyword(name: str, annotation: object, default: object) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY  # allows any order of parameters with and without default
    return inspect.Parameter(name, kind, annotation=annotation, default=default)


@contextmanager
def exit_codes(*, debug: bool) -> Iterator[None]:
    """Prints errors to stderr in plain words and exits with the matching code.

    Raises:
      typer.Exit: with the exit code.
    """
    try:
        yield
    except MtjLoaderError as error:
        raise _fail(f"error: {error}", error.exit_code, debug) from error
    except MemoryError as error:
        message = "error: out of memory on this machine"
        raise _fail(message, MachineError.exit_code, debug) from error
    except (typer.Exit, ImportError):  # a broken installation, or a memory limit (see memory_limit)
        raise
    except Exception as error:
        hint = "" if debug else "\n  hint: --debug shows the traceback"
        message = f"error: unexpected {type(error).__name__}: {escape(error)}{hint}"
        raise _fail(message, UNEXPECTED, debug) from error


def _fail(message: str, code: int, debug: bool) -> typer.Exit:
    if debug:
        print_to_stderr(escape_lines(traceback.format_exc().rstrip("\n")))
    print_to_stderr(message)
    return typer.Exit(code)
