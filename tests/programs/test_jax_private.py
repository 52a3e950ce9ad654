"""The private parts of JAX that storing programs relies on have not moved."""

from __future__ import annotations

import inspect

import jax
import numpy as np
from jax._src import core, stages
from jax._src.interpreters import pxla

from mtj_loader.programs.jax_private import put_together, take_apart
from tests.support.programs import compile_program, make_arguments, make_signature

HINT = "JAX has changed: compare jax/experimental/serialize_executable.py with jax_private.py"


def parameters(function: object) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_the_parts_of_an_executable_are_known():
    """A part that is new in JAX would be lost."""
    assert parameters(pxla.UnloadedMeshExecutable) == [
        "xla_executable", "device_list", "backend", "input_avals", "input_shardings",
        "output_avals", "output_shardings", "committed", "name", "unordered_effects",
        "ordered_effects", "keepalive", "host_callbacks", "kept_var_idx", "mut",
        "xla_in_layouts", "dispatch_in_layouts", "xla_out_layouts", "all_args_info",
        "pgle_profiler",
    ], HINT  # fmt: skip
    assert parameters(stages.Compiled)[:5] == [
        "executable", "const_args", "args_info", "out_tree", "no_kwargs",
    ], HINT  # fmt: skip
    assert parameters(pxla._get_layouts_from_executable) == [
        "xla_executable", "in_layouts", "out_layouts", "num_ordered_effects", "in_avals",
        "out_avals",
    ], HINT  # fmt: skip
    assert parameters(pxla.get_dispatch_layouts) == [
        "xla_in_layouts", "in_shardings", "in_avals",
    ], HINT  # fmt: skip
    assert pxla.AllArgsInfo._fields == ("in_avals", "debug_info"), HINT
    assert parameters(core.DebugInfo)[:4] == [
        "traced_for", "func_src_info", "arg_names", "result_paths",
    ], HINT  # fmt: skip


def test_the_rebuilt_program_has_all_that_the_compiled_one_has():
    signature = make_signature()
    compiled = compile_program(signature).compiled
    parts = take_apart(compiled)
    assert parts.used == (0, 1, 2), HINT  # the last argument is not used
    rebuilt = put_together(
        parts.data,
        "sum",
        signature.args,
        signature.results,
        used=parts.used,
        donated=signature.donated,
    )
    for name in ("in_tree", "out_tree", "in_avals", "input_formats", "output_formats"):
        assert getattr(rebuilt, name) == getattr(compiled, name), (name, HINT)
    executables = rebuilt._executable, compiled._executable
    for name in ("_kept_var_idx", "_dispatch_in_layouts", "_mut", "out_avals"):
        assert getattr(executables[0], name) == getattr(executables[1], name), (name, HINT)
    donated = [info.donated for info in jax.tree.leaves(rebuilt.args_info)]
    assert donated == [False, False, True, False]
    for result, expected in zip(
        rebuilt(*make_arguments(signature)), compiled(*make_arguments(signature)), strict=True
    ):
        assert (result.aval, result.sharding) == (expected.aval, expected.sharding), HINT
        np.testing.assert_array_equal(result, expected)
