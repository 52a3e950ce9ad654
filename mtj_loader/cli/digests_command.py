"""`mtj-loader digests`: whether the shards of several loads make up the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtj_loader.cli.command import command
from mtj_loader.cli.output import print_json
from mtj_loader.cli.shared_options import AsJson
from mtj_loader.display import counted


@command
def digests(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE…", help="What load --digests wrote.", show_default=False),
    ],
    *,
    as_json: AsJson = False,
) -> None:
    """Join the digests of hosts: every shard must be there, and be the same in every file.

    Example: [bold]mtj-loader digests host-*.json whole.json[/bold]
    """
    from mtj_loader.loading import shard_digests as loading  # noqa: PLC0415 -- brings JAX

    found = loading.joined({str(file): loading.read_digests(file) for file in files})
    loading.check_whole(found)
    if as_json:
        print_json({"parameters": len(found.of), "shards": found.shards, "sha256": found.sha256})
        return
    parameters = f"{counted(len(found.of), 'parameter')} of {counted(found.shards, 'shard')}"
    print(f"{counted(len(files), 'file')}: the whole of {parameters}\nSHA-256 {found.sha256}")
