"""SHA-256 of every shard on the devices: what loads on many hosts, or simulated ones, add up to."""

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
from mtj_loader.names import number_set
from mtj_loader.storage.local import LocalStorage

_MAX_FILE_BYTES = 1 << 30  # ten thousand parameters in a thousand shards


@dataclass(frozen=True)
class Digests:
    """Digests of shards, as hexadecimal SHA-256 of their bytes in C order.

    Attributes:
      shards: n, how many there are of each parameter.
      of: "module param" → number of a shard → its digest; of one host only the shards it holds.
    """

    shards: int
    of: Mapping[str, Mapping[int, str]]

    @property
    def sha256(self) -> str:
        """One digest of all of them, whatever the order in which they were found."""
        lines = (f"{name} {j} {self.of[name][j]}\n" for name, j in sorted(self._keys()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def missing(self) -> dict[str, list[int]]:
        """The shards that are not there, of each parameter that lacks any."""
        absent = {n: [j for j in range(self.shards) if j not in of] for n, of in self.of.items()}
        return {name: numbers for name, numbers in absent.items() if numbers}

    def to_dict(self) -> dict[str, object]:
        """The digests as JSON types; docs/json.md describes them."""
        of = {name: {str(j): one for j, one in mine.items()} for name, mine in self.of.items()}
        return {"shards": self.shards, "sha256": self.sha256, "of": of}

    def _keys(self) -> Iterator[tuple[str, int]]:
        return ((name, j) for name, mine in self.of.items() for j in mine)


def digests(
    params: Mapping[str, Mapping[str, jax.Array]], shards: int, numbers: Sequence[int] | None = None
) -> Digests:
    """The digests of all shards that this process holds.

    Args:
      params: `params[module][param]`.
      shards: n, of the whole mesh.
      numbers: the numbers of the shards in `params`, where a simulated host has only some.
    """
    numbers = range(shards) if numbers is None else numbers
    found = [
        (f"{module} {param}", numbers[j], shard)
        for module, arrays in params.items()
        for param, array in arrays.items()
        for j, shard in _distinct(array)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets other threads run
        made = list(pool.map(_sha256, [shard for _, _, shard in found]))
    of: dict[str, dict[int, str]] = {}
    for (name, j, _), one in zip(found, made, strict=True):
        of.setdefault(name, {})[j] = one
    return Digests(shards, of)


def joined(parts: Mapping[str, Digests]) -> Digests:
    """What several loads hold together.

    Args:
      parts: where each comes from, for messages, and its digests.

    Raises:
      UsageError: they are of different meshes.
      VerifyError: two of them differ in a shard, or one lacks a parameter that another has.
    """
    first, whole = next(iter(parts.items()))
    of: dict[str, dict[int, str]] = {name: {} for name in whole.of}
    for source, part in parts.items():
        if part.shards != whole.shards:
            expected = f"{whole.shards} shards, as {first} has"
            raise UsageError("not of one mesh", file=source, expected=expected, found=part.shards)
        if strange := part.of.keys() ^ of.keys():
            what = f"{source} and {first} do not have the same parameters"
            raise VerifyError(what, key=min(strange))
        for name, mine in part.of.items():
            _add(of[name], mine, source, name)
    return Digests(whole.shards, of)


def check_whole(found: Digests) -> None:
    """Raises VerifyError if a shard of any parameter is not there."""
    if missing := found.missing:
        name, numbers = next(iter(missing.items()))
        raise VerifyError(
            f"the whole is not there: {len(missing)} parameters lack shards",
            key=name,
            expected=f"{found.shards} shards",
            found=f"all but {number_set(numbers)}",
        )


def read_digests(path: Path) -> Digests:
    """Reads what `--digests` wrote.

    Raises:
      FormatError: it is something else.
      StorageError: it cannot be read.
    """
    with LocalStorage(path.parent) as storage:
        size_bytes = min(storage.version(path.name).size_bytes, _MAX_FILE_BYTES + 1)
        data = storage.read(path.name, 0, size_bytes)
    document = strict_json.parse_object(data, file=str(path), max_bytes=_MAX_FILE_BYTES)
    return from_dict(document, file=path)


def from_dict(document: Mapping[str, object], file: Path | None = None) -> Digests:
    """What `Digests.to_dict` gave.

    Raises:
      FormatError: it is something else.
    """
    match document:
        case {"shards": int(shards), "of": {**of}, "sha256": str(sha256)}:
            found = Digests(shards, {str(name): _by_number(mine) for name, mine in of.items()})
            if found.sha256 == sha256:
                return found
    raise FormatError("not what --digests wrote, or changed since", file=file)


def _by_number(mine: object) -> dict[int, str]:
    """Shard numbers and digests; nothing of what has another form."""
    entries = mine.items() if isinstance(mine, dict) else ()
    return {int(j): str(one) for j, one in entries if str(j).isdecimal()}


def _add(of: dict[int, str], mine: Mapping[int, str], source: str, name: str) -> None:
    for j, one in mine.items():
        other = of.setdefault(j, one)
        if other != one:
            what = f"shard {j} of a parameter is not everywhere the same"
            raise VerifyError(what, file=source, key=name, expected=other, found=one)


def _distinct(array: jax.Array) -> Iterator[tuple[int, jax.Array]]:
    """Each shard of an array [n, …] that this process holds, with its number; replicas once."""
    seen: set[int] = set()
    for shard in array.addressable_shards:
        j = shard.index[0].start or 0
        if j not in seen:
            seen.add(j)
            yield j, shard.data


def _sha256(shard: jax.Array) -> str:
    data = np.ascontiguousarray(np.asarray(shard)).reshape(-1).view(np.uint8)
    return hashlib.sha256(data.data).hexdigest()
