"""Making a plan: checkpoint, model and mesh brought together before a byte of weights is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mtj_loader import dtypes, models
from mtj_loader.errors import AdapterError, ConfigError, MapError, UsageError
from mtj_loader.formats import hf_config
from mtj_loader.formats.checkpoint import Checkpoint
from mtj_loader.formats.records import TensorRecord
from mtj_loader.formats.token_ids import outside_vocabulary
from mtj_loader.lora.adapter import Adapter, PathLike, open_adapter
from mtj_loader.lora.adapter_resolve import resolve_adapter
from mtj_loader.lora.low_rank import AdapterTerms, LowRank
from mtj_loader.models.config import ModelConfig
from mtj_loader.planning.assign_reads import assign_reads
from mtj_loader.planning.load_plan import LoadOptions, LoadPlan, ParamPlan
from mtj_loader.planning.topology import Topology
from mtj_loader.weights.copies import shard_layouts
from mtj_loader.weights.find_map import find_map
from mtj_loader.weights.map_reader import read_map
from mtj_loader.weights.resolve import Binding, Resolution, TargetKey, resolve
from mtj_loader.weights.transforms import Layout
from mtj_loader.weights.weight_map import WeightMap

MIN_HOST_MEMORY = 64 << 20  # below, panels and pending copies no longer overlap


def make_plan(
    checkpoint: Checkpoint,
    topology: Topology,
    options: LoadOptions,
    map_path: Path | None = None,
) -> LoadPlan:
    """Plans a load; reads no tensor and needs no device.

    Args:
      checkpoint: an opened checkpoint.
      topology: the mesh to plan for.
      options: see LoadOptions.
      map_path: a weight map to use instead of `configs/<model_type>.json`.

    Raises:
      ConfigError: config.json is malformed or asks for what is not supported.
      MeshError: the shard count does not divide what it splits.
      MapError: the map is malformed or belongs to another family.
      CheckpointMismatchError: checkpoint, map and model do not fit; lists every problem.
    """
    dtype = dtypes.parameter_dtype(options.dtype)
    weight_map, model_type, config = read_model(checkpoint, map_path)
    if options.expert_parallel:
        config = _with_whole_experts(config)
    models.check_shards(config, topology.mp)
    specs = models.family(model_type).parameters(config, topology.mp, options.transposed_linear)
    _check_map_values(weight_map, config, checkpoint)
    noticed = outside_vocabulary(checkpoint.config, checkpoint.generation_config, config.vocab_size)
    resolution = resolve(
        weight_map,
        checkpoint.index,
        specs,
        Layout(topology.mp, config.vocab_size, options.transposed_linear),
        layers=config.layers,
        ties=_ties(config),
        allow_unmapped=options.allow_unmapped,
    )
    params = _in_file_order(resolution, checkpoint, topology.mp, dtype)
    return LoadPlan(
        checkpoint,
        model_type,
        config,
        weight_map.file,
        topology,
        options,
        assign_reads(params, topology, checkpoint.storage.costs),
        resolution.comparisons,
        resolution.skipped,
        resolution.unmapped,
        noticed=tuple(noticed),
    )


def add_adapters(plan: LoadPlan, adapters: Sequence[tuple[PathLike, float]]) -> LoadPlan:
    """The plan with LoRA adapters that are added to the weights.

    Args:
      plan: of the model alone, or with other adapters already.
      adapters: folders, each with a factor on top of its own scale.

    Raises:
      AdapterError: an adapter is malformed, unsupported or made for another model.
    """
    weight_map = read_map(Path(plan.map_file))
    specs = [param.spec for param in plan.params]
    options = plan.options
    layout = Layout(plan.shards, plan.config.vocab_size, options.transposed_linear)
    for path, weight in adapters:
        adapter = open_adapter(path)
        index, layers = plan.checkpoint.index, plan.config.layers
        found = resolve_adapter(
            adapter, weight, weight_map, index, specs, layout=layout, layers=layers
        )
        _refuse_tied(plan, adapter, found)
        params = tuple(_with_term(param, found.terms) for param in plan.params)
        plan = replace(
            plan,
            params=params,
            adapters=(*plan.adapters, adapter),
            carried=(*plan.carried, *found.copies),
        )
    return plan


def _with_term(param: ParamPlan, terms: Mapping[TargetKey, LowRank]) -> ParamPlan:
    term = terms.get((param.spec.module, param.spec.param))
    return param if term is None else replace(param, terms=(*param.terms, term))


def _refuse_tied(plan: LoadPlan, adapter: Adapter, found: AdapterTerms) -> None:
    """Raises AdapterError if an adapter of the embedding would change the projection too."""
    for key in set(_ties(plan.config).values()) & found.terms.keys():
        raise AdapterError(
            "the embedding is tied to the projection; an adapter of it would change both",
            file=adapter.stamp.path,
            key=" ".join(key),
        )


def read_model(
    checkpoint: Checkpoint, map_path: Path | None = None
) -> tuple[WeightMap, str, ModelConfig]:
    """The weight map, the family and the config of a checkpoint.

    Raises:
      ConfigError: the family is unknown, or its config is refused.
      MapError: the map is malformed or belongs to another family.
    """
    file = _config_file(checkpoint)
    config = hf_config.normalize(checkpoint.config, file=file)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError("config.json names no model family", file=file, key="model_type")
    family = models.family(model_type)
    weight_map = find_map(model_type, map_path)
    if models.family_of_compat(weight_map.compat) is not family:
        raise MapError(
            "the weight map is for another family",
            file=weight_map.file,
            key="mtj_compat",
            expected=models.FAMILIES[model_type],
            found=weight_map.compat,
        )
    return weight_map, model_type, family.Config.read(config, file=file)


def _with_whole_experts(config: ModelConfig) -> ModelConfig:
    """The same model with whole experts dealt over the shards.

    Raises:
      UsageError: it has no experts.
    """
    if not hasattr(config, "expert_parallel"):
        what = "expert_parallel is for models with experts"
        raise UsageError(what, key="expert_parallel", found=config.model_type)
    return replace(config, expert_parallel=True)  # pyright: ignore[reportCallIssue]


def _config_file(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.location}/config.json"


def check_host_memory(host_memory_bytes: int) -> None:
    """Raises UsageError if the budget is below the least that works."""
    if host_memory_bytes < MIN_HOST_MEMORY:
        found = f"{host_memory_bytes:,} bytes"
        raise UsageError("host_memory is too small", expected="at least 64MiB", found=found)


def _ties(config: ModelConfig) -> dict[TargetKey, TargetKey]:
    """The projection uses the embedding's tensor where the config ties them."""
    if not config.tie_word_embeddings:
        return {}
    return {("projection_shard/~/linear", "w"): ("embedding_shard/~/linear", "w")}


def _check_map_values(weight_map: WeightMap, config: ModelConfig, checkpoint: Checkpoint) -> None:
    """What the map reads from config.json must be what the model reads.

    Raises:
      MapError: a value of `mtj_config_map` differs from the model's.
    """
    file = _config_file(checkpoint)
    values = weight_map.config_values(hf_config.normalize(checkpoint.config, file=file), file=file)
    for key, value in values.items():
        model_value = getattr(config, key, value)
        if model_value != value:
            what = "the map reads another value from config.json than the model does"
            raise MapError(what, file=weight_map.file, key=key, expected=model_value, found=value)


def _in_file_order(
    resolution: Resolution, checkpoint: Checkpoint, shards: int, dtype: np.dtype
) -> tuple[ParamPlan, ...]:
    order = {file: i for i, file in enumerate(checkpoint.index.files)}

    def place(record: TensorRecord) -> tuple[int, int]:
        return order[record.file], record.offset_bytes

    plans = [_param_plan(binding, shards, dtype) for binding in resolution.bindings]
    first = (-1, 0)  # what no file has needs no reading
    return tuple(sorted(plans, key=lambda p: min(map(place, p.view.records), default=first)))


def _param_plan(binding: Binding, shards: int, dtype: np.dtype) -> ParamPlan:
    spec, view = binding.spec, binding.view
    layouts = shard_layouts(view.layout, spec.groups, spec.split, shards)
    source = dtypes.WEIGHT_DTYPES[view.records[0].dtype] if view.records else dtype
    return ParamPlan(spec, view, layouts, source, dtype, shards if binding.divide else 1)
