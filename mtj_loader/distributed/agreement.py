"""Before a byte is read: all hosts are about to load the same, or all say who differs in what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import jax
from jax.sharding import Mesh

from mtj_loader.distributed.hosts import Hosts
from mtj_loader.errors import HostError, StorageError, UsageError
from mtj_loader.formats.records import FileVersion
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.storage.base import RemoteStorage, Storage, StoredFile
from mtj_loader.version import version

_SAMPLES = 64  # of all files together; training changes nearly every weight
_MIN_SAMPLES = 2  # of each file: where folders are mounted over a network each takes long
_SAMPLE_BYTES = 4096  # what a disk reads at least
_DIGITS = 12  # of a SHA-256 in a message: enough to tell two files apart by eye


def agree(hosts: Hosts, plan: LoadPlan, mesh: Mesh) -> None:
    """Makes sure that all hosts are about to do the same.

    Each publishes a SHA-256 of all that its plan follows from, beside the parts of it.

    Raises:
      HostError: a host differs; says which, and in what. The same on all hosts.
    """
    if hosts.count > 1:
        _agree(hosts, plan_facts(plan, mesh), "load the same")


def agree_to_generate(
    hosts: Hosts, prompts: Sequence[object], sampling: Mapping[str, object]
) -> None:
    """Makes sure that all hosts are about to continue the same prompts in the same way.

    Args:
      hosts: all of them.
      prompts: texts, or lists of token ids.
      sampling: the arguments of `Model.generate`.

    Raises:
      HostError: as `agree`.
    """
    facts = {"prompts": digest(prompts), **{name: repr(value) for name, value in sampling.items()}}
    _agree(hosts, facts, "generate the same")


def _agree(hosts: Hosts, facts: Mapping[str, str], what: str) -> None:
    document = json.dumps({"digest": digest(facts), "facts": facts}).encode()
    published = [json.loads(one) for one in hosts.gather(f"agree to {what}", document)]
    if len({one["digest"] for one in published}) > 1:
        raise disagreement([one["facts"] for one in published], what)


def plan_facts(plan: LoadPlan, mesh: Mesh) -> dict[str, str]:
    """All that a plan follows from, under the names that messages give it."""
    checkpoint = plan.checkpoint
    stamps = checkpoint.index.files.values()
    samples = max(_MIN_SAMPLES, _SAMPLES // len(stamps))
    return {
        "mtj_loader": version(),
        "jax": jax.__version__,
        "config": digest([checkpoint.config, checkpoint.generation_config]),
        "tensors": digest([asdict(record) for record in checkpoint.index.records.values()]),
        "map": _content([Path(plan.map_file)]),
        "tokenizer": _content(checkpoint.tokenizer_files.values()),
        "adapters": _adapters(plan),
        "mesh": f"{plan.topology} on devices {[device.id for device in mesh.devices.flat]}",
        **{f"size of {stamp.path}": f"{stamp.size_bytes:,} bytes" for stamp in stamps},
        **{f"content of {s.path}": _samples(checkpoint.storage, s, samples) for s in stamps},
        **{name: repr(value) for name, value in asdict(plan.options).items()},
    }


def digest(value: object) -> str:
    """SHA-256 of JSON types, whatever the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def disagreement(facts: Sequence[Mapping[str, str]], what: str) -> HostError:
    """What every other host has that process 0 does not have, or the other way round."""
    first, *others = facts
    found = [
        f"{name}: {_brief(other.get(name))} on host {host}, {_brief(first.get(name))} on host 0"
        for host, other in enumerate(others, start=1)
        for name in sorted({*first, *other})
        if first.get(name) != other.get(name)
    ]
    return HostError(
        f"the hosts are not about to {what}",
        exit_code=UsageError.exit_code,
        found="; ".join(found),
        hint="all need the same command, files and versions",
    )


def _brief(value: str | None) -> str:
    if value is None:
        return "nothing"
    is_digest = len(value) == 2 * hashlib.sha256().digest_size
    return value[:_DIGITS] if is_digest else value


def _content(paths: Iterable[Path | StoredFile]) -> str:
    """SHA-256 of files, one after another."""
    total = hashlib.sha256()
    for path in paths:
        try:
            total.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise StorageError("cannot read the file", file=path, found=error.strerror) from error
    return total.hexdigest()


def _samples(storage: Storage, stamp: FileVersion, count: int) -> str:
    """SHA-256 of pieces all over a file: two fine-tunes of one model differ in no header or size.

    Of an object in a store all hosts see the same, and each answer is compared with its version.
    """
    if isinstance(storage, RemoteStorage):
        return stamp.version
    total = hashlib.sha256()
    step = max(_SAMPLE_BYTES, stamp.size_bytes // count)
    for start in range((step - _SAMPLE_BYTES) // 2, stamp.size_bytes, step):
        length_bytes = min(_SAMPLE_BYTES, stamp.size_bytes - start)
        total.update(storage.read(stamp.path, start, length_bytes))
    return total.hexdigest()


def _adapters(plan: LoadPlan) -> str:
    """SHA-256 of what the adapters are and how strongly each is added."""
    headers = [
        [
            asdict(adapter.config),
            [asdict(record) for record in adapter.records.values()],
            _samples(adapter.storage, adapter.stamp, _SAMPLES),
        ]
        for adapter in plan.adapters
    ]
    terms = [term for param in plan.adapted for term in param.terms]
    return digest([headers, [term.scales.tolist() for term in terms]])
