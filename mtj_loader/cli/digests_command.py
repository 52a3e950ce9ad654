"""`load --digests` and `mtj-loader digests`: whether the shards of all hosts form the whole model.

JAX is imported inside the functions, so that `--help` stays fast.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtj_loader.cli.command import command
from mtj_loader.cli.output import print_json, print_lines
from mtj_loader.cli.shared_options import AsJson
from mtj_loader.display import counted

if TYPE_CHECKING:
    from mtj_loader import Model
    from mtj_loader.cli.cluster import Cluster


@command
def digests(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE…", help="Files from load --digests.", show_default=False),
    ],
    *,
    as_json: AsJson = False,
) -> None:
    """Combine digest files. Fails if a shard is missing or differs between two files.

    Example: [bold]mtj-loader digests host-*.json whole.json[/bold]
    """
    from mtj_loader.loading import shard_digests  # noqa: PLC0415

    found = shard_digests.merge_digests(
        {str(file): shard_digests.read_digests(file) for file in files}
    )
    shard_digests.check_complete(found, files)
    if as_json:
        print_json({"parameters": len(found.of), "shards": found.shards, "sha256": found.sha256})
        return
    parameters, shards = counted(len(found.of), "parameter"), counted(found.shards, "shard")
    print_lines(f"{counted(len(files), 'file')}: complete, {parameters} with {shards} each")
    print_lines(f"SHA-256 {found.sha256}")


def digests_of_all_hosts(model: Model, cluster: Cluster) -> dict[str, object]:
    """Collects the digests of every host, as JSON types.

    Raises:
      VerifyError: hosts that hold the same shard disagree about it.
    """
    from mtj_loader.loading import shard_digests  # noqa: PLC0415

    with cluster.connect() as hosts, hosts.phase("digests"):
        own = shard_digests.compute_digests(model.params, model.plan.shards).to_dict()
        documents = map(json.loads, hosts.gather("digests", json.dumps(own).encode()))
        found = {f"host {i}": shard_digests.from_dict(one) for i, one in enumerate(documents)}
        return shard_digests.merge_digests(found).to_dict()
