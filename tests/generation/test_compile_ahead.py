"""Compiling while loading: generation uses the programs, and failures do not wait for them."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import pytest

import mtj_loader
from mtj_loader.distributed.hosts import Hosts
from mtj_loader.errors import CheckpointError, UsageError
from mtj_loader.generation import compile_ahead
from mtj_loader.generation.compile_ahead import (
    CompiledPrograms,
    add_compile_times,
    keep_common_shapes,
    read_shapes,
)
from mtj_loader.generation.prompts import Prompt, PromptRules, Shape, make_batch
from mtj_loader.generation.tokenizer import Tokenizer
from mtj_loader.loading.stream import Streamer
from mtj_loader.models.forward import Forward
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
    wait(model.compiled.steps.values())
    return model


# Generation runs the programs that were compiled ahead.


def test_generation_does_not_compile_warmed_up_shapes(folder: Path):
    model = load(folder, "mp=2", warm_up=[(1, 18, 3)])
    with compilations() as found:
        model.generate([5] * 18, max_new_tokens=3)
        model.generate([5], **GREEDY)
        assert list(model.stream([5, 6, 7], **GREEDY))
        assert found == []
        model.generate([[1], [2]], **GREEDY)  # a shape that was not requested
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


def test_a_larger_shape_gives_the_same_text(folder: Path):
    cold = load(folder, "mp=2", dtype="float32")
    warm = load(folder, "mp=2", dtype="float32", warm_up=[(1, 20, 12)])
    assert warm.warm == (Shape(1, 32, 32),)
    for sampling in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 3}):
        expected = cold.generate([3, 1, 4], max_new_tokens=9, **sampling)
        assert warm.generate([3, 1, 4], max_new_tokens=9, **sampling) == expected


def test_the_smallest_compiled_shape_that_can_hold_the_batch_is_used():
    warm = [Shape(1, 64, 128), Shape(1, 32, 64), Shape(2, 32, 32)]

    def shape(length: int, new: int, rows: int = 1) -> Shape:
        prompts = [Prompt((7,) * length, is_text=False)] * rows
        batch = make_batch(prompts, new, max_positions=512, dp=1, compiled=warm)
        assert batch.totals.tolist() == [length + new] * rows
        assert (batch.ids[:, :length] == 7).all()
        assert not batch.ids[:, length:].any()
        return Shape(*batch.ids.shape, batch.cache_length)

    assert shape(3, 5) == Shape(1, 32, 64)
    assert shape(32, 32) == Shape(1, 32, 64)
    assert shape(33, 5) == Shape(1, 64, 128)
    assert shape(3, 120) == Shape(1, 64, 128)  # its cache is long enough
    assert shape(3, 126) == Shape(1, 16, 256)  # no cache is long enough
    assert shape(65, 5) == Shape(1, 128, 128)  # no other shape has room for the prompt
    assert shape(3, 5, rows=2) == Shape(2, 32, 32)
    assert shape(3, 5, rows=3) == Shape(3, 16, 16)  # rows are never added


# Which shapes can be requested.


def test_the_default_number_of_new_tokens_is_that_of_generate():
    rules = PromptRules(vocab_size=29, max_positions=100)
    assert read_shapes([(1, 5)], rules, dp=1) == (Shape(1, 16, 100),)  # 5 + 64 tokens
    assert read_shapes([(1, 99)], rules, dp=1) == (Shape(1, 100, 100),)
    assert read_shapes([(3, 5, 8), [4, 6, 8]], rules, dp=2) == (Shape(4, 16, 16),)
    assert read_shapes(lambda given: [(1, given.max_positions, 0 + 1)][:0], rules, dp=1) == ()


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


def test_a_failure_is_a_warning_and_the_model_is_usable(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise ValueError("out of luck\nand more")

    monkeypatch.setattr(Forward, "lower_prefill", fail)
    model = mtj_loader.load(folder, "mp=1", warm_up=[(2, 5, 2)])
    what = "a batch of 2 prompts of up to 16 tokens could not be compiled ahead"
    assert model.report.warnings == (f"{what}: ValueError: out of luck",)
    assert (model.warm, len(model.params)) == ((), 15)


def test_the_load_does_not_wait_for_the_programs_of_later_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    released = threading.Event()
    lower, step, stepped = Forward.lower_step, Forward.step, []

    def trace(*given: object) -> object:
        released.wait(60)
        return lower(*given)

    monkeypatch.setattr(Forward, "lower_step", trace)
    monkeypatch.setattr(
        Forward, "step", lambda *given: stepped.append(released.is_set()) or step(*given)
    )
    model = mtj_loader.load(folder, "mp=1", warm_up=[(1, 5, 4)])
    assert model.warm == (Shape(1, 16, 16),)
    tokens = model.stream([5, 6], **GREEDY)
    first = next(tokens)
    threading.Timer(0.5, released.set).start()
    whole = [*first, *(token for piece in tokens for token in piece)]
    assert stepped == [True] * 3  # the stream waited for it
    assert whole == model.generate([5, 6], **GREEDY)


def test_a_shape_whose_step_cannot_be_compiled_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise ValueError("out of luck")

    monkeypatch.setattr(Forward, "lower_step", fail)
    model = load(folder, "mp=1", warm_up=[(1, 20, 4)])
    assert model.warm == ()
    assert model.generate([5], **GREEDY) == mtj_loader.load(folder, "mp=1").generate([5], **GREEDY)


def test_several_hosts_wait_for_everything_and_report_every_failure():
    class Both(Hosts):
        count = 2

        def gather(self, name: str, value: bytes) -> list[bytes]:
            return [value, json.dumps([[1, 16, 32], [1, 16, 64]]).encode()]

    ready, failed = Future(), Future()
    ready.set_result(1.0)
    threading.Timer(0.2, failed.set_exception, [ValueError("out of luck")]).start()
    here = {Shape(1, 16, 16): ready, Shape(1, 16, 32): ready, Shape(1, 16, 64): failed}
    compiled = keep_common_shapes(CompiledPrograms(0.0, 0.0, here, {}), Both())
    assert compiled.shapes == (Shape(1, 16, 32),)
    (warning,) = compiled.warnings
    assert warning.endswith("could not be compiled ahead: ValueError: out of luck")


def test_a_failed_load_does_not_wait_for_the_compiler(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    released, compiled = threading.Event(), threading.Event()

    def compile_slowly(_: object) -> float:
        released.wait(60)
        compiled.set()
        return 0.0

    monkeypatch.setattr(compile_ahead, "_compile", compile_slowly)
    plan = mtj_loader.plan(folder, "mp=1")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        mtj_loader.load(plan=plan, warm_up=[(1, 5)])
    assert not compiled.is_set()
    released.set()
    for thread in threading.enumerate():
        if thread.name.startswith(("mtj_loader_trace", "mtj_loader_compile")):
            thread.join(60)
            assert not thread.is_alive()


def test_threads_switch_more_often_while_tracing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    before, meanwhile = sys.getswitchinterval(), []

    lower = Forward.lower_step

    def trace(*given: object) -> object:
        meanwhile.append(sys.getswitchinterval())
        return lower(*given)

    monkeypatch.setattr(Forward, "lower_step", trace)
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
    found = add_compile_times(report, CompiledPrograms(started, ended, {}, {}), load_end=12.0)
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
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """The shapes that programs are made for, in order."""
    found: list[Shape] = []
    made = compile_ahead.Programs
    monkeypatch.setattr(
        compile_ahead, "Programs", lambda *given: found.append(given[-1]) or made(*given)
    )
    return found


def test_load_compiles_the_requested_shapes(folder: Path, asked: list[Shape]):
    result = run(
        "load", folder, "--mesh", "mp=1", "--warm-up", "1x5+3", "--warm-up=2x17+4", "--json"
    )
    assert asked == [Shape(1, 16, 16), Shape(2, 32, 32)]
    seconds = json.loads(result.stdout)["report"]["seconds"]
    assert 0 < seconds["overlap"] < seconds["compile"]


@pytest.mark.parametrize("text", ["5", "1x", "x5", "1x5+", "1X5", "1x5x6", "-1x5"])
def test_an_invalid_shape_on_the_command_line(folder: Path, text: str):
    result = run("load", folder, f"--warm-up={text}")
    assert result.exit_code == 2
    assert "not a shape\n  key: --warm-up\n  expected: prompts x tokens" in result.stderr
    assert f"found: '{text}'" in result.stderr


def test_generate_compiles_for_its_prompts(folder: Path, asked: list[Shape]):
    prompts = ["--ids", "1 2 3", "--ids", " ".join(["4"] * 17), "--max-new-tokens", "3"]
    result = run("generate", folder, "--mesh", "mp=1", *prompts, "--json")
    assert asked == [Shape(2, 32, 32)]
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
