"""SHA-256 digests of the shards, to compare loads on several real or simulated hosts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from mtj_loader.errors import FormatError, UsageError, VerifyError
from mtj_loader.formats import strict_json
from mtj_loader.formats.file_names import join_names
from mtj_loader.names import number_set
from mtj_loader.storage.local import LocalStorage

_MAX_FILE_BYTES = 1 << 30  # enough for 10,000 parameters in 1,000 shards
_MAX_SHARDS, _MAX_DIGITS = 10_000, 5


@dataclass(frozen=True)
class Digests:
    """Digests of shards: hexadecimal SHA-256 of their bytes in C order.

    Attributes:
      shards: n, the number of shards of each parameter.
      of: "module param" → shard number → digest; may lack shards that other hosts hold.
    """

    shards: int
    of: Mapping[str, Mapping[int, str]]

    @property
    def sha256(self) -> str:
        """One digest of all digests; does not depend on their order."""
        lines = (f"{name} {j} {self.of[name][j]}\n" for name, j in sorted(self._keys()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def missing(self) -> dict[str, list[int]]:
        """The numbers of the missing shards, for each parameter with missing shards."""
        absent = {n: [j for j in range(self.shards) if j not in of] for n, of in self.of.items()}
        return {name: numbers for name, numbers in absent.items() if numbers}

    def to_dict(self) -> dict[str, object]:
        """The digests as JSON types; docs/json.md describes them."""
        of = {name: {str(j): sha256 for j, sha256 in own.items()} for name, own in self.of.items()}
        return {"shards": self.shards, "sha256": self.sha256, "of": of}

    def _keys(self) -> Iterator[tuple[str, int]]:
        return ((name, j) for name, own in self.of.items() for j in own)


def compute_digests(
    params: Mapping[str, Mapping[str, jax.Array]], shards: int, numbers: Sequence[int] | None = None
) -> Digests:
    """Computes the digests of all shards that this process holds.

    Args:
      params: `params[module][param]`.
      shards: n, of the whole mesh.
      numbers: the numbers of the shards in `params`, if a simulated host holds only some.
    """
    numbers = range(shards) if numbers is None else numbers
    found = [
        (f"{module} {param}", numbers[j], shard)
        for module, arrays in params.items()
        for param, array in arrays.items()
        for j, shard in _distinct_shards(array)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the GIL
        hashes = list(pool.map(_sha256, [shard for _, _, shard in found]))
    of: dict[str, dict[int, str]] = {}
    for (name, j, _), sha256 in zip(found, hashes, strict=True):
        of.setdefault(name, {})[j] = sha256
    return Digests(shards, of)


def merge_digests(parts: Mapping[str, Digests]) -> Digests:
    """Merges the digests of several loads.

    Args:
      parts: the source of each part, for messages, and its digests.

    Raises:
      UsageError: they have different numbers of shards.
      VerifyError: a shard differs between two parts, or their parameters differ.
    """
    first, whole = next(iter(parts.items()))
    of: dict[str, dict[int, str]] = {name: {} for name in whole.of}
    for source, part in parts.items():
        if part.shards != whole.shards:
            expected = f"{whole.shards} shards, as {first} has"
            raise UsageError(
                "digests of different meshes", file=source, expected=expected, found=part.shards
            )
        if differing := part.of.keys() ^ of.keys():
            what = f"{source} and {first} do not have the same parameters"
            raise VerifyError(what, file=source, key=min(differing))
        for name, shards in part.of.items():
            _add(of[name], shards, source, name)
    return Digests(whole.shards, of)


def check_complete(found: Digests, files: Sequence[Path] = ()) -> None:
    """Raises VerifyError if a shard of any parameter is missing; `files` are for its message."""
    if missing := found.missing:
        name, numbers = next(iter(missing.items()))
        raise VerifyError(
            f"the digests are incomplete: {len(missing)} parameters lack shards",
            file=join_names([str(file) for file in files]) or None,
            key=name,
            expected=f"{found.shards} shards",
            found=f"all but {number_set(numbers)}",
        )


def read_digests(path: Path) -> Digests:
    """Reads a file written by `--digests`.

    Raises:
      FormatError: the file has another format.
      StorageError: the file cannot be read.
    """
    with LocalStorage(path.parent) as storage:
        size_bytes = min(storage.version(path.name).size_bytes, _MAX_FILE_BYTES + 1)
        data = storage.read(path.name, 0, size_bytes)
    document = strict_json.parse_object(data, file=str(path), max_bytes=_MAX_FILE_BYTES)
    return from_dict(document, file=path)


def from_dict(document: Mapping[str, object], file: Path | None = None) -> Digests:
    """The inverse of `Digests.to_dict`.

    Raises:
      FormatError: the document has another format.
    """
    match document:
        case {"shards": int(shards), "of": {**of}, "sha256": str(sha256)} if shards <= _MAX_SHARDS:
            found = Digests(shards, {str(name): _by_number(own) for name, own in of.items()})
            if found.sha256 == sha256:
                return found
    raise FormatError("not written by --digests, or changed since", file=file)


def _by_number(shards: object) -> dict[int, str]:
    """Shard numbers and digests; skips entries that have another format."""
    entries = shards.items() if isinstance(shards, dict) else ()
    numbers = ((str(j), str(sha256)) for j, sha256 in entries)
    return {int(j): sha256 for j, sha256 in numbers if j.isdecimal() and len(j) <= _MAX_DIGITS}


def _add(known: dict[int, str], new: Mapping[int, str], source: str, name: str) -> None:
    for j, sha256 in new.items():
        expected = known.setdefault(j, sha256)
        if expected != sha256:
            what = f"shard {j} of a parameter differs between hosts"
            raise VerifyError(what, file=source, key=name, expected=expected, found=sha256)


def _distinct_shards(array: jax.Array) -> Iterator[tuple[int, jax.Array]]:
    """The shards of an array [n, …] on this process's devices, without replicas: number, shard."""
    seen: set[int] = set()
    for shard in array.addressable_shards:
        j = shard.index[0].start or 0
        if j not in seen:
            seen.add(j)
            yield j, shard.data


def _sha256(shard: jax.Array) -> str:
    data = np.ascontiguousarray(np.asarray(shard)).reshape(-1).view(np.uint8)
    return hashlib.sha256(data.data).hexdigest()
