"""Options that several commands share.

Those of a load are the fields of `mtj_loader.options.Source` and `LoadOptions`; this module only
says how they are spelled on the command line.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.markup import escape

from mtj_loader.errors import UsageError
from mtj_loader.options import LoadOptions, Source

_LOADING = "What is loaded, and how"
_SOURCE = "Where it comes from"
_MEMORY = "Memory"
_machine_option = functools.partial(typer.Option, rich_help_panel="This machine")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON; docs/json.md describes it.")]
MeshOption = Annotated[
    str | None,
    typer.Option(
        metavar="dp=R,mp=N",
        help="R replicas with N shards each; by default the most shards that fit.",
        rich_help_panel=_LOADING,
    ),
]
SlotsOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="How many prompts run at a time; others wait. By default up to 16 for each of the R "
        "replicas.",
        rich_help_panel=_MEMORY,
    ),
]
ContextLengthOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="The most tokens of a prompt and its continuation; by default the model's limit.",
        rich_help_panel=_MEMORY,
    ),
]


def option_hints(group: type) -> dict[str, Any]:
    """The type of each field of a dataclass, annotated as an option for typer."""
    hints = get_type_hints(group, include_extras=True)
    if group not in _PANELS:
        return hints
    return {
        name: make_option(
            name,
            hint.__origin__,
            hint.__metadata__[0],
            _PANELS[group],
            _ON_THE_COMMAND_LINE.get(name, {}),
        )
        for name, hint in hints.items()
    }


def make_option(name: str, type_: object, text: str, panel: str, more: Mapping[str, Any]) -> object:
    """The type of an option, annotated for typer.

    Args:
      name: of the setting.
      type_: of its value.
      text: for the help.
      panel: of the help.
      more: replaces the `type`, the `help` or the `flags`; adds a `metavar` or a `parser`.
    """
    text = escape(more.get("help", text))
    if name == "path":
        argument = typer.Argument(metavar="PATH", help=text, show_default=False)
        return Annotated[str, argument]
    flags = (f"--{name.replace('_', '-')}",) if type_ is bool else ()  # without a --no-… form
    flags = more.get("flags", flags)
    settings = {key: more[key] for key in ("metavar", "parser") if key in more}
    option = typer.Option(*flags, help=text, rich_help_panel=panel, **settings)
    return Annotated[more.get("type", type_), option]


def _parse_adapter(text: str) -> tuple[str, float]:
    """Parses `DIR=0.5`; if what follows the equals sign is no number, it belongs to the name."""
    folder, _, weight = text.rpartition("=")
    try:
        return (folder, float(weight)) if folder else (text, 1.0)
    except ValueError:
        return text, 1.0


_PANELS: dict[object, str] = {Source: _SOURCE, LoadOptions: _LOADING}
_ON_THE_COMMAND_LINE: dict[str, dict[str, Any]] = {
    "cache_dir": {"type": Path | None},
    "map": {"type": Path | None, "metavar": "FILE"},
    "adapter": {
        "type": list[tuple] | None,
        "parser": _parse_adapter,
        "metavar": "DIR[=WEIGHT]",
        "help": "A LoRA adapter to merge, with a weight if given. Repeatable.",
    },
    "ignore_settings": {"type": list[str], "flags": ("--ignore-setting",), "metavar": "KEY"},
    "host_memory": {"type": str, "metavar": "SIZE"},
}


@dataclass(frozen=True)
class Machine:
    """The devices of this machine, and what is shown while they are filled."""

    cpu_devices: Annotated[
        int | None,
        _machine_option(
            metavar="N", min=1, help="Use N virtual CPU devices, to try a mesh without a TPU."
        ),
    ] = None
    progress: Annotated[
        bool, _machine_option("--progress/--no-progress", help="Show a progress bar in a terminal.")
    ] = True

    def prepare(self) -> None:
        """Creates the virtual devices; call it before anything asks JAX for its devices.

        Raises:
          UsageError: JAX has its devices already.
        """
        if self.cpu_devices is None:
            return
        import jax  # noqa: PLC0415 -- inspect and --help run without it

        try:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", self.cpu_devices)
        except RuntimeError as error:
            what = "--cpu-devices has no effect: JAX already has its devices"
            raise UsageError(what) from error
