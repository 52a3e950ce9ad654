"""Compiling while loading: generation uses the programs, and failures do not wait for them."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import pytest

import mtj_loader
from mtj_loader.distributed.hosts import Hosts
from mtj_loader.engine.compile_ahead import (
    NO_PROGRAMS,
    CompiledPrograms,
    add_compile_times,
    keep_common_programs,
    keys_for,
    read_shapes,
    sizes_for,
)
from mtj_loader.engine.engine_programs import Programs
from mtj_loader.engine.keys import Key
from mtj_loader.engine.sizes import Sizes
from mtj_loader.errors import CheckpointError, UsageError
from mtj_loader.generation.prompts import PromptRules
from mtj_loader.generation.tokenizer import Tokenizer
from mtj_loader.loading.stream import Streamer
from tests.support import adapters, neox
from tests.support.command_line import run

GOLDENS = Path(__file__).parents[1] / "data/goldens"
COMPILING = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")
GREEDY = {"temperature": 0.0, "max_new_tokens": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return neox.write(tmp_path / "model")


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Records what is traced, lowered or compiled in the block."""
    found: list[str] = []

    def listen(event: str, _: float, **facts: str | int) -> None:
        if event.endswith(COMPILING):
            found.append(f"{event} {facts}")

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def load(path: Path, mesh: str, **options) -> mtj_loader.Model:
    """Loads, and waits until all compilations end."""
    model = mtj_loader.load(path, mesh, **options)
    model.compiled.wait()
    return model


# Generation runs the programs that were compiled ahead.


def test_generation_does_not_compile_warmed_up_shapes(folder: Path):
    model = load(folder, "mp=2", warm_up=[(1, 18, 3)])
    with compilations() as found:
        model.generate([5] * 18, max_new_tokens=3)
        model.generate([5], **GREEDY)
        assert list(model.stream([5, 6, 7], **GREEDY))
        assert found == []
        model.generate([[1], [2]], **GREEDY)  # more slots than were requested
        assert found != []


def test_a_batch_that_dp_does_not_divide_is_compiled_ahead(folder: Path):
    model = load(folder, "dp=2,mp=2", warm_up=[(3, 4)])
    with compilations() as found:
        model.generate([[1], [2, 3, 4, 5], [6, 7]], max_new_tokens=4, top_k=3, seed=[1, 2, 3])
    assert found == []


def test_a_model_without_rotary_embedding_and_another_dtype():
    folder = GOLDENS / "bloom"
    model = load(folder, "mp=1", dtype="float32", warm_up=[(1, 5)])
    with compilations() as found:
        model.generate([5, 6], **GREEDY)
    assert found == []


def test_adapters_share_compiled_programs(folder: Path, tmp_path: Path):
    factors = adapters.linear("gpt_neox.layers.0.attention.dense", 24, 24)
    adapter = adapters.write_adapter(tmp_path, factors)
    merged = load(folder, "mp=2", adapter=adapter, warm_up=[(1, 5)])
    model = load(folder, "mp=2", warm_up=[(1, 5)])
    added = model.with_adapter(adapter)
    with compilations() as found:
        assert merged.generate([5, 6], **GREEDY) == added.generate([5, 6], **GREEDY)
        assert model.generate([5, 6], **GREEDY)
    assert found == []


def test_a_longer_cache_gives_the_same_text(folder: Path):
    cold = load(folder, "mp=2", dtype="float32")
    warm = load(folder, "mp=2", dtype="float32", warm_up=[(1, 20, 12)])
    assert list(map(str, warm.warm)) == ["init-1x1", "prefill-1x16", "choose-1x1", "step-1x1"]
    for sampling in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 3}):
        expected = cold.generate([3, 1, 4], max_new_tokens=9, **sampling)
        assert warm.generate([3, 1, 4], max_new_tokens=9, **sampling) == expected


@pytest.mark.parametrize(
    ("shapes", "sizes", "first", "later"),
    [
        ([(1, 5, 8)], (1, 256), ["init-1x1", "prefill-1x16", "choose-1x1"], ["step-1x1"]),
        ([(1, 600, 8)], (1, 1024), ["init-1x1", "prefill-1x512", "choose-1x1"], ["step-1x1"]),
        ([(3, 10, 1)], (4, 256), ["init-1x1", "prefill-4x16", "choose-4x1"], []),
        (
            [(1, 5, 1), (9, 5, 8)],
            (16, 256),
            ["init-1x1", "prefill-1x16", "choose-1x1"],
            ["step-16x1"],
        ),
    ],
)
def test_the_programs_for_a_batch(
    shapes: list[tuple[int, int, int]],
    sizes: tuple[int, int],
    first: list[str],
    later: list[str],
):
    found = sizes_for(shapes, Sizes(1, 1, 1), Sizes(1, 16, 2048))
    assert (found.slots, found.context) == sizes
    names = list(map(str, keys_for(shapes, found)))
    assert names[: len(first)] == first
    assert set(later) <= set(names[len(first) :])
    assert (names[len(first) :] == []) == (later == [])


# Which shapes can be requested.


def test_the_default_number_of_new_tokens_is_that_of_generate():
    rules = PromptRules(vocab_size=29, max_positions=100)
    assert read_shapes([(1, 5)], rules) == ((1, 5, 64),)
    assert read_shapes([(1, 99)], rules) == ((1, 99, 1),)
    assert read_shapes([(3, 5, 8), [4, 6, 8]], rules) == ((3, 5, 8), (4, 6, 8))
    assert read_shapes(lambda given: [(1, given.max_positions, 0 + 1)][:0], rules) == ()


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ([(1, 30, 3)], r"exceed the context.*at most 32 tokens.*30 in the prompt \+ 3 new = 33"),
        ([(1, 32)], r"exceed the context.*32 in the prompt \+ 1 new = 33"),
        ((1, 16), r"cannot compile ahead.*key: warm_up.*\(batch, prompt_length\).*found: 1$"),
        ([(0, 16)], r"found: \(0, 16\)"),
        ([(True, 16)], r"found: \(True, 16\)"),
        ([(1, 2, 3, 4)], r"found: \(1, 2, 3, 4\)"),
        (16, r"found: 16"),
        ("1x16", r"found: '1'"),
    ],
)
def test_invalid_shapes_are_rejected_before_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, wanted, words: str
):
    monkeypatch.setattr(Streamer, "run", lambda _: pytest.fail("weights were read"))
    with pytest.raises(UsageError, match=f"(?s){words}"):
        mtj_loader.load(folder, "mp=1", warm_up=wanted)


# During the load.


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Callable[[], object]]]:
    """What runs before programs of some kinds are traced."""
    lower, before = Programs.lower, {}

    def trace(self: Programs, sizes: Sizes, key: Key) -> object:
        if key.kind in before:
            before[key.kind]()
        return lower(self, sizes, key)

    monkeypatch.setattr(Programs, "lower", trace)
    return before


def fail() -> None:
    raise ValueError("out of luck\nand more")


def test_a_failure_is_a_warning_and_the_model_is_usable(folder: Path, lowered):
    lowered["prefill"] = fail
    model = load(folder, "mp=1", warm_up=[(1, 5, 2)])
    what = "program prefill-1x16 could not be compiled ahead"
    assert model.report.warnings == (f"{what}: ValueError: out of luck",)
    assert Key("prefill", 1, 16) not in model.warm
    with pytest.raises(ValueError, match="out of luck"):
        model.generate([5], **GREEDY)
    del lowered["prefill"]
    assert len(model.generate([5], **GREEDY)) == 4


def test_the_load_does_not_wait_for_the_programs_of_later_tokens(folder: Path, lowered):
    released, waited = threading.Event(), []
    lowered["step"] = lambda: waited.append(released.wait(60))
    model = mtj_loader.load(folder, "mp=1", warm_up=[(1, 5, 4)])
    assert not model.compiled.jobs[Key("step", 1)].done()
    tokens = model.stream([5, 6], **GREEDY)
    first = next(tokens)
    released.set()
    whole = [*first, *(token for piece in tokens for token in piece)]
    assert waited
    assert whole == model.generate([5, 6], **GREEDY)


def test_several_hosts_wait_for_everything_and_report_every_failure(folder: Path):
    class Both(Hosts):
        count = 2

        def gather(self, name: str, value: bytes) -> list[bytes]:
            return [value, json.dumps(["step-1x1", "step-4x1"]).encode()]

    ready, failed = Future(), Future()
    ready.set_result(None)
    threading.Timer(0.2, failed.set_exception, [ValueError("out of luck")]).start()
    here = {Key("choose", 1): ready, Key("step", 1): ready, Key("step", 4): failed}
    programs, sizes = load(folder, "mp=1").programs, Sizes(1, 4, 32)
    for key in here:
        programs.put(sizes, key, lambda: lambda: None)
    everything = CompiledPrograms(0.0, 0.0, sizes, here, {})
    compiled = keep_common_programs(programs, everything, Both())
    assert compiled.keys == (Key("step", 1),)
    assert programs.is_ready(sizes, Key("step", 1))
    assert not programs.is_ready(sizes, Key("choose", 1))  # the other host would compile it
    (warning,) = compiled.warnings
    assert warning.endswith("could not be compiled ahead: ValueError: out of luck")


def test_a_failed_load_does_not_wait_for_the_compiler(folder: Path, lowered):
    released, traced = threading.Event(), threading.Event()

    def wait() -> None:
        released.wait(60)
        traced.set()

    lowered["prefill"] = wait
    plan = mtj_loader.plan(folder, "mp=1")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        mtj_loader.load(plan=plan, warm_up=[(1, 5)])
    assert not traced.is_set()
    released.set()
    for thread in threading.enumerate():
        if thread.name.startswith(("mtj_loader_trace", "mtj_loader_compile")):
            thread.join(60)
            assert not thread.is_alive()


def test_threads_switch_more_often_while_tracing(folder: Path, lowered):
    before, meanwhile = sys.getswitchinterval(), []
    lowered["step"] = lambda: meanwhile.append(sys.getswitchinterval())
    load(folder, "mp=1", warm_up=[(1, 5)])
    assert meanwhile == [pytest.approx(before / 10)]
    assert sys.getswitchinterval() == before


# The report.


@pytest.mark.parametrize(
    ("started", "ended", "overlap"), [(10.0, 13.0, 2.0), (10.5, 11.0, 0.5), (12.5, 14.0, 0.0)]
)
def test_the_report_has_the_overlap_of_load_and_compilation(
    folder: Path, started: float, ended: float, overlap: float
):
    report = mtj_loader.load(folder, "mp=1").report
    report = replace(report, seconds=report.seconds | {"load": 2.0})  # from 10 to 12
    found = add_compile_times(report, replace(NO_PROGRAMS, start=started, end=ended), load_end=12.0)
    assert found.seconds["compile"] == ended - started
    assert found.seconds["overlap"] == overlap
    words = f"load 2.00 s, compile {ended - started:.2f} s, overlapping for {overlap:.2f} s"
    assert str(found).splitlines()[1] == words


def test_the_first_token_is_timed_once(folder: Path):
    model = mtj_loader.load(folder, "mp=1")
    assert model.report.seconds["compile"] == model.report.seconds["overlap"] == 0
    assert "\n" not in str(model.report)
    assert "first_token" not in model.report.seconds
    model.generate([5], **GREEDY)
    first = model.report.seconds["first_token"]
    assert first > model.report.seconds["load"]
    assert model.report.start_up.endswith(f"; first token after {first:.2f} s")
    model.generate([5], **GREEDY)
    assert model.report.seconds["first_token"] == first


# The command line.


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The programs that are traced, in order."""
    lower, found = Programs.lower, []

    def trace(self: Programs, sizes: Sizes, key: Key) -> object:
        found.append(f"{key} of {sizes.slots}x{sizes.context}")
        return lower(self, sizes, key)

    monkeypatch.setattr(Programs, "lower", trace)
    return found


def test_load_compiles_the_requested_shapes(folder: Path, asked: list[str]):
    result = run(
        "load", folder, "--mesh", "mp=1", "--warm-up", "1x5+1", "--warm-up=2x17+4", "--json"
    )
    assert len(asked) == len(set(asked)) >= 4  # and more in the background
    assert asked[:3] == [f"{key} of 4x32" for key in ("init-1x1", "prefill-1x16", "choose-1x1")]
    seconds = json.loads(result.stdout)["report"]["seconds"]
    assert 0 < seconds["overlap"] < seconds["compile"]


@pytest.mark.parametrize("text", ["5", "1x", "x5", "1x5+", "1X5", "1x5x6", "-1x5"])
def test_an_invalid_shape_on_the_command_line(folder: Path, text: str):
    result = run("load", folder, f"--warm-up={text}")
    assert result.exit_code == 2
    assert "not a shape\n  key: --warm-up\n  expected: prompts x tokens" in result.stderr
    assert f"found: '{text}'" in result.stderr


def test_generate_compiles_for_its_prompts(folder: Path, asked: list[str]):
    prompts = ["--ids", "1 2 3", "--ids", " ".join(["4"] * 17), "--max-new-tokens", "3"]
    result = run("generate", folder, "--mesh", "mp=1", *prompts, "--json")
    assert len(asked) == len(set(asked))  # nothing is compiled twice, or later
    assert {name.split(" of ")[1] for name in asked} == {"4x32"}
    seconds = json.loads(result.stdout)["seconds"]
    assert 0 < seconds["compile"] < seconds["first_token"]
    assert f"first token after {seconds['first_token']:.2f} s" in result.stderr


@pytest.mark.parametrize("output", [[], ["--json"]])
def test_generate_tokenizes_a_prompt_once(output: list[str], monkeypatch: pytest.MonkeyPatch):
    encode, encoded = Tokenizer.encode, []
    monkeypatch.setattr(
        Tokenizer, "encode", lambda self, text: encoded.append(text) or encode(self, text)
    )
    folder = GOLDENS.parent / "shakespeare-neox"
    prompt = ["--prompt", "To be", "--max-new-tokens", "2", "--temperature", "0"]
    assert run("generate", folder, "--mesh", "mp=1", *prompt, *output).exit_code == 0
    assert encoded == ["To be"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ids", "1 99"], "not a token id of this model"),
        (["--ids", "1", "--max-new-tokens", "0"], "max_new_tokens is out of range"),
        (["--ids", "1", "--top-p", "2"], "top_p is out of range"),
    ],
)
def test_invalid_prompts_are_rejected_before_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
):
    monkeypatch.setattr(Streamer, "run", lambda _: pytest.fail("weights were read"))
    result = run("generate", folder, "--mesh", "mp=1", *arguments)
    assert (result.exit_code, result.stderr.split("\n")[0]) == (2, f"error: {words}")
