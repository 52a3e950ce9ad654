"""`mtj-loader load --simulate-host k/K`: the share of one host of a pod that is not there."""

from __future__ import annotations

import re
from dataclasses import asdict, replace

import mtj_loader
from mtj_loader.cli.options import Loading, Machine, Source
from mtj_loader.cli.outcome import to_dict
from mtj_loader.cli.output import warn
from mtj_loader.display import counted
from mtj_loader.errors import UsageError
from mtj_loader.names import number_set


def simulate(
    path: str, loading: Loading, source: Source, machine: Machine, host: str
) -> tuple[dict[str, object], str]:
    """Reads and places what one host would.

    Args:
      path: the checkpoint.
      loading: the command's options of this name.
      source: likewise.
      machine: likewise.
      host: "k/K": number k, from 0, of K hosts that share the devices of the mesh evenly.

    Returns:
      The outcome as JSON types, as docs/json.md describes it, and in words.

    Raises:
      UsageError: `host` cannot be read, or there is no mesh.
    """
    number, hosts = _read(host)
    if loading.mesh is None:
        raise UsageError("--simulate-host needs --mesh", hint="such as --mesh mp=32")
    mesh = mtj_loader.make_abstract_mesh(loading.mesh, hosts)
    devices = sum(row.count(number) for row in mesh.hosts)
    replace(machine, cpu_devices=machine.cpu_devices or devices).prepare()

    from mtj_loader.loading.progress import progress_bar  # noqa: PLC0415
    from mtj_loader.loading.shard_digests import digests  # noqa: PLC0415 -- `load --help` is quicker
    from mtj_loader.loading.simulated_host import load_host  # noqa: PLC0415

    options = loading.options() | asdict(source)
    options["mesh"] = mesh
    plan = mtj_loader.plan(path, **options)
    needed = plan.unshared.host_bytes(number)
    with progress_bar(needed, shown=machine.progress) as advance:
        params, report = load_host(plan, number, advance)
    warn(report.warnings)
    numbers = mesh.shards_of(number)
    found = digests(params, mesh.mp, numbers)
    document = to_dict(plan, report, None)
    document["simulated_host"] = {"number": number, "hosts": hosts, "shards": list(numbers)}
    document["digests"] = found.to_dict()
    where = f"host {number} of {hosts} ({counted(devices, 'virtual device')})"
    held = f"shards {number_set(numbers)} of {mesh}"
    words = f"{plan.model_type} from {plan.checkpoint.location}: {where}, {held}\n{report}"
    return document, f"{words}\nSHA-256 of its shards: {found.sha256}"


def _read(host: str) -> tuple[int, int]:
    """The number of the host, and of how many."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", host)
    if found is None or int(found[1]) >= int(found[2]):
        expected = "k/K with k from 0 to K - 1, like 3/8"
        raise UsageError("cannot read --simulate-host", expected=expected, found=repr(host))
    return int(found[1]), int(found[2])
