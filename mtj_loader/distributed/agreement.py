"""Checks before a load that all hosts are about to load the same; all report which host differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import jax
from jax.sharding import Mesh

from mtj_loader.distributed.hosts import Hosts
from mtj_loader.errors import HostError, UsageError
from mtj_loader.formats.file_names import MAX_TOKENIZER_BYTES
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.storage.base import FileVersion, Storage, StoredFile, read_small
from mtj_loader.version import version

_SAMPLES = 64  # over all files; training changes nearly every weight
_MIN_SAMPLES = 2  # per file; reads are slow where folders are mounted over a network
_SAMPLE_BYTES = 4096  # the smallest unit that a disk reads
_DIGITS = 12  # of a SHA-256 in a message: enough to tell two files apart by eye


def check_same_load(hosts: Hosts, plan: LoadPlan, mesh: Mesh) -> None:
    """Checks that all hosts are about to load the same.

    Each host publishes a SHA-256 of everything that its plan depends on, and of each part.

    Raises:
      HostError: a host differs; the message names it and what differs. Raised on all hosts.
    """
    if hosts.count > 1:
        _check_same(hosts, plan_facts(plan, mesh), "load")


def check_same_generation(
    hosts: Hosts, prompts: Sequence[object], sampling: Mapping[str, object]
) -> None:
    """Checks that all hosts are about to continue the same prompts with the same settings.

    Args:
      hosts: all of them.
      prompts: texts, or lists of token ids.
      sampling: the arguments of `Model.generate`.

    Raises:
      HostError: a host differs; see `check_same_load`.
    """
    facts = {"prompts": digest(prompts), **{name: repr(value) for name, value in sampling.items()}}
    _check_same(hosts, facts, "generate")


def _check_same(hosts: Hosts, facts: Mapping[str, str], action: str) -> None:
    document = json.dumps({"digest": digest(facts), "facts": facts}).encode()
    published = [json.loads(one) for one in hosts.gather(f"agreement to {action}", document)]
    if len({one["digest"] for one in published}) > 1:
        raise disagreement([one["facts"] for one in published], action)


def plan_facts(plan: LoadPlan, mesh: Mesh) -> dict[str, str]:
    """Everything that a plan depends on, by the names that messages use."""
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
        **{name: repr(value) for name, value in plan.options.to_dict().items()},
    }


def digest(value: object) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def disagreement(facts: Sequence[Mapping[str, str]], action: str) -> HostError:
    """The error that lists how the other hosts differ from process 0."""
    first, *others = facts
    found = [
        f"{name}: {_shorten(other.get(name))} on host {host}, {_shorten(first.get(name))} on host 0"
        for host, other in enumerate(others, start=1)
        for name in sorted({*first, *other})
        if first.get(name) != other.get(name)
    ]
    return HostError(
        f"the hosts are not about to {action} the same",
        exit_code=UsageError.exit_code,
        found="; ".join(found),
        hint="all hosts need the same command, files and versions",
    )


def _shorten(value: str | None) -> str:
    if value is None:
        return "nothing"
    is_digest = len(value) == 2 * hashlib.sha256().digest_size
    return value[:_DIGITS] if is_digest else value


def _content(paths: Iterable[Path | StoredFile]) -> str:
    """SHA-256 over the SHA-256 of each file."""
    total = hashlib.sha256()
    for path in paths:
        total.update(hashlib.sha256(read_small(path, MAX_TOKENIZER_BYTES)).digest())
    return total.hexdigest()


def _samples(storage: Storage, stamp: FileVersion, count: int) -> str:
    """SHA-256 of samples from all over a file: two fine-tunes may have equal headers and sizes.

    For an object in a store, its version: every response about it is compared with that.
    """
    if storage.checks_versions:
        return stamp.version
    total = hashlib.sha256()
    step = max(_SAMPLE_BYTES, stamp.size_bytes // count)
    for start in range((step - _SAMPLE_BYTES) // 2, stamp.size_bytes, step):
        length_bytes = min(_SAMPLE_BYTES, stamp.size_bytes - start)
        total.update(storage.read(stamp.path, start, length_bytes))
    return total.hexdigest()


def _adapters(plan: LoadPlan) -> str:
    """SHA-256 of the adapters' settings and weights."""
    headers = [
        [
            adapter.settings,
            [asdict(record) for record in adapter.records.values()],
            _samples(adapter.storage, adapter.file, _SAMPLES),
        ]
        for adapter in plan.adapters
    ]
    terms = [term for param in plan.adapted for term in param.terms]
    return digest([headers, [term.scales.tolist() for term in terms]])
