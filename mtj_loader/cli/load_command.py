"""`mtj-loader load`: loads and reports; verifies every byte on request, or simulates one host."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import mtj_loader
from mtj_loader.cli.cluster import Cluster
from mtj_loader.cli.command import command
from mtj_loader.cli.digests_command import digests_of_all_hosts
from mtj_loader.cli.output import is_muted, note, print_json, print_lines, print_remarks
from mtj_loader.cli.shared_options import (
    AsJson,
    ContextLengthOption,
    Machine,
    MeshOption,
    SlotsOption,
)
from mtj_loader.cli.start_up import StartUp
from mtj_loader.display import counted, show_bytes
from mtj_loader.errors import StorageError, UsageError
from mtj_loader.names import escape, number_set
from mtj_loader.options import LoadOptions, Source
from mtj_loader.storage.base import closing_all

if TYPE_CHECKING:
    from mtj_loader import Model
    from mtj_loader.loading.load_report import LoadReport
    from mtj_loader.planning.load_plan import LoadPlan

Outcome = tuple[dict[str, object], str]  # a finished load: as JSON types (docs/json.md), as text


@command
def load(
    *,
    source: Source,
    slots: SlotsOption = None,
    context_length: ContextLengthOption = None,
    mesh: MeshOption = None,
    options: LoadOptions,
    machine: Machine,
    start_up: StartUp,
    cluster: Cluster,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Read the files again and compare every byte on the devices."
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", dir_okay=False, help="Write the full report to a JSON file."),
    ] = None,
    simulate_host: Annotated[
        str | None,
        typer.Option(
            metavar="k/K",
            help="Load only what host k of K would hold, on virtual devices; k starts at 0.",
        ),
    ] = None,
    digests: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            help="Write the SHA-256 of every shard; `mtj-loader digests` combines such files.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Load a checkpoint onto a mesh; report the bytes read, the time and the memory.

    Example: [bold]mtj-loader load EleutherAI/pythia-70m --mesh mp=8 --cpu-devices 8 --verify[/bold]
    """
    if simulate_host is None:
        run = start_up.options() | {"slots": slots, "context_length": context_length}
        run |= cluster.join(machine)
        with cluster.connect() as hosts, hosts.phase("files"):
            _check_writable(report, digests)
        model = load_model(source, options, mesh, machine, run)
        document, text = _outcome(model, _verify(model, cluster) if verify else None)
        if digests is not None:
            document["digests"] = digests_of_all_hosts(model, cluster)
    else:
        _refuse({"--verify": verify, "--warm-up": start_up.warm_up, **cluster.identity()})
        _check_writable(report, digests)
        document, text = simulate(source, options, mesh, machine, simulate_host)
    if report is not None:
        _write(report, document)
    if digests is not None:
        _write(digests, document["digests"])
    if as_json:
        print_json(document)
    else:
        print_lines(text)


def load_model(
    source: Source, options: LoadOptions, mesh: str | None, machine: Machine, run: dict[str, Any]
) -> Model:
    """Loads onto the devices that `Cluster.join` prepared; prints warnings to stderr."""
    from mtj_loader.api import RunOptions, load_source  # noqa: PLC0415 -- imports JAX

    model = load_source(source, options, mesh, RunOptions(machine.progress, **run))
    print_remarks(model.plan.notes, model.report.warnings)
    return model


def describe(model: Model) -> str:
    """What was loaded onto which devices, and the report."""
    devices = model.mesh.devices
    where = counted(devices.size, f"{devices.flat[0].platform} device")
    plan = model.plan
    return (
        f"{plan.model_type} from {escape(plan.checkpoint.location)} on {plan.topology} ({where})\n"
        f"{model.report}"
    )


def simulate(
    source: Source, options: LoadOptions, mesh: str | None, machine: Machine, host: str
) -> Outcome:
    """Reads and places what one host of a pod would, on virtual devices.

    Args:
      source: the checkpoint.
      options: how it is loaded.
      mesh: the mesh of the pod.
      machine: the options of this machine.
      host: "k/K": host k, from 0, of K hosts with equal shares of the mesh.

    Raises:
      UsageError: `host` is malformed, or there is no mesh.
    """
    number, hosts = _parse_host(host)
    if mesh is None:
        raise UsageError("--simulate-host needs --mesh", hint="for example --mesh mp=32")
    pod = mtj_loader.make_abstract_mesh(mesh, hosts)
    devices = sum(row.count(number) for row in pod.hosts)
    replace(machine, cpu_devices=machine.cpu_devices or devices).prepare()

    from mtj_loader.api import plan_source  # noqa: PLC0415 -- these import JAX
    from mtj_loader.loading.progress import progress_bar  # noqa: PLC0415
    from mtj_loader.loading.shard_digests import compute_digests  # noqa: PLC0415
    from mtj_loader.loading.simulated_host import load_as_host  # noqa: PLC0415

    plan = plan_source(source, options, pod)
    needed_bytes = plan.without_exchange.host_bytes(number)
    with progress_bar(needed_bytes, shown=machine.progress) as advance:
        params, report = load_as_host(plan, number, advance)
    print_remarks(plan.notes, report.warnings)
    shards = pod.shards_of(number)
    found = compute_digests(params, pod.mp, shards)
    document = to_dict(plan, report, None)
    document["simulated_host"] = {"number": number, "hosts": hosts, "shards": list(shards)}
    document["digests"] = found.to_dict()
    return document, (
        f"{plan.model_type} from {escape(plan.checkpoint.location)}: host {number} of {hosts} "
        f"({counted(devices, 'virtual device')}), shards {number_set(shards)} of {pod}\n"
        f"{report}\nSHA-256 of its shards: {found.sha256}"
    )


def to_dict(plan: LoadPlan, report: LoadReport, verified_bytes: int | None) -> dict[str, object]:
    """A finished load as JSON types; docs/json.md describes every key."""
    return {
        "location": plan.checkpoint.location,
        "model_type": plan.model_type,
        "mesh": {"dp": plan.topology.dp, "mp": plan.topology.mp},
        "report": report.to_dict(),
        "verified_bytes": verified_bytes,
    }


def _outcome(model: Model, verified_bytes: int | None) -> Outcome:
    text = describe(model)
    if verified_bytes is not None:
        text += f"\nverified: all {show_bytes(verified_bytes)} on the devices match the files"
    return to_dict(model.plan, model.report, verified_bytes), text


def _verify(model: Model, cluster: Cluster) -> int:
    """Returns how many bytes were compared on all hosts together."""
    from mtj_loader.loading.verify import verify  # noqa: PLC0415 -- imports JAX

    note("verifying: reading every byte again")
    with cluster.connect() as hosts, hosts.phase("verify"), closing_all(*model.plan.storages):
        verified_bytes = verify(model.plan, model.params)
        return sum(map(int, hosts.gather("verified", b"%d" % verified_bytes)))


def _parse_host(host: str) -> tuple[int, int]:
    """The host's number, and the number of hosts."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", host)
    if found is None or int(found[1]) >= int(found[2]):
        expected = "k/K with k from 0 to K - 1, for example 3/8"
        raise UsageError("cannot read --simulate-host", expected=expected, found=repr(host))
    return int(found[1]), int(found[2])


def _refuse(options: dict[str, Any]) -> None:
    """Raises UsageError if an option was given that cannot be used for a simulated host."""
    if given := [option for option, value in options.items() if value]:
        what = f"{given[0]} cannot be used with --simulate-host"
        raise UsageError(what, hint="--digests shows whether this host's shards are correct")


def _check_writable(*files: Path | None) -> None:
    """Raises StorageError before the load for a file that could not be written after it."""
    for file in (file for file in files if file is not None and not is_muted()):
        if not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
            found = "the file or its folder is not writable, or the folder does not exist"
            raise StorageError("cannot write the file", file=file, found=found)
        is_in_dev = Path(os.path.normpath(file)).is_relative_to("/dev")  # as `>(…)`, which is read
        if file.is_fifo() and not is_in_dev:
            hint = "--json prints the report to a pipe"
            found = "a named pipe, which may have no reader"
            raise StorageError("cannot write the file", file=file, found=found, hint=hint)


def _write(path: Path, document: object) -> None:
    """Writes a JSON file, unless another process does."""
    if is_muted():
        return
    try:
        path.write_text(json.dumps(document, indent=2) + "\n")
    except OSError as error:
        raise StorageError("cannot write the file", file=path, found=error.strerror) from error
