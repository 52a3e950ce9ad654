"""`mtj-loader compile`: compiles every program of a model and stores them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtj_loader.cli.command import command
from mtj_loader.cli.output import note, print_json, print_lines, reserve_stdout
from mtj_loader.cli.shared_options import (
    AsJson,
    ContextLengthOption,
    Machine,
    MeshOption,
    SlotsOption,
)
from mtj_loader.display import counted, show_bytes
from mtj_loader.errors import UsageError
from mtj_loader.names import escape
from mtj_loader.options import LoadOptions, Source

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from mtj_loader.engine.cache_memory import Room
    from mtj_loader.engine.sizes import Sizes
    from mtj_loader.engine.store_programs import StoredEngine
    from mtj_loader.models.forward import Forward
    from mtj_loader.planning.load_plan import LoadPlan


@command
def compile(
    *,
    source: Source,
    mesh: MeshOption = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="TPU",
            help="Compile for this Cloud TPU slice, such as v5e-8, and --mesh on it. Needs libtpu "
            "(pip install 'mtj-loader\\[tpu]'), but no TPU.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            file_okay=False,
            help="Where to store the programs, for --programs DIR; by default in the user's cache, "
            "where load and generate find them.",
        ),
    ] = None,
    slots: SlotsOption = None,
    context_length: ContextLengthOption = None,
    options: LoadOptions,
    machine: Machine,
    as_json: AsJson = False,
) -> None:
    """Compile every program that generating text needs, and store them.

    load and generate then start without compiling. A folder with nothing but config.json is enough.
    By default, the programs are for as many slots and as long a context as fit into memory.

    Example: [bold]mtj-loader compile EleutherAI/pythia-70m --mesh mp=1 --slots 1[/bold]
    """
    if target is not None:
        forward, plan, room = _prepare_slice(source, options, mesh, target)
    else:
        machine.prepare()
        forward, plan, room = _prepare_devices(source, options, mesh)
    from mtj_loader.engine.cache_memory import choose_sizes  # noqa: PLC0415 -- these import JAX
    from mtj_loader.engine.keys import all_keys  # noqa: PLC0415
    from mtj_loader.engine.store_programs import store_programs  # noqa: PLC0415

    longest = plan.config.max_positions
    context = None if context_length is None else min(context_length, longest)
    sizes = choose_sizes(forward, longest, slots, context, room)
    names = [str(key) for key in all_keys(sizes)]

    def show_progress(name: str, seconds: float) -> None:
        if machine.progress:
            note(f"compiled {name} in {seconds:.1f} s")

    note(f"compiling {counted(len(names), 'program')} for {_describe_sizes(sizes)}")
    params = plan.abstract_params(forward.mesh)
    stored = store_programs(forward, params, sizes, out, show_progress)
    if as_json:
        print_json(to_dict(plan, forward, stored))
    else:
        print_lines(describe(plan, forward, stored))


def _prepare_devices(
    source: Source, options: LoadOptions, mesh: str | None
) -> tuple[Forward, LoadPlan, Room]:
    """The model on the devices of this machine, its plan, and the memory for the cache."""
    from mtj_loader.api import options_for_generation, plan_source  # noqa: PLC0415 -- imports JAX
    from mtj_loader.engine.cache_memory import free_memory  # noqa: PLC0415
    from mtj_loader.planning.topology import make_mesh  # noqa: PLC0415

    plan = plan_source(source, options_for_generation(options), mesh, weights_required=False)
    plan.checkpoint.storage.close()
    forward = _forward(plan, make_mesh(str(plan.topology)))
    limit, free_bytes = free_memory(forward)
    devices = forward.mesh.devices
    shares = devices.size if devices.flat[0].platform == "cpu" else 1  # CPUs share their memory
    return forward, plan, (limit, free_bytes and free_bytes - shares * plan.device_bytes)


def _prepare_slice(
    source: Source, options: LoadOptions, mesh: str | None, name: str
) -> tuple[Forward, LoadPlan, Room]:
    """The same for a TPU slice.

    Raises:
      UsageError: there is no such slice, or no mesh.
      MachineError: libtpu is not installed.
    """
    if mesh is None:
        raise UsageError("--for needs --mesh", hint="for example --mesh mp=8")
    import jax  # noqa: PLC0415 -- inspect and --help run without it

    from mtj_loader.api import plan_source  # noqa: PLC0415
    from mtj_loader.planning.compile_for import LIBTPU_ENVIRONMENT, check_libtpu  # noqa: PLC0415
    from mtj_loader.planning.tpu_targets import find_target  # noqa: PLC0415
    from mtj_loader.tpu_compiler.slice_mesh import slice_mesh  # noqa: PLC0415

    target = find_target(name)
    check_libtpu()
    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine is not used
    os.environ.update(LIBTPU_ENVIRONMENT)
    reserve_stdout(muted=False)  # libtpu prints
    plan = plan_source(source, options, mesh, weights_required=False)
    plan.checkpoint.storage.close()
    forward = _forward(plan, slice_mesh(target, plan.topology.dp, plan.topology.mp))
    return forward, plan, (f"the memory of {name}", target.available_bytes - plan.device_bytes)


def _forward(plan: LoadPlan, mesh: Mesh) -> Forward:
    from mtj_loader.dtypes import parameter_dtype  # noqa: PLC0415 -- these import JAX
    from mtj_loader.models.forward import Forward  # noqa: PLC0415

    dtype = parameter_dtype(plan.options.dtype)
    return Forward(plan.config, mesh, plan.options.transposed_linear, dtype)


def describe(plan: LoadPlan, forward: Forward, stored: StoredEngine) -> str:
    """What was compiled, for people."""
    device = forward.mesh.devices.flat[0]
    programs = [
        f"  {name:<16}{seconds:>7.1f} s{show_bytes(stored.bytes[name]):>12}"
        for name, seconds in stored.compile_seconds.items()
    ]
    where = f"{plan.topology} ({device.device_kind}, {forward.dtype.name})"
    first = f"{plan.model_type} from {escape(plan.checkpoint.location)} on {where}"
    count, total = counted(len(programs), "program"), show_bytes(sum(stored.bytes.values()))
    last = f"{count}, {total}, in {stored.seconds:.1f} s: {escape(stored.folder)}"
    return "\n".join([f"{first}: {_describe_sizes(stored.sizes)}", *programs, last])


def _describe_sizes(sizes: Sizes) -> str:
    return f"{counted(sizes.total_slots, 'slot')} of {sizes.context:,} tokens"


def to_dict(plan: LoadPlan, forward: Forward, stored: StoredEngine) -> dict[str, object]:
    """The same as JSON types; docs/json.md describes every key."""
    device = forward.mesh.devices.flat[0]
    return {
        "location": plan.checkpoint.location,
        "model_type": plan.model_type,
        "mesh": {"dp": plan.topology.dp, "mp": plan.topology.mp},
        "platform": device.platform,
        "device_kind": device.device_kind,
        "dtype": forward.dtype.name,
        "slots": stored.sizes.total_slots,
        "context_length": stored.sizes.context,
        "folder": str(stored.folder),
        "seconds": stored.seconds,
        "programs": [
            {"name": name, "compile_seconds": seconds, "bytes": stored.bytes[name]}
            for name, seconds in stored.compile_seconds.items()
        ],
    }
