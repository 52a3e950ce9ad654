"""The public functions `plan` and `load`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Unpack

import jax
from jax.sharding import AbstractMesh, Mesh

from mtj_loader.distributed.agreement import check_same_load
from mtj_loader.distributed.host_group import DEFAULT_TIMEOUT_SECONDS, connect_hosts
from mtj_loader.distributed.hosts import SINGLE_HOST, Hosts
from mtj_loader.distributed.shared_headers import open_on_all_hosts
from mtj_loader.dtypes import has_bfloat16_arithmetic, parameter_dtype
from mtj_loader.engine.choose_settings import choose_settings, use_stored_programs
from mtj_loader.engine.compilation_cache import (
    compilation_cache_folder,
    enable_compilation_cache,
)
from mtj_loader.engine.compile_ahead import (
    WarmUpLike,
    add_compile_times,
    compile_in_background,
    keep_common_programs,
    keys_for,
    read_shapes,
)
from mtj_loader.engine.engine_programs import Programs
from mtj_loader.errors import MeshError, TokenizerMissingError, UsageError
from mtj_loader.formats.checkpoint import Checkpoint, Headers, open_checkpoint
from mtj_loader.formats.token_ids import bos_id
from mtj_loader.formats.typed_reader import format_value
from mtj_loader.generation.prompts import PromptRules
from mtj_loader.generation.tokenizer import load_tokenizer
from mtj_loader.loading.load_params import load_params
from mtj_loader.loading.process_memory import no_garbage_collection
from mtj_loader.loading.progress import progress_bar
from mtj_loader.model import Model
from mtj_loader.models import usable_shards
from mtj_loader.models.config import ModelConfig
from mtj_loader.models.forward import Forward
from mtj_loader.options import (
    Keywords,
    LoadOptions,
    PathLike,
    Source,
    split_keywords,
    takes_options,
)
from mtj_loader.planning.load_plan import LoadPlan
from mtj_loader.planning.planner import add_adapters, make_plan, read_model, without_settings
from mtj_loader.planning.topology import (
    Topology,
    as_mesh,
    make_abstract_mesh,
    make_mesh,
    parse_mesh,
    topology,
)
from mtj_loader.storage.base import closing_all

MeshLike = Mesh | AbstractMesh | Topology | str


@takes_options(LoadOptions, Source)
def plan(path: PathLike, mesh: MeshLike | None = None, **keywords: Unpack[Keywords]) -> LoadPlan:
    """Plans a load: every read and every target. Reads no weights and needs no device.

    A folder with config.json and no weights can be planned too, with a warning, but not loaded.

    Args:
      path: {path}
      mesh: A mesh with the axes dp and mp, `make_abstract_mesh(…)` for one that does not exist, or
        a string such as "mp=8". None takes the most shards that the devices and the model allow.
      {options}

    Raises:
      UsageError: an option is wrong, or the mesh does not fit the model.
      CheckpointError, MapError: the files or the map are at fault.
      MachineError: the disk or the network failed, or there are too few devices.
    """
    return plan_source(*split_keywords(path, keywords), mesh, weights_required=False)


@takes_options(LoadOptions, Source)
def load(
    path: PathLike | None = None,
    mesh: Mesh | str | None = None,
    *,
    progress: bool = True,
    plan: LoadPlan | None = None,
    host_timeout: float = DEFAULT_TIMEOUT_SECONDS,
    warm_up: WarmUpLike = (),
    compilation_cache: bool = True,
    slots: int | None = None,
    context_length: int | None = None,
    programs: PathLike | None = None,
    **keywords: Unpack[Keywords],
) -> Model:
    """Loads a checkpoint onto a mesh.

    Args:
      path: {path}
      mesh: A mesh with the axes dp and mp, or a string such as "dp=2,mp=4". None takes the most
        shards that the devices and the model allow.
      {options}
      progress: Show a progress bar in a terminal or a notebook.
      plan: A plan from `mtj_loader.plan`, instead of a path and its options. `mesh` must then be
        omitted or the one that was planned for.
      host_timeout: Seconds to wait for other hosts that are alive; see docs/hosts.md.
      warm_up: What to compile while weights are read: a list of (batch, prompt_length) or (batch,
        prompt_length, max_new_tokens), or a function that returns it for the model's PromptRules.
        `generate` then compiles nothing for a batch of this size with prompts up to this length.
      compilation_cache: Have JAX keep compiled programs in `~/.cache/mtj_loader/xla`, unless its
        cache is configured already. JAX has one cache, which also stores other programs of this
        process from now on; see docs/start-up.md. False does not change JAX's configuration.
      slots: How many requests run at a time; others wait. By default, the KV cache grows with the
        requests, up to 16 for each group of dp.
      context_length: The most tokens of a prompt and its continuation. By default, the model's
        context, and the KV cache grows with the requests.
      programs: A folder of `mtj-loader compile --out`, whose programs are used instead of compiling
        them; by default those in `~/.cache/mtj_loader/programs`. Whoever can write to it can run
        code as you; see docs/compiled-programs.md. Without `slots` and `context_length`, the KV
        cache gets the sizes that they were compiled for, if `warm_up` fits.

    Returns:
      The model, ready to run.

    Raises:
      UsageError: an option is wrong, or the mesh does not fit the model.
      CheckpointError, MapError: the files or the map are at fault; no parameters stay on devices.
      MachineError: memory, disk, network or devices failed.
      HostError: another host failed, died or timed out.
    """
    if (path is None) == (plan is None):
        raise UsageError("load takes either a path or a plan")
    run = RunOptions(
        progress, host_timeout, warm_up, compilation_cache, slots, context_length, programs
    )
    if plan is None:
        assert path is not None
        return load_source(*split_keywords(path, keywords), mesh, run)
    if keywords:
        what, hint = "a plan has these options already", "pass them to mtj_loader.plan instead"
        raise UsageError(what, key=", ".join(keywords), hint=hint)
    return _load(lambda hosts, mesh: _check_mesh(plan, mesh), mesh, run)


@dataclass(frozen=True)
class RunOptions:
    """The options of `load` that are not about the checkpoint; `load` documents them."""

    progress: bool = True
    host_timeout: float = DEFAULT_TIMEOUT_SECONDS
    warm_up: WarmUpLike = ()
    compilation_cache: bool = True
    slots: int | None = None
    context_length: int | None = None
    programs: PathLike | None = None

    def __post_init__(self) -> None:
        for name in ("slots", "context_length"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(
                    f"{name} is out of range",
                    key=name,
                    expected="an integer, 1 or more",
                    found=repr(value),
                )


def plan_source(
    source: Source,
    options: LoadOptions,
    mesh: MeshLike | None,
    hosts: Hosts = SINGLE_HOST,
    *,
    weights_required: bool = True,
) -> LoadPlan:
    """Plans a load of a source; see `plan`. Adapters always require weights."""
    options.check()
    source.check_path()
    required = weights_required or bool(options.adapters)

    def open_here(headers: Headers | None, commit: str | None) -> Checkpoint:
        found = replace(source, revision=commit or source.revision)
        return open_checkpoint(found, headers=headers, weights_required=required)

    checkpoint = without_settings(open_on_all_hosts(hosts, open_here), options.ignore_settings)
    with no_garbage_collection():
        model = read_model(checkpoint, options.map)
        made = make_plan(checkpoint, model, _topology(mesh, model.config), options)
    made = add_adapters(made, options.adapters)
    return replace(made, mesh=mesh if isinstance(mesh, Mesh) else None)


def load_source(
    source: Source, options: LoadOptions, mesh: Mesh | str | None, run: RunOptions
) -> Model:
    """Loads a source; see `load`."""
    return _load(lambda hosts, mesh: plan_source(source, options, mesh, hosts), mesh, run)


def options_for_generation(options: LoadOptions) -> LoadOptions:
    """The options with the dtype that is best for generating text, unless one was chosen.

    That is float32 on a CPU without bfloat16 arithmetic; see `dtypes.has_bfloat16_arithmetic`. The
    plan is made with it, so the parameters take twice the memory there.
    """
    if options.dtype != "auto" or jax.default_backend() != "cpu" or has_bfloat16_arithmetic():
        return options
    return replace(options, dtype="float32")


def _load(
    make: Callable[[Hosts, Mesh | str | None], LoadPlan], mesh: Mesh | str | None, run: RunOptions
) -> Model:
    """Plans with `make`, checks that all hosts have the same plan, and loads."""
    started = time.perf_counter()
    with connect_hosts(run.host_timeout) as hosts:
        with hosts.phase("plan"):
            mesh = _existing_mesh(mesh)
            plan = make(hosts, mesh)
            plan.check_weights()
            devices = _devices(mesh, plan)
            check_same_load(hosts, plan, devices)
        warnings = enable_compilation_cache() if run.compilation_cache else ()
        model = _execute(plan, devices, hosts, run, started)
        warnings = (*model.report.warnings, *warnings)
        folder = compilation_cache_folder()
        report = replace(model.report, warnings=warnings, compilation_cache=folder)
        return replace(model, report=report)


def _execute(plan: LoadPlan, mesh: Mesh, hosts: Hosts, run: RunOptions, started: float) -> Model:
    """Loads what is planned, and meanwhile compiles for generation."""
    plan_seconds = time.perf_counter() - started
    with hosts.phase("prepare"), plan.checkpoint.storage:
        rules = _prompt_rules(plan, run.context_length)
        dtype = parameter_dtype(plan.options.dtype)
        forward = Forward(plan.config, mesh, plan.options.transposed_linear, dtype)
        programs = Programs(forward, plan.abstract_params(mesh))
        shapes = read_shapes(run.warm_up, rules)
        given = run.slots, run.context_length
        settings, found = use_stored_programs(
            forward,
            choose_settings(forward, rules.max_positions, shapes, *given),
            shapes,
            run.programs,
            hosts,
            fixed_slots=run.slots is not None,
            fixed_context=run.context_length is not None,
        )
        keys = found.keys_to_read(programs, keys_for(shapes, settings.sizes))
    needed = plan.host_bytes(jax.process_index())
    with compile_in_background(programs, settings.sizes, keys) as first_compiled:
        with closing_all(*plan.storages), progress_bar(needed, shown=run.progress) as advance:
            params, report = load_params(
                plan, mesh, plan_seconds=plan_seconds, progress=advance, hosts=hosts
            )
        loaded = time.perf_counter()
        compiled = keep_common_programs(programs, first_compiled(), hosts)
    report = add_compile_times(report, compiled, loaded)
    report = found.add_to(report, programs, compiled)
    report = replace(report, warnings=(*report.warnings, *_tokenizer_warnings(rules)))
    model = params, plan.config, mesh, rules, report, plan, forward
    return Model(*model, programs, compiled, settings, started)


def _tokenizer_warnings(rules: PromptRules) -> list[str]:
    if rules.missing is not None:
        return [f"only token ids work: {rules.missing.what}: {rules.missing.found}"]
    if rules.tokenizer is None or rules.tokenizer.unknown_class is None:
        return []
    name = format_value(rules.tokenizer.unknown_class)
    ignored = f"tokenizer.json is used without the rules of the tokenizer's class {name}"
    return [f"{ignored}: token ids may differ from those of transformers"]


def _prompt_rules(plan: LoadPlan, context_length: int | None) -> PromptRules:
    """What the model accepts as a prompt: only token ids if the tokenizer cannot be used."""
    config, checkpoint = plan.config, plan.checkpoint
    tokenizer = missing = None
    try:
        class_name = checkpoint.config.get("tokenizer_class")
        tokenizer = load_tokenizer(checkpoint.tokenizer_files, plan.model_type, class_name)
    except TokenizerMissingError as error:
        missing = error
    bos = bos_id(checkpoint.config, checkpoint.generation_config)
    longest = min(config.max_positions, context_length or config.max_positions)
    return PromptRules(config.vocab_size, longest, tokenizer, bos, missing)


def _topology(mesh: MeshLike | None, config: ModelConfig) -> Topology:
    """The mesh to plan for; None means one shard per device, as many as the model can use."""
    if isinstance(mesh, str):
        return make_abstract_mesh(mesh)
    if isinstance(mesh, Mesh | AbstractMesh | Topology):
        return topology(mesh)
    if mesh is not None:
        expected = 'a mesh, or a string such as "dp=2,mp=4"'
        raise MeshError("not a mesh", key="mesh", expected=expected, found=repr(mesh))
    return topology(make_mesh(f"mp={usable_shards(config, len(jax.devices()))[-1]}"))


def _check_mesh(plan: LoadPlan, mesh: Mesh | str | None) -> LoadPlan:
    """The plan; raises MeshError if `mesh` is given and differs from the plan's."""
    if mesh is not None and str(found := _topology(mesh, plan.config)) != str(plan.topology):
        raise MeshError("the plan is for another mesh", expected=plan.topology, found=found)
    return plan


def _existing_mesh(mesh: Mesh | str | None) -> Mesh | str | None:
    """The mesh for a string; the string itself if there are too few devices.

    The planner may then find a mistake that matters more.
    """
    if not isinstance(mesh, str):
        return mesh
    dp, mp = parse_mesh(mesh)
    return make_mesh(mesh) if dp * mp <= len(jax.devices()) else mesh


def _devices(mesh: Mesh | str | None, plan: LoadPlan) -> Mesh:
    """The devices to load onto: those given, those planned for, or the first ones."""
    given = mesh if isinstance(mesh, Mesh | str) else plan.mesh or str(plan.topology)
    return make_mesh(given) if isinstance(given, str) else as_mesh(given)
