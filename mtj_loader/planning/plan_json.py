"""A plan as JSON types; docs/json.md describes every key."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from mtj_loader.planning.changes import changes
from mtj_loader.planning.tpu_fit import cache_bytes_per_token, fits

if TYPE_CHECKING:
    from mtj_loader.planning.load_plan import LoadPlan, ParamPlan


def to_dict(plan: LoadPlan) -> dict[str, object]:
    """The whole plan, every parameter by itself, in the order in which they are read."""
    files = plan.checkpoint.index.files.values()
    return {
        "location": plan.checkpoint.location,
        "model_type": plan.model_type,
        "map": plan.map_file,
        "adapters": [adapter.location for adapter in plan.adapters],
        "mesh": {
            "dp": plan.topology.dp,
            "mp": plan.topology.mp,
            "hosts": [list(row) for row in plan.topology.hosts],
        },
        "options": asdict(plan.options),
        "files": [{"name": stamp.path, "bytes": stamp.size_bytes} for stamp in files],
        "device_bytes": plan.device_bytes,
        "cache_bytes_per_token": cache_bytes_per_token(plan, plan.shards),
        "fits": [fit.to_dict() for fit in fits(plan)],
        "host_read_bytes": {str(host): count for host, count in plan.bytes_of_hosts.items()},
        "host_received_bytes": {str(h): plan.received_bytes(h) for h in plan.topology.host_ids},
        "parameters": [_parameter(param) for param in plan.params],
        "tied": [
            {"tensor": pair.copy.name, "equals": pair.original.name} for pair in plan.comparisons
        ],
        "skipped": list(plan.skipped),
        "unmapped": list(plan.unmapped),
        "warnings": list(plan.warnings),
    }


def _reading(param: ParamPlan) -> str:
    """How devices share it out for reading."""
    if param.reading is None:
        return "own shards"
    return "blocks of all shards" if param.reading.is_mixed else "blocks of each shard"


def _parameter(param: ParamPlan) -> dict[str, object]:
    return {
        "module": param.spec.path,
        "param": param.spec.param,
        "shape": list(param.array_shape),
        "dtype": param.dtype.name,
        "split": param.spec.split,
        "device_bytes": param.shard_bytes,
        "read": _reading(param),
        "changes": dict(vars(changes(param))),  # asdict would copy deeply, for every parameter
        "tensors": [record.to_dict() for record in param.view.records],
    }
