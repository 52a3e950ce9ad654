"""`mtj-loader load --simulate-host k/K`: the share of one host of a pod that is not there."""

from __future__ import annotations

import re
from dataclasses import replace

import mtj_loader
from mtj_loader.cli.outcome import to_dict
from mtj_loader.cli.output import warn
from mtj_loader.cli.shared_options import Machine
from mtj_loader.display import counted
from mtj_loader.errors import UsageError
from mtj_loader.names import number_set
from mtj_loader.options import LoadOptions, Source


def simulate(
    source: Source, options: LoadOptions, mesh: str | None, machine: Machine, host: str
) -> tuple[dict[str, object], str]:
    """Reads and places what one host would.

    Args:
      source: the checkpoint.
      options: how it is loaded.
      mesh: the mesh that the hosts share.
      machine: the command's options of this name.
      host: "k/K": number k, from 0, of K hosts that share the devices of the mesh evenly.

    Returns:
      The outcome as JSON types, as docs/json.md describes it, and in words.

    Raises:
      UsageError: `host` cannot be read, or there is no mesh.
    """
    number, hosts = _read(host)
    if mesh is None:
        raise UsageError("--simulate-host needs --mesh", hint="such as --mesh mp=32")
    pod = mtj_loader.make_abstract_mesh(mesh, hosts)
    devices = sum(row.count(number) for row in pod.hosts)
    replace(machine, cpu_devices=machine.cpu_devices or devices).prepare()

    from mtj_loader.api import plan_source  # noqa: PLC0415
    from mtj_loader.loading.progress import progress_bar  # noqa: PLC0415
    from mtj_loader.loading.shard_digests import digests  # noqa: PLC0415 -- `load --help` is quicker
    from mtj_loader.loading.simulated_host import load_host  # noqa: PLC0415

    plan = plan_source(source, options, pod)
    needed = plan.unshared.host_bytes(number)
    with progress_bar(needed, shown=machine.progress) as advance:
        params, report = load_host(plan, number, advance)
    warn(report.warnings)
    numbers = pod.shards_of(number)
    found = digests(params, pod.mp, numbers)
    document = to_dict(plan, report, None)
    document["simulated_host"] = {"number": number, "hosts": hosts, "shards": list(numbers)}
    document["digests"] = found.to_dict()
    where = f"host {number} of {hosts} ({counted(devices, 'virtual device')})"
    held = f"shards {number_set(numbers)} of {pod}"
    words = f"{plan.model_type} from {plan.checkpoint.location}: {where}, {held}\n{report}"
    return document, f"{words}\nSHA-256 of its shards: {found.sha256}"


def _read(host: str) -> tuple[int, int]:
    """The number of the host, and of how many."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", host)
    if found is None or int(found[1]) >= int(found[2]):
        expected = "k/K with k from 0 to K - 1, like 3/8"
        raise UsageError("cannot read --simulate-host", expected=expected, found=repr(host))
    return int(found[1]), int(found[2])
