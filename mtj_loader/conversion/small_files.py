"""What travels with the weights: the config in its new dtype, and every small file as it is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from mtj_loader.conversion.output_folder import write_at
from mtj_loader.formats.checkpoint import CONFIG_FILE, Checkpoint
from mtj_loader.formats.file_names import INDEX_FILE, OTHER_WEIGHTS, SUFFIX
from mtj_loader.storage.base import Storage

_WEIGHTS = (SUFFIX, *OTHER_WEIGHTS, ".ckpt", ".onnx_data", ".tflite", ".index.json")
_MAX_BYTES = 100_000_000  # the largest tokenizers have a third of it; a weight file has more
_DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5, and before
_COPIED_BYTES = 1 << 20  # at a time


def is_small_file(name: str, size_bytes: int) -> bool:
    """Whether a file of a checkpoint is copied: no weights, no index, and not too large."""
    return not name.endswith(_WEIGHTS) and size_bytes <= _MAX_BYTES


def sort_files(checkpoint: Checkpoint, others: Iterable[str]) -> tuple[list[str], list[str]]:
    """The files that are copied, and those that are left out.

    Args:
      checkpoint: its weights, its index and its config are neither, as they are written anew.
      others: more names that the checkpoint's repository has; a folder's end in a slash.
    """
    storage = checkpoint.storage
    anew = {CONFIG_FILE, INDEX_FILE, *checkpoint.index.files}
    names = [name for name in storage.names() if name not in anew]
    copied = [name for name in names if is_small_file(name, storage.version(name).size_bytes)]
    return copied, sorted({*names, *others} - anew - set(copied))


def copy_file(storage: Storage, name: str, path: Path) -> None:
    """Copies a file of the checkpoint; raises what reading and writing raise."""
    size_bytes = storage.version(name).size_bytes
    write_at(path, 0, memoryview(b""))  # also of an empty file there is a copy
    for start in range(0, size_bytes, _COPIED_BYTES):
        data = storage.read(name, start, min(_COPIED_BYTES, size_bytes - start))
        write_at(path, start, memoryview(data))


def write_json(path: Path, document: Mapping[str, object]) -> None:
    """Writes a JSON file as transformers lays it out."""
    write_at(path, 0, memoryview((json.dumps(document, indent=2) + "\n").encode()))


def with_dtype(config: Mapping[str, object], dtype: str) -> dict[str, object]:
    """The config with its dtype changed, under the names that it uses for it.

    A config that names none gets the older name, which all versions of transformers read.
    """
    spelled = [key for key in _DTYPE_KEYS if key in config] or ["torch_dtype"]
    return {**config, **dict.fromkeys(spelled, dtype)}
