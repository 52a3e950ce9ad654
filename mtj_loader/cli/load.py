"""`mtj-loader load`: loads, says how it went, and on request checks every byte."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import mtj_loader
from mtj_loader.cli.command import command
from mtj_loader.cli.options import AsJson, CheckpointPath, Loading, Machine, Source
from mtj_loader.cli.output import note, print_json, warn
from mtj_loader.display import counted, show_bytes
from mtj_loader.errors import StorageError

if TYPE_CHECKING:
    from mtj_loader import Model


@command
def load(
    path: CheckpointPath,
    *,
    loading: Loading,
    source: Source,
    machine: Machine,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Read everything again and compare every byte on the devices with it."
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="Write the whole report there, as JSON."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Load a checkpoint onto a mesh and report.

    Example: [bold]mtj-loader load EleutherAI/pythia-70m --mesh mp=8 --cpu-devices 8 --verify[/bold]
    """
    model = load_model(path, loading, source, machine)
    verified_bytes = _verify(model) if verify else None
    document = to_dict(model, verified_bytes)
    if report is not None:
        _write(report, document)
    if as_json:
        print_json(document)
        return
    print(describe(model))
    if verified_bytes is not None:
        print(f"verified: all {show_bytes(verified_bytes)} on the devices are as the files have it")


def load_model(path: str, loading: Loading, source: Source, machine: Machine) -> Model:
    """Loads as the options say; warnings go to stderr."""
    machine.prepare()
    options = loading.options() | asdict(source)
    model = mtj_loader.load(path, progress=machine.progress, **options)
    warn(model.report.warnings)
    return model


def describe(model: Model) -> str:
    """What was loaded, and the report in a line."""
    devices, platform = model.mesh.devices, model.mesh.devices.flat[0].platform
    where = f"{model.plan.topology} ({counted(devices.size, f'{platform} device')})"
    return (
        f"{model.plan.model_type} from {model.plan.checkpoint.location} on {where}\n{model.report}"
    )


def to_dict(model: Model, verified_bytes: int | None) -> dict[str, object]:
    """A finished load as JSON types; docs/json.md describes every key."""
    return {
        "location": model.plan.checkpoint.location,
        "model_type": model.plan.model_type,
        "mesh": {"dp": model.plan.topology.dp, "mp": model.plan.topology.mp},
        "report": model.report.to_dict(),
        "verified_bytes": verified_bytes,
    }


def _verify(model: Model) -> int:
    from mtj_loader.loading.verify import verify  # noqa: PLC0415 -- brings JAX

    note("verifying: reading everything again")
    with model.plan.checkpoint.storage:
        return verify(model.plan, model.params)


def _write(path: Path, document: dict[str, object]) -> None:
    try:
        path.write_text(json.dumps(document, indent=2) + "\n")
    except OSError as error:
        raise StorageError("cannot write the report", file=path, found=error.strerror) from error
