"""`mtj-loader plan`: shows what a load would do without doing it."""

from __future__ import annotations

from typing import Annotated

import typer

import mtj_loader
from mtj_loader.cli.command import command
from mtj_loader.cli.output import print_json, print_table
from mtj_loader.cli.shared_options import AsJson, Machine, MeshOption
from mtj_loader.errors import UsageError
from mtj_loader.options import LoadOptions, Source

_COMPILER = "The TPU compiler"


@command
def plan(
    *,
    source: Source,
    mesh: MeshOption = None,
    options: LoadOptions,
    machine: Machine,
    hosts: Annotated[
        int,
        typer.Option(
            metavar="K", min=1, help="The number of hosts; each has an equal share of --mesh."
        ),
    ] = 1,
    compile_for: Annotated[
        str | None,
        typer.Option(
            metavar="TPU[,TPU…]",
            help="Compile the model for these Cloud TPU slices, such as v3-8,v5e-8. Takes minutes; "
            "needs libtpu (pip install 'mtj-loader\\[tpu]'), but no TPU.",
            rich_help_panel=_COMPILER,
        ),
    ] = None,
    slots: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Sequences at a time.", rich_help_panel=_COMPILER),
    ] = 1,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Tokens of each sequence; by default 2,048, or the model's context.",
            rich_help_panel=_COMPILER,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what each host would read, where each parameter would go, and how much memory it takes.

    Only headers are read and no device is used, so the mesh does not have to exist. A folder with
    nothing but config.json can be planned too.

    Example: [bold]mtj-loader plan EleutherAI/gpt-neox-20b --mesh dp=2,mp=8 --hosts 4[/bold]
    """
    machine.prepare()
    if hosts > 1 and mesh is None:
        raise UsageError("--hosts needs --mesh", hint="for example --mesh mp=8")
    from mtj_loader.api import plan_source  # noqa: PLC0415 -- imports JAX

    topology = None if mesh is None else mtj_loader.make_abstract_mesh(mesh, hosts)
    load_plan = plan_source(source, options, topology, weights_required=False)
    load_plan.checkpoint.storage.close()
    names = [] if compile_for is None else [name.strip() for name in compile_for.split(",")]
    compiled = load_plan.compile_for(names, slots=slots, context=context) if names else ()
    if as_json:
        print_json(load_plan.to_dict(compiled))
    else:
        from mtj_loader.planning import summary  # noqa: PLC0415 -- imports JAX

        print_table(summary.tables(load_plan, compiled))
