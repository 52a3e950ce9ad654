"""Saving and loading compiled programs."""

from __future__ import annotations

import functools
import json
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtj_loader.engine.device import Steps
from mtj_loader.engine.engine_programs import Programs, neutral_settings
from mtj_loader.engine.keys import step_key
from mtj_loader.engine.sizes import Sizes
from mtj_loader.errors import ProgramError, StorageError, UsageError
from mtj_loader.programs import (
    CompiledProgram,
    Signature,
    check_compiled,
    default_programs_folder,
    open_programs,
    program_store,
    save_programs,
)
from mtj_loader.programs.facts import differences
from tests.support.models import PARITY, config_of, make_forward, make_mesh, params_of
from tests.support.programs import (
    collect_facts,
    compile_program,
    compile_signature,
    lower,
    make_arguments,
    make_signature,
)

ROOT = Path(__file__).parents[2]


@functools.cache
def program() -> CompiledProgram:
    return compile_program(make_signature())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one program, `sum`."""
    save_programs(tmp_path / "programs", {"sum": program()}, collect_facts())
    return tmp_path / "programs"


def edit_manifest(folder: Path, edit: Callable[[dict], object]) -> None:
    path = folder / "programs.json"
    manifest = json.loads(path.read_bytes())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def load(folder: Path, signature: Signature | None = None) -> jax.stages.Compiled:
    return open_programs(folder).load("sum", signature or make_signature())


def refusal(folder: Path, signature: Signature | None = None) -> str:
    with pytest.raises(ProgramError) as caught:
        load(folder, signature)
    return str(caught.value)


def save_refusal(folder: Path, program: CompiledProgram) -> str:
    with pytest.raises(ProgramError) as caught:
        save_programs(folder, {"sum": program}, collect_facts())
    assert not folder.exists()
    return str(caught.value)


def assert_equal(actual: object, expected: object) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), actual, expected)


# Loading and running.

FRESH = """
import sys
from pathlib import Path
import jax, numpy as np

events = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.append(event))

from mtj_loader.programs import open_programs
from mtj_loader.programs.facts import differences
from tests.support.programs import collect_facts, make_arguments, make_signature

signature = make_signature()
stored = open_programs(sys.argv[1])
assert differences(stored.facts, collect_facts()) == []
program = stored.load("sum", signature)
results = program(*make_arguments(signature))
for result, expected in zip(results, signature.results):
    assert result.sharding == expected.sharding, result.sharding
np.savez(sys.argv[2], *results)
assert not [event for event in events if "/compile/" in event or "cache" in event], events
"""


def test_a_fresh_process_runs_it_without_tracing_and_compiling(folder: Path, tmp_path: Path):
    signature, out = make_signature(), tmp_path / "results.npz"
    subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH, str(folder), str(out)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=120,
    )
    expected = program().compiled(*make_arguments(signature))
    with np.load(out) as results:
        assert_equal(tuple(results.values()), tuple(map(np.asarray, expected)))


def test_donated_arguments_are_deleted_and_results_have_their_shardings(folder: Path):
    signature = make_signature()
    args = make_arguments(signature)
    results = load(folder)(*args)
    assert [arg.is_deleted() for arg in args[1:]] == [False, True, False]
    for result, wanted in zip(results, signature.results, strict=True):
        assert result.sharding == wanted.sharding
        assert result.committed


def test_later_calls_are_dispatched_without_python(folder: Path, monkeypatch):
    calls = []
    call = jax.stages.Compiled.call
    count = staticmethod(lambda *args: calls.append(1) or call(*args))
    monkeypatch.setattr(jax.stages.Compiled, "call", count)
    loaded, args = load(folder), list(make_arguments(make_signature()))
    for _ in range(5):
        _, args[2] = loaded(*args)
    assert len(calls) == 1


def test_wrong_arguments_are_refused_by_name(folder: Path):
    args = list(make_arguments(make_signature()))
    args[1] = args[1][:, :32]
    with pytest.raises(TypeError, match=r"'\[1\]' compiled with float32\[4,64\]"):
        load(folder)(*args)


def test_a_mesh_of_some_devices(tmp_path: Path):
    one = compile_program(make_signature(make_mesh(1, 4)))
    save_programs(tmp_path / "one", {"sum": one}, collect_facts(make_mesh(1, 4)))
    results = load(tmp_path / "one", one.signature)(*make_arguments(one.signature))
    assert_equal(results, one.compiled(*make_arguments(one.signature)))


def test_a_decoding_step_of_a_real_model(tmp_path: Path):
    checkpoint = PARITY / "pythia_like"
    forward = make_forward(config_of(checkpoint), mp=2)
    programs, sizes = Programs(forward, forward.param_shapes()), Sizes(1, 2, 16)
    signature = programs.signature(sizes, step_key(2))
    args = signature.args
    step = compile_signature(lambda: programs.lower(sizes, step_key(2)), signature)
    save_programs(tmp_path / "model", {"step": step}, collect_facts())
    loaded = open_programs(tmp_path / "model").load("step", signature)

    def run(step: jax.stages.Compiled) -> object:
        state = jax.tree.map(
            lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), args[1]
        )
        settings = jax.device_put(
            neutral_settings(forward, sizes), NamedSharding(forward.mesh, P("dp"))
        )
        numbers = np.array([[0, 1], [1, 1], [0, 0], [1, 1]], np.int32)
        return step(params_of(checkpoint, forward), state, settings, Steps(*numbers))

    assert_equal(run(loaded), run(step.compiled))


# What is refused.


class Evil:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("with_digest", [False, True])
def test_a_pickle_runs_nothing(folder: Path, tmp_path: Path, with_digest: bool):
    data = pickle.dumps(Evil(tmp_path / "ran"))
    (folder / "sum.xla").write_bytes(data)
    if with_digest:
        record = {"sha256": program_store.hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        edit_manifest(folder, lambda manifest: manifest["programs"]["sum"].update(record))
    expected = "XLA cannot load the program" if with_digest else "does not have the size"
    assert expected in refusal(folder)
    assert not (tmp_path / "ran").exists()
    pickle.loads(data)  # noqa: S301 -- it would have
    assert (tmp_path / "ran").exists()


def test_a_pickle_as_manifest_runs_nothing(folder: Path, tmp_path: Path):
    (folder / "programs.json").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    assert "the manifest is damaged" in refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_a_changed_byte_is_refused_before_xla_sees_it(folder: Path, monkeypatch):
    monkeypatch.delattr(program_store, "put_together")
    data = bytearray((folder / "sum.xla").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "sum.xla").write_bytes(data)
    message = refusal(folder)
    assert "the file was changed" in message
    assert "sum.xla" in message


@pytest.mark.parametrize(
    ("kind", "row", "change"),
    [
        ("arguments", 0, {"shape": [4, 16, 9]}),
        ("arguments", 0, {"path": "[0]['v']"}),
        ("arguments", 1, {"dtype": "int32"}),
        ("arguments", 1, {"partition": ["mp", "dp"]}),
        ("arguments", 2, {"donated": False}),
        ("results", 1, {"shape": [4, 2**60]}),
        ("results", 0, {"surplus": 1}),
    ],
)
def test_a_manifest_that_lies_is_refused(folder: Path, kind: str, row: int, change: dict):
    edit_manifest(folder, lambda m: m["programs"]["sum"][kind][row].update(change))
    message = refusal(folder)
    assert f"the program has another {kind[:-1]}" in message
    assert "sum.xla" in message


@pytest.mark.parametrize("kind", ["arguments", "results"])
def test_a_missing_row_is_refused(folder: Path, kind: str):
    edit_manifest(folder, lambda m: m["programs"]["sum"].update(used=[0]))
    edit_manifest(folder, lambda m: m["programs"]["sum"][kind].pop())
    assert f"another number of {kind}" in refusal(folder)


def test_used_arguments_must_be_those_of_the_executable(folder: Path):
    edit_manifest(folder, lambda m: m["programs"]["sum"].update(used=[0, 1]))
    assert "the executable has 3 arguments, not 2" in refusal(folder)


def test_the_caller_decides_what_is_expected(folder: Path):
    other = make_signature(counters=5)
    assert 'expected: {"path": "[2]", "shape": [4, 5]' in refusal(folder, other)
    kept = replace(make_signature(), donate_argnums=())
    assert "the program has another argument" in refusal(folder, kept)


def test_an_unknown_program_is_refused(folder: Path):
    with pytest.raises(ProgramError, match=r"no such program is stored\n.*\n  key: product"):
        open_programs(folder).load("product", make_signature())


@pytest.mark.parametrize("name", ["", "..", "../sum", "a/b", "/etc/passwd", "a.b", "ä", "a" * 65])
def test_bad_names_are_refused(folder: Path, tmp_path: Path, name: str):
    edit_manifest(folder, lambda m: m["programs"].update({name: m["programs"]["sum"]}))
    with pytest.raises(ProgramError, match="bad name of a program"):
        open_programs(folder)
    with pytest.raises(ProgramError, match="bad name of a program"):
        save_programs(tmp_path / "new", {name: program()}, collect_facts())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(format="other"), "key: format"),
        (lambda m: m.update(version=2), "key: version"),
        (lambda m: m.update(surplus=1), "key: surplus"),
        (lambda m: m.pop("facts"), "key: facts"),
        (lambda m: m["facts"]["model"].update(slots=4), "key: facts.model"),
        (lambda m: m["facts"].update(surplus={}), "key: facts.surplus"),
        (lambda m: m["programs"].update(sum=1), "key: programs.sum"),
        (lambda m: m["programs"]["sum"].update(sha256="0"), "key: programs.sum.sha256"),
        (lambda m: m["programs"]["sum"].update(bytes=2**40), "key: programs.sum.bytes"),
        (lambda m: m["programs"]["sum"].update(arguments=[1]), "key: programs.sum.arguments"),
        (lambda m: m["programs"]["sum"].update(used=[1, 0]), "key: programs.sum.used"),
        (lambda m: m["programs"]["sum"].update(used=[4]), "key: programs.sum.used"),
        (lambda m: m["programs"]["sum"].update(used=[-1]), "key: programs.sum.used"),
        (lambda m: m["programs"]["sum"].update(used=[True]), "key: programs.sum.used"),
        (lambda m: m["programs"]["sum"].update(surplus=1), "key: programs.sum.surplus"),
    ],
)
def test_a_malformed_manifest_is_refused(folder: Path, edit: Callable, message: str):
    edit_manifest(folder, edit)
    assert message in refusal(folder)


def test_an_oversized_manifest_is_not_read(folder: Path):
    os.truncate(folder / "programs.json", 2**40)
    message = refusal(folder)
    assert "the file is too large" in message
    assert "programs.json" in message


def test_missing_files_are_refused_by_name(folder: Path):
    (folder / "sum.xla").unlink()
    assert "sum.xla\n  found: No such file" in refusal(folder)
    (folder / "programs.json").unlink()
    assert "programs.json\n  found: No such file" in refusal(folder)


def test_urls_are_refused():
    with pytest.raises(UsageError, match="only from folders of this machine"):
        open_programs("gs://bucket/programs")


# Saving.


def test_only_the_user_can_read_what_is_saved(tmp_path: Path):
    umask = os.umask(0)
    try:
        save_programs(tmp_path / "a/b/programs", {"sum": program()}, collect_facts())
    finally:
        os.umask(umask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").rglob("*")}
    assert modes == {"b": 0o700, "programs": 0o700, "programs.json": 0o600, "sum.xla": 0o600}
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700


def test_saving_replaces_the_folder(folder: Path):
    save_programs(folder, {"other": program()}, collect_facts(slots=8))
    assert sorted(path.name for path in folder.iterdir()) == ["other.xla", "programs.json"]
    stored = open_programs(folder)
    assert list(stored.records) == ["other"]
    assert differences(stored.facts, collect_facts()) == ["compiled for slots 8, this is 4"]
    assert [path.name for path in folder.parent.iterdir()] == ["programs"]


def test_a_failed_save_changes_nothing(folder: Path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="No space left"):
        save_programs(folder, {"other": program()}, collect_facts())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["programs"]


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path):
    (tmp_path / "config.json").touch()
    with pytest.raises(ProgramError, match="holds no compiled programs, so it is not replaced"):
        save_programs(tmp_path, {"sum": program()}, collect_facts())
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_nothing_is_saved_where_others_may_write(tmp_path: Path):
    tmp_path.chmod(0o777)
    assert "others may write to it" in save_refusal(tmp_path / "programs", program())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: replace(s, args=s.args[:3]), "key: arguments"),
        (lambda s: replace(s, results=list(s.results)), "key: results"),
        (lambda s: replace(s, donate_argnums=()), "key: [2]"),
        (lambda s: replace(s, args=(s.args[0], s.args[2], *s.args[2:])), "key: [1]"),
        (lambda s: replace(s, results=(s.results[1], s.results[1])), "key: result[0]"),
        (lambda s: make_signature(make_mesh(4, 2)), "key: argument 0"),
    ],
)
def test_a_program_must_have_its_signature(tmp_path: Path, change: Callable, message: str):
    other = CompiledProgram(program().compiled, change(make_signature()))
    found = save_refusal(tmp_path / "programs", other)
    assert "the program sum does not have the signature to save it with" in found
    assert message in found


def one_array(function: Callable) -> CompiledProgram:
    """A program of one array on one device."""
    sharding = NamedSharding(make_mesh(1, 1), P())
    array = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=sharding)
    jitted = jax.jit(function, out_shardings=sharding)
    return compile_signature(lambda: jitted.lower(array), Signature((array,), array))


def test_callbacks_are_refused(tmp_path: Path):
    def run(x: jax.Array) -> jax.Array:
        return jax.pure_callback(lambda value: value, x, x)

    message = save_refusal(tmp_path / "programs", one_array(run))
    assert "the program sum cannot be saved\n  found: it has callbacks to the host" in message


def test_weak_results_are_refused(tmp_path: Path):
    message = save_refusal(tmp_path / "programs", one_array(lambda x: jnp.where(x > 0, 1.0, 2.0)))
    assert "result 0 is weakly typed" in message


def test_closed_over_arrays_are_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(check_compiled, "_MAX_CONSTANT_BYTES", 11)
    array = jax.device_put(np.array([0.3, 0.1, 0.2], np.float32))
    message = save_refusal(tmp_path / "programs", one_array(lambda x: x * array))
    assert "it contains a large constant" in message
    assert "found: 12 bytes" in message


def test_hoisted_closures_are_refused(tmp_path: Path):
    """With jax_use_simplified_jaxpr_constants, JAX passes them as arguments of its own."""
    closure = one_array(lambda x: x + 1)
    params = closure.compiled._params._replace(const_args=[np.zeros(3)])
    closure.compiled._params = params
    message = save_refusal(tmp_path / "programs", closure)
    assert "it has arrays that it closes over" in message


def test_programs_that_jax_may_have_read_are_refused(folder: Path, tmp_path: Path):
    """XLA for CPUs would save them without their machine code."""
    for compiled in load(folder), lower(make_signature()).compile():
        message = save_refusal(tmp_path / "again", CompiledProgram(compiled, make_signature()))
        assert "it was not compiled by compile_all, so JAX may have read it from a file" in message


def test_programs_in_the_caches_of_jax_are_compiled_again(tmp_path: Path):
    signature = make_signature()
    lowered = lower(signature)
    lowered.compile()
    lower(signature).compile()  # read from the file that the line above wrote
    again = compile_signature(lambda: lowered, signature)
    save_programs(tmp_path / "again", {"sum": again}, collect_facts())
    results = load(tmp_path / "again")(*make_arguments(signature))
    assert_equal(results, program().compiled(*make_arguments(signature)))


def test_a_program_that_only_copies(tmp_path: Path):
    """It has no machine code of its own."""
    copy = one_array(lambda x: x)
    save_programs(tmp_path / "programs", {"sum": copy}, collect_facts())
    x = jax.device_put(np.arange(3, dtype=np.float32), copy.signature.args[0].sharding)
    assert_equal(load(tmp_path / "programs", copy.signature)(x), x)


def test_arrays_without_a_mesh_are_refused():
    with pytest.raises(ProgramError, match="has no NamedSharding"):
        Signature((jax.ShapeDtypeStruct((3,), jnp.float32),), ())
    with pytest.raises(ProgramError, match="on one mesh"):
        Signature((), ())


def test_the_default_folder_depends_on_model_device_and_sizes_and_not_on_versions(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    facts = collect_facts()
    folder = default_programs_folder(facts)
    assert folder.parents[1] == Path("/cache/mtj_loader/programs")
    assert folder.name == "4x64"
    assert default_programs_folder(replace(facts, versions={})) == folder
    assert default_programs_folder(collect_facts(slots=8)) == folder.with_name("8x64")
    assert default_programs_folder(facts.with_sizes(8, 64)) == folder.with_name("8x64")
    for other in (
        collect_facts(dtype=np.dtype("float16")),
        replace(facts, platform={**facts.platform, "device_kind": "TPU v3"}),
    ):
        assert default_programs_folder(other).parent != folder.parent


def test_lowering_needs_no_arrays():
    assert lower(make_signature()).out_info[0].shape == (4, 8)
