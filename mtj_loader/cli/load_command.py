"""`mtj-loader load`: loads, says how it went, and on request checks every byte."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtj_loader.cli.cluster import Cluster
from mtj_loader.cli.command import command
from mtj_loader.cli.outcome import to_dict
from mtj_loader.cli.output import is_muted, note, print_json, warn
from mtj_loader.cli.shared_options import AsJson, Machine, MeshOption
from mtj_loader.cli.simulate_command import simulate
from mtj_loader.cli.start_up import StartUp
from mtj_loader.display import counted, show_bytes
from mtj_loader.errors import StorageError, UsageError
from mtj_loader.options import LoadOptions, Source
from mtj_loader.storage.base import closing_all

if TYPE_CHECKING:
    from mtj_loader import Model


@command
def load(
    *,
    source: Source,
    mesh: MeshOption = None,
    options: LoadOptions,
    machine: Machine,
    start_up: StartUp,
    cluster: Cluster,
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
    simulate_host: Annotated[
        str | None,
        typer.Option(
            metavar="k/K",
            help="Load just what host k of K would hold, on virtual devices; k counts from 0.",
        ),
    ] = None,
    digests: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            help="Write a SHA-256 of every shard there; `mtj-loader digests` joins such files.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Load a checkpoint onto a mesh and report.

    Example: [bold]mtj-loader load EleutherAI/pythia-70m --mesh mp=8 --cpu-devices 8 --verify[/bold]
    """
    if simulate_host is None:
        run = start_up.options() | cluster.join(machine)
        with cluster.connect() as hosts, hosts.phase("files"):
            _check_writable(report, digests)
        model = load_model(source, options, mesh, machine, run)
        verified_bytes = _verify(model, cluster) if verify else None
        document, words = _outcome(model, verified_bytes)
        if digests is not None:
            document["digests"] = _digests(model, cluster)
    else:
        whole = {"--verify": verify, "--warm-up": start_up.warm_up, **cluster.identity()}
        _refuse([option for option, value in whole.items() if value])
        _check_writable(report, digests)
        document, words = simulate(source, options, mesh, machine, simulate_host)
    if report is not None and not is_muted():
        _write(report, document)
    if digests is not None and not is_muted():
        _write(digests, document["digests"])
    if as_json:
        print_json(document)
    else:
        print(words)


def _refuse(options: Sequence[str]) -> None:
    """Raises UsageError if options were given that make no sense for a simulated host."""
    if options:
        what = f"{options[0]} is for whole loads, not for --simulate-host"
        raise UsageError(what, hint="--digests tells whether it is part of the whole")


def _check_writable(*files: Path | None) -> None:
    """Raises StorageError now for a file that could not be written after the load."""
    for file in (file for file in files if file is not None and not is_muted()):
        if not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
            found = "it or its folder is closed to writing, or the folder is not there"
            raise StorageError("cannot write the file", file=file, found=found)


def _outcome(model: Model, verified_bytes: int | None) -> tuple[dict[str, object], str]:
    """What came of a load, as JSON types and in words."""
    words = describe(model)
    if verified_bytes is not None:
        checked = f"all {show_bytes(verified_bytes)} on the devices are as the files have it"
        words = f"{words}\nverified: {checked}"
    return to_dict(model.plan, model.report, verified_bytes), words


def load_model(
    source: Source, options: LoadOptions, mesh: str | None, machine: Machine, run: dict[str, Any]
) -> Model:
    """Loads onto the devices that `Cluster.join` prepared; warnings go to stderr."""
    from mtj_loader.api import RunOptions, load_source  # noqa: PLC0415 -- brings JAX

    model = load_source(source, options, mesh, RunOptions(machine.progress, **run))
    warn(model.report.warnings)
    return model


def describe(model: Model) -> str:
    """What was loaded, and the report in a line."""
    devices, platform = model.mesh.devices, model.mesh.devices.flat[0].platform
    where = f"{model.plan.topology} ({counted(devices.size, f'{platform} device')})"
    return (
        f"{model.plan.model_type} from {model.plan.checkpoint.location} on {where}\n{model.report}"
    )


def _verify(model: Model, cluster: Cluster) -> int:
    from mtj_loader.loading.verify import verify  # noqa: PLC0415 -- brings JAX

    note("verifying: reading everything again")
    with cluster.connect() as hosts, hosts.phase("verify"), closing_all(*model.plan.storages):
        verified_bytes = verify(model.plan, model.params)
        return sum(map(int, hosts.gather("verified", b"%d" % verified_bytes)))


def _digests(model: Model, cluster: Cluster) -> dict[str, object]:
    """Those of all hosts; what several hold must be the same."""
    from mtj_loader.loading.shard_digests import digests, from_dict, joined  # noqa: PLC0415 -- brings JAX

    with cluster.connect() as hosts, hosts.phase("digests"):
        mine = digests(model.params, model.plan.shards).to_dict()
        each = map(json.loads, hosts.gather("digests", json.dumps(mine).encode()))
        return joined({f"host {i}": from_dict(one) for i, one in enumerate(each)}).to_dict()


def _write(path: Path, document: object) -> None:
    try:
        path.write_text(json.dumps(document, indent=2) + "\n")
    except OSError as error:
        raise StorageError("cannot write the file", file=path, found=error.strerror) from error
