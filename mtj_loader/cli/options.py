"""Options that several commands share; the names of the fields are those of `mtj_loader.load`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mtj_loader.dtypes import DTypeName
from mtj_loader.errors import UsageError

_LOADING = "What is loaded, and how"
_HUB = "Where it comes from"
_MACHINE = "This machine"

CheckpointPath = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="A folder, a .safetensors file, a URL (s3://, gs://, az://, https://), or a Hugging "
        "Face id.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON; docs/json.md describes it.")]


@dataclass(frozen=True)
class Source:
    """Which revision of a Hugging Face repository, and where it is kept."""

    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of the repository.", rich_help_panel=_HUB),
    ] = None
    token: Annotated[
        str | None,
        typer.Option(
            help="For private repositories; the one that is stored on the machine by default.",
            rich_help_panel=_HUB,
        ),
    ] = None
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Where downloaded files are kept.", rich_help_panel=_HUB),
    ] = None
    local_files_only: Annotated[
        bool,
        typer.Option("--local-files-only", help="Never use the network.", rich_help_panel=_HUB),
    ] = False
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Read a repository straight from the hub and keep no file, as a URL always is.",
            rich_help_panel=_HUB,
        ),
    ] = False


@dataclass(frozen=True)
class Loading:
    """Onto which mesh, and in which form."""

    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="dp=R,mp=N",
            help="R replicas of N shards each; by default the most shards that fit.",
            rich_help_panel=_LOADING,
        ),
    ] = None
    dtype: Annotated[
        DTypeName,
        typer.Option(help="Of the parameters; auto is bfloat16.", rich_help_panel=_LOADING),
    ] = "auto"
    transposed_linear: Annotated[
        bool,
        typer.Option(
            "--transposed-linear",
            help="Keep linear weights in torch's order, \\[out, in]: the fastest to load.",
            rich_help_panel=_LOADING,
        ),
    ] = False
    expert_parallel: Annotated[
        bool,
        typer.Option(
            "--expert-parallel",
            help="Deal whole experts over the shards instead of splitting each.",
            rich_help_panel=_LOADING,
        ),
    ] = False
    map: Annotated[
        Path | None,
        typer.Option(
            help="A weight map to use instead of the family's own.",
            metavar="FILE",
            rich_help_panel=_LOADING,
        ),
    ] = None
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="A LoRA adapter to merge, with a factor if it has one; may be given repeatedly.",
            metavar="DIR[=WEIGHT]",
            rich_help_panel=_LOADING,
        ),
    ] = None
    host_memory: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="The most memory in flight between files and devices.",
            rich_help_panel=_LOADING,
        ),
    ] = "1GiB"
    check_finite: Annotated[
        bool,
        typer.Option("--check-finite", help="Look for NaN and infinity.", rich_help_panel=_LOADING),
    ] = False
    allow_unmapped: Annotated[
        bool,
        typer.Option(
            "--allow-unmapped",
            help="Leave out tensors that the map does not know, with a warning.",
            rich_help_panel=_LOADING,
        ),
    ] = False
    allow_nonfinite: Annotated[
        bool,
        typer.Option(
            "--allow-nonfinite",
            help="Load NaN and infinity all the same.",
            rich_help_panel=_LOADING,
        ),
    ] = False

    def options(self) -> dict[str, Any]:
        """As keyword arguments of `mtj_loader.load`."""
        adapters = [_weighted(text) for text in self.adapter or ()]
        return asdict(self) | {"adapter": adapters or None}


def _weighted(adapter: str) -> tuple[str, float]:
    """Reads `DIR=0.5`; a name that merely contains an equals sign is a name."""
    folder, _, weight = adapter.rpartition("=")
    try:
        return (folder, float(weight)) if folder else (adapter, 1.0)
    except ValueError:
        return adapter, 1.0


@dataclass(frozen=True)
class Machine:
    """The devices, and what is shown while they are filled."""

    cpu_devices: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Pretend to have N devices, on the CPU: to try a mesh without a TPU.",
            rich_help_panel=_MACHINE,
        ),
    ] = None
    progress: Annotated[
        bool,
        typer.Option(
            "--progress/--no-progress",
            help="Show a progress bar, where there is a terminal.",
            rich_help_panel=_MACHINE,
        ),
    ] = True

    def prepare(self) -> None:
        """Makes the virtual devices; to be called before anything asks JAX for its devices.

        Raises:
          UsageError: something did already.
        """
        if self.cpu_devices is None:
            return
        import jax  # noqa: PLC0415 -- inspect and --help do without

        try:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", self.cpu_devices)
        except RuntimeError as error:
            what = "--cpu-devices comes too late: JAX has its devices already"
            raise UsageError(what) from error
