"""Every private call of JAX that storing programs takes.

`jax.experimental.serialize_executable` does the same, but it unpickles what it loads. Here only
XLA's own bytes are stored, and everything else is rebuilt from the caller's argument shapes.
Checked with JAX 0.10 and 0.12; tests/programs/test_jax_private.py fails if a name moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import jax
from jax._src import compilation_cache, core
from jax._src.interpreters import pxla
from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]
from jax._src.stages import ArgInfo
from jax.sharding import Sharding
from jax.stages import Compiled, Lowered

Leaf = Any  # a jax.ShapeDtypeStruct with a NamedSharding
Tree = Any  # a pytree of leaves

_fresh: WeakSet[Compiled] = WeakSet()


@dataclass(frozen=True)
class ExecutableParts:
    """What a compiled program consists of, with flat arguments and results.

    Attributes:
      data: XLA's serialized executable.
      used: the positions of the arguments that the program has; JAX drops those that it never uses.
      argument_shardings: for each used argument.
      result_shardings: for each result.
      weak_results: the positions of results whose dtype is weak, as that of a Python number.
    """

    data: bytes
    used: tuple[int, ...]
    argument_shardings: tuple[Sharding, ...]
    result_shardings: tuple[Sharding, ...]
    weak_results: tuple[int, ...]


@contextmanager
def without_caches() -> Iterator[None]:
    """Makes JAX compile anew in all threads, instead of reading its compilation cache."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX reads the setting only once
    pxla.clear_in_memory_compilation_cache()  # may hold what was read
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def compile_fresh(lowered: Lowered) -> Compiled:
    """Compiles a program that `take_apart` accepts; to be called within `without_caches`.

    XLA for CPUs does not keep the machine code of a program that it has read from a file:
    serialized again, it loads, but fails when it runs.
    """
    compiled = lowered.compile(compiler_options={})  # with options, JAX compiles it again
    _fresh.add(compiled)
    return compiled


def take_apart(compiled: Compiled) -> ExecutableParts:
    """Serializes a compiled program; also one for devices that are not there.

    Raises:
      ValueError: the program needs more than its arguments: closed-over arrays, references, or
        callbacks to the host. Or it is not from `compile_fresh`.
    """
    if compiled not in _fresh:
        raise ValueError("it was not compiled by compile_all, so JAX may have read it from a file")
    loaded: Any = compiled._executable
    unloaded = loaded._unloaded_executable
    outside = {
        "arrays that it closes over": compiled._params.const_args,
        "mutable references": unloaded.mut,
        "callbacks to the host": unloaded.host_callbacks or unloaded.keepalive,
        "effects": unloaded.ordered_effects or unloaded.unordered_effects,
    }
    for what, found in outside.items():
        if found:
            raise ValueError(f"it has {what}")
    return ExecutableParts(
        _serialize(unloaded.xla_executable),
        tuple(sorted(loaded._kept_var_idx)),
        tuple(loaded._in_shardings),
        tuple(loaded._out_shardings),
        tuple(i for i, aval in enumerate(loaded.out_avals) if aval.weak_type),
    )


def _serialize(executable: Any) -> bytes:  # noqa: ANN401
    if isinstance(executable, xla_client.LoadedExecutable):
        return executable.client.serialize_executable(executable)
    return executable.serialize()  # compiled for a topology, without its devices


def put_together(
    data: bytes,
    name: str,
    args: tuple[Tree, ...],
    results: Tree,
    *,
    used: Sequence[int],
    donated: Sequence[int],
) -> Compiled:
    """Loads a serialized executable. The bytes are native code: they must be trusted.

    Args:
      data: from `take_apart`.
      name: of the program, for messages and profiles.
      args: all arguments; each leaf has a NamedSharding, all on one mesh.
      results: the same.
      used: positions of the flat arguments that the executable has.
      donated: positions of the flat arguments that are donated.

    Raises:
      ValueError: the executable has another number of arguments or results.
      jax.errors.JaxRuntimeError: XLA refuses the bytes.
    """
    paths, in_tree = jax.tree_util.tree_flatten_with_path((args, {}))
    arg_names = tuple(jax.tree_util.keystr(path[1:]) for path, _ in paths)
    flat_args, flat_results = [leaf for _, leaf in paths], jax.tree.leaves(results)
    all_avals = _avals(flat_args)
    is_donated = set(donated).__contains__
    args_info = [ArgInfo(aval, is_donated(i)) for i, aval in enumerate(all_avals)]
    debug_info = core.DebugInfo("program", name, arg_names, None)
    executable = _mesh_executable(
        data,
        name,
        [flat_args[i] for i in used],
        flat_results,
        used=used,
        all_args_info=pxla.AllArgsInfo(all_avals, debug_info),
    )
    out_tree = jax.tree.structure(results)
    return Compiled(executable, [], jax.tree.unflatten(in_tree, args_info), out_tree, True)


def _mesh_executable(
    data: bytes,
    name: str,
    args: Sequence[Leaf],
    results: Sequence[Leaf],
    *,
    used: Sequence[int],
    all_args_info: pxla.AllArgsInfo,
) -> pxla.MeshExecutable:
    """Loads an executable for the devices of the mesh; `args` are those that it has."""
    devices = tuple((*args, *results)[0].sharding.mesh.devices.flat)
    device_list, backend = xla_client.DeviceList(devices), devices[0].client
    executable = backend.deserialize_executable(data, executable_devices=device_list)
    _check_count("arguments", len(executable.get_parameter_layouts()), len(args))
    _check_count("results", len(executable.get_output_layouts()), len(results))
    in_avals, out_avals = _avals(args), _avals(results)
    in_shardings = [leaf.sharding for leaf in args]
    in_layouts, out_layouts = pxla._get_layouts_from_executable(
        executable, (None,) * len(args), (None,) * len(results), 0, in_avals, out_avals
    )
    return pxla.UnloadedMeshExecutable(
        xla_executable=executable,
        device_list=device_list,
        backend=backend,
        input_avals=in_avals,
        input_shardings=in_shardings,
        output_avals=out_avals,
        output_shardings=[leaf.sharding for leaf in results],
        committed=True,
        name=name,
        unordered_effects=[],
        ordered_effects=[],
        keepalive=[],
        host_callbacks=[],
        mut=None,
        xla_in_layouts=in_layouts,
        dispatch_in_layouts=pxla.get_dispatch_layouts(in_layouts, in_shardings, in_avals),
        xla_out_layouts=out_layouts,
        pgle_profiler=None,
        kept_var_idx=set(used),
        all_args_info=all_args_info,
    ).load()


def _avals(leaves: Sequence[Leaf]) -> list[Any]:
    return [core.shaped_abstractify(leaf) for leaf in leaves]


def _check_count(what: str, actual: int, expected: int) -> None:
    if actual != expected:
        raise ValueError(f"the executable has {actual} {what}, not {expected}")
