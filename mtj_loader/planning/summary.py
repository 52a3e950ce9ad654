"""A plan as tables for people; identical layers share a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table

from mtj_loader import display
from mtj_loader.display import counted, show_bytes
from mtj_loader.names import blank_indices, fold_all, fold_names, group_by, natural_key, number_set
from mtj_loader.parameters import AXIS_NAMES
from mtj_loader.planning.compiled_fit import CompiledFit
from mtj_loader.planning.compiled_tables import compiled_tables
from mtj_loader.planning.param_plan import ParamPlan, dtype_changes
from mtj_loader.planning.plan_data import PlanData
from mtj_loader.planning.tpu_fit import Fit, fits


def tables(plan: PlanData, compiled: Sequence[CompiledFit] = ()) -> RenderableType:
    """The plan as a rich renderable: facts, tables, notes."""
    facts, fitting = display.facts(dict(_facts(plan))), _fit_table(plan, compiled)
    return Group(facts, _parameter_table(plan), fitting, *compiled_tables(compiled), *_notes(plan))


def _row_key(param: ParamPlan) -> tuple[object, ...]:
    """What all parameters of one row have in common: all but their layer and expert numbers."""
    records = {(blank_indices(r.name), r.dtype, r.shape): None for r in param.view.records}
    spec = param.spec
    return blank_indices(_name(param)), tuple(records), spec.groups, spec.split, param.divisor


def _name(param: ParamPlan) -> str:
    return f"{param.spec.module} {param.spec.param}"


def _facts(plan: PlanData) -> Iterator[tuple[str, str]]:
    linear = "[out, in]" if plan.options.transposed_linear else "[in, out]"
    yield "checkpoint", _checkpoint(plan)
    yield "model", _model(plan)
    yield "map", plan.map_file
    for adapter in plan.adapters:
        yield "adapter", adapter.location
    yield "mesh", _mesh(plan)
    yield "parameters", f"{counted(len(plan.params), 'array')}, linear weights {linear}"
    for change, count in dtype_changes(plan.params).items():
        yield "dtype", f"{change} in {counted(count, 'array')}"
    yield "each device", f"holds {show_bytes(plan.device_bytes)}"
    yield from _reads(plan)


def _checkpoint(plan: PlanData) -> str:
    files = plan.checkpoint.index.files.values()
    size = show_bytes(sum(file.size_bytes for file in files))
    return f"{plan.checkpoint.location}: {counted(len(files), 'file')}, {size}"


def _model(plan: PlanData) -> str:
    config = plan.config
    padded = config.padded_vocabulary(plan.shards)
    padding = "" if padded == config.vocab_size else f", padded to {padded:,}"
    sizes = f"{counted(config.layers, 'layer')}, d_model {config.d_model:,}"
    heads = counted(config.n_heads, "head")
    return f"{plan.model_type}: {sizes}, {heads}, vocabulary {config.vocab_size:,}{padding}"


def _mesh(plan: PlanData) -> str:
    devices = counted(plan.topology.dp * plan.topology.mp, "device")
    return f"{plan.topology}: {devices} on {counted(len(plan.topology.host_ids), 'host')}"


def _reads(plan: PlanData) -> Iterator[tuple[str, str]]:
    """What hosts read and receive; hosts that read about the same share a line."""
    read_bytes = plan.bytes_of_hosts
    for hosts in group_by(read_bytes, lambda host: show_bytes(read_bytes[host])):
        read = show_bytes(read_bytes[hosts[0]])
        most = show_bytes(max(map(plan.received_bytes, hosts)))
        more = f", {most} more from other hosts" if plan.is_exchanged else ""
        if len(hosts) == 1:
            yield f"host {number_set(hosts)}", f"reads {read}{more}"
        else:
            yield f"hosts {number_set(hosts)}", f"read {read} each{more}"


def _parameter_table(plan: PlanData) -> Table:
    """Pairs of rows: parameters with the same `_row_key`, and below them their tensors."""
    headers = (
        "parameter\n← tensor",
        "on each device\nin the file",
        "split\nchanges",
        "bytes,\nall layers",
    )
    table = display.table(*headers)
    groups = group_by(plan.params, _row_key)
    for group in sorted(groups, key=lambda group: natural_key(_name(group[0]))):
        display.add_row(table, *_on_device(group, plan.shards))
        if plan.has_weights:
            display.add_row(table, *_in_file(group), style="dim")
    return table


def _on_device(group: Sequence[ParamPlan], shards: int) -> tuple[str, str, str, str]:
    first = group[0]
    return (
        fold_names([_name(param) for param in group]),
        f"{list(first.shard_shape)} {first.dtype.name}",
        _split(first.spec.split, shards),
        show_bytes(len(group) * first.shard_bytes),
    )


def _in_file(group: Sequence[ParamPlan]) -> tuple[Sequence[str], Sequence[str], str, str]:
    records = [record for param in group for record in param.view.records]
    names = fold_all([record.name for record in records]) or ["no tensor"]
    return (
        [f"← {name}" for name in names],
        list(dict.fromkeys(f"{list(r.shape)} {r.dtype}" for r in group[0].view.records)),
        str(group[0].changes) if records else "zeros",
        show_bytes(sum(record.size_bytes for record in records)),
    )


def _split(axis: str | None, shards: int) -> str:
    if shards == 1:
        return "whole"
    return "a copy in each" if axis is None else f"{AXIS_NAMES.get(axis, axis)} / {shards}"


def _fit_table(plan: PlanData, compiled: Sequence[CompiledFit]) -> Table:
    """Which TPUs the model fits, each with the mesh that uses most of its devices as shards."""
    headers = "TPU", "mesh", "parameters on each device", "fits", "basis", "tokens of KV cache"
    table = display.table(*headers)
    for fit in fits(plan, compiled):
        held, memory = show_bytes(fit.device_bytes), show_bytes(fit.slice.hbm_bytes)
        mesh = f"dp={fit.dp}, mp={fit.mp}"
        tokens, held = f"{fit.cache_tokens:,}", f"{held} of {memory}"
        display.add_row(table, fit.slice.name, mesh, held, _verdict(fit), fit.basis, tokens)
    return table


def _verdict(fit: Fit) -> str:
    if fit.fits:
        return "yes"
    if fit.compiled is not None:
        return f"no, {show_bytes(fit.compiled.shortfall_bytes)} too large"
    if fit.free_bytes < 0:
        return f"no, {show_bytes(-fit.free_bytes)} too large"
    return f"no, less than {fit.min_tokens:,} tokens"


def _notes(plan: PlanData) -> Iterator[RenderableType]:
    for pair in plan.comparisons:
        copy, original = pair.copy.name, pair.original.name
        yield display.line(f"tied: {copy} must equal {original}; compared while loading")
    for name in fold_all(plan.skipped):
        yield display.line(f"not needed: {name}")
    for note in plan.notes:
        yield display.line(note)
    for warning in plan.warnings:
        yield display.line(f"warning: {warning}", "yellow")
