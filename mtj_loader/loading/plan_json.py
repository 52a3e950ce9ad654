"""A plan as JSON types; docs/json.md describes every key."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from mtj_loader.loading.changes import changes

if TYPE_CHECKING:
    from mtj_loader.loading.plan import LoadPlan, ParamPlan


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
        "host_read_bytes": {str(host): count for host, count in plan.bytes_of_hosts.items()},
        "parameters": [_parameter(param) for param in plan.params],
        "tied": [
            {"tensor": pair.copy.name, "equals": pair.original.name} for pair in plan.comparisons
        ],
        "skipped": list(plan.skipped),
        "unmapped": list(plan.unmapped),
        "warnings": list(plan.warnings),
    }


def _parameter(param: ParamPlan) -> dict[str, object]:
    return {
        "module": param.spec.path,
        "param": param.spec.param,
        "shape": list(param.spec.array_shape(len(param.shards))),
        "dtype": param.dtype.name,
        "split": param.spec.split,
        "device_bytes": param.shard_bytes,
        "changes": dict(vars(changes(param))),  # asdict would copy deeply, for every parameter
        "tensors": [record.to_dict() for record in param.view.records],
    }
