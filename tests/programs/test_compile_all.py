"""Compiling several programs at once."""

from __future__ import annotations

import sys
import threading

import jax
import jax.numpy as jnp
import pytest

from mtj_loader.programs import compile_all


def lower(number: int) -> jax.stages.Lowered:
    return jax.jit(lambda x: x + number).lower(jax.ShapeDtypeStruct((2,), jnp.float32))


def test_programs_are_compiled_in_the_order_given():
    tracing, threads = threading.Lock(), set()

    def trace(number: int) -> jax.stages.Lowered:
        assert tracing.acquire(blocking=False)  # one at a time
        threads.add(threading.current_thread().name)
        lowered = lower(number)
        tracing.release()
        return lowered

    programs = {f"p{i}": lambda i=i: trace(i) for i in range(5)}
    compiled = compile_all(programs)
    assert list(compiled) == list(programs)
    assert [float(one(jnp.zeros(2))[0]) for one in compiled.values()] == [0, 1, 2, 3, 4]
    assert len(threads) == 1


def test_an_error_names_its_program_and_ends_the_rest():
    started = []

    def fail() -> jax.stages.Lowered:
        started.append("bad")
        raise ValueError("no")

    def later(number: int) -> jax.stages.Lowered:
        started.append(number)
        return lower(number)

    programs = {"bad": fail} | {f"p{i}": lambda i=i: later(i) for i in range(200)}
    with pytest.raises(ValueError, match="no") as caught:
        compile_all(programs)
    assert caught.value.__notes__ == ["while compiling the program 'bad'"]
    assert len(started) < 200


def test_an_error_is_raised_at_once(monkeypatch):
    started, may_end, ended = (threading.Event() for _ in range(3))

    def fail(lowered: object) -> None:
        assert started.wait(60)
        raise ValueError("no")

    def slow() -> jax.stages.Lowered:
        started.set()
        may_end.wait(60)
        ended.set()
        return lower(1)

    monkeypatch.setattr(sys.modules[compile_all.__module__], "compile_fresh", fail)
    with pytest.raises(ValueError, match="no"):
        compile_all({"bad": lambda: lower(0), "slow": slow})
    assert not ended.is_set()
    may_end.set()


def test_nothing_to_compile():
    assert compile_all({}) == {}
