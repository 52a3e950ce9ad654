"""File names of a checkpoint, and which files are the weights: decided by name alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from mtj_loader.errors import CheckpointError, FormatError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SUFFIX = ".safetensors"
CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
MAX_TOKENIZER_BYTES = 100_000_000  # of a file; three times the largest published ones
# Requested together from a storage where each request takes a round trip.
USUAL_FILES = (CONFIG_FILE, GENERATION_CONFIG_FILE, INDEX_FILE, SINGLE_FILE, *TOKENIZER_FILES)

# At most nine digits: the number is untrusted input.
_SHARD = re.compile(r"(?P<stem>.+)-(?P<k>[0-9]{1,9})-of-(?P<n>[0-9]{1,9})\.safetensors")
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".npz", ".onnx")
_MAX_NAMES_SHOWN = 5  # in a message


def choose_files(names: Iterable[str], *, location: str) -> list[str]:
    """Picks the weights of a folder that has no index; `location` is the folder, for messages.

    Takes a complete set of `model-00001-of-0000N.safetensors`, else `model.safetensors`, else the
    only safetensors file.

    Raises:
      CheckpointError: none of these, or both of the first two.
      FormatError: the set is incomplete.
    """
    names = sorted(names)
    candidates = [name for name in names if name.endswith(SUFFIX) and "/" not in name]
    shards = [name for name in candidates if _is_model_shard(name)]
    if shards and SINGLE_FILE not in candidates:
        check_numbering(shards)
        return shards
    if SINGLE_FILE in candidates and not shards:
        return [SINGLE_FILE]
    if len(candidates) == 1:
        return candidates
    raise _ambiguous(candidates, location) if candidates else _no_weights(names, location)


def check_numbering(files: Iterable[str]) -> None:
    """Checks that files named k of N have a single N, and are complete from 1 to N.

    Raises:
      FormatError: a shard is missing, or there are two values of N.
    """
    groups: dict[str, list[tuple[int, int]]] = {}
    for file in files:
        if match := _SHARD.fullmatch(file):
            groups.setdefault(match["stem"], []).append((int(match["k"]), int(match["n"])))
    for stem, numbers in groups.items():
        _check_group(f"{stem}-*-of-*{SUFFIX}", numbers)


def shard_total(file: str) -> int | None:
    """The N of a file named k of N; None for any other name."""
    match = _SHARD.fullmatch(file)
    return int(match["n"]) if match else None


def join_names(names: Sequence[str]) -> str:
    """A list of names for a message, shortened if it is long."""
    shown = ", ".join(names[:_MAX_NAMES_SHOWN])
    return shown if len(names) <= _MAX_NAMES_SHOWN else f"{shown}, … ({len(names)} in total)"


def _check_group(file: str, numbers: Sequence[tuple[int, int]]) -> None:
    totals = sorted({n for _, n in numbers})
    if len(totals) > 1:
        found = " and ".join(f"of-{n}" for n in totals)
        what = "shards of two different sets"
        raise FormatError(what, file=file, expected="one total", found=found)
    present, total = {k for k, _ in numbers}, totals[0]
    if len(present) < total:  # so the loop finds a gap soon, however large the total is
        gap = next(k for k in range(1, total + 1) if k not in present)
        found = f"{len(present)} of them; shard {gap} is missing"
        raise FormatError("a shard is missing", file=file, expected=f"{total} shards", found=found)
    if min(present) != 1 or max(present) != total:
        found = f"{min(present)} to {max(present)}"
        raise FormatError("wrong shard numbers", file=file, expected=f"1 to {total}", found=found)


def _is_model_shard(name: str) -> bool:
    match = _SHARD.fullmatch(name)
    return match is not None and match["stem"] == "model"


def _ambiguous(candidates: Sequence[str], location: str) -> CheckpointError:
    return CheckpointError(
        "it is not clear which files are the weights",
        file=location,
        expected=f"{INDEX_FILE}, or one set of weights",
        found=join_names(candidates),
        hint="pass the path of one .safetensors file, or write the index",
    )


def _no_weights(names: Sequence[str], location: str) -> CheckpointError:
    other = [name for name in names if name.endswith(OTHER_WEIGHTS)]
    hint = "convert the weights to safetensors; other formats are not supported"
    return CheckpointError(
        "no safetensors weights",
        file=location,
        expected=f"{INDEX_FILE}, {SINGLE_FILE} or another {SUFFIX} file",
        found=join_names(other or names) or "no files",
        hint=hint if other else None,
    )
