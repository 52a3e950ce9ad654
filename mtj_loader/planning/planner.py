"""Makes a plan from a checkpoint, a model and a mesh, without reading any weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mtj_loader import dtypes, models
from mtj_loader.errors import AdapterError, ConfigError, MapError, UsageError
from mtj_loader.formats import hf_config
from mtj_loader.formats.checkpoint import Checkpoint
from mtj_loader.formats.known_settings import remarks
from mtj_loader.formats.leave_out import leave_out
from mtj_loader.formats.records import TensorRecord
from mtj_loader.formats.token_ids import outside_vocabulary, token_id_problems
from mtj_loader.lora.adapter import Adapter, open_adapter
from mtj_loader.lora.adapter_resolve import resolve_adapter
from mtj_loader.lora.low_rank import AdapterTerms, LowRank
from mtj_loader.models.config import ModelConfig
from mtj_loader.options import LoadOptions, PathLike
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.planning.param_plan import ParamPlan, own_shards, with_reads
from mtj_loader.planning.topology import Topology
from mtj_loader.weights.copies import shard_layouts
from mtj_loader.weights.map_reader import find_map
from mtj_loader.weights.resolve import Binding, Resolution, TargetKey, resolve
from mtj_loader.weights.transforms import TransformContext
from mtj_loader.weights.view import zeros
from mtj_loader.weights.weight_map import WeightMap


@dataclass(frozen=True)
class ModelSource:
    """What a checkpoint's config.json and its weight map say about the model.

    Attributes:
      weight_map: which tensor fills which parameter.
      hf_config: config.json, normalized.
      config: the model.
    """

    weight_map: WeightMap
    hf_config: Mapping[str, object]
    config: ModelConfig


def without_settings(checkpoint: Checkpoint, keys: Sequence[str]) -> Checkpoint:
    """The checkpoint without some keys of its config.json; see `LoadOptions.ignore_settings`.

    Raises:
      UsageError: its config.json has no such key.
    """
    config = leave_out(checkpoint.config, keys, file=f"{checkpoint.location}/config.json")
    return replace(checkpoint, config=config)


def read_model(checkpoint: Checkpoint, map_path: PathLike | None = None) -> ModelSource:
    """Reads the config and the weight map of a checkpoint's model.

    Args:
      checkpoint: an opened checkpoint.
      map_path: a weight map to use instead of `configs/<model_type>.json`.

    Raises:
      ConfigError: config.json is malformed, its family is unknown, or a setting is not supported.
      MapError: the map is malformed or belongs to another family.
    """
    file = f"{checkpoint.location}/config.json"
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError("config.json names no model family", file=file, key="model_type")
    family = models.family(model_type, file=file)
    weight_map = find_map(model_type, None if map_path is None else Path(map_path))
    if weight_map.compat != models.FAMILIES[model_type]:
        raise MapError(
            "the weight map is for another family",
            file=weight_map.file,
            key="mtj_compat",
            expected=models.FAMILIES[model_type],
            found=weight_map.compat,
        )
    if map_path is not None and weight_map.positions != (own := find_map(model_type)).positions:
        raise MapError(
            "the weight map is for other positions than the family's",
            file=weight_map.file,
            key="mtj_pe",
            expected=own.positions,
            found=weight_map.positions,
        )
    problems = token_id_problems(
        checkpoint.config, checkpoint.generation_config, folder=checkpoint.location
    )
    hf = hf_config.normalize(checkpoint.config, file=file, problems=problems)
    config = family.Config.read(hf, file=file, problems=problems)
    return ModelSource(weight_map, hf, config)


def make_plan(
    checkpoint: Checkpoint, model: ModelSource, topology: Topology, options: LoadOptions
) -> LoadPlan:
    """Plans a load without adapters; reads no tensor and needs no device.

    Args:
      checkpoint: an opened checkpoint.
      model: its model; see `read_model`.
      topology: the mesh to plan for.
      options: see LoadOptions.

    Raises:
      ConfigError: a token id in its configs is malformed.
      MeshError: the shard count does not divide a split dimension.
      MapError: the map and the model read different values from config.json.
      CheckpointMismatchError: checkpoint, map and model do not fit; lists every problem.
    """
    dtype = dtypes.parameter_dtype(options.dtype)
    config, weight_map = model.config, model.weight_map
    if options.expert_parallel:
        config = with_whole_experts(config)
    models.check_shards(config, topology.mp, options.transposed_linear)
    specs = models.parameters(config, topology.mp, options.transposed_linear)
    _check_map_values(weight_map, config, model.hf_config, checkpoint)
    notices = outside_vocabulary(checkpoint.config, checkpoint.generation_config, config.vocab_size)
    notes, doubts = remarks(checkpoint.config, config.ignored_settings, options.ignore_settings)
    if checkpoint.index.records:
        resolution = resolve(
            weight_map,
            checkpoint.index,
            specs,
            TransformContext(topology.mp, config.vocab_size, options.transposed_linear),
            layers=config.layers,
            ties=_ties(config),
            allow_unmapped=options.allow_unmapped,
        )
    else:  # see `open_checkpoint`
        resolution = Resolution(tuple(Binding(spec, zeros(spec.shape)) for spec in specs))
    params = _in_file_order(resolution, checkpoint, topology.mp, dtype)
    return LoadPlan(
        checkpoint,
        weight_map,
        model.hf_config,
        config,
        topology,
        options,
        with_reads(params, topology, checkpoint.storage.costs),
        resolution.comparisons,
        resolution.skipped,
        resolution.unmapped,
        notices=(*notices, *doubts),
        notes=tuple(notes),
    )


def add_adapters(plan: LoadPlan, adapters: Sequence[tuple[PathLike, float]]) -> LoadPlan:
    """Adds LoRA adapters to a plan.

    Args:
      plan: of the model alone, or with other adapters already.
      adapters: folders, each with a factor that multiplies the adapter's own scale.

    Raises:
      AdapterError: an adapter is malformed, unsupported or made for another model.
    """
    specs = [param.spec for param in plan.params]
    options = plan.options
    context = TransformContext(plan.shards, plan.config.vocab_size, options.transposed_linear)
    for path, weight in adapters:
        adapter = open_adapter(path)
        index, layers = plan.checkpoint.index, plan.config.layers
        found = resolve_adapter(
            adapter, weight, plan.weight_map, index, specs, context=context, layers=layers
        )
        _refuse_tied(plan, adapter, found)
        params = tuple(_with_term(param, found.terms) for param in plan.params)
        plan = replace(
            plan,
            params=params,
            adapters=(*plan.adapters, adapter),
            base_weights=(*plan.base_weights, *found.copies),
        )
    return plan


def _with_term(param: ParamPlan, terms: Mapping[TargetKey, LowRank]) -> ParamPlan:
    term = terms.get((param.spec.module, param.spec.param))
    return param if term is None else replace(param, terms=(*param.terms, term))


def _refuse_tied(plan: LoadPlan, adapter: Adapter, found: AdapterTerms) -> None:
    """Raises AdapterError if an adapter of the embedding would also change the projection."""
    for key in set(_ties(plan.config).values()) & found.terms.keys():
        raise AdapterError(
            "the embedding is tied to the projection; an adapter of it would change both",
            file=adapter.file.path,
            key=" ".join(key),
        )


def with_whole_experts(config: ModelConfig) -> ModelConfig:
    """The same model with whole experts distributed over the shards.

    Raises:
      UsageError: the model has no experts.
    """
    if not hasattr(config, "expert_parallel"):
        what = "expert_parallel is for models with experts"
        raise UsageError(what, key="expert_parallel", found=config.model_type)
    return replace(config, expert_parallel=True)  # pyright: ignore[reportCallIssue]


def _ties(config: ModelConfig) -> dict[TargetKey, TargetKey]:
    """The projection uses the embedding's tensor where the config ties them."""
    if not config.tie_word_embeddings:
        return {}
    return {("projection_shard/~/linear", "w"): ("embedding_shard/~/linear", "w")}


def _check_map_values(
    weight_map: WeightMap, config: ModelConfig, hf: Mapping[str, object], checkpoint: Checkpoint
) -> None:
    """Raises MapError if `mtj_config_map` reads another value from config.json than the model."""
    spelled = hf_config.add_spellings(hf, config.spellings)
    for key, value in weight_map.config_values(
        spelled, file=f"{checkpoint.location}/config.json"
    ).items():
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
    first = (-1, 0)  # parameters without a tensor
    return tuple(sorted(plans, key=lambda p: min(map(place, p.view.records), default=first)))


def _param_plan(binding: Binding, shards: int, dtype: np.dtype) -> ParamPlan:
    spec, view = binding.spec, binding.view
    layouts = shard_layouts(view.layout, spec.groups, spec.split, shards)
    source = dtypes.WEIGHT_DTYPES[view.records[0].dtype] if view.records else dtype
    divisor = shards if binding.divide else 1
    return ParamPlan(spec, view, layouts, source, dtype, divisor, own_shards(spec, layouts))
