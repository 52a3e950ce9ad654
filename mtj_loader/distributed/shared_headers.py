"""Header, index and config of a checkpoint, read by process 0 and handed to the other hosts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from mtj_loader.distributed.hosts import Hosts
from mtj_loader.errors import CheckpointError
from mtj_loader.formats.checkpoint import Checkpoint, Headers
from mtj_loader.formats.records import FileVersion, TensorIndex, TensorRecord
from mtj_loader.storage.base import RemoteStorage, Storage

Open = Callable[[Headers | None, str | None], Checkpoint]


def open_for_all(hosts: Hosts, open_here: Open) -> Checkpoint:
    """Opens a checkpoint whose headers and config process 0 reads, and no other host.

    Args:
      hosts: of this load.
      open_here: opens it on this host. It takes the headers, None where they are to be read, and
        the commit that process 0 found, None for what has no commits.

    Raises:
      CheckpointError: a file of the checkpoint is missing here, or is not the one of host 0.
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
    stamps = {name: _own_stamp(here.storage, stamp) for name, stamp in here.index.files.items()}
    return replace(here, index=replace(here.index, files=stamps))


def pack(checkpoint: Checkpoint) -> bytes:
    """What `unpack` makes Headers of, and the commit behind a Hugging Face id."""
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
    """The headers and the commit that `pack` wrote."""
    document = json.loads(packed)
    records = {one["name"]: _record(one) for one in document["records"]}
    files = {one["path"]: FileVersion(**one) for one in document["files"]}
    index = TensorIndex(records, files, tuple(document["warnings"]))
    headers = Headers(document["config"], document["generation_config"], index)
    return headers, document["commit"]


def _record(fields: dict[str, Any]) -> TensorRecord:
    """A record; JSON has lists where it has tuples."""
    strides = fields["strides"]
    shapes = {
        "shape": tuple(fields["shape"]),
        "strides": None if strides is None else tuple(strides),
    }
    return TensorRecord(**fields | shapes)


def _own_stamp(storage: Storage, theirs: FileVersion) -> FileVersion:
    """This host's stamp of a file, which has to be the file that process 0 read the header of.

    Copies on local disks were written at different times; in a store all hosts see one object.
    """
    if isinstance(storage, RemoteStorage):
        return theirs  # every answer about the object is compared with this
    if not storage.exists(theirs.path):
        raise CheckpointError("this host lacks a file that host 0 has", file=theirs.path)
    mine = storage.stamp(theirs.path)
    if mine.size_bytes != theirs.size_bytes:
        raise CheckpointError(
            "this host's copy of a file has another size than host 0's",
            file=theirs.path,
            expected=f"{theirs.size_bytes:,} bytes",
            found=f"{mine.size_bytes:,} bytes",
        )
    return mine
