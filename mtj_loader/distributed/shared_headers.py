"""Headers, index and config of a checkpoint, read by process 0 and sent to the other hosts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from mtj_loader.distributed.hosts import Hosts
from mtj_loader.errors import CheckpointError
from mtj_loader.formats.checkpoint import Checkpoint, Headers
from mtj_loader.formats.records import TensorIndex, TensorRecord
from mtj_loader.storage.base import FileVersion, Storage

Open = Callable[[Headers | None, str | None], Checkpoint]


def open_on_all_hosts(hosts: Hosts, open_here: Open) -> Checkpoint:
    """Opens a checkpoint; only process 0 reads its headers and config.

    Args:
      hosts: of this load.
      open_here: opens it on this host, given the headers (None to read them) and the commit that
        process 0 resolved (None if there is none).

    Raises:
      CheckpointError: a file of the checkpoint is missing here, or differs from host 0's.
      HostError: another host failed.
    """
    checkpoints: list[Checkpoint] = []

    def read() -> bytes:
        checkpoints.append(open_here(None, None))
        return pack(checkpoints[0]) if hosts.count > 1 else b""

    packed = hosts.broadcast("headers", read)
    if checkpoints:
        return checkpoints[0]
    headers, commit = unpack(packed)
    here = open_here(headers, commit)
    stamps = {name: _local_version(here.storage, stamp) for name, stamp in here.index.files.items()}
    return replace(here, index=replace(here.index, files=stamps))


def pack(checkpoint: Checkpoint) -> bytes:
    """Serializes headers and commit for `unpack`."""
    index = checkpoint.index
    document = {
        "commit": checkpoint.commit,
        "config": checkpoint.config,
        "generation_config": checkpoint.generation_config,
        "records": [asdict(record) for record in index.records.values()],
        "files": [asdict(stamp) for stamp in index.files.values()],
        "warnings": index.warnings,
    }
    return json.dumps(document).encode()


def unpack(packed: bytes) -> tuple[Headers, str | None]:
    """The headers and commit that `pack` serialized."""
    document = json.loads(packed)
    records = {one["name"]: _record(one) for one in document["records"]}
    files = {one["path"]: FileVersion(**one) for one in document["files"]}
    index = TensorIndex(records, files, tuple(document["warnings"]))
    headers = Headers(document["config"], document["generation_config"], index)
    return headers, document["commit"]


def _record(fields: dict[str, Any]) -> TensorRecord:
    """A record from its JSON fields, which have lists in place of tuples."""
    strides = fields["strides"]
    shapes = {
        "shape": tuple(fields["shape"]),
        "strides": None if strides is None else tuple(strides),
    }
    return TensorRecord(**fields | shapes)


def _local_version(storage: Storage, theirs: FileVersion) -> FileVersion:
    """This host's version of a file, which must be the file whose header process 0 read.

    Copies on local disks have their own modification times; in a store there is one object.
    """
    if storage.checks_versions:
        return theirs  # every response about the object is compared with this
    if not storage.exists(theirs.path):
        raise CheckpointError("a file that host 0 has is missing on this host", file=theirs.path)
    mine = storage.version(theirs.path)
    if mine.size_bytes != theirs.size_bytes:
        raise CheckpointError(
            "this host's copy of a file differs in size from host 0's",
            file=theirs.path,
            expected=f"{theirs.size_bytes:,} bytes",
            found=f"{mine.size_bytes:,} bytes",
        )
    return mine
